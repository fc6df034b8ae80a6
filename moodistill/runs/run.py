"""One run from teacher to exported finalists, in a folder that it can be resumed from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from moodistill.config import Budget, RunConfig
from moodistill.data.images import ImageData, metric_name
from moodistill.errors import UserError
from moodistill.finalists.confirm import SLACK, still_confirmed
from moodistill.finalists.distil import Distiller, read_finalists
from moodistill.genome.layout_file import LAYOUT_FILE, write_layout
from moodistill.io.atomic import TEMPORARY, remove_orphans
from moodistill.io.cache import default_cache_dir
from moodistill.latency.meter import LatencyError
from moodistill.pareto.evaluation import Latency
from moodistill.progress import Reporter
from moodistill.report import figures as report
from moodistill.report.page import structure_data, write_report
from moodistill.runs.backend import (
    Places,
    calibration,
    make_distiller,
    make_executor,
    make_meter,
    timing_device,
    timing_devices,
)
from moodistill.runs.compatibility import (
    check_resumed,
    check_students,
    compare_devices,
    least_accuracy,
)
from moodistill.runs.estimate import estimate_seconds
from moodistill.runs.finish import changed_places, finish_run, package_finalists, score_front
from moodistill.runs.rows import Accuracies, make_rows, write_results
from moodistill.search.driver import Progress, Search
from moodistill.search.executor import Executor
from moodistill.search.surrogate import TRUSTED
from moodistill.storage.folder import (
    LOCK_FILE,
    RUN_FILE,
    new_run_folder,
    read_run,
    versions,
    write_run,
)
from moodistill.storage.lock import writer_lock
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.context import TeacherContext, load_context, use_threads
from moodistill.teacher.check import check_teacher
from moodistill.teacher.task import Task, load_task
from moodistill.teacher.weights import network_digest

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster
    from moodistill.runs.backend import Meter

CACHE_ORPHANS_S = 600.0  # nothing that is written to the cache takes so long


def start_run(
    config: RunConfig,
    out: Path,
    places: Places,
    reporter: Reporter | None = None,
    task: Task | None = None,
    cluster: Cluster | None = None,
    expected_accuracy: float | None = None,
) -> Path:
    """Make the folder `out` and run; returns the folder. `task` None loads `config.model`.

    The first thing said is how good the teacher is; one that falls short of `expected_accuracy` by
    more than two points is refused.

    Raises:
        UserError: if `out` holds anything, or data or teacher cannot be had.
    """
    use_threads(places.threads)
    task = task or load_task(config.model, config.own)
    reporter = reporter or Reporter()

    def first_word(teacher: nn.Module, data: ImageData) -> None:
        for line in check_teacher(teacher, data, expected_accuracy).lines():
            reporter.say(line)

    context = _context(task, config, places, reporter, first_word)
    if not context.layout.length:
        whole = "; ".join(f"{name} ({why})" for name, why in context.graph.uncut().items())
        raise UserError(
            f"nothing of this network can be left out ({whole or 'all layers are kept'}); expected "
            "a convolutional network with layers whose widths may change"
        )
    floor = least_accuracy(context, config)
    limits = config.search.limits
    if limits.min_accuracy is None:
        limits = replace(limits, min_accuracy=floor)
        config = replace(config, search=replace(config.search, limits=limits))
    folder = new_run_folder(out)
    with writer_lock(folder) as lock, make_meter(context, config, None, cluster) as meter:
        new_run_folder(folder, locked=True)  # nobody has begun a run in it since
        write_run(
            folder,
            {
                "config": asdict(config),
                "teacher_digest": context.teacher_digest,
                "network_digest": network_digest(context.graph.module),
                "data_digest": context.data.digest,
                "metric": metric_name(context.data),
                "genome_bits": context.layout.length,
                "teacher_latency_ms": meter.teacher_latency_ms,
                "teacher_latencies_ms": calibration(meter),
                "device": timing_device(meter, config),
                "devices": timing_devices(meter, config),
                "latency_on": cluster.config.place if cluster is not None else None,
                "versions": versions(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "status": "running",
            },
        )
        write_layout(folder, context.layout)
        with Store.create(folder, lock) as store:
            executor = make_executor(context, config, places, meter, cluster)
            distil = make_distiller(context, config, places, cluster)
            _execute(folder, store, config, context, meter, reporter, executor, distil)
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
    """
    stored = read_run(folder)
    kept = RunConfig.from_dict(stored.get("config", {}))
    config = kept.with_budget(budget)
    use_threads(places.threads)
    with _writer(folder) as store:
        remove_orphans(folder)
        finished = len(store.generations())
        if budget.students:
            config = replace(kept, distill=config.distill, finalists=len(budget.students))
            ended = stored.get("status") == "finished" or finished >= kept.search.generations
            check_students(folder, store, kept, budget.students, ended)
        elif config.search.generations < finished:
            raise UserError(
                f"{folder} has {finished} finished generations, more than the "
                f"{config.search.generations} asked for: resume it with a larger budget or none"
            )
        reporter = reporter or Reporter()
        task = task or load_task(config.model, config.own)
        context = _context(task, config, places, reporter)
        scales = check_resumed(folder, stored, context, cluster)
        with make_meter(context, config, scales, cluster) as meter:
            note = compare_devices(folder, stored.get("devices"), timing_devices(meter, config))
            if note:
                reporter.say(note)
            if not budget.students:  # else the run stays as it was until they are done
                write_run(folder, {**stored, "config": asdict(config), "status": "running"})
            write_layout(folder, context.layout)
            executor = make_executor(context, config, places, meter, cluster)
            distil = make_distiller(context, config, places, cluster)
            _execute(
                folder, store, config, context, meter, reporter, executor, distil,
                budget.students,
            )  # fmt: skip
    return folder


