"""Several ranks against one process: iteration by iteration from the same checkpoint, and when some of them are lost.

Rounding differs, as sums are added up in another order, and grows from one iteration to the next (as it does between
one thread and two). So what has to be equal is one iteration from the same state.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from helpers import SMALL, assert_same, tiny_config
from mtrl_vec.errors import InputError, RunFailed
from mtrl_vec.policy.checkpoint import checkpoints, load_checkpoint
from mtrl_vec.ranks import ALONE, Ranks, require_same
from mtrl_vec.torchrun import join, launch_id
from mtrl_vec.train import Trainer
from mtrl_vec.train.resolve import resolve
from mtrl_vec.train.run_dir import run_of_this_launch
from processes import still_running, workers_of
from runs import metrics, train_until_interrupted, whole_state

pytestmark = pytest.mark.xdist_group("ranks")  # in one process, since they share what takes long
SLOW = pytest.mark.slow

ITERATION = 384
RUN = {
    "num_envs": 96,
    "num_steps": 4,
    "max_episode_steps": 9,
    "eval_interval": ITERATION,
    "eval_episodes": 3,
    "checkpoint_seconds": 0.0,
}
"""Short episodes, evaluations and a checkpoint in every iteration: all of it is part of what is compared.

Many environments for few steps: products of three rows or fewer, those of a task on a rank, are rounded differently
from those of more.
"""

CONFIGS = {
    "default": {},
    "pcgrad": {"gradient_method": "pcgrad"},
    "cagrad": {"gradient_method": "cagrad", "popart": False, "entropy_coeff": 0.01},
    "overlap": {"overlap": True, "log_gradients": True, "per_task_advantage": False, "direct_features": True},
    "halves in turn": {"double_buffer": True},
    "five minibatches": {"num_minibatches": 5, "sampling": "uniform", "learn_std": False},  # of 76: not equal parts
    **{f"sampling {name}": {"sampling": name} for name in ("random", "curriculum", "difficulty", "progress", "meta")},
}

FAST = ("default", "cagrad", "overlap", "sampling meta")
"""Those that are compared in every run of the tests."""

ROUNDED = ("policy", "learner", "acting", "task_sampling")
"""Parts of a checkpoint in which sums over the ranks end up; but not all of them."""
EXACT_PARTS = ("progress", "rollouts", "statistics", "evaluation")
EXACT_ENTRIES = (("learner", "minibatch_order"), ("learner", "reward_scale", "count"), ("acting", "noise"))


PROGRAM = Path(__file__).with_name("rank_program.py")
TRAIN = ["-m", "mtrl_vec", "train", *SMALL]


def torchrun(
    *command: object, ranks: int = 2, options: Sequence[str] = ("--standalone",), **environment: str
) -> subprocess.Popen:
    """Start ranks on this machine, with a thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*launch, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen, seconds: float = 120) -> tuple[str, list[str]]:
    """What it prints, and what our program says on stderr; killed if it takes too long."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=60)
        pytest.fail(f"still running after {seconds} s: {out}{err}")
    print(out, err)  # shown where a test fails
    return out, [line for line in err.splitlines() if line.startswith(("error:", "interrupted:"))]


def wait_for_iterations(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) <= count:
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Its ranks, in their order."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "RANK" in c.environ()), key=lambda c: int(c.environ()["RANK"]))


def simulators_of(rank: psutil.Process) -> list[int]:
    return workers_of(rank.children(recursive=True))


def largest_difference(one: object, other: object) -> float:
    """Over all numbers in nested dictionaries of tensors, which have to be the same but for their values.

    Of numbers above 1 relative to them.
    """
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        return max((largest_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float):
        one, other = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    if not isinstance(one, torch.Tensor):
        assert one == other
        return 0.0
    assert one.shape == other.shape and one.dtype == other.dtype
    if not one.numel():
        return 0.0
    assert torch.equal(one.isnan(), other.isnan())
    gaps = (one.double() - other.double()).abs() / other.double().abs().clamp(min=1.0)
    return float(gaps.nan_to_num(0.0).max())


def assert_same_but_for_rounding(one: Path, other: Path) -> None:
    state, expected = whole_state(one), whole_state(other)
    for part in ROUNDED:
        assert largest_difference(state[part], expected[part]) < 1e-6, part
    for part in EXACT_PARTS:
        assert largest_difference(state[part], expected[part]) == 0, part
    for path in EXACT_ENTRIES:
        mine, theirs = state, expected
        for key in path:
            mine, theirs = mine[key], theirs[key]
        assert largest_difference(mine, theirs) == 0, path


def first_iteration(folder: Path, **changes: object) -> Path:
    """One iteration of a longer run on one process: with ``overlap``, the next rollout is there already."""
    train_until_interrupted(folder, 1, num_workers=2, **RUN | {"total_frames": 3 * ITERATION} | changes)
    return folder


@pytest.fixture(scope="module")
def continued(tmp_path_factory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Folders of runs after one iteration, and after the second one: by one process, and by two ranks, from the same
    checkpoint. By the name of a configuration; those that are fast are made together, and so are the others."""

    @functools.cache
    def made(names: tuple[str, ...]) -> tuple[Path, Path, Path]:
        first, one, two = (tmp_path_factory.mktemp(name) for name in ("first", "one", "two"))
        for name in names:
            first_iteration(first / name, **CONFIGS[name])
            shutil.copytree(first / name, one / name)
            shutil.copytree(first / name, two / name)
        process = torchrun(PROGRAM, *(f"{2 * ITERATION}:{two / name}" for name in names))
        for name in names:
            Trainer.resume(one / name, total_frames=2 * ITERATION).train()
        assert output_of(process, 300)[1] == [] and process.returncode == 0
        return first, one, two

    return lambda name: made(FAST if name in FAST else tuple(config for config in CONFIGS if config not in FAST))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else SLOW) for name in CONFIGS])
