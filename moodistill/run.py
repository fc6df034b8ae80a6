"""One run from teacher to exported finalists, in a folder that it can be resumed from."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moodistill import front, report
from moodistill.context import TeacherContext, default_cache_dir, load_context, use_threads
from moodistill.distill import DistillConfig, SoftTargets
from moodistill.errors import UserError
from moodistill.evaluation import Evaluation, Latency
from moodistill.finalists import Finalist, finish, objectives
from moodistill.inherit import InheritConfig
from moodistill.latency import LatencyMeter, device_fingerprint
from moodistill.recipe import Evaluator, Recipe, make_student, measure_with, teacher_onnx
from moodistill.search import Progress, Search, SearchConfig
from moodistill.statistics import CalibrationConfig
from moodistill.store import Store, new_run_folder, read_run, versions, write_run
from moodistill.task import Task, load_task
from moodistill.training import accuracy


@dataclass(frozen=True)
class Preset:
    """What a preset sets; everything else is the same in all of them."""

    generations: int
    finalists: int
    distill_steps: int


PRESETS = {
    "quick": Preset(generations=5, finalists=4, distill_steps=100),
    "standard": Preset(generations=13, finalists=6, distill_steps=500),
    "thorough": Preset(generations=60, finalists=10, distill_steps=10_000),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result but the machine; stored in `run.json`."""

    model: str
    preset: str
    search: SearchConfig
    recipe: Recipe
    calibration: CalibrationConfig
    distill: DistillConfig
    finalists: int
    latency_threads: int = 1

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> RunConfig:
        """The inverse of `asdict`.

        Raises:
            UserError: if a key is missing or unknown.
        """
        try:
            recipe = dict(stored["recipe"])
            recipe["inherit"] = InheritConfig(**recipe["inherit"])
            return RunConfig(
                model=stored["model"],
                preset=stored["preset"],
                search=SearchConfig(**stored["search"]),
                recipe=Recipe(**recipe),
                calibration=CalibrationConfig(**stored["calibration"]),
                distill=DistillConfig(**stored["distill"]),
                finalists=int(stored["finalists"]),
                latency_threads=int(stored["latency_threads"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"run.json does not hold a configuration of this version ({error}); "
                "start a new run with another --out"
            ) from error

    def with_preset(self, name: str) -> RunConfig:
        """The same run with another preset's generations and finalists' budget."""
        preset = get_preset(name)
        return replace(
            self,
            preset=name,
            search=replace(self.search, generations=preset.generations),
            distill=replace(self.distill, steps=preset.distill_steps),
            finalists=preset.finalists,
        )


def get_preset(name: str) -> Preset:
    """A preset by name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Places:
    """Where data and caches are on this machine (not part of a run's identity)."""

    data_dir: Path | None = None
    weights: Path | None = None
    cache_dir: Path | None = None
    threads: int | None = None


def start_run(config: RunConfig, out: Path, places: Places) -> Path:
    """Make the folder `out` and run; returns the folder.

    Raises:
        UserError: if `out` holds anything, or data or teacher cannot be had.
    """
    use_threads(places.threads)
    task = load_task(config.model)
    context = _context(task, config, places)
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
                "device": device_fingerprint(),
                "versions": versions(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "status": "running",
            },
        )
        with Store.create(folder) as store:
            _execute(folder, store, config, context, meter, places)
    return folder


def resume_run(folder: Path, preset: str | None, places: Places) -> Path:
    """Carry on a run, finished or not; finished evaluations are answered from its store.

    Raises:
        UserError: if `folder` is no run, or teacher or data are not those it was started with.
    """
    stored = read_run(folder)
    config = RunConfig.from_dict(stored.get("config", {}))
    if preset is not None:
        wanted = config.with_preset(preset)
        if wanted.search.generations < config.search.generations:
            raise UserError(
                f"{folder} was run with preset {config.preset!r} "
                f"({config.search.generations} generations); {preset!r} has fewer "
                f"({wanted.search.generations}): resume with a larger preset or none"
            )
        config = wanted
    use_threads(places.threads)
    with Store.open(folder) as store:
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
            _execute(folder, store, config, context, meter, places)
    return folder


def _context(task: Task, config: RunConfig, places: Places) -> TeacherContext:
    return load_context(task, places.data_dir, places.weights, config.calibration, places.cache_dir)


def _meter(context: TeacherContext, config: RunConfig, calibrated: float | None) -> LatencyMeter:
    return LatencyMeter(
        teacher_onnx(context),
        context.data.input_shape,
        config.latency_threads,
        teacher_latency_ms=calibrated,
    )


def _execute(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    meter: LatencyMeter,
    places: Places,
) -> None:
    say = tqdm.write
    _estimate(context, config, say)
    evaluator = Evaluator(context, config.recipe, measure_with(meter))
    search = Search(context.layout, config.search, store, evaluator.evaluate)
    try:
        _search(search, store)
        rows, finalists = _finish(folder, store, config, context, meter, places)
        status = "finished"
    except KeyboardInterrupt:
        say(f"stopped; {len(store)} evaluations are kept. Carry on with: --resume {folder}")
        rows, finalists = _rows(store, context, {}, {}, {}, meter), []
        status = "interrupted"
    _write_results(folder, store, config, rows)
    stored = read_run(folder)
    stored.update(
        status=status,
        rejected_latency_windows=meter.rejected_windows,
        finalists=[f.student for f in finalists],
    )
    write_run(folder, stored)
    if rows:
        print(report.front_table(rows))
    if status == "interrupted":
        raise KeyboardInterrupt


def _estimate(context: TeacherContext, config: RunConfig, say: Callable[[str], None]) -> None:
    """Print about how long the run takes, from the teacher's speed on this machine."""
    images = context.samples.images[:64]
    with torch.no_grad():
        context.graph.module(images[:8])
        began = time.perf_counter()
        context.graph.module(images)
    per_image = (time.perf_counter() - began) / len(images)
    # A student of the search costs about a fifth of the teacher; training three forward passes.
    passes = config.recipe.validation_images + 1.5 * config.calibration.images
    search = config.search.population * config.search.generations * (0.2 * per_image * passes + 0.6)
    data = context.data
    step = config.distill.batch_size * per_image
    checks = 0.2 * per_image * (2 * len(data.validation) + len(data.test))
    final = config.finalists * (config.distill.steps * step * 0.8 + checks)
    final += min(config.distill.steps, config.distill.views) * step
    say(
        f"about {search / 60:.0f} min for {config.search.population * config.search.generations} "
        f"evaluations and {final / 60:.0f} min for {config.finalists} finalists on this machine"
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
    places: Places,
) -> tuple[list[front.Student], list[Finalist]]:
    """Distil, export, confirm and test the finalists; the rows of `pareto.csv`."""
    candidates = [e for e in store.all() if e.latency is not None]
    # The teacher itself is a row of its own, never a finalist.
    teacher, *others = candidates
    chosen = front.pick_finalists(objectives(others), config.finalists, _useful(config, teacher))
    numbers = {e.genome_hash: n for n, e in enumerate(store.all())}
    cache = places.cache_dir or default_cache_dir()
    targets = SoftTargets(
        context.graph.module, context.data, config.distill, cache, context.teacher_digest
    )
    finalists = []
    steps = config.distill.steps
    with tqdm(total=steps * len(chosen), unit="step", disable=None, file=sys.stderr) as bar:
        for place, index in enumerate(chosen):
            evaluation = others[index]
            name = student_id(numbers[evaluation.genome_hash])

            def step(done: int, loss: float, name: str = name, base: int = place * steps) -> None:
                bar.update(base + done - bar.n)
                bar.set_postfix(student=name, loss=f"{loss:.3f}")

            finalists.append(
                finish(
                    context, evaluation, name, folder / "students" / name, config.recipe,
                    config.distill, targets, step,
                )
            )  # fmt: skip
            targets.save()
            last = finalists[-1]
            tqdm.write(
                f"{name}: validation accuracy {last.accuracy_before:.4f} -> {last.accuracy:.4f}"
            )
    models = {
        f.student: (folder / "students" / f.student / "model.onnx").read_bytes() for f in finalists
    }
    confirmed = meter.confirm(models) if models else {}
    by_hash = {f.genome_hash: f for f in finalists}
    accuracies = _searched_accuracies(folder, store, config, context, set(by_hash))
    return _rows(store, context, by_hash, confirmed, accuracies, meter), finalists


def _useful(config: RunConfig, teacher: Evaluation) -> float:
    """Finalists are picked above half of the teacher's search accuracy, if there are any."""
    return max(config.search.min_accuracy, 0.5 * teacher.accuracy)


def student_id(number: int) -> str:
    """The name of the student that was evaluated as number `number`."""
    return f"s{number:04d}"


def _front(store: Store) -> list[tuple[int, Evaluation]]:
    """Non-dominated successful evaluations but the teacher's, with their numbers."""
    usable = [(n, e) for n, e in enumerate(store.all()) if e.latency is not None and n > 0]
    if not usable:
        return []
    mask = front.non_dominated(objectives([e for _, e in usable]))
    return [pair for pair, keep in zip(usable, mask, strict=True) if keep]


def _searched_accuracies(
    folder: Path, store: Store, config: RunConfig, context: TeacherContext, skip: set[str]
) -> dict[str, float]:
    """Accuracy of the front's other students on all held-out images, kept between resumes."""
    path = folder / "accuracies.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    todo = [e for _, e in _front(store) if e.genome_hash not in skip and e.genome_hash not in known]
    for evaluation in tqdm(todo, unit="student", desc="front", disable=None, file=sys.stderr):
        genome = context.layout.unpack(evaluation.genome)
        student = make_student(context, genome, config.recipe)
        known[evaluation.genome_hash] = accuracy(
            student.module, context.data, context.data.validation
        )
    from moodistill.store import write_json_atomic

    write_json_atomic(path, known)
    return known


def _rows(
    store: Store,
    context: TeacherContext,
    finalists: dict[str, Finalist],
    confirmed: dict[str, Latency],
    accuracies: dict[str, float],
    meter: LatencyMeter,
) -> list[front.Student]:
    """The teacher, the finalists, and the rest of the searched front."""
    evaluations = store.all()
    if not evaluations or evaluations[0].latency is None:
        return []
    reference = meter.teacher_latency_ms

    def row(number: int, one: Evaluation) -> front.Student:
        finalist = finalists.get(one.genome_hash)
        name = student_id(number)
        latency = confirmed.get(name, one.latency)
        assert latency is not None
        return front.Student(
            student=name,
            stage="distilled" if finalist else "searched",
            search_accuracy=one.accuracy,
            accuracy=finalist.accuracy if finalist else accuracies.get(one.genome_hash),
            test_accuracy=finalist.test_accuracy if finalist else None,
            parameters=one.parameters,
            macs=one.macs,
            latency_ms=latency.latency_ms,
            latency_ms_low=latency.low_ms,
            latency_ms_high=latency.high_ms,
            teacher_latency_ms=reference,
            size_bytes=finalist.size_bytes if finalist else one.size_bytes,
            onnx=f"students/{name}/model.onnx" if finalist else "",
            genome_hash=one.genome_hash,
            summary=one.summary,
        )

    known = teacher_accuracies(context) if finalists else None
    teacher = replace(
        row(0, evaluations[0]),
        student="teacher",
        stage="teacher",
        accuracy=known["validation"] if known else None,
        test_accuracy=known["test"] if known else None,
    )
    members = _front(store)
    on_front = {e.genome_hash for _, e in members}
    # A finalist of an earlier, smaller preset may have left the front: it stays exported.
    members += [
        (n, e)
        for n, e in enumerate(evaluations)
        if e.genome_hash in finalists and e.genome_hash not in on_front
    ]
    return [teacher, *(row(n, e) for n, e in members)]


def teacher_accuracies(context: TeacherContext) -> dict[str, float]:
    """The teacher's accuracy on all validation and all test images, cached by digests."""
    name = f"teacher-{context.teacher_digest[:16]}-{context.data.digest[:16]}.json"
    path = default_cache_dir() / name
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
            return {key: float(stored[key]) for key in ("validation", "test")}
        except (ValueError, KeyError, TypeError):
            path.unlink()
    from moodistill.store import write_json_atomic

    data, teacher = context.data, context.graph.module
    result = {
        "validation": accuracy(teacher, data, data.validation),
        "test": accuracy(teacher, data, data.test),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, result)
    return result


def _write_results(
    folder: Path, store: Store, config: RunConfig, rows: list[front.Student]
) -> None:
    """`pareto.csv`, `pareto.json` and the figures."""
    if not rows:
        return
    front.write_front(folder / "pareto.csv", rows)
    title = f"{config.model}: {len(store)} students searched, {config.preset} preset"
    report.plot_front(rows, folder / "pareto.png", title)
    report.plot_history(store.generations(), folder / "history.png")
