"""The command line: one line and exit code 2 for bad input, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from moodistill.cli import results as cli_results
from moodistill.cli import run as cli_run
from moodistill.errors import UserError
from moodistill.version import __version__

Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str
]
COMMANDS: dict[str, Command] = {
    "run": (
        "search for a front of smaller networks",
        cli_run.run_arguments,
        cli_run.run_command,
        "example: python scripts/run_nsga.py --model vgg16 --preset quick",
    ),
    "resume": (
        "carry on a run, finished or not",
        cli_run.resume_arguments,
        cli_run.resume_command,
        "example: moodistill resume results/mine --preset standard",
    ),
    "choose": (
        "choose a student from a run's front",
        cli_results.choose_arguments,
        cli_results.choose_command,
        "example: python scripts/choose.py RUN --max-latency-ms 2 --min-accuracy 0.85",
    ),
    "export": (
        "write a student's ONNX file",
        cli_results.export_arguments,
        cli_results.export_command,
        "example: python scripts/export_onnx.py RUN s0042 --out my_student",
    ),
    "report": (
        "write report.html, also of a run that goes on",
        cli_results.report_arguments,
        cli_results.report_command,
        "example: moodistill report results/mine --watch",
    ),
    "verify": (
        "check a shipped folder",
        cli_results.verify_arguments,
        cli_results.verify_command,
        "example: moodistill verify my_student",
    ),
    "clean": (
        "free what can be made again",
        cli_results.clean_arguments,
        cli_results.clean_command,
        "example: moodistill clean results/mine --cache",
    ),
    "teacher": (
        "train a teacher",
        cli_run.teacher_arguments,
        cli_run.teacher_command,
        "example: python scripts/train_teacher.py --model resnet18",
    ),
}


def run_tool(name: str, arguments: Sequence[str] | None = None) -> int:
    """One command as a program of its own (the files in `scripts/`); returns the exit code."""
    help_text, add, command, example = COMMANDS[name]
    parser = argparse.ArgumentParser(description=help_text, epilog=example)
    add(parser)
    return _call(command, parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """The `moodistill` program with its subcommands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="moodistill")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help_text, add, _, example) in COMMANDS.items():
        add(commands.add_parser(name, help=help_text, description=help_text, epilog=example))
    parsed = parser.parse_args(arguments)
    return _call(COMMANDS[parsed.command][2], parsed)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _call(command: Callable[[argparse.Namespace], None], parsed: argparse.Namespace) -> int:
    if threading.current_thread() is threading.main_thread():
        # A service manager's way to say Ctrl-C.
        signal.signal(signal.SIGTERM, _stop)
    try:
        command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(
            f"error: {error}; what is stored is kept: check the disk's space and permissions and "
            "call it again (a run: with --resume)",
            file=sys.stderr,
        )
        return 2
    return 0
