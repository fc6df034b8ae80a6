"""The command line: one line and exit code 2 for bad input, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moodistill import __version__, choose, front
from moodistill.errors import UserError


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _weights(text: str) -> dict[str, float]:
    result = {}
    for item in text.split(","):
        name, separator, value = item.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"{item!r}: expected NAME=NUMBER,NAME=NUMBER")
        result[name.strip()] = _number(value)
    return result


def _places_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, help="data folder (default: $MOODISTILL_DATA, then data/)"
    )
    parser.add_argument("--teacher", type=Path, help="other teacher weights (.safetensors)")
    parser.add_argument("--threads", type=int, help="threads for everything but latency")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a problem's name (vgg16, resnet18, digits) or file")
    parser.add_argument("--preset", help="quick (default), standard or thorough")
    parser.add_argument("--out", type=Path, help="new run folder (default: results/<model>-<time>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="carry on this run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--population", type=int, help="students a generation (default 32)")
    parser.add_argument("--generations", type=int, help="instead of the preset's")
    parser.add_argument("--finalists", type=int, help="instead of the preset's")
    parser.add_argument("--distill-steps", type=int, help="instead of the preset's")
    parser.add_argument("--simd-step", type=int, help="channels per SIMD block (default: by CPU)")
    parser.add_argument("--latency-threads", type=int, default=1)
    _places_arguments(parser)


def run_command(arguments: argparse.Namespace) -> None:
    """Search, distil, confirm, export."""
    from dataclasses import replace

    from moodistill.device import simd_step
    from moodistill.distill import DistillConfig
    from moodistill.recipe import Recipe
    from moodistill.run import Places, resume_run, start_run
    from moodistill.run_config import Budget, RunConfig, get_preset
    from moodistill.search import SearchConfig
    from moodistill.statistics import CalibrationConfig

    for name in ("population", "generations", "finalists", "distill_steps", "simd_step", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {value}; expected a whole number of at least 1")
    places = Places(arguments.data_dir, arguments.teacher, arguments.threads)
    if arguments.resume is not None:
        if arguments.out is not None:
            raise UserError("--resume continues in its own folder; leave out --out")
        budget = Budget(
            arguments.preset, arguments.generations, arguments.finalists, arguments.distill_steps
        )
        folder = resume_run(arguments.resume, budget, places)
    else:
        if arguments.model is None:
            raise UserError("which network? give --model vgg16, resnet18, digits or a problem file")
        preset = arguments.preset or "quick"
        settings = get_preset(preset)
        step = arguments.simd_step or simd_step()
        search = SearchConfig(
            population=arguments.population or 32,
            generations=arguments.generations or settings.generations,
            seed=arguments.seed,
            simd_step=step,
        )
        config = RunConfig(
            model=arguments.model,
            preset=preset,
            search=search,
            recipe=Recipe(simd_step=step),
            calibration=CalibrationConfig(),
            distill=replace(
                DistillConfig(), steps=arguments.distill_steps or settings.distill_steps
            ),
            finalists=arguments.finalists or settings.finalists,
            latency_threads=arguments.latency_threads,
        )
        stem = Path(arguments.model).stem
        out = arguments.out or Path("results") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = start_run(config, out, places)
    print(f"\nresults in {folder}")
    print(f"choose a student: python scripts/choose.py {folder} --knee")


def _choose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--max-latency-ms", type=_number)
    parser.add_argument("--max-params", type=_number)
    parser.add_argument("--min-accuracy", type=_number, help="a fraction, on validation images")
    parser.add_argument("--max-size-bytes", type=_number, help="of the ONNX file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--knee", action="store_true", help="where the front bends most")
    how.add_argument("--weights", type=_weights, metavar="accuracy=1,latency=2,params=0.5")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def choose_command(arguments: argparse.Namespace) -> None:
    """Choose one finalist by limits, by the knee or by weights."""
    rows = front.read_front(arguments.run)
    limits = choose.Constraints(
        arguments.max_latency_ms,
        arguments.max_params,
        arguments.min_accuracy,
        arguments.max_size_bytes,
    )
    if arguments.knee:
        choice = choose.knee(rows, limits)
    elif arguments.weights is not None:
        choice = choose.weighted(rows, arguments.weights, limits)
    else:
        choice = choose.choose(rows, limits)
    if arguments.json:
        print(json.dumps(choice.to_dict(), indent=2))
        return
    print(f"{choice.student.student}: {choice.reason}")
    print(f"gives up: {choice.gives_up}")
    print(f"structure: {choice.student.summary}")
    print(
        f"export it: python scripts/export_onnx.py {arguments.run} {choice.student.student} "
        f"--out {choice.student.student}"
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("student", metavar="STUDENT", help="a student's id from pareto.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data-dir", type=Path)


def export_command(arguments: argparse.Namespace) -> None:
    """Write a student's ONNX file after comparing it with torch on real images."""
    from moodistill.shipping import export_student

    path, parity = export_student(
        arguments.run, arguments.student, arguments.out, arguments.data_dir
    )
    print(
        f"wrote {path} ({path.stat().st_size} bytes): {parity.images} real images, largest logit "
        f"difference {parity.max_difference:.1e}, all predictions equal"
    )


def _teacher_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a problem's name or file")
    parser.add_argument("--out", type=Path, help="weights file (default: the problem's own)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int)


def teacher_command(arguments: argparse.Namespace) -> None:
    """Train a teacher; run it again to carry on after an interruption."""
    from moodistill.context import use_threads
    from moodistill.task import load_task
    from moodistill.training import train_teacher

    use_threads(arguments.threads)
    task = load_task(arguments.model)
    out = arguments.out or task.weights
    if out.exists():
        raise UserError(f"{out} exists; name another file with --out, or move it away")
    report = train_teacher(task, task.load_data(arguments.data_dir), out, arguments.device)
    print(
        f"wrote {out}: validation accuracy {report['validation_accuracy']:.4f}, "
        f"test accuracy {report['test_accuracy']:.4f}"
    )


Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str
]
COMMANDS: dict[str, Command] = {
    "run": (
        "search for a front of smaller networks",
        _run_arguments,
        run_command,
        "example: python scripts/run_nsga.py --model vgg16 --preset quick",
    ),
    "choose": (
        "choose a student from a run's front",
        _choose_arguments,
        choose_command,
        "example: python scripts/choose.py RUN --max-latency-ms 2 --min-accuracy 0.85",
    ),
    "export": (
        "write a student's ONNX file",
        _export_arguments,
        export_command,
        "example: python scripts/export_onnx.py RUN s0042 --out my_student",
    ),
    "teacher": (
        "train a teacher",
        _teacher_arguments,
        teacher_command,
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


def _call(command: Callable[[argparse.Namespace], None], parsed: argparse.Namespace) -> int:
    try:
        command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    return 0
