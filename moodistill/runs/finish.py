"""From the search's front to finalists that ship: distilled, quantised, confirmed, packaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moodistill.bundle.folder import write_package
from moodistill.bundle.int8 import Int8Result, judge_speed, quantise_student, save_int8
from moodistill.bundle.model import Origin
from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.finalists.confirm import Timer, confirm
from moodistill.finalists.distil import Distiller, float_model, read_finalists
from moodistill.io.cache import default_cache_dir
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.pareto import geometry as pareto
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.table import SUFFIX, FrontRow
from moodistill.progress import Reporter
from moodistill.runs.rows import Accuracies, exported_front, measure_front, measure_teacher
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.context import TeacherContext

FLOOR = 0.7  # of the teacher's accuracy


def finish_run(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    meter: Timer,
    device: Mapping[str, Any],
    known: Accuracies,
    reporter: Reporter,
    distil: Distiller,
    students: Sequence[str] = (),
) -> dict[str, Latency]:
    """Distil, quantise, export and test the finalists, and measure the front's latency again.

    With `students` these are distilled now, and who was a finalist before stays one. Whatever is
    already in `folder` for the same budget, or a larger one, is read back.

    Raises:
        UserError: if no student works, or one of `students` could not be distilled.
        LatencyError: if the latencies could not be measured again.
    """
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    if len(store) == 1:
        raise UserError(
            f"every student came out as the teacher: with whole SIMD blocks of "
            f"{config.search.simd_step} channels nothing of this network can be left out; start a "
            "new run with a smaller --simd-step"
        )
    if searched is None or not searched.students:
        raise UserError(
            f"{folder} holds no student that works; see the failures in evaluations.sqlite, "
            "or search on with more --generations"
        )
    chosen = {name: searched.students[name] for name in students} or _picked(searched, config)
    failed = _distil(folder, chosen, config, reporter, distil)
    if students and failed:
        raise UserError(f"{'; '.join(failed)}; what there was of it before is as it was")
    finalists = read_finalists(folder, searched)
    twins: dict[str, Int8Result] = {}
    if config.int8.wanted:
        with reporter.stage("INT8", len(finalists), "student") as stage:
            for place, (name, finalist) in enumerate(finalists.items()):
                genome = searched.students[name].genome
                twins[name] = quantise_student(
                    float_model(folder / "students" / name, context),
                    name + SUFFIX, finalist.accuracy, context.data,
                    Origin(context.task.name, context.teacher_digest, genome),
                    folder / "students" / (name + SUFFIX), device, config.int8,
                )  # fmt: skip
                stage.update(place + 1, student=name)
    measure_teacher(known, context, default_cache_dir())
    offered = [*finalists, *(twin.student for twin in twins.values() if not twin.refused)]
    shipped = {name: folder / "students" / name / "model.onnx" for name in offered}
    confirmed = confirm(folder, searched, shipped, context, meter, reporter)
    for name, twin in twins.items():
        _judge(folder, twin, confirmed, name, context, reporter)
    return confirmed


def score_front(
    folder: Path,
    store: Store,
    config: RunConfig,
    context: TeacherContext,
    confirmed: Mapping[str, Latency],
    known: Accuracies,
    reporter: Reporter,
) -> None:
    """Accuracy on all validation images of what the confirmed front has besides the finalists."""
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    assert searched is not None  # or `finish_run` would have refused
    front, finalists = exported_front(searched, confirmed), read_finalists(folder, searched)
    measure_front(known, front, context, config.recipe, set(finalists), reporter)


def _picked(searched: Searched, config: RunConfig) -> dict[str, Evaluation]:
    """The students of the front that the run itself makes finalists."""
    names = list(searched.students)
    picked = pareto.pick_finalists(
        searched.values(),
        config.finalists,
        # A student that keeps less of the teacher's accuracy, even before it is distilled, is no
        # candidate for a device.
        FLOOR * searched.teacher.accuracy,
    )
    return {names[index]: searched.students[names[index]] for index in picked}


def _distil(
    folder: Path,
    chosen: Mapping[str, Evaluation],
    config: RunConfig,
    reporter: Reporter,
    distil: Distiller,
) -> list[str]:
    """Distil the chosen; says of each one that failed why."""
    steps, failed = config.distill.steps, []
    with reporter.stage("distilling", steps * len(chosen), "step") as stage:
        finished = 0

        def step(name: str, done: int, loss: float) -> None:
            if done % 10 == 0 or done == steps:
                stage.update(finished * steps + done, student=name, loss=f"{loss:.3f}")

        for name, result in distil(chosen, folder / "students", step):
            finished += 1
            stage.update(finished * steps, student=name)
            if isinstance(result, Exception):
                # A diverged distillation or a refused export costs this finalist, not the run.
                failed.append(f"{name} was not distilled ({result})")
                reporter.say(failed[-1])
                continue
            reporter.say(
                f"{name}: validation accuracy {result.accuracy_before:.4f} -> "
                f"{result.accuracy:.4f} after {result.budget['steps']} steps",
                student=name,
                accuracy_before=result.accuracy_before,
                accuracy=result.accuracy,
            )
    return failed


def _judge(
    folder: Path,
    twin: Int8Result,
    confirmed: Mapping[str, Latency],
    name: str,
    context: TeacherContext,
    reporter: Reporter,
) -> None:
    """Keep an INT8 twin that is faster, with its test accuracy; refuse the others.

    Who passed once stays unless it is plainly slower now.
    """
    place = folder / "students" / twin.student
    if not twin.refused:
        latency, floating = confirmed[twin.student], confirmed[name]
        passed = twin.test_accuracy is not None
        if not passed or latency.low_ms > floating.latency_ms:
            twin = judge_speed(twin, latency, floating)
        if not twin.refused and not passed:
            model, data = (place / "model.onnx").read_bytes(), context.data
            reached = onnx_accuracy(model, data, data.test, torch.get_num_threads())
            twin = replace(twin, test_accuracy=reached)
        save_int8(place, twin)
    if twin.refused:
        reporter.say(f"{twin.student} is not offered: it {twin.refused}")


def package_finalists(
    folder: Path,
    rows: Sequence[FrontRow],
    searched: Searched,
    context: TeacherContext,
    device: Mapping[str, Any],
) -> None:
    """Complete the folder of every exported student into one that can be shipped."""
    teacher = next(row for row in rows if row.stage == "teacher")
    for row in rows:
        if row.onnx and (folder / row.onnx).is_file():
            genome = searched.students[row.student.removesuffix(SUFFIX)].genome
            origin = Origin(context.task.name, context.teacher_digest, genome)
            write_package((folder / row.onnx).parent, row, teacher, context.data, origin, device)


def changed_places(searched: Searched, confirmed: Mapping[str, Latency]) -> dict[str, list[str]]:
    """Ids that the second measurement put out of the front (`lost`) and into it (`gained`)."""
    if not confirmed.keys() & searched.students.keys():
        return {"lost": [], "gained": []}
    before, after = set(searched.front()), set(exported_front(searched, confirmed))
    return {"lost": sorted(before - after), "gained": sorted(after - before)}