def test_two_ranks_learn_as_one_process(name, continued) -> None:
    _, one, two = continued(name)
    assert_same_but_for_rounding(two / name, one / name)
    assert [row["iteration"] for row in metrics(two / name)] == ["1", "2"]
    for column, value in metrics(one / name)[1].items():
        assert float(metrics(two / name)[1][column]) == pytest.approx(float(value), rel=1e-4, abs=1e-5, nan_ok=True)


@SLOW
def test_any_number_of_ranks_continues_a_run(continued, tmp_path) -> None:
    """Three ranks what one process began; one process, and three ranks, what two ranks went on with."""
    first, one, two = continued("default")
    for name, folder in {"third": two / "default", "alone": two / "default", "three": first / "default"}.items():
        shutil.copytree(folder, tmp_path / name)
    process = torchrun(
        *(PROGRAM, f"{3 * ITERATION}:{tmp_path / 'third'}", f"{2 * ITERATION}:{tmp_path / 'three'}"), ranks=3
    )
    Trainer.resume(tmp_path / "alone", total_frames=3 * ITERATION).train()
    assert output_of(process)[1] == [] and process.returncode == 0
    assert_same_but_for_rounding(tmp_path / "third", tmp_path / "alone")
    assert_same_but_for_rounding(tmp_path / "three", one / "default")


@SLOW
def test_compiled_ranks_learn_as_a_compiled_process(tmp_path) -> None:
    """Sums over the ranks are part of the one graph that the advantages are compiled to."""
    one = first_iteration(tmp_path / "one", compile="on")
    two = shutil.copytree(one, tmp_path / "two")
    process = torchrun(PROGRAM, f"{2 * ITERATION}:{two}")
    Trainer.resume(one, total_frames=2 * ITERATION).train()
    assert output_of(process, 500)[1] == [] and process.returncode == 0
    assert_same_but_for_rounding(two, one)


