"""The commands that compute: run, resume and teacher."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moodistill.errors import UserError
from moodistill.latency.meter import LatencyConfig
from moodistill.latency.worker import CPU

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster
    from moodistill.progress import Reporter
    from moodistill.runs.backend import Places
    from moodistill.teacher.task import OwnTask


def number(text: str) -> float:
    """An argument that is a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _places_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, help="data folder (default: $MOODISTILL_DATA, then data/)"
    )
    parser.add_argument(
        "--weights", type=Path, help="the teacher's weights (.safetensors, or .pt of a state dict)"
    )
    parser.add_argument("--torch-threads", type=int, help="threads for everything but latency")


LIMITS = {
    "max_latency_ms": "measured",
    "max_parameters": "of the student",
    "max_macs": "multiply-accumulates of one image",
    "max_size_bytes": "of the float ONNX file",
    "max_memory_bytes": "weights and largest activations, computed",
}


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("--model", help="a problem's name (vgg16, resnet18, digits) or file")
    own = parser.add_argument_group("your own network and pictures, without a problem file")
    own.add_argument("--teacher", metavar="MODULE:CALLABLE", help="what builds the network")
    own.add_argument("--data", type=Path, metavar="FOLDER", help="pictures, one folder a class")
    own.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    own.add_argument("--channels", type=int, help="3 (RGB, default), 1 or 4")
    own.add_argument("--mean", type=number, nargs="+", help="of pixels in [0, 1], as in training")
    own.add_argument("--std", type=number, nargs="+", help="(default: measured)")
    parser.add_argument("--out", type=Path, help="new run folder (default: results/<model>-<time>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="carry on this run")
    _run_options(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="quick (default), standard or thorough")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print the result only")
    how.add_argument("--json", action="store_true", help="one JSON object a line, for logs")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="curves for TensorBoard (extra)"
    )
    parser.add_argument("--seed", type=int, help="of the search (default 0)")
    parser.add_argument("--population", type=int, help="students a generation (default 32)")
    parser.add_argument("--generations", type=int, help="instead of the preset's")
    parser.add_argument("--finalists", type=int, help="instead of the preset's")
    parser.add_argument("--distill-steps", type=int, help="instead of the preset's")
    parser.add_argument(
        "--no-flip", action="store_true",
        help="distil on no mirrored pictures (default: as a problem's teacher was trained)",
    )  # fmt: skip
    parser.add_argument(
        "--student", action="append", metavar="ID",
        help="with --resume of a finished run: distil and export this one; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--objectives", metavar="NAME,NAME",
        help="accuracy and some of parameters, latency, macs, size, memory "
        "(default accuracy,parameters,latency)",
    )  # fmt: skip
    parser.add_argument("--algorithm", help="nsga2 (default), nsga3 or sms, all pymoo's")
    parser.add_argument(
        "--screen", type=int,
        help="offspring bred for each one scored, a model chooses (default 24; 1: no screening)",
    )  # fmt: skip
    parser.add_argument(
        "--connections", metavar="KIND,KIND",
        help="kinds that are searched: kernels, ranks, merges, bypasses, blocks "
        "(default merges,bypasses), or none",
    )  # fmt: skip
    parser.add_argument(
        "--min-accuracy", type=number,
        help="hard limit, a fraction, before distillation "
        "(default: two fifths of the way from chance to the teacher)",
    )  # fmt: skip
    for name, what in LIMITS.items():
        option = "--" + name.replace("_", "-")
        names = [option, "--max-params"] if name == "max_parameters" else [option]
        parser.add_argument(*names, type=number, dest=name, help=f"hard limit, {what}")
    parser.add_argument("--keep", action="append", metavar="LAYER", help="leave this layer alone")
    for option, what in (("--min-width", "least"), ("--max-width", "most")):
        parser.add_argument(
            option, action="append", type=_width, metavar="LAYER=N",
            help=f"{what} outputs that a layer keeps",
        )  # fmt: skip
    parser.add_argument(
        "--simd-step", type=int, help="channels per SIMD block (default: probed on this device)"
    )
    parser.add_argument("--threads", type=int, help="of ONNX Runtime (default 1)")
    parser.add_argument("--batch", type=int, help="images a latency is of (default 1)")
    parser.add_argument("--provider", help=f"of ONNX Runtime (default {CPU})")
    parser.add_argument("--no-int8", action="store_true", help="no INT8 twins of the finalists")
    parser.add_argument(
        "--int8-max-loss", type=number, metavar="FRACTION",
        help="validation accuracy that an INT8 twin may lose (default 0.01, one point)",
    )  # fmt: skip
    _places_arguments(parser)
    _cluster_arguments(parser)


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group("more processes and machines (extra: distributed)")
    many.add_argument("--workers", type=int, metavar="N", help="processes on this machine")
    many.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, tcp://host:port")
    many.add_argument(
        "--latency-on", metavar="NAME,...",
        help="devices that are timed; the first one's latency is the objective",
    )  # fmt: skip
    many.add_argument(
        "--worst-latency", action="store_true", help="the objective is the largest over all devices"
    )
    for name in ("ca", "cert", "key"):
        many.add_argument(f"--tls-{name}", type=Path, metavar="PEM")
    many.add_argument(
        "--patience", type=number, metavar="SECONDS",
        help="how long there may be no worker before the run stops (default 60)",
    )  # fmt: skip
    many.add_argument("--wait", action="store_true", help="say so then, and wait for one")


