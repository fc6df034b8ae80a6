"""One run from teacher to exported finalists, in a folder that it can be resumed from."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from moodistill import pareto, report
from moodistill.context import TeacherContext, default_cache_dir, load_context, use_threads
from moodistill.distill import SoftTargets
from moodistill.errors import UserError
from moodistill.evaluation import Latency
from moodistill.finalists import finish
from moodistill.latency import LatencyError, LatencyMeter, device_fingerprint
from moodistill.recipe import Evaluator, teacher_onnx
from moodistill.results import (
    Accuracies,
    Searched,
    make_rows,
    measure_front,
    measure_teacher,
    objectives,
    write_results,
)
from moodistill.run_config import Budget, RunConfig
from moodistill.run_folder import new_run_folder, read_run, versions, write_run
from moodistill.search import Progress, Search
from moodistill.store import Store
from moodistill.task import Task, load_task


@dataclass(frozen=True)
class Places:
    """Where data and caches are on this machine (not part of a run's identity)."""

    data_dir: Path | None = None
    weights: Path | None = None
    threads: int | None = None


def start_run(config: RunConfig, out: Path, places: Places) -> Path:
    """Make the folder `out` and run; returns the folder.

    Raises:
        UserError: if `out` holds anything, or data or teacher cannot be had.
    """
    use_threads(places.threads)
    task = load_task(config.model)
    context = _context(task, config, places)
    # A fifth of the way from chance to perfect: below, a student has learnt next to nothing.
    chance = 1.0 / len(context.data.labels)
    floor = round(chance + 0.2 * (1.0 - chance), 4)
    config = replace(config, search=replace(config.search, min_accuracy=floor))
    folder = new_run_folder(out)
    with _meter(context, config, None) as meter:
        write_run(
            folder,
            {
                "config": asdict(config),
                "teacher_digest": context.teacher_digest,
                "data_digest": context.data.digest,
                "genome_bits": context.layout.length,
                "teacher_latency_ms": meter.teacher_latency_ms,
                "device": device_fingerprint(config.latency_threads),
                "versions": versions(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "status": "running",
            },
        )
        with Store.create(folder) as store:
            _execute(folder, store, config, context, meter)
    return folder


def resume_run(folder: Path, budget: Budget, places: Places) -> Path:
    """Carry on a run, finished or not; finished evaluations are answered from its store.

    Raises:
        UserError: if `folder` is no run, teacher or data are not those it was started with, or the
            budget has fewer generations than the run has finished.
    """
    stored = read_run(folder)
    config = RunConfig.from_dict(stored.get("config", {})).with_budget(budget)
    use_threads(places.threads)
    with Store.open(folder) as store:
        finished = len(store.generations())
        if config.search.generations < finished:
            raise UserError(
                f"{folder} has {finished} finished generations, more than the "
                f"{config.search.generations} asked for: resume it with a larger budget or none"
            )
        context = _context(load_task(config.model), config, places)
        for key, found in (
            ("teacher_digest", context.teacher_digest),
            ("data_digest", context.data.digest),
            ("genome_bits", context.layout.length),
        ):
            if stored.get(key) != found:
                raise UserError(
                    f"{folder} was started with {key} {stored.get(key)}, found {found}; "
                    "resume it with the same teacher and data"
                )
        write_run(folder, {**stored, "config": asdict(config), "status": "running"})
        with _meter(context, config, stored.get("teacher_latency_ms")) as meter:
            _execute(folder, store, config, context, meter)
    return folder


def _context(task: Task, config: RunConfig, places: Places) -> TeacherContext:
    return load_context(task, places.data_dir, places.weights, config.calibration)


def _meter(context: TeacherContext, config: RunConfig, calibrated: float | None) -> LatencyMeter:
    try:
        return LatencyMeter(
            teacher_onnx(context),
            context.data.input_shape,
            config.latency_threads,
            teacher_latency_ms=calibrated,
        )
    except LatencyError as error:
        raise UserError(
            f"the teacher cannot be timed in ONNX Runtime ({error}); expected a network that runs "
            "there on this machine"
        ) from error


def _execute(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    meter: LatencyMeter,
) -> None:
    _estimate(context, config, len(store))
    evaluator = Evaluator(context, config.recipe, meter.measure)
    search = Search(context.layout, config.search, store, evaluator.evaluate)
    known = Accuracies(folder / "accuracies.json")
    confirmed: dict[str, Latency] = {}
    status, problem = "interrupted", ""
    try:
        _search(search, store)
        confirmed = _finish(folder, store, config, context, meter, known)
        status = "finished"
    except LatencyError as error:
        # Everything else of the finalists is on disk: their rows are written before it is said.
        problem = f"the finalists' latency was not confirmed ({error})"
    except KeyboardInterrupt:
        tqdm.write(f"stopped; {len(store)} evaluations are kept. Carry on with: --resume {folder}")
    searched = Searched.read(store, config.search.min_accuracy)
    if searched is not None:
        rows = make_rows(folder, searched, known.known, confirmed, meter.teacher_latency_ms)
        title = f"{config.model}: {len(store)} students searched, {config.preset} preset"
        write_results(folder, store, rows, title)
        print(report.front_table(rows))
    stored = read_run(folder)
    stored.update(status=status, rejected_latency_windows=meter.rejected_windows)
    write_run(folder, stored)
    if problem:
        raise UserError(f"{problem}; carry on with: --resume {folder}")
    if status == "interrupted":
        raise KeyboardInterrupt


def _estimate(context: TeacherContext, config: RunConfig, stored: int) -> None:
    """Print about how long the run takes, from the teacher's speed on this machine."""
    images = context.samples.images[:64]
    with torch.no_grad():
        context.graph.module(images[:8])
        began = time.perf_counter()
        context.graph.module(images)
    per_image = (time.perf_counter() - began) / len(images)
    # A student of the search costs about a quarter of the teacher; training, three passes.
    passes = config.recipe.validation_images + 1.5 * config.calibration.images
    count = max(0, config.search.population * config.search.generations - stored)
    search = count * (0.25 * per_image * passes + 0.6)
    data = context.data
    step = config.distill.batch_size * per_image
    checks = 0.2 * per_image * (2 * len(data.validation) + len(data.test))
    final = config.finalists * (config.distill.steps * step * 0.8 + checks)
    final += min(config.distill.steps, config.distill.views) * step
    # The front, about one and a half populations, is checked on all validation images.
    passes = len(data.validation) + 1.5 * config.calibration.images
    front = 1.5 * config.search.population * 0.25 * per_image * passes
    tqdm.write(
        f"about {search / 60:.0f} min for {count} evaluations, {final / 60:.0f} min for "
        f"{config.finalists} finalists and {front / 60:.0f} min for the front on this machine"
    )


def _search(search: Search, store: Store) -> None:
    total = search.config.population * search.config.generations
    with tqdm(total=total, unit="student", disable=None, file=sys.stderr) as bar:
        volume = 0.0
        for progress in search.run():
            bar.update(1)
            volume = progress.hypervolume if progress.generation_done else volume
            bar.set_postfix(
                generation=progress.generation, front=progress.front_size, hv=f"{volume:.4f}"
            )
            _tell(progress)


def _tell(progress: Progress) -> None:
    if progress.last.failure is not None and progress.replayed != progress.evaluated:
        tqdm.write(f"student failed: {progress.last.failure}")
    if progress.generation_done:
        tqdm.write(
            f"generation {progress.generation}: {progress.evaluated} evaluated "
            f"({progress.replayed} from the store), front {progress.front_size}, "
            f"hypervolume {progress.hypervolume:.4f}"
        )


def _finish(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    meter: LatencyMeter,
    known: Accuracies,
) -> dict[str, Latency]:
    """Distil, export and test the finalists; their latency confirmed in a fresh process."""
    searched = Searched.read(store, config.search.min_accuracy)
    if searched is None or not searched.students:
        raise UserError(
            f"{folder} holds no student that works; see the failures in evaluations.sqlite, "
            "or search on with more --generations"
        )
    names = list(searched.students)
    picked = pareto.pick_finalists(
        objectives(list(searched.students.values())),
        config.finalists,
        # Below half of the teacher's accuracy a student is no candidate for a device.
        0.5 * searched.teacher.accuracy,
    )
    cache = default_cache_dir()
    targets = SoftTargets(
        context.graph.module, context.data, config.distill, cache, context.teacher_digest
    )
    steps = config.distill.steps
    with tqdm(total=steps * len(picked), unit="step", disable=None, file=sys.stderr) as bar:
        for place, index in enumerate(picked):
            name = names[index]

            def step(done: int, loss: float, name: str = name, base: int = place * steps) -> None:
                bar.update(base + done - bar.n)
                bar.set_postfix(student=name, loss=f"{loss:.3f}")

            try:
                finalist = finish(
                    context, searched.students[name], name, folder / "students" / name,
                    config.recipe, config.distill, targets, step,
                )  # fmt: skip
            except (FloatingPointError, UserError) as error:
                # A diverged distillation or a refused export costs this finalist, not the run.
                tqdm.write(f"{name} is no finalist: {error}")
                continue
            targets.save()
            tqdm.write(
                f"{name}: validation accuracy {finalist.accuracy_before:.4f} -> "
                f"{finalist.accuracy:.4f} after {steps} steps"
            )
    measure_teacher(known, context, cache)
    finalists = set(searched.finalists(folder))
    measure_front(known, searched, context, config.recipe, finalists)
    models = {n: (folder / "students" / n / "model.onnx").read_bytes() for n in sorted(finalists)}
    return meter.confirm(models) if models else {}
