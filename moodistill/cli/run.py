"""The commands that compute: run, resume and teacher."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moodistill.cli.options import (
    absolute,
    add_setting,
    add_settings,
    given_places,
    given_settings,
)
from moodistill.errors import UserError
from moodistill.settings import SETTINGS, Settings, read_settings

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster
    from moodistill.config import RunConfig
    from moodistill.progress import Mode, Reporter
    from moodistill.runs.backend import Places
    from moodistill.teacher.task import OwnTask, Task

# Of these a run that is carried on has its own.
IMAGES = (
    "size", "channels", "resize", "shorter_side", "fill", "interpolation", "channel_order", "exif",
)  # fmt: skip
PREPARED = (*IMAGES, "mean", "std")


@dataclass(frozen=True)
class Work:
    """What a run is to be made with.

    Attributes:
        settings: all that are given.
        places: where data and weights are.
        reporter: hears how far it is.
        cluster: its workers, None for this process alone.
        base: the configuration of a run that is started anew.
    """

    settings: Settings
    places: Places
    reporter: Reporter
    cluster: Cluster | None
    base: RunConfig | None = None


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("--resume", type=Path, metavar="RUN", help="resume this run")
    _common_arguments(parser)
    add_settings(parser)


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="a TOML file with any of the settings below (options win), or the run.json of a run "
        "that is to be started anew",
    )  # fmt: skip
    parser.add_argument(
        "--student", action="append", metavar="ID",
        help="of a finished run that is resumed: distil and export this one; may be repeated",
    )  # fmt: skip


def run_command(arguments: argparse.Namespace) -> None:
    """Search, distil, confirm, export."""
    from moodistill.progress import TensorBoardReporter, make_reporter
    from moodistill.runs.backend import Places

    settings, base = _settings(arguments)
    mode: Mode = settings.progress or "auto"  # type: ignore[assignment]
    reporter = make_reporter(mode)
    with _cluster(settings, reporter.say) as cluster:
        if settings.tensorboard is not None:
            reporter = TensorBoardReporter(reporter, settings.tensorboard)
        work = Work(settings, Places(**settings.part("places")), reporter, cluster, base)
        act = _start if arguments.resume is None else _resume
        folder = act(arguments, work)
    if mode == "json":
        print(json.dumps({"event": "finished", "run": str(folder)}))
        return
    print(f"\nresults in {folder}; look at {folder / 'report.html'}")
    print(f"choose a student: moodistill choose {shlex.quote(str(folder))} --knee")


def _settings(arguments: argparse.Namespace) -> tuple[Settings, RunConfig | None]:
    """The settings that are given as options or in a file, and the run to start anew."""
    given, path = given_settings(arguments), arguments.config
    if path is None:
        return given, None
    if path.suffix == ".toml":
        return given.over(read_settings(path)), None
    if path.name != "run.json":
        raise UserError(f"--config is {path}; expected a .toml file or the run.json of a run")
    if arguments.resume is not None:
        raise UserError(f"--config {path} starts its run anew; leave it out to resume a run")
    from moodistill.config import RunConfig, refuse_older
    from moodistill.storage.folder import read_run

    base, stored = RunConfig.read(path.parent), read_run(path.parent)
    refuse_older(stored.get("config"), path.parent)
    if stored.get("latency_on") and given.latency_on is None:
        raise UserError(
            f"{path} has latencies of {stored['latency_on']}; name those devices with `scheduler` "
            "and `latency_on`"
        )
    return given, base


@contextmanager
def _cluster(settings: Settings, say: Callable[[str], None]) -> Iterator[Cluster | None]:
    """The workers that the settings ask for, None for this process alone."""
    given = {name: value for name, value in settings.part("cluster").items() if value is not False}
    if not given:
        yield None
        return
    from moodistill.cluster.client import ClusterConfig, connect

    with connect(ClusterConfig(**given), say) as cluster:
        yield cluster


def _resume(arguments: argparse.Namespace, work: Work) -> Path:
    from moodistill.config import Budget, RunConfig, refuse_changes
    from moodistill.pareto.table import SUFFIX
    from moodistill.runs.run import resume_run

    folder, settings = arguments.resume, work.settings
    if settings.out is not None:
        raise UserError("--resume continues in its own folder; leave out --out")
    for name in PREPARED:
        if getattr(settings, name) is not None:
            raise UserError(f"--resume takes `{name}` from its run; leave it out")
    config = RunConfig.read(folder)
    # Network, weights and images may lie elsewhere: whether they are others is told by digests.
    refuse_changes(config, replace(settings, model=None), folder)
    if arguments.student and (settings.generations or settings.finalists):
        raise UserError("--student does not search; leave out --generations and --finalists")
    students = tuple(dict.fromkeys(s.removesuffix(SUFFIX) for s in arguments.student or ()))
    budget = Budget.of(settings, students)
    with _hint(folder, bool(students)):
        places = given_places(settings)
        return resume_run(folder, budget, places, work.reporter, cluster=work.cluster)


def _start(arguments: argparse.Namespace, work: Work) -> Path:
    from moodistill.config import new_config
    from moodistill.runs.run import start_run
    from moodistill.teacher.task import builder_of, module_folder

    settings, base = work.settings, work.base
    if arguments.student:
        raise UserError("--student takes the students of a finished run: give --resume RUN too")
    model = absolute(settings.teacher or settings.model) or (base.model if base else None)
    if model is None:
        raise UserError("which network? give --model vgg16, resnet18, digits or a problem file")
    if settings.int8_twins is False and settings.int8_max_loss is not None:
        raise UserError("`int8_max_loss` is of INT8 twins, which --no-int8 leaves out")
    own = _own_task(settings, base)
    if own is not None and settings.teacher is not None:
        own = replace(own, module_folder=module_folder(model))
    if base is not None and model != base.model:  # its weights are of the other network
        base = replace(base, weights=None, weights_key=None)
    named = new_config(model, Settings(), own, base)
    named = named.with_weights(settings.weights, settings.weights_key)
    task = named.task(work.places.images_in_memory, work.reporter)
    config = new_config(model, _device_settings(work, task), named.own, named)
    stem = builder_of(model)[1] or Path(model).stem  # of a file's path its name
    out = settings.out or Path("results") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _hint(out):
        return start_run(config, out, work.places, work.reporter, task, work.cluster)


def _device_settings(work: Work, task: Task) -> Settings:
    """The settings, and what follows from device and teacher where it is not given."""
    from moodistill.io.cache import default_cache_dir
    from moodistill.latency.device import check_provider
    from moodistill.latency.meter import LatencyConfig
    from moodistill.latency.simd import probe_simd

    settings, base = work.settings, work.base
    latency = replace(base.latency if base else LatencyConfig(), **settings.part("latency"))
    remote = work.cluster if work.cluster is not None and work.cluster.config.latency_on else None
    if remote is None:
        check_provider(latency.provider)
    if base is not None:
        return settings  # the rest is the run's
    step, flip = settings.simd_step, settings.flip
    if step is None and remote is not None:
        step = remote.probe_step(latency)
    elif step is None:
        step = probe_simd(latency, default_cache_dir()).step
    return replace(settings, simd_step=step, flip=task.mirrored if flip is None else flip)


@contextmanager
def _hint(folder: Path, same: bool = False) -> Iterator[None]:
    """How to carry on a run that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / "run.json").is_file():
            how = "the same command" if same else f"--resume {shlex.quote(str(folder))}"
            with suppress(OSError):
                print(f"continue with {how}", file=sys.stderr)
        raise