def _writer(folder: Path) -> Store:
    """A run's store; a new one if the run was killed before it had any."""
    names = {path.name for path in folder.iterdir() if path.suffix != TEMPORARY}
    return (
        Store.create(folder) if names <= {RUN_FILE, LOCK_FILE, LAYOUT_FILE} else Store.open(folder)
    )


def _context(
    task: Task,
    config: RunConfig,
    places: Places,
    reporter: Reporter,
    check: Callable[[nn.Module, ImageData], None] | None = None,
) -> TeacherContext:
    remove_orphans(default_cache_dir(), CACHE_ORPHANS_S)
    return load_context(
        task, places.data_dir, places.weights, config.calibration, rules=config.rules,
        say=reporter.say, check=check,
    )  # fmt: skip


def _execute(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    meter: Meter,
    reporter: Reporter,
    executor: Executor,
    distil: Distiller,
    students: Sequence[str] = (),
) -> None:
    """Search and finish, or with `students` distil these of a search that has ended."""
    seconds = estimate_seconds(context, config, len(store))
    minutes = {name: f"{value / 60:.0f} min" for name, value in seconds.items()}
    count = max(0, config.search.population * config.search.generations - len(store))
    if students:
        count, seconds["search"], minutes["search"] = 0, 0.0, "0 min"
    reporter.say(
        f"about {minutes['search']} for {count} evaluations, {minutes['finalists']} for "
        f"{config.finalists} finalists and {minutes['front']} for the front on this machine",
        estimated_seconds={name: round(value) for name, value in seconds.items()},
    )
    floor = config.search.limits.min_accuracy
    if floor and not students:
        reporter.say(f"students below {floor:.4f} of the search's images are out (--min-accuracy)")
    whole = context.graph.uncut()
    if whole:
        reporter.say(f"left whole: {'; '.join(f'{name} ({why})' for name, why in whole.items())}")
    search = Search(context.layout, config.search, store, executor)
    device = timing_device(meter, config)
    known = Accuracies(folder / "accuracies.json")
    confirmed: dict[str, Latency] = {}
    again = "carry on with the same command" if students else f"carry on with: --resume {folder}"
    ending: BaseException | None = None
    status = "stopped"
    try:
        if not students:
            _search(search, config, reporter)
        confirmed = finish_run(
            folder, store, config, context, meter, device, known, reporter, distil, students
        )
        # A step of its own: interrupted in it, the rows still have the latencies measured again.
        score_front(folder, store, config, context, confirmed, known, reporter)
        status = "finished"
    except LatencyError as error:
        # Everything else of the finalists is on disk: their rows are written before it is said.
        ending = UserError(f"the finalists' latency was not confirmed ({error}); {again}")
    except KeyboardInterrupt as error:
        status, ending = "interrupted", error
        reporter.say(f"stopped; {len(store)} evaluations are kept. {again[0].upper()}{again[1:]}")
    except UserError as error:
        if not students:
            write_run(folder, {**read_run(folder), "status": status})
            raise
        ending = error
    finally:
        reporter.close()
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    changes: dict[str, list[str]] = {}
    if searched is not None:
        if not confirmed:
            # Where the front is what it was, what was measured before is still all there is.
            before = still_confirmed(folder, searched)
            if students or before.keys() >= searched.near_front(SLACK).keys():
                confirmed = before
        rows = make_rows(folder, searched, known.known, confirmed, meter.teacher_latency_ms)
        title = f"{config.model}: {len(store)} students searched, {config.preset} preset"
        write_results(folder, store, rows, title)
        package_finalists(folder, rows, searched, context, device)
        reporter.say(report.front_table(rows))
        finalists = read_finalists(folder, searched)
        for name in searched.beyond(confirmed):
            if name in finalists:
                reporter.say(
                    f"{name} takes {confirmed[name].latency_ms:.3f} ms measured again, more than "
                    "--max-latency-ms; it is listed because it is distilled"
                )
        changes = changed_places(searched, confirmed)
        if changes["lost"] or changes["gained"]:
            reporter.say(
                f"measured again: {len(changes['lost'])} students lost their place in the front "
                f"to slower timings, {len(changes['gained'])} came in (run.json names them)"
            )
    stored = read_run(folder)
    if students:  # of a run whose search has ended, however this one did
        status = str(stored.get("status")).replace("running", "interrupted")
    stored.update(
        status=status,
        rejected_latency_windows=meter.rejected_windows,
        changed_by_confirmation=changes,
    )
    write_run(folder, stored)
    if searched is not None:
        write_report(folder, store, rows)
        for name in finalists:
            genome = context.layout.unpack(searched.students[name].genome)
            structure = structure_data(context.layout, genome)
            path = folder / f"structure-{name}.png"
            report.plot_structure(structure, path, f"{config.model}, student {name}")
    if ending is not None:
        raise ending


