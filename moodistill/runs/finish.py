"""From the search's front to finalists: distilled, quantised, confirmed, and the front scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moodistill.bundle.int8 import Int8Result, judge_speed, quantise_student, save_int8
from moodistill.bundle.model import Origin
from moodistill.errors import UserError
from moodistill.finalists.confirm import Confirmed, confirm
from moodistill.finalists.distil import Finalist, float_model, read_finalists
from moodistill.io.cache import default_cache_dir
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.pareto import geometry as pareto
from moodistill.pareto.evaluation import Evaluation
from moodistill.pareto.table import SUFFIX
from moodistill.runs.accuracies import measure_teacher
from moodistill.runs.rows import exported_front
from moodistill.runs.session import Session
from moodistill.storage.folder import MODEL_FILE, STUDENTS
from moodistill.storage.searched import Searched
from moodistill.student.accuracy import inherited_accuracy
from moodistill.student.evaluator import make_student


def finish(session: Session, searched: Searched) -> Confirmed:
    """Distil, quantise and export the finalists, and measure the front's confirming latency.

    With `session.students` these are distilled now, and who was a finalist before stays one.
    Whatever is already in the folder for the same budget, or a larger one, is read back.

    Raises:
        UserError: if one of `session.students` could not be distilled.
        LatencyError: if the latencies could not be measured again.
    """
    with session.timed("finalists"):
        finalists = distil(session, searched)
    with session.timed("INT8"):
        twins = quantise(session, searched, finalists) if session.config.int8.wanted else {}
    measure_teacher(session.accuracies, session.context, default_cache_dir())
    offered = [*finalists, *(twin.student for twin in twins.values() if not twin.refused)]
    shipped = {name: session.student_folder(name) / MODEL_FILE for name in offered}
    with session.timed("latency"):
        confirmed = confirm(
            session.folder, searched, shipped, session.context, session.backend.timing.meter,
            session.reporter,
        )  # fmt: skip
    for name, twin in twins.items():
        judge(session, twin, name, confirmed)
    return confirmed


def usable_students(session: Session) -> Searched:
    """What the search has found.

    Raises:
        UserError: if no student works.
    """
    if len(session.store) == 1:
        raise UserError(
            f"every student came out as the teacher: with whole SIMD blocks of "
            f"{session.config.search.simd_step} channels nothing of this network can be left out; "
            "start a new run with a smaller `simd_step`"
        )
    searched = session.searched()
    if searched is None or not searched.students:
        raise UserError(
            f"{session.folder} holds no student that works; see the failures in "
            "evaluations.sqlite, or search on with more `generations`"
        )
    return searched


def distil(session: Session, searched: Searched) -> dict[str, Finalist]:
    """Distil the chosen students; all finalists that there are then, by name.

    Raises:
        UserError: if one of `session.students` could not be distilled.
    """
    asked = {name: searched.students[name] for name in session.students}
    failed = _distil(session, asked or _picked(session, searched))
    if asked and failed:
        raise UserError(f"{'; '.join(failed)}; what there was of it before is as it was")
    return read_finalists(session.folder, searched)


def _picked(session: Session, searched: Searched) -> dict[str, Evaluation]:
    """The students of the front that the run itself makes finalists."""
    names = list(searched.students)
    picked = pareto.pick_finalists(
        searched.values(),
        session.config.finalists,
        searched.teacher.accuracy - session.config.finalists_within,
    )
    within = session.config.finalists_within
    if len(picked) < session.config.finalists:
        session.reporter.say(
            f"{len(picked)} finalists, not {session.config.finalists}: no others of the front are "
            f"within {within:g} of the teacher's accuracy (finalists_within)"
        )
    return {names[index]: searched.students[names[index]] for index in picked}


def _distil(session: Session, chosen: Mapping[str, Evaluation]) -> list[str]:
    """Distil the chosen; says of each one that failed why."""
    steps, failed = session.config.distill.steps, []
    reporter = session.reporter
    with reporter.stage("distilling", steps * len(chosen), "step") as stage:
        finished = 0

        def step(name: str, done: int, loss: float) -> None:
            if done % 10 == 0 or done == steps:
                stage.update(finished * steps + done, student=name, loss=f"{loss:.3f}")

        folder = session.folder / STUDENTS
        for name, result in session.backend.distil(chosen, folder, step):
            finished += 1
            stage.update(finished * steps, student=name)
            if isinstance(result, Exception):
                # A diverged distillation or a refused export costs this finalist, not the run.
                failed.append(f"{name} was not distilled ({result})")
                reporter.say(failed[-1])
                continue
            metric = session.context.data.metric_label
            reporter.say(
                f"{name}: validation {metric} {result.accuracy_before:.4f} -> "
                f"{result.accuracy:.4f} after {result.budget['steps']} steps",
                student=name,
                accuracy_before=result.accuracy_before,
                accuracy=result.accuracy,
            )
    return failed


def quantise(
    session: Session, searched: Searched, finalists: Mapping[str, Finalist]
) -> dict[str, Int8Result]:
    """INT8 twins by the names of their float students."""
    context, twins = session.context, {}
    with session.reporter.stage("INT8", len(finalists), "student") as stage:
        for place, (name, finalist) in enumerate(finalists.items()):
            genome = searched.students[name].genome
            twins[name] = quantise_student(
                float_model(session.student_folder(name), context),
                name + SUFFIX, finalist.accuracy, context.data,
                Origin(context.task.name, context.teacher_digest, genome),
                session.student_folder(name + SUFFIX), session.device, session.config.int8,
            )  # fmt: skip
            stage.update(place + 1, student=name)
    return twins


def judge(session: Session, twin: Int8Result, name: str, confirmed: Confirmed) -> None:
    """Keep an INT8 twin that is faster than its student `name`, and test it; refuse the others.

    Who passed once stays unless it is plainly slower now.
    """
    folder = session.student_folder(twin.student)
    if not twin.refused:
        latency, floating = confirmed.latencies[twin.student], confirmed.latencies[name]
        passed = twin.test_accuracy is not None
        if not passed or latency.low_ms > floating.latency_ms:
            twin = judge_speed(twin, latency, floating)
        if not twin.refused and not passed:
            model, data = (folder / MODEL_FILE).read_bytes(), session.context.data
            reached = onnx_accuracy(model, data, data.test, torch.get_num_threads())
            twin = replace(twin, test_accuracy=reached)
        save_int8(folder, twin)
    if twin.refused:
        session.reporter.say(f"{twin.student} is not offered: it {twin.refused}")


def score_front(session: Session, searched: Searched, confirmed: Confirmed) -> None:
    """Accuracy on all validation images of what the confirmed front has besides the finalists."""
    known, finalists = session.accuracies, read_finalists(session.folder, searched)
    todo = [
        one
        for name, one in exported_front(searched, confirmed.latencies).items()
        if name not in finalists and one.genome_hash not in known.known
    ]
    with session.reporter.stage(
        f"{session.context.data.metric_label} of the front", len(todo), "student"
    ) as stage:
        for place, one in enumerate(todo):
            known.add(one.genome_hash, _whole_accuracy(session, one))
            stage.update(place + 1)


def _whole_accuracy(session: Session, one: Evaluation) -> float:
    """Accuracy of a student that was not distilled on all validation images."""
    context, recipe = session.context, session.config.recipe
    student = make_student(context, context.layout.unpack(one.genome), recipe)
    return inherited_accuracy(student.module, context.data, recipe, one.accuracy)