LONG = [
    "--total-frames",
    str(30 * 192),
    "--checkpoint-seconds",
    "0.2",
    "--num-workers",
    "1",
    "--max-episode-steps",
    "20",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = torchrun(*TRAIN, *LONG, "--run-dir", folder)
    assert output_of(process)[1] == [] and process.returncode == 0
    return folder


@SLOW
def test_a_simulator_that_dies_on_one_rank_changes_nothing(undisturbed, tmp_path) -> None:
    process = torchrun(*TRAIN, *LONG, "--run-dir", tmp_path / "run")
    wait_for_iterations(tmp_path / "run", 4)
    os.kill(simulators_of(ranks_of(process)[1])[0], signal.SIGKILL)
    assert output_of(process)[1] == [] and process.returncode == 0
    assert "(rank 1); continuing after" in (tmp_path / "run" / "events.log").read_text()
    assert_same(whole_state(tmp_path / "run"), whole_state(undisturbed))


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_changes_nothing(rank, undisturbed, tmp_path) -> None:
    """torchrun starts all ranks again, and they continue where the first had saved."""
    process = torchrun(*TRAIN, *LONG, "--run-dir", tmp_path / "run", options=["--standalone", "--max-restarts=1"])
    wait_for_iterations(tmp_path / "run", 4)
    ranks_of(process)[rank].kill()
    out, _ = output_of(process)
    assert process.returncode == 0 and "continuing with" in out
    assert_same(whole_state(tmp_path / "run"), whole_state(undisturbed))


@SLOW
def test_so_does_one_whose_rollouts_overlap_with_learning(tmp_path) -> None:
    """The rollouts that are ahead are gathered, and spread again."""
    flags = [*TRAIN, *LONG, "--overlap", "--total-frames", str(100 * 192)]
    undisturbed = torchrun(*flags, "--run-dir", tmp_path / "undisturbed")
    assert output_of(undisturbed)[1] == [] and undisturbed.returncode == 0
    process = torchrun(*flags, "--run-dir", tmp_path / "run", options=["--standalone", "--max-restarts=1"])
    wait_for_iterations(tmp_path / "run", 6)
    ranks_of(process)[1].kill()
    output_of(process)
    assert process.returncode == 0
    assert_same(whole_state(tmp_path / "run"), whole_state(tmp_path / "undisturbed"))


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["torchrun", "rank 0", "rank 1"])
def test_a_signal_ends_all_ranks_and_saves(number, whom, tmp_path) -> None:
    process = torchrun(*TRAIN, *LONG, "--total-frames", "200000", "--run-dir", tmp_path / "run")
    wait_for_iterations(tmp_path / "run", 4)
    everything = psutil.Process(process.pid).children(recursive=True)
    pid = process.pid if whom == "torchrun" else ranks_of(process)[int(whom[-1])].pid
    os.kill(pid, number)
    _, errors = output_of(process, 60)
    assert len(errors) == 1 and "frames saved in" in errors[0]
    assert still_running(everything) == []
    state = load_checkpoint(checkpoints(tmp_path / "run")[0])
    assert state["progress"]["iteration"] >= 3
    Trainer.resume(tmp_path / "run", total_frames=state["frames"] + 192).train()  # what one rank saved is whole