def _search(search: Search, config: RunConfig, reporter: Reporter) -> None:
    total = config.search.population * config.search.generations
    began, volume, failure = time.monotonic(), 0.0, ""
    with reporter.stage("searching", total, "student") as stage:
        for progress in search.run():
            fresh = progress.evaluated - progress.replayed
            minutes = (time.monotonic() - began) / 60
            volume = progress.hypervolume if progress.generation_done else volume
            if progress.last.failure is not None and fresh:
                failure = progress.last.failure
                reporter.say(f"student failed: {failure}")
            facts: dict[str, object] = {
                "generation": progress.generation,
                "front": progress.front_size,
                "hypervolume": f"{volume:.4f}",
            }
            if fresh:
                facts["per minute"] = f"{fresh / minutes:.1f}"
            if failure:
                facts["last failure"] = failure
            stage.update(progress.evaluated, **facts)
            if progress.generation_done:
                reporter.say(
                    f"generation {progress.generation}: {progress.evaluated} evaluated "
                    f"({progress.replayed} from the store), front {progress.front_size}, "
                    f"hypervolume {progress.hypervolume:.4f}{_surrogate(progress)}",
                    **facts,
                )
                values = {"hypervolume": volume, "front_size": float(progress.front_size)}
                reporter.measured(progress.evaluated, values)
                reporter.table(lambda: _best_so_far(search.store, config))


def _surrogate(progress: Progress) -> str:
    """How well the surrogate's ranks of the last generation were those that were measured."""
    found = progress.correlation
    if found is None:
        return ""
    off = "" if found >= TRUSTED else ", not listened to in the next generation"
    return f", surrogate's rank correlation {found:.2f}{off}"


def _best_so_far(store: Store, config: RunConfig) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a small table: ten of the front, spread over its latencies."""
    header = ["student", "accuracy", "parameters", "latency ms", "x faster"]
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    if searched is None or not searched.students or searched.teacher.latency is None:
        return header, []
    teacher_ms = searched.teacher.latency.latency_ms
    rows = []
    for name, one in searched.front().items():
        assert one.latency is not None
        ms = one.latency.latency_ms
        rows.append(
            (ms, [name, f"{one.accuracy:.4f}", f"{one.parameters:,}", f"{ms:.3f}",
                  f"{teacher_ms / ms:.1f}"])
        )  # fmt: skip
    rows.sort(reverse=True)
    step = max(1, len(rows) // 10)
    return header, [cells for _, cells in rows[::step][:10]]