@contextmanager
def _cluster(arguments: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Cluster | None]:
    """The workers that the options ask for, None for this process alone."""
    given = {
        "workers": arguments.workers,
        "scheduler": arguments.scheduler,
        "latency_on": tuple(arguments.latency_on.split(",")) if arguments.latency_on else None,
        "worst_latency": arguments.worst_latency or None,
        "tls_ca": arguments.tls_ca,
        "tls_cert": arguments.tls_cert,
        "tls_key": arguments.tls_key,
        "patience_s": arguments.patience,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given and not arguments.wait:
        yield None
        return
    from moodistill.cluster.client import ClusterConfig, connect

    with connect(ClusterConfig(**given, wait=arguments.wait), say) as cluster:
        yield cluster


def run_command(arguments: argparse.Namespace) -> None:
    """Search, distil, confirm, export."""
    from moodistill.progress import Mode, make_reporter

    mode: Mode = "json" if arguments.json else "quiet" if arguments.quiet else "auto"
    reporter = make_reporter(mode)
    with _cluster(arguments, reporter.say) as cluster:
        _run(arguments, reporter, cluster)


def _run(arguments: argparse.Namespace, reporter: Reporter, cluster: Cluster | None) -> None:
    from moodistill.progress import TensorBoardReporter
    from moodistill.runs.backend import Places

    for name in (
        "population", "generations", "finalists", "distill_steps", "simd_step",
        "threads", "batch", "torch_threads",
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {value}; expected a whole number of at least 1")
    if arguments.tensorboard is not None:
        reporter = TensorBoardReporter(reporter, arguments.tensorboard)
    places = Places(arguments.data_dir, arguments.weights, arguments.torch_threads)
    act = _start if arguments.resume is None else _resume
    folder = act(arguments, places, reporter, cluster)
    if arguments.json:
        print(json.dumps({"event": "finished", "run": str(folder)}))
        return
    print(f"\nresults in {folder}; look at {folder / 'report.html'}")
    print(f"choose a student: moodistill choose {shlex.quote(str(folder))} --knee")


def _searched(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is given of the search's settings; None is not given."""
    plain = ("population", "seed", "algorithm", "screen", "simd_step")
    return {
        **{name: getattr(arguments, name) for name in plain},
        "objectives": _names(arguments.objectives),
        "connections": [] if arguments.connections == "none" else _names(arguments.connections),
    }


def _resume(
    arguments: argparse.Namespace, places: Places, reporter: Reporter, cluster: Cluster | None
) -> Path:
    from moodistill.config import Budget, RunConfig, flat_settings, refuse_changes
    from moodistill.pareto.table import SUFFIX
    from moodistill.runs.run import resume_run
    from moodistill.storage.folder import read_run

    if arguments.out is not None:
        raise UserError("--resume continues in its own folder; leave out --out")
    for name in ("teacher", "data", "size", "channels", "mean", "std"):
        if getattr(arguments, name, None) is not None:
            raise UserError(f"--resume takes --{name} from its run; leave it out")
    plain = ("threads", "batch", "provider", "int8_max_loss", "min_accuracy", *LIMITS)
    given = flat_settings(
        **_searched(arguments),
        **{name: getattr(arguments, name) for name in plain},
        model=_absolute(arguments.model),
        int8_twins=False if arguments.no_int8 else None,
        flip=False if arguments.no_flip else None,
        keep=tuple(arguments.keep) if arguments.keep else None,
        min_width=dict(arguments.min_width) if arguments.min_width else None,
        max_width=dict(arguments.max_width) if arguments.max_width else None,
    )
    config = RunConfig.from_dict(read_run(arguments.resume).get("config", {}))
    refuse_changes(config, given, arguments.resume)
    if arguments.student and (arguments.generations or arguments.finalists):
        raise UserError("--student does not search; leave out --generations and --finalists")
    budget = Budget(
        arguments.preset, arguments.generations, arguments.finalists, arguments.distill_steps,
        tuple(dict.fromkeys(s.removesuffix(SUFFIX) for s in arguments.student or ())),
    )  # fmt: skip
    return resume_run(arguments.resume, budget, places, reporter, cluster=cluster)


def _start(
    arguments: argparse.Namespace, places: Places, reporter: Reporter, cluster: Cluster | None
) -> Path:
    from moodistill.bundle.int8 import Int8Config
    from moodistill.config import new_config
    from moodistill.io.cache import default_cache_dir
    from moodistill.latency.device import check_provider
    from moodistill.latency.simd import probe_simd
    from moodistill.pareto.objectives import Limits
    from moodistill.runs.run import start_run
    from moodistill.teacher.blocks import LayerRules
    from moodistill.teacher.task import load_task

    if arguments.student:
        raise UserError("--student takes the students of a finished run: give --resume RUN too")
    own = _own_task(arguments)
    model = _absolute(arguments.teacher if own else arguments.model)
    if model is None:
        raise UserError("which network? give --model vgg16, resnet18, digits or a problem file")
    task = load_task(model, own)
    latency = LatencyConfig(arguments.threads or 1, arguments.batch or 1, arguments.provider or CPU)
    remote = cluster if cluster is not None and cluster.config.latency_on else None
    if remote is None:
        check_provider(latency.provider)
    searched = _searched(arguments)
    if searched["simd_step"] is None:
        searched["simd_step"] = (
            remote.probe_step(latency)
            if remote is not None
            else probe_simd(latency, default_cache_dir()).step
        )
    loss = arguments.int8_max_loss
    config = new_config(
        model,
        preset=arguments.preset,
        generations=arguments.generations,
        finalists=arguments.finalists,
        distill_steps=arguments.distill_steps,
        **searched,
        limits=Limits(
            arguments.min_accuracy, **{name: getattr(arguments, name) for name in LIMITS}
        ),
        latency=latency,
        int8=Int8Config(not arguments.no_int8, 0.01 if loss is None else loss),
        rules=LayerRules(
            tuple(arguments.keep or ()),
            dict(arguments.min_width or ()),
            dict(arguments.max_width or ()),
        ),
        flip=False if arguments.no_flip else task.mirrored,
        own=own,
    )
    stem = model.rpartition(":")[2] if own else Path(model).stem  # of a file's path its name
    out = arguments.out or Path("results") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return start_run(config, out, places, reporter, task, cluster)


def _absolute(model: str | None) -> str | None:
    """A model with the whole path of its file: a run is carried on from anywhere."""
    file, separator, builder = (model or "").partition(":")
    return f"{Path(file).resolve()}{separator}{builder}" if file.endswith(".py") else model


def _names(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")


def _width(text: str) -> tuple[str, int]:
    name, separator, value = text.rpartition("=")
    if not separator or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected LAYER=NUMBER")
    return name, int(value)


def _own_task(arguments: argparse.Namespace) -> OwnTask | None:
    """The task of `--teacher`, `--weights` and `--data`, None if there is no `--teacher`."""
    from moodistill.teacher.task import OwnTask

    if arguments.teacher is None:
        return None
    if arguments.model is not None:
        raise UserError("--teacher and --model both name a network; give one of them")
    for name in ("weights", "data"):
        if getattr(arguments, name) is None:
            raise UserError(f"--teacher needs --{name}; see docs/own_network.md")
    size = arguments.size or [32]
    if len(size) > 2 or min(size) < 1:
        raise UserError(f"--size is {size}; expected one number, or height and width")
    return OwnTask(
        weights=str(arguments.weights.resolve()),
        data=str(arguments.data.resolve()),
        size=(size[0], size[-1]),
        channels=arguments.channels or 3,
        mean=tuple(arguments.mean) if arguments.mean else None,
        std=tuple(arguments.std) if arguments.std else None,
    )


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resume`."""
    parser.add_argument("resume", type=Path, metavar="RUN", help="a run's folder")
    _run_options(parser)


def resume_command(arguments: argparse.Namespace) -> None:
    """`run --resume` by its own name."""
    arguments.out = arguments.model = None
    run_command(arguments)


def teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `teacher`."""
    parser.add_argument("--model", required=True, help="a problem's name or file")
    parser.add_argument("--out", type=Path, help="weights file (default: the problem's own)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--torch-threads", type=int)


def teacher_command(arguments: argparse.Namespace) -> None:
    """Train a teacher; run it again to carry on after an interruption."""
    from moodistill.student.context import use_threads
    from moodistill.teacher.task import load_task
    from moodistill.training.teacher import train_teacher

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
