"""The commands on what a run has found: choose, export, verify, report and clean."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

from moodistill.cli.options import PLACES, add_setting, given_places, given_settings, number
from moodistill.errors import UserError
from moodistill.pareto import choose
from moodistill.pareto import table as front
from moodistill.settings import SETTINGS


def _weights(text: str) -> dict[str, float]:
    result = {}
    for item in text.split(","):
        name, separator, value = item.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"{item!r}: expected NAME=NUMBER,NAME=NUMBER")
        result[name.strip()] = number(value)
    return result


def choose_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `choose`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--max-latency-ms", type=number)
    parser.add_argument("--max-params", type=number)
    parser.add_argument(
        "--min-accuracy", type=number, help="least accuracy, or other metric of the run, a fraction"
    )
    parser.add_argument("--max-size-bytes", type=number, help="of the ONNX file")
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
    print(f"against the teacher: {choice.gives_up}")
    print(f"structure: {choice.student.summary}")
    print(
        f"export it: moodistill export {shlex.quote(str(arguments.run))} "
        f"{choice.student.student} "
        f"--out {choice.student.student}"
    )


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("student", metavar="STUDENT", help="a student's id from pareto.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    moved = parser.add_argument_group("what lies elsewhere than when the run was made")
    for name in PLACES:
        add_setting(moved, SETTINGS[name])
    parser.add_argument("--softmax", action="store_true", help="probabilities instead of logits")
    parser.add_argument("--int8", action="store_true", help="quantised, if that is faster here")
    parser.add_argument(
        "--opset", type=int, help="opset of the ONNX file (default: the lowest that it needs)"
    )
    parser.add_argument(
        "--fixed-batch", type=int, metavar="N",
        help="a file that takes N images at once, no other number, as some converters want",
    )  # fmt: skip
    entry = parser.add_mutually_exclusive_group()
    entry.add_argument("--float32", action="store_true", help="take 0-255 pixels as float32")
    entry.add_argument(
        "--bare", action="store_true", help="the bare network: normalising is up to the caller"
    )


def export_command(arguments: argparse.Namespace) -> None:
    """Write a student's bundle after comparing it with torch on real images."""
    from moodistill.bundle.model import ShipOptions
    from moodistill.runs.export import export_student

    kind = "float32" if arguments.float32 else "normalised" if arguments.bare else "uint8"
    options = ShipOptions(kind, arguments.softmax, arguments.opset, arguments.fixed_batch)
    done = export_student(
        arguments.run, arguments.student, arguments.out, options, arguments.int8,
        given_places(given_settings(arguments)),
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


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that export wrote")


def verify_command(arguments: argparse.Namespace) -> None:
    """Check a bundle against its manifest, and run its sample."""
    from moodistill.bundle.verify import verify_package

    found = verify_package(arguments.folder)
    print(
        f"{found.student}: {found.files} files as listed, the sample's answer as expected "
        f"(largest difference {found.difference:.1e})"
    )


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "--watch", type=int, nargs="?", const=10, metavar="SECONDS",
        help="write it anew every so often (10) until the run ends; the page follows",
    )  # fmt: skip


def report_command(arguments: argparse.Namespace) -> None:
    """Write `report.html` of a run, without disturbing it."""
    from moodistill.report.page import write_report
    from moodistill.runs.rows import current_rows
    from moodistill.storage.lock import is_written
    from moodistill.storage.store import Store

    if arguments.watch is not None and arguments.watch < 1:
        raise UserError(f"--watch is {arguments.watch}; expected at least 1 second")
    while True:
        # Not by its status: a run that was killed has had no time to change it.
        going = arguments.watch is not None and is_written(arguments.run)
        with Store.open(arguments.run, readonly=True) as store:
            rows = current_rows(arguments.run, store)
            path = write_report(arguments.run, store, rows, arguments.watch if going else None)
            print(f"{len(store)} students: {path}", flush=True)
        if not going:
            return
        time.sleep(arguments.watch)


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `clean`."""
    parser.add_argument("run", type=Path, nargs="*", metavar="RUN", help="a run's folder")
    parser.add_argument("--cache", action="store_true", help="also what all runs share")


def clean_command(arguments: argparse.Namespace) -> None:
    """Delete files that a run, or the cache, can recompute."""
    from moodistill.io.cache import default_cache_dir
    from moodistill.runs.clean import clean_cache, clean_run

    if not arguments.run and not arguments.cache:
        raise UserError("nothing to clean; name a run's folder, or give --cache")
    done = [(path, clean_run(path)) for path in arguments.run]
    if arguments.cache:
        done.append((default_cache_dir(), clean_cache(default_cache_dir())))
    for path, freed in done:
        print(f"{path}: {freed.files} files, {freed.size_bytes / 1e6:.1f} MB freed")