def _own_task(settings: Settings, base: RunConfig | None) -> OwnTask | None:
    """The task of `teacher`, `weights` and `data`, None if it is a problem's."""
    from moodistill.data.array_files import holds_arrays
    from moodistill.teacher.task import OwnTask, builder_of

    given = settings.part("own")
    if settings.size is not None:
        if len(settings.size) > 2:
            raise UserError(f"`size` is {settings.size}; expected one number, or height and width")
        given["size"] = (settings.size[0], settings.size[-1])
    if settings.data is not None:
        given["data"] = str(settings.data.resolve())
    if settings.teacher is not None and settings.model is not None:
        raise UserError("`teacher` and `model` both name a network; give one of them")
    if settings.model is None and base is not None and base.own is not None:
        _refuse_data_dir(settings)
        own = replace(base.own, cut=None) if "data" in given else base.own  # others: cut anew
        return replace(own, **given)
    if settings.teacher is not None:
        if not builder_of(settings.teacher)[1]:
            raise UserError(
                f"`teacher` is {settings.teacher}; expected MODULE:CALLABLE or FILE.py:CALLABLE, "
                "which gives the network"
            )
        _refuse_data_dir(settings)
        for name in ("weights", "data"):
            if getattr(settings, name) is None:
                raise UserError(f"`teacher` needs `{name}`; see docs/own_network.md")
        unused = [name for name in IMAGES if getattr(settings, name) is not None]
        if unused and holds_arrays(Path(given["data"])):
            raise UserError(f"`{unused[0]}` is for images, {given['data']} holds arrays; omit it")
        return OwnTask(weights=str(settings.weights), **given)
    of_others = ("data", "heads", *PREPARED)
    unused = [name for name in of_others if getattr(settings, name) is not None]
    if unused:
        raise UserError(f"`{unused[0]}` is for a network of your own; give it with `teacher`")
    return None


def _refuse_data_dir(settings: Settings) -> None:
    if settings.data_dir is not None:
        raise UserError("`data_dir` is for a problem's data; give images of your own as `data`")


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resume`."""
    parser.add_argument("resume", type=Path, metavar="RUN", help="a run's folder")
    _common_arguments(parser)
    add_settings(parser, leave_out=("out", *PREPARED))


def resume_command(arguments: argparse.Namespace) -> None:
    """`run --resume` by its own name."""
    run_command(arguments)


def teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `teacher`."""
    parser.add_argument("--model", required=True, help="a problem's name or file")
    parser.add_argument("--out", type=Path, help="weights file (default: the problem's own)")
    for name in ("data_dir", "device", "torch_threads"):
        add_setting(parser, SETTINGS[name])


def teacher_command(arguments: argparse.Namespace) -> None:
    """Train a teacher; run it again to carry on after an interruption."""
    from moodistill.accelerator import AUTO, find_device
    from moodistill.student.context import use_threads
    from moodistill.teacher.task import load_task
    from moodistill.training.teacher import train_teacher

    use_threads(arguments.torch_threads)
    task = load_task(arguments.model)
    out = arguments.out or task.weights
    if out.exists():
        raise UserError(f"{out} exists; name another file with --out, or move it away")
    device = find_device(arguments.device or AUTO)
    report = train_teacher(task, task.load_data(arguments.data_dir), out, device)
    print(
        f"wrote {out}: validation accuracy {report['validation_accuracy']:.4f}, "
        f"test accuracy {report['test_accuracy']:.4f}"
    )
