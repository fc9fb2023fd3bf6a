"""Recorded demonstrations: read back by the documented schema, and replayed in the real Meta-World."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from metaworld_oracle import make_env, set_vector
from mtrl_vec.commands import dataset as dataset_module
from mtrl_vec.commands.cli import main
from mtrl_vec.commands.record import play
from mtrl_vec.policy import load_policy
from mtrl_vec.sim import SimBatch
from mtrl_vec.tasks.suite import resolve_tasks

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

pytestmark = pytest.mark.xdist_group("record")  # in one process, since they share a dataset

IMAGE = "observation.image"
EPISODES, SEED = 2, 3
TASKS = ["push-v3", "reach-v3"]


def can_draw() -> bool:
    code = "from mtrl_vec.commands.stage import choose_gl; choose_gl()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two episodes of two tasks of `pretrained`, with pictures where something can draw."""
    folder = tmp_path_factory.mktemp("record") / "demonstrations"
    size = 64 if can_draw() else 0
    arguments = ["--episodes", str(EPISODES), "--seed", str(SEED), "--image-size", str(size), "--out", str(folder)]
    command = [sys.executable, "-m", "mtrl_vec", "record", "pretrained", "--tasks", "push", "reach", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "wrote" in result.stdout and "4 episodes" in result.stdout
    return folder


def frames_of(folder) -> dict[str, np.ndarray]:
    """All frames, in the order of the files."""
    tables = [parquet.read_table(file) for file in sorted((folder / "data").glob("*/*.parquet"))]
    return {
        name: np.concatenate([np.array(table[name].to_pylist()) for table in tables]) for name in tables[0].column_names
    }


def episodes_of(folder) -> list[dict]:
    return parquet.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def test_the_tables_agree_with_the_description(dataset) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    frames, episodes = frames_of(dataset), episodes_of(dataset)
    tasks = parquet.read_table(dataset / "meta/tasks.parquet").to_pylist()
    assert info["codebase_version"] == "v3.0" and info["fps"] == 80
    assert [(row["task"], row["task_index"]) for row in tasks] == [(task, k) for k, task in enumerate(TASKS)]
    assert info["total_episodes"] == len(episodes) == 4 and info["total_tasks"] == 2
    assert info["splits"] == {"train": "0:4"}
    assert info["total_frames"] == len(frames["index"]) and frames["index"].tolist() == list(
        range(info["total_frames"])
    )
    columns = {name: feature for name, feature in info["features"].items() if feature["dtype"] != "video"}
    assert set(columns) == set(frames)
    table = parquet.read_table(dataset / info["data_path"].format(chunk_index=0, file_index=0))
    for name, feature in columns.items():
        assert list(frames[name].shape[1:]) == ([] if feature["shape"] == [1] else feature["shape"])
        assert feature["dtype"].replace("float32", "float") in str(table.schema.field(name).type)
        assert feature["names"] is None or len(feature["names"]) == feature["shape"][0]


def test_episodes_cut_the_frames(dataset) -> None:
    frames = frames_of(dataset)
    for number, episode in enumerate(episodes_of(dataset)):
        rows = slice(episode["dataset_from_index"], episode["dataset_to_index"])
        n = episode["length"]
        k = TASKS.index(episode["tasks"][0])
        assert rows.stop - rows.start == n and episode["episode_index"] == number
        assert set(frames["episode_index"][rows]) == {number} and set(frames["task_index"][rows]) == {k}
        assert episode["data/file_index"] == k
        assert frames["frame_index"][rows].tolist() == list(range(n))
        np.testing.assert_allclose(frames["timestamp"][rows], np.arange(n) / 80, atol=1e-6)
        assert frames["next.done"][rows].tolist() == [False] * (n - 1) + [True]
        np.testing.assert_array_equal(
            frames["observation.state"][rows], frames["observation.environment_state"][rows][:, :4]
        )


def test_statistics_are_those_of_the_frames(dataset) -> None:
    frames = frames_of(dataset)
    whole = json.loads((dataset / "meta/stats.json").read_text())
    for name in ("action", "next.reward", "observation.environment_state", "next.success"):
        values = frames[name].astype(float).reshape(len(frames[name]), -1)
        for of, expected in (("min", values.min(0)), ("max", values.max(0)), ("mean", values.mean(0))):
            np.testing.assert_allclose(whole[name][of], expected, rtol=1e-6)
        np.testing.assert_allclose(whole[name]["std"], values.std(0), rtol=1e-6)
        np.testing.assert_allclose(whole[name]["q90"], np.percentile(values, 90, axis=0), rtol=1e-6)
        assert whole[name]["count"] == [len(values)]
    second = episodes_of(dataset)[1]
    rows = slice(second["dataset_from_index"], second["dataset_to_index"])
    np.testing.assert_allclose(second["stats/action/mean"], frames["action"][rows].mean(0), rtol=1e-5)


def test_meta_world_sees_the_same_when_the_actions_are_replayed(dataset) -> None:
    """From each episode's own draw; the actions are the policy's, and success ends it ten steps later."""
    frames, policy = frames_of(dataset), load_policy("pretrained")
    for number, episode in enumerate(episodes_of(dataset)):
        (task,) = resolve_tasks(episode["tasks"])
        env = make_env(task.name)
        vector = task.draw.sample(np.random.default_rng((SEED, number % EPISODES)))
        observation = set_vector(env, vector)
        first = None
        for row in range(episode["dataset_from_index"], episode["dataset_to_index"]):
            np.testing.assert_array_equal(frames["observation.environment_state"][row], observation.astype(np.float32))
            action = frames["action"][row].astype(np.float32)
            np.testing.assert_allclose(action, policy(observation, task.name), atol=1e-5)
            observation, reward, _, _, info = env.step(action)
            assert frames["next.reward"][row] == pytest.approx(reward, abs=1e-5)
            assert frames["next.success"][row] == bool(info["success"])
            if info["success"] and first is None:
                first = row
        assert first is not None and episode["dataset_to_index"] == first + 11


def test_every_frame_has_its_picture(dataset) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    if IMAGE not in info["features"]:
        pytest.skip("nothing can draw here")
    described = info["features"][IMAGE]
    assert described["shape"] == [64, 64, 3] and described["info"]["video.fps"] == 80
    for k in range(len(TASKS)):
        path = info["video_path"].format(video_key=IMAGE, chunk_index=0, file_index=k)
        with av.open(str(dataset / path)) as film:
            shown = list(film.decode(video=0))
            assert film.streams.video[0].codec.canonical_name == described["info"]["video.codec"]
        times = np.array([float(frame.pts * frame.time_base) for frame in shown])
        np.testing.assert_allclose(times, np.arange(len(shown)) / 80, atol=1e-4)  # LeRobot's own tolerance
        mine = [episode for episode in episodes_of(dataset) if episode["tasks"] == [TASKS[k]]]
        assert len(shown) == sum(episode["length"] for episode in mine)
        start = 0
        for episode in mine:
            assert episode[f"videos/{IMAGE}/from_timestamp"] == pytest.approx(start / 80)
            start += episode["length"]
            assert episode[f"videos/{IMAGE}/to_timestamp"] == pytest.approx(start / 80)
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in shown[: mine[0]["length"]]]) / 255
        told = {of: np.array(mine[0][f"stats/{IMAGE}/{of}"]) for of in ("mean", "std", "q50", "min")}
        assert all(values.shape == (3, 1, 1) for values in told.values())
        np.testing.assert_allclose(told["mean"][:, 0, 0], pixels.mean((0, 1, 2)), atol=0.02)  # encoding loses a little
        np.testing.assert_allclose(told["std"][:, 0, 0], pixels.std((0, 1, 2)), atol=0.02)
        np.testing.assert_allclose(told["q50"][:, 0, 0], np.median(pixels, axis=(0, 1, 2)), atol=0.02)
        assert mine[0][f"stats/{IMAGE}/count"] == [mine[0]["length"]]
        first, later = (shown[i].to_ndarray(format="rgb24").astype(int) for i in (0, mine[0]["length"] - 1))
        assert np.abs(first - later).max() > 40  # the arm has moved
        again = shown[mine[0]["length"]].to_ndarray(format="rgb24").astype(int)
        assert np.abs(first - again).mean() < np.abs(first - later).mean()  # and is back at the next start


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="lerobot is not installed")
def test_lerobot_reads_it(dataset) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    read, frames = LeRobotDataset("me/demonstrations", root=dataset), frames_of(dataset)
    assert read.num_episodes == 4 and read.num_frames == len(frames["index"]) and read.fps == 80
    row = read[5]
    np.testing.assert_allclose(row["action"].numpy(), frames["action"][5])
    assert row["task"] == TASKS[frames["task_index"][5]] and row["next.success"] == frames["next.success"][5]
    if IMAGE in read.features:
        assert row[IMAGE].shape == (3, 64, 64)


