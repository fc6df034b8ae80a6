"""The command line: one line and exit code 2 for bad input, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moodistill import __version__, choose, front
from moodistill.errors import UserError
from moodistill.latency import LatencyConfig
from moodistill.latency_worker import CPU


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
    parser.add_argument("--torch-threads", type=int, help="threads for everything but latency")


# What decides a run's result besides its budget: a resume cannot change it.
FIXED = (
    "model", "seed", "population", "objectives", "algorithm", "simd_step", "threads", "batch",
    "provider", "int8_max_loss", "min_accuracy", "max_latency_ms", "max_parameters", "max_macs",
    "max_size_bytes", "max_memory_bytes",
)  # fmt: skip
LIMITS = {
    "max_latency_ms": "measured",
    "max_parameters": "of the student",
    "max_macs": "multiply-accumulates of one image",
    "max_size_bytes": "of the float ONNX file",
    "max_memory_bytes": "weights and largest activations, computed",
}


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a problem's name (vgg16, resnet18, digits) or file")
    parser.add_argument("--preset", help="quick (default), standard or thorough")
    parser.add_argument("--out", type=Path, help="new run folder (default: results/<model>-<time>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="carry on this run")
    parser.add_argument("--seed", type=int, help="of the search (default 0)")
    parser.add_argument("--population", type=int, help="students a generation (default 32)")
    parser.add_argument("--generations", type=int, help="instead of the preset's")
    parser.add_argument("--finalists", type=int, help="instead of the preset's")
    parser.add_argument("--distill-steps", type=int, help="instead of the preset's")
    parser.add_argument(
        "--objectives", metavar="NAME,NAME",
        help="accuracy and some of parameters, latency, macs, size, memory "
        "(default accuracy,parameters,latency)",
    )  # fmt: skip
    parser.add_argument("--algorithm", help="nsga2 (default), nsga3 or sms, all pymoo's")
    parser.add_argument(
        "--min-accuracy", type=_number, help="hard limit, a fraction, before distillation"
    )
    for name, what in LIMITS.items():
        option = "--" + name.replace("_", "-")
        names = [option, "--max-params"] if name == "max_parameters" else [option]
        parser.add_argument(*names, type=_number, dest=name, help=f"hard limit, {what}")
    parser.add_argument(
        "--simd-step", type=int, help="channels per SIMD block (default: probed on this device)"
    )
    parser.add_argument("--threads", type=int, help="of ONNX Runtime (default 1)")
    parser.add_argument("--batch", type=int, help="images a latency is of (default 1)")
    parser.add_argument("--provider", help=f"of ONNX Runtime (default {CPU})")
    parser.add_argument("--no-int8", action="store_true", help="no INT8 twins of the finalists")
    parser.add_argument(
        "--int8-max-loss", type=_number, metavar="FRACTION",
        help="validation accuracy that an INT8 twin may lose (default 0.01, one point)",
    )  # fmt: skip
    _places_arguments(parser)


def run_command(arguments: argparse.Namespace) -> None:
    """Search, distil, confirm, export."""
    from dataclasses import replace

    from moodistill.context import default_cache_dir
    from moodistill.device import check_provider, probe_simd
    from moodistill.distill import DistillConfig
    from moodistill.int8 import Int8Config
    from moodistill.objectives import DEFAULT, Limits, check_objectives
    from moodistill.recipe import Recipe
    from moodistill.run import Places, refuse_changes, resume_run, start_run
    from moodistill.run_config import Budget, RunConfig, get_preset
    from moodistill.search import SearchConfig
    from moodistill.statistics import CalibrationConfig

    for name in (
        "population", "generations", "finalists", "distill_steps", "simd_step",
        "threads", "batch", "torch_threads",
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {value}; expected a whole number of at least 1")
    places = Places(arguments.data_dir, arguments.teacher, arguments.torch_threads)
    if arguments.resume is not None:
        if arguments.out is not None:
            raise UserError("--resume continues in its own folder; leave out --out")
        given = {n: getattr(arguments, n) for n in FIXED if getattr(arguments, n) is not None}
        if arguments.no_int8:
            given["no_int8"] = True
        refuse_changes(arguments.resume, given)
        budget = Budget(
            arguments.preset, arguments.generations, arguments.finalists, arguments.distill_steps
        )
        folder = resume_run(arguments.resume, budget, places)
    else:
        if arguments.model is None:
            raise UserError("which network? give --model vgg16, resnet18, digits or a problem file")
        objectives = arguments.objectives or ",".join(DEFAULT)
        preset = arguments.preset or "quick"
        settings = get_preset(preset)
        latency = LatencyConfig(
            arguments.threads or 1, arguments.batch or 1, arguments.provider or CPU
        )
        check_provider(latency.provider)
        step = arguments.simd_step or probe_simd(latency, default_cache_dir()).step
        search = SearchConfig(
            population=arguments.population or 32,
            generations=arguments.generations or settings.generations,
            seed=arguments.seed or 0,
            simd_step=step,
            limits=Limits(
                arguments.min_accuracy or 0.0, **{name: getattr(arguments, name) for name in LIMITS}
            ),
            objectives=check_objectives(objectives.split(",")),
            algorithm=arguments.algorithm or "nsga2",
        )
        loss = arguments.int8_max_loss
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
            latency=latency,
            int8=Int8Config(not arguments.no_int8, 0.01 if loss is None else loss),
        )
        stem = Path(arguments.model).stem
        out = arguments.out or Path("results") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = start_run(config, out, places)
    print(f"\nresults in {folder}; look at {folder / 'report.html'}")
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
    parser.add_argument("--softmax", action="store_true", help="probabilities instead of logits")
    parser.add_argument("--int8", action="store_true", help="quantised, if that is faster here")
    entry = parser.add_mutually_exclusive_group()
    entry.add_argument("--float32", action="store_true", help="take 0-255 pixels as float32")
    entry.add_argument(
        "--bare", action="store_true", help="the bare network: normalising is up to the caller"
    )


def export_command(arguments: argparse.Namespace) -> None:
    """Write a student's shipped folder after comparing it with torch on real images."""
    from moodistill.ship import ShipOptions
    from moodistill.shipping import export_student

    kind = "float32" if arguments.float32 else "normalised" if arguments.bare else "uint8"
    options = ShipOptions(kind, arguments.softmax)
    done = export_student(
        arguments.run, arguments.student, arguments.out, arguments.data_dir,
        options, arguments.int8,
    )  # fmt: skip
    size = done.path.stat().st_size
    if done.parity is None:
        print(f"wrote {done.path} ({size} bytes), INT8")
    else:
        print(
            f"wrote {done.path} ({size} bytes): {done.parity.images} real images, largest "
            f"difference from torch {done.parity.max_difference:.1e}, all predictions equal"
        )
    print(f"try it: python {arguments.out / 'run.py'}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that export wrote")