@SLOW
def test_a_run_goes_on_where_a_node_is_lost(tmp_path) -> None:
    """Two nodes of one rank each, on this machine; the second is killed, with all that it started."""
    options = ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29533", "--rdzv-id=two-nodes"]
    options.append("--max-restarts=3")
    nodes = [
        torchrun(
            *(*TRAIN, *LONG, "--run-dir", tmp_path / "run"),
            ranks=1,
            options=[*options, f"--rdzv-conf=is_host={int(node == 0)},last_call_timeout=5"],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for node in range(2)
    ]
    wait_for_iterations(tmp_path / "run", 4)
    lost = [psutil.Process(nodes[1].pid), *psutil.Process(nodes[1].pid).children(recursive=True)]
    for process in lost:
        process.kill()
    out, _ = output_of(nodes[0])
    assert nodes[0].returncode == 0
    assert "2 ranks with 1 simulator process each" in out and "continuing with" in out
    assert load_checkpoint(checkpoints(tmp_path / "run")[0])["frames"] == 30 * 192


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("{train} --num-envs 13 --run-dir run", "num_envs is 13: it must be a multiple of the 2 ranks"),
        pytest.param("{train} --seed $((RANK + 1)) --run-dir run", "seed is 2, but 1 on the first rank", marks=SLOW),
        pytest.param(
            "mkdir $RANK; cd $RANK; {train} --run-dir run", "choose a --run-dir that all nodes share", marks=SLOW
        ),
        pytest.param("{train} --num-envs many", "see python -m mtrl_vec train --help", marks=SLOW),
        pytest.param(  # the first rank, which shows it, is late
            "sleep $((2 - 2 * RANK)); python -m mtrl_vec eval pretrained", "torchrun is for train alone", marks=SLOW
        ),
    ],
)
def test_bad_input_is_one_line_and_ends_every_rank(command, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    train = shlex.join(["python", *TRAIN])
    process = torchrun("--no-python", "bash", "-c", command.format(train=train))
    _, errors = output_of(process, 60)
    assert len(errors) == 1 and message in errors[0], errors
    assert process.returncode != 0 and not list(tmp_path.glob("**/checkpoint-*"))


NAN_ON_RANK_1 = """
import os, sys
from mtrl_vec.commands.cli import main
from mtrl_vec.learn.ppo import PPO

add_advantages = PPO.add_advantages

def broken(ppo, data):
    metrics = add_advantages(ppo, data)
    data["advantage"][data["task_idx"] == 1] = float("nan")
    return metrics

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        PPO.add_advantages = broken
    sys.exit(main())
"""


@SLOW
def test_numbers_that_are_not_finite_on_one_rank_are_diagnosed_by_the_first(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(NAN_ON_RANK_1)
    flags = [*TRAIN[2:], "--task-sampling", "uniform", "--max-skipped-updates", "2", "--num-workers", "1"]
    process = torchrun(program, *flags, "--total-frames", "1920", "--run-dir", tmp_path / "run")
    _, errors = output_of(process)
    assert process.returncode != 0 and len(errors) == 1
    assert "not finite is advantage of push-v3" in errors[0]
    frames = load_checkpoint(tmp_path / "run" / "diverged.pt")["minibatch"]
    assert len(frames["task_idx"]) == 96  # of both ranks
    broken = frames["advantage"].isnan().squeeze(-1)
    assert broken.any() and (frames["task_idx"][broken] == 1).all() and not broken[frames["task_idx"] == 1].all()


@pytest.mark.parametrize(
    ("own_store", "name", "message"),
    [
        (None, "my-run", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1"),
        ("0", "my-run", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1"),
        ("1", "none", "give every torchrun the same --rdzv-id"),
    ],
)
def test_several_nodes_need_a_store_and_a_name(own_store, name, message, monkeypatch) -> None:
    variables = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": name}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    if own_store is not None:
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", own_store)
    with pytest.raises(InputError, match=message):
        join("cpu")


def test_world_size_alone_is_not_torchrun(monkeypatch) -> None:
    """Clusters set it as well."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert join("cpu") is ALONE and launch_id() is None


def test_a_launch_continues_its_own_run_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    Trainer(tiny_config(run_dir=tmp_path / "other", num_workers=1)).train()
    assert not (tmp_path / "other" / "launch.id").exists()  # it is complete
    trainer = Trainer(tiny_config(run_dir=tmp_path / "mine", num_workers=1))
    assert run_of_this_launch(tmp_path / "mine") == tmp_path / "mine"
    assert run_of_this_launch(tmp_path / "other") is None
    (tmp_path / "mine" / "best.pt").write_bytes(b"a policy")
    with pytest.raises(InputError, match="has a policy, but no checkpoint to continue from"):
        run_of_this_launch(tmp_path / "mine")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert run_of_this_launch(tmp_path / "mine") is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert run_of_this_launch(tmp_path / "mine") is None
    trainer.lock.release()


def test_ranks_that_have_drifted_apart_end_the_run() -> None:
    weights = [torch.randn(3, 4), torch.tensor(0.5)]

    class Three(Ranks):
        size = 3

        def __init__(self, *others: list[torch.Tensor]) -> None:
            self.others = others

        def rows(self, tensor: torch.Tensor) -> torch.Tensor:
            found = []
            for other in self.others:  # what they would send
                alone = Three()
                alone.rows = lambda sent: (found.append(sent), sent)[1]
                require_same(other, alone)
            return torch.cat([tensor, *found])

    copies = [[tensor.clone() for tensor in weights] for _ in range(2)]
    require_same(weights, Three(*copies))
    copies[1][0][2, 3] = torch.nextafter(weights[0][2, 3], torch.tensor(9.0))  # the smallest step there is
    with pytest.raises(RunFailed, match="the policy of rank 2 is no longer that of rank 0"):
        require_same(weights, Three(*copies))


def test_every_rank_needs_an_episode_to_evaluate() -> None:
    group = Ranks()
    group.size = 6
    with pytest.raises(InputError, match="eval_episodes is 1: 6 ranks need at least 2 per task"):
        resolve(tiny_config(eval_episodes=1, eval_interval=192), group)
    resolve(tiny_config(eval_episodes=2, eval_interval=192), group)
    resolve(tiny_config(eval_episodes=1, eval_interval=0), group)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_are_even_and_leave_nothing_out(size) -> None:
    group = Ranks()
    group.size = size
    parts: list[list[int]] = []
    for group.rank in range(size):
        parts.append(list(range(13))[group.part(13)])
    assert [row for part in parts for row in part] == list(range(13))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
