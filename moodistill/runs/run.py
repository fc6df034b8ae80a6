"""One run from teacher to exported finalists, in a folder that it can be resumed from."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moodistill.accelerator import described, find_device
from moodistill.config import Budget, RunConfig, refuse_older
from moodistill.data.cut import CUT_FILE
from moodistill.data.images import ImageData, metric_name
from moodistill.errors import UnfinishedRun, UserError
from moodistill.finalists.confirm import Confirmed
from moodistill.genome.layout_file import LAYOUT_FILE, write_layout
from moodistill.io.atomic import TEMPORARY, remove_orphans
from moodistill.io.cache import default_cache_dir
from moodistill.latency.meter import LatencyError
from moodistill.progress import Reporter
from moodistill.runs.backend import Places, Timing, open_backend
from moodistill.runs.compatibility import (
    check_resumed,
    check_students,
    compare_devices,
    device_of_resumed,
    least_accuracy,
)
from moodistill.runs.finish import finish, score_front, usable_students
from moodistill.runs.moved import moved_config, new_places
from moodistill.runs.results import write_results
from moodistill.runs.search import announce, search
from moodistill.runs.session import Session
from moodistill.storage.folder import (
    LOCK_FILE,
    RUN_FILE,
    new_run_folder,
    read_run,
    versions,
    write_run,
)
from moodistill.storage.lock import writer_lock
from moodistill.storage.store import Store
from moodistill.student.context import TeacherContext, load_context, use_threads
from moodistill.student.evaluator import try_device
from moodistill.teacher.check import check_teacher
from moodistill.teacher.task import Task
from moodistill.teacher.weights import network_digest

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster

CACHE_ORPHANS_S = 600.0  # nothing that is written to the cache takes so long


def start_run(
    config: RunConfig,
    out: Path,
    places: Places,
    reporter: Reporter | None = None,
    task: Task | None = None,
    cluster: Cluster | None = None,
) -> Path:
    """Make the folder `out` and run; returns the folder. `task` None loads the configuration's.

    The first thing said is how good the teacher is.

    Raises:
        UserError: if `out` holds anything, or data or teacher cannot be had.
        UnfinishedRun: if it ended early and can be carried on.
    """
    use_threads(places.threads)
    reporter = reporter or Reporter()
    task = task or config.task(places.images_in_memory, reporter)
    context = _context(task, config, places, reporter, first=True)
    _say_data(context.data, reporter)
    _refuse_uncuttable(context)
    if context.device.type != "cpu":
        try_device(context, config.recipe)  # too little memory shows before anything is written
    config = _with_least_accuracy(config, context)
    folder = new_run_folder(out)
    with (
        writer_lock(folder) as lock,
        open_backend(context, config, places, None, cluster) as backend,
    ):
        new_run_folder(folder, locked=True)  # nobody has begun a run in it since
        place = cluster.config.place if cluster is not None else None
        write_run(folder, _record(config, context, backend.timing, place))
        if context.data.cut is not None:
            context.data.cut.write(folder / CUT_FILE)
        write_layout(folder, context.layout)
        with Store.create(folder, lock) as store:
            execute(Session(folder, store, config, context, backend, reporter))
    return folder


def resume_run(
    folder: Path,
    budget: Budget,
    places: Places,
    reporter: Reporter | None = None,
    task: Task | None = None,
    cluster: Cluster | None = None,
) -> Path:
    """Carry on a run, finished or not; finished evaluations are answered from its store.

    Raises:
        UserError: if `folder` is no run, teacher or data are not those it was started with, or the
            budget has fewer generations than the run has finished.
        UnfinishedRun: if it ended early and can be carried on.
    """
    stored, reporter = read_run(folder), reporter or Reporter()
    kept = RunConfig.read(folder)
    refuse_older(stored.get("config"), folder)
    use_threads(places.threads)
    with _writer(folder) as store:
        remove_orphans(folder)
        config = _resumed_config(folder, store, kept, budget)
        if budget.students:
            whole = len(store.generations()) >= kept.search.generations
            ended = stored.get("status") == "finished" or whole
            check_students(folder, store, kept, budget.students, ended)
        here = config if task is not None else moved_config(folder, config, places)
        task = task or here.task(places.images_in_memory, reporter)
        places = replace(places, device=device_of_resumed(folder, stored, places.device))
        context = _context(task, here, places, reporter)
        _say_data(context.data, reporter)
        scales = check_resumed(folder, stored, context, cluster)
        with open_backend(context, here, places, scales, cluster) as backend:
            note = compare_devices(folder, stored.get("devices"), backend.timing.devices)
            if note:
                reporter.say(note)
            stored |= new_places(stored, places)
            if not budget.students:  # else the run stays as it was until they are done
                stored |= {"config": asdict(config), "status": "running"}
            write_run(folder, stored)
            write_layout(folder, context.layout)
            execute(Session(folder, store, here, context, backend, reporter, budget.students))
    return folder


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        status: `finished`, `interrupted` or `stopped`.
        confirmed: the latencies that were measured again.
        error: what ended it early.
        found_nothing: whether there is nothing to write: the search itself was refused.
    """

    status: str
    confirmed: Confirmed
    error: BaseException | None = None
    found_nothing: bool = False