def verify_command(arguments: argparse.Namespace) -> None:
    """Check a shipped folder against its manifest, and run its sample."""
    from moodistill.verify import verify_package

    found = verify_package(arguments.folder)
    print(
        f"{found.student}: {found.files} files as listed, the sample's answer as expected "
        f"(largest difference {found.difference:.1e})"
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "--watch", type=int, nargs="?", const=10, metavar="SECONDS",
        help="write it anew every so often (10) until the run ends; the page follows",
    )  # fmt: skip


def report_command(arguments: argparse.Namespace) -> None:
    """Write `report.html` of a run, without disturbing it."""
    from moodistill.report_html import write_report
    from moodistill.results import current_rows
    from moodistill.run_folder import read_run
    from moodistill.store import Store

    if arguments.watch is not None and arguments.watch < 1:
        raise UserError(f"--watch is {arguments.watch}; expected at least 1 second")
    while True:
        going = arguments.watch is not None and read_run(arguments.run).get("status") == "running"
        with Store.open(arguments.run, readonly=True) as store:
            rows = current_rows(arguments.run, store)
            path = write_report(arguments.run, store, rows, arguments.watch if going else None)
            print(f"{len(store)} students: {path}", flush=True)
        if not going:
            return
        time.sleep(arguments.watch)


def _clean_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="*", metavar="RUN", help="a run's folder")
    parser.add_argument("--cache", action="store_true", help="also what all runs share")


def clean_command(arguments: argparse.Namespace) -> None:
    """Free what a run, or the cache, can make again."""
    from moodistill.clean import clean_cache, clean_run
    from moodistill.context import default_cache_dir

    if not arguments.run and not arguments.cache:
        raise UserError("nothing to clean; name a run's folder, or give --cache")
    done = [(path, clean_run(path)) for path in arguments.run]
    if arguments.cache:
        done.append((default_cache_dir(), clean_cache(default_cache_dir())))
    for path, freed in done:
        print(f"{path}: {freed.files} files, {freed.size_bytes / 1e6:.1f} MB freed")


def _teacher_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a problem's name or file")
    parser.add_argument("--out", type=Path, help="weights file (default: the problem's own)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--torch-threads", type=int)


def teacher_command(arguments: argparse.Namespace) -> None:
    """Train a teacher; run it again to carry on after an interruption."""
    from moodistill.context import use_threads
    from moodistill.task import load_task
    from moodistill.training import train_teacher

    use_threads(arguments.torch_threads)
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
    "report": (
        "write report.html, also of a run that goes on",
        _report_arguments,
        report_command,
        "example: moodistill report results/mine --watch",
    ),
    "verify": (
        "check a shipped folder",
        _verify_arguments,
        verify_command,
        "example: moodistill verify my_student",
    ),
    "clean": (
        "free what can be made again",
        _clean_arguments,
        clean_command,
        "example: moodistill clean results/mine --cache",
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
    return 0
