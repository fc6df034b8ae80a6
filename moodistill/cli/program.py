"""The command line: one line and exit code 2 for bad input, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from moodistill.cli import results as cli_results
from moodistill.cli import run as cli_run
from moodistill.cli.options import with_flags
from moodistill.errors import UnfinishedRun, UserError
from moodistill.version import __version__


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: one line.
        add_arguments: adds its options to a parser.
        call: does it.
        examples: arguments of examples, without the program.
        script: the file in `scripts/` that is this command alone, if there is one.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], None]
    examples: tuple[str, ...]
    script: str = ""


COMMANDS: dict[str, Command] = {
    "run": Command(
        "search for a front of smaller networks",
        cli_run.run_arguments,
        cli_run.run_command,
        (
            "--model vgg16 --preset quick",
            "--config settings.toml --seed 1",
            "--config results/mine/run.json --out results/again",
            "--resume results/mine --preset standard",
        ),
        "run_nsga.py",
    ),
    "resume": Command(
        "resume or extend a run",
        cli_run.resume_arguments,
        cli_run.resume_command,
        ("results/mine --preset standard", "results/mine --student s0123 --distill-steps 10000"),
    ),
    "choose": Command(
        "choose a student from a run's front",
        cli_results.choose_arguments,
        cli_results.choose_command,
        ("results/mine --max-latency-ms 2 --min-accuracy 0.85", "results/mine --knee"),
        "choose.py",
    ),
    "export": Command(
        "export a student as a bundle: its ONNX file and what runs it",
        cli_results.export_arguments,
        cli_results.export_command,
        ("results/mine s0042 --out my_student",),
        "export_onnx.py",
    ),
    "report": Command(
        "write report.html, also while the run is going on",
        cli_results.report_arguments,
        cli_results.report_command,
        ("results/mine --watch",),
    ),
    "verify": Command(
        "check an exported bundle",
        cli_results.verify_arguments,
        cli_results.verify_command,
        ("my_student",),
    ),
    "clean": Command(
        "delete files that can be recomputed",
        cli_results.clean_arguments,
        cli_results.clean_command,
        ("results/mine --cache",),
    ),
    "teacher": Command(
        "train a teacher",
        cli_run.teacher_arguments,
        cli_run.teacher_command,
        ("--model resnet18",),
        "train_teacher.py",
    ),
}


def run_tool(name: str, arguments: Sequence[str] | None = None) -> int:
    """One command as a program of its own (the files in `scripts/`); returns the exit code."""
    command = COMMANDS[name]
    program = f"python scripts/{command.script}" if command.script else f"moodistill {name}"
    parser = argparse.ArgumentParser(prog=program, **_description(command, program))
    command.add_arguments(parser)
    return _call(command.call, parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """The `moodistill` program with its subcommands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="moodistill")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        described = _description(command, f"moodistill {name}")
        command.add_arguments(commands.add_parser(name, help=command.help, **described))
    parsed = parser.parse_args(arguments)
    return _call(COMMANDS[parsed.command].call, parsed)


def _description(command: Command, program: str) -> dict[str, Any]:
    lines = [f"  {program} {words}" for words in command.examples]
    return {
        "description": command.help,
        "epilog": "\n".join(["examples:", *lines]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _call(command: Callable[[argparse.Namespace], None], parsed: argparse.Namespace) -> int:
    _make_streams_safe()
    try:
        with _signals():
            command(parsed)
            sys.stdout.flush()
    except UserError as error:
        return _refuse(_message(error))
    except KeyboardInterrupt:
        _forget_closed_output()
        return 130
    except BrokenPipeError:
        _forget_closed_output()
        return 1
    except OSError as error:
        return _refuse(
            f"{error}; what is stored is kept: check the disk's space and permissions and "
            "call it again (a run: with --resume)"
        )
    return 0


def _make_streams_safe() -> None:
    """Let a name that the terminal cannot show, or a stream that is closed, end nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _refuse(message: str) -> int:
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return 2


def _message(error: UserError) -> str:
    """In the words of the command line: settings by their options, and how to carry on."""
    message = with_flags(str(error))
    if isinstance(error, UnfinishedRun):
        message += f"; continue with --resume {shlex.quote(str(error.folder))}"
    return message


def _forget_closed_output() -> None:
    """Keep Python from failing at exit where nobody reads the output any more."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # a stream of a test has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    """What a service manager or a closing terminal sends ends a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # Under nohup it is ignored, and is to be.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    if number != signal.SIGTERM:
        # A terminal that closes may say so more than once: the results are being written then.
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
