"""From what somebody typed to a command: reading flags, and errors of one line with a suggestion."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Union, get_type_hints

import tyro

from mtrl_vec.commands.arguments import COMMANDS, ProfileCommand, TrainCommand
from mtrl_vec.config import PRESETS, TrainConfig
from mtrl_vec.errors import InputError

PROG = "mtrl-vec" if Path(sys.argv[0]).stem == "mtrl-vec" else "python -m mtrl_vec"
"""How this program was called."""
RENAMED = {
    "--schedule": "--task-sampling",
    "--share-floor": "--min-task-prob (with difficulty: --min-task-weight)",
    "--balance": "--gradient-method",
    "--relative-inputs": "--relative-features",
    "--no-relative-inputs": "--no-relative-features",
}
"""Flags of earlier versions, and what they are called now."""


def parse(arguments: Sequence[str], resumed: TrainConfig | None = None) -> Any:
    """The command, one of `mtrl_vec.commands.arguments.COMMANDS`, that arguments mean.

    Args:
        arguments: name of the command and its flags.
        resumed: defaults of ``train`` in place of a preset's.

    Raises:
        InputError: they make no sense. The message is one line.
        SystemExit: after showing the help that they ask for.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        fix = f"did you mean {close[0]}?" if close else f"known commands are {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {arguments[0]!r}: {fix}")
    for flag in (argument.partition("=")[0].replace("_", "-") for argument in arguments):
        if flag in RENAMED:
            raise InputError(f"{flag} is now called {RENAMED[flag]}")
    preset = peek("--preset", arguments) or "cpu"
    config = resumed or PRESETS.get(preset, PRESETS["cpu"])
    defaults: dict[str, Any] = {
        "train": TrainCommand.of(config, preset=preset if preset in PRESETS else "cpu"),
        "profile": ProfileCommand.of(config, preset=preset if preset in PRESETS else "cpu"),
    }
    commands = [
        Annotated[cls, tyro.conf.subcommand(name, **({"default": defaults[name]} if name in defaults else {}))]
        for name, cls in COMMANDS.items()
    ]
    return _parse(commands, arguments)


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that flags of ``train`` mean. Raises InputError where they make no sense."""
    return parse(["train", *arguments]).config()


def peek(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of a flag that decides what the defaults of others are; the last one, and None if there is none."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else following
    return None if found is None or found.startswith("--") else found


_REGISTRY = tyro.constructors.ConstructorRegistry()
_FACTORS = {"k": 10**3, "M": 10**6, "G": 10**9}


def whole_number(text: str) -> int:
    """What ``2000000``, ``2_000_000``, ``2e6`` and ``2M`` mean. Raises ValueError."""
    number, factor = (text[:-1], _FACTORS[text[-1]]) if text[-1:] in _FACTORS else (text, 1)
    try:
        value = Decimal(number) * factor
    except ArithmeticError as error:
        raise ValueError(f"{text!r} is not a number") from error
    if not value.is_finite() or value.adjusted() > 30 or value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


@_REGISTRY.primitive_rule
def _whole_numbers(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """How tyro reads all integers."""
    if type_info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda texts: whole_number(texts[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _flags_of(command: type) -> Iterator[str]:
    """All flags of a command, those of its groups too."""
    hints, full = get_type_hints(command), get_type_hints(command, include_extras=True)
    for one in dataclasses.fields(command):
        if tyro.conf.Positional in getattr(full[one.name], "__metadata__", ()):
            continue
        if dataclasses.is_dataclass(hints[one.name]):
            yield from _flags_of(hints[one.name])
        else:
            name = one.name.replace("_", "-")
            yield from [f"--{name}", *([f"--no-{name}"] if hints[one.name] is bool else [])]


def _suggestion(message: str, command: str) -> str:
    """The flag that an unknown one was perhaps meant to be."""
    match = re.match(r"Unrecognized (?:or misplaced )?options: (--[\w-]+)", message)
    close = difflib.get_close_matches(match[1], _flags_of(COMMANDS[command]), n=1, cutoff=0.75) if match else []
    return f": did you mean {close[0]}?" if close else ""


def _parse(commands: list[Any], arguments: Sequence[str]) -> Any:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            union: Any = Union[tuple(commands)]  # noqa: UP007  (made at run time)
            return tyro.cli(
                union,
                args=list(arguments),
                prog=PROG,
                description="Fast multi-task reinforcement learning on Meta-World. Errors are one line; with --debug "
                "they come with a traceback.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                registry=_REGISTRY,
            )
    except SystemExit as end:
        if not end.code:
            raise
        named = [arguments[0]] if arguments and arguments[0] in COMMANDS else []
        message = _first_part(box.getvalue())
        fix = (_suggestion(message, named[0]) if named else "") or f": see {' '.join([PROG, *named])} --help"
        raise InputError(f"{message}{fix}") from end


def _first_part(box: str) -> str:
    """What tyro says in the first part of the box that it draws around a message and its explanations."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:-1]]  # without the title and the bottom
    texts = itertools.dropwhile(_is_rule, lines)
    return " ".join(itertools.takewhile(lambda line: not _is_rule(line), texts)).removesuffix(".") or "cannot be read"


def _is_rule(line: str) -> bool:
    return not line.strip("─-+ ")