def execute(session: Session) -> None:
    """Search and finish, or distil the session's students, and write what was found in any case.

    Raises:
        UserError: if it stopped for a reason.
        KeyboardInterrupt: if it was interrupted, or nobody reads any more what it says.
    """
    ending = _work(session)
    if ending.found_nothing:
        write_run(session.folder, {**read_run(session.folder), "status": ending.status})
    else:
        write_results(session, ending.status, ending.confirmed)
    if ending.error is not None:
        raise ending.error


def _work(session: Session) -> Ending:
    """All stages in turn, and how they ended."""
    confirmed = Confirmed()
    try:
        announce(session)
        if not session.students:
            search(session)
        searched = usable_students(session)
        confirmed = finish(session, searched)
        # A step of its own: interrupted in it, the rows still have the latencies measured again.
        with session.timed("front"):
            score_front(session, searched, confirmed)
        return Ending("finished", confirmed)
    except LatencyError as error:
        # Everything else of the finalists is on disk: their rows are written before it is said.
        return Ending("stopped", confirmed, _unconfirmed(session, error))
    except (KeyboardInterrupt, BrokenPipeError):
        session.tell(f"stopped; {len(session.store)} evaluations are kept in {session.folder}")
        return Ending("interrupted", confirmed, KeyboardInterrupt())
    except UserError as error:
        return Ending("stopped", confirmed, error, found_nothing=not session.students)
    finally:
        with suppress(OSError):  # the terminal may be gone
            session.reporter.close()


def _unconfirmed(session: Session, error: LatencyError) -> UserError:
    message = f"the finalists' latency was not confirmed ({error})"
    if session.students:
        return UserError(f"{message}; continue with the same command")
    return UnfinishedRun(message, session.folder)


def _say_data(data: ImageData, reporter: Reporter) -> None:
    """What the images are, and what became of every file."""
    if data.table is not None:
        reporter.say("\n".join(data.table.lines()), data=asdict(data.table))


def _refuse_uncuttable(context: TeacherContext) -> None:
    """Refuse a network of which nothing can be left out."""
    if not context.layout.length:
        whole = context.graph.describe_uncut()
        raise UserError(
            f"nothing of this network can be left out ({whole or 'all layers are kept'}); expected "
            "a convolutional network with layers whose widths may change"
        )


def _with_least_accuracy(config: RunConfig, context: TeacherContext) -> RunConfig:
    """The configuration with a least accuracy, unless one is given; checks the teacher's own."""
    floor, limits = least_accuracy(context, config), config.search.limits
    if limits.min_accuracy is not None:
        return config
    limits = replace(limits, min_accuracy=floor)
    return replace(config, search=replace(config.search, limits=limits))


def _record(
    config: RunConfig, context: TeacherContext, timing: Timing, latency_on: str | None
) -> dict[str, Any]:
    """What `run.json` says of a run that begins."""
    return {
        "config": asdict(config),
        "teacher_digest": context.teacher_digest,
        "network_digest": network_digest(context.graph.module),
        "data_digest": context.data.digest,
        "metric": metric_name(context.data),
        "computed_on": context.device.type,
        "metric_label": context.data.metric_label,
        "genome_bits": context.layout.length,
        "teacher_latency_ms": timing.teacher_latency_ms,
        "teacher_latencies_ms": timing.teacher_latencies_ms,
        "device": timing.device,
        "devices": timing.devices,
        "latency_on": latency_on,
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "status": "running",
    }


def _resumed_config(folder: Path, store: Store, kept: RunConfig, budget: Budget) -> RunConfig:
    """The run's configuration with another budget.

    Raises:
        UserError: if the run has finished more generations than that.
    """
    config = kept.with_budget(budget)
    if budget.students:
        return replace(kept, distill=config.distill, finalists=len(budget.students))
    finished = len(store.generations())
    if config.search.generations < finished:
        raise UserError(
            f"{folder} has {finished} finished generations, more than the "
            f"{config.search.generations} asked for: resume it with a larger budget or none"
        )
    return config


def _writer(folder: Path) -> Store:
    """A run's store; a new one if the run was killed before it had any."""
    names = {path.name for path in folder.iterdir() if path.suffix != TEMPORARY}
    return (
        Store.create(folder)
        if names <= {RUN_FILE, LOCK_FILE, LAYOUT_FILE, CUT_FILE}
        else Store.open(folder)
    )


def _context(
    task: Task, config: RunConfig, places: Places, reporter: Reporter, first: bool = False
) -> TeacherContext:
    """The teacher made ready; where it is the `first` time, how good it is is said before."""

    def check(teacher: nn.Module, data: ImageData) -> None:
        for line in check_teacher(teacher, data, places.expected_accuracy).lines():
            reporter.say(line)

    remove_orphans(default_cache_dir(), CACHE_ORPHANS_S)
    wanted = first or places.expected_accuracy is not None
    device = find_device(places.device)
    if device.type != "cpu":
        reporter.say(f"students are computed on {described(device)}")
    try:
        return load_context(
            task, places.data_dir, config.calibration, rules=config.rules,
            say=reporter.say, check=check if wanted else None, device=device,
        )  # fmt: skip
    except BaseException:
        reporter.close()  # it may have shown how far the reading of the images is
        raise
