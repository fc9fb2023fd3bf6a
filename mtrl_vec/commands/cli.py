"""``python -m mtrl_vec``: runs the command that was typed."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from mtrl_vec.commands import arguments as flags
from mtrl_vec.commands.parsing import parse
from mtrl_vec.errors import InputError, RunFailed, tell
from mtrl_vec.processes import num_ranks

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
WAIT_SECONDS = 10.0
"""How long a rank waits for the one that shows an error: torchrun ends all ranks of a node once one has failed, and the
one that shows it may be late. On nodes without it this delays the end."""
SPINS = "10000"
"""How often an OpenMP thread of GNU's library looks for work before it sleeps, 300,000 times by default. Beside other
busy processes spinning takes their cores, and updates take several times as long. Passive waiting is slow on idle
cores."""


def run(arguments: Sequence[str]) -> None:
    """Run a command. Its modules are imported only now, so that ``--help`` is quick."""
    if arguments[:1] == ["train"]:
        from mtrl_vec.commands.train import train

        train(arguments)
        return
    if num_ranks() > 1 and arguments:
        error = InputError(f"torchrun is for train alone: run {arguments[0]} in one process")
        error.shown_elsewhere = os.environ["RANK"] != "0"
        raise error
    command = parse(arguments)
    if isinstance(command, flags.ProfileCommand):
        from mtrl_vec.commands.profile import profile

        profile(command, arguments)
    else:
        module, function = _FUNCTIONS[type(command)]
        getattr(importlib.import_module(f"mtrl_vec.commands.{module}"), function)(command)


_FUNCTIONS = {
    flags.EvalCommand: ("evaluate", "evaluate_checkpoints"),
    flags.PlotCommand: ("plot", "plot"),
    flags.VideoCommand: ("video", "video"),
    flags.ExportCommand: ("export", "export"),
    flags.PushCommand: ("push", "push"),
    flags.RecordCommand: ("record", "record"),
    flags.DoctorCommand: ("doctor", "doctor"),
}
"""Module and function of the commands that need nothing but their flags."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # before torch is imported
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send counts as Ctrl-C
    try:
        run(arguments)
    except (InputError, RunFailed) as error:
        if debug:
            traceback.print_exc()
        if not error.shown_elsewhere:
            tell(f"error: {error}")
        else:
            with contextlib.suppress(KeyboardInterrupt):  # SIGTERM of torchrun
                time.sleep(WAIT_SECONDS)
        return EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0