def test_failures_and_bad_input(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [
        "record",
        "pretrained",
        "--tasks",
        "reach",
        "--episodes",
        "1",
        "--image-size",
        "0",
        "--max-episode-steps",
        "2",
    ]
    assert main(quick) == 2  # nobody reaches a goal in two steps
    err = capsys.readouterr().err
    assert "warning: 0 of 3 episodes of reach-v3 succeeded" in err and "nothing to record" in err
    assert list(tmp_path.iterdir()) == []
    assert main([*quick, "--keep-failures", "--out", "some"]) == 0
    assert len(frames_of(tmp_path / "some")["index"]) == 2
    assert not frames_of(tmp_path / "some")["next.success"].any()
    for more, message in (
        (["--out", "some"], "some exists already"),
        (["--episodes", "0"], "episodes is 0"),
        (["--image-size", "65"], "image_size is 65"),
        (["--tasks", "door-open"], "task is 'door-open-v3': this policy was trained on"),
        (["--out", "none/some"], "cannot write none/some (No such file or directory)"),
    ):
        assert main([*quick, *more]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([*quick, "--out", "other"]) == 2
    assert "datasets need pyarrow: pip install 'mtrl_vec[dataset]'" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["some"]


def test_nothing_is_left_of_a_recording_that_fails(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_module.Dataset, "close", full)
    quick = ["record", "pretrained", "--tasks", "reach", "--episodes", "1", "--image-size", "0"]
    assert main(quick) == 2
    assert "cannot write demonstrations (No space left on device)" in capsys.readouterr().err
    assert os.listdir() == []


def test_no_episode_comes_twice() -> None:
    """In a task whose starts are otherwise drawn from a pool, across batches of episodes."""
    policy = load_policy("pretrained")
    (task,) = resolve_tasks(["push"])
    assert not task.settles
    settles = next(task for task in resolve_tasks(["MT50"]) if task.settles)
    first = [
        play(lambda rows, _: np.zeros((len(rows), 4), np.float32), settles, 3, seed=0, first=n, max_episode_steps=1)
        for n in (0, 3)
    ]
    starts = {episode.observation.tobytes() for batch in first for episode, _ in batch}
    assert len(starts) == 6
    again = play(policy, task, 2, seed=0, first=1, max_episode_steps=20)
    alone = play(policy, task, 1, seed=0, first=2, max_episode_steps=20)
    np.testing.assert_allclose(again[1][0].observation, alone[0][0].observation, atol=1e-4)  # its number decides


def test_an_episode_ends_before_its_physics_become_unstable(monkeypatch) -> None:
    real, steps = SimBatch.step, []

    def unstable(sim, action):
        steps.append(1)
        step = real(sim, action)
        return step._replace(unstable=np.array([len(steps) == 4, False]))

    monkeypatch.setattr(SimBatch, "step", unstable)
    (task,) = resolve_tasks(["reach"])
    played = play(load_policy("pretrained"), task, 2, seed=0, first=0, max_episode_steps=8)
    assert [len(episode.action) for episode, _ in played] == [3, 8]
    assert [len(views) for _, views in played] == [3, 8]
