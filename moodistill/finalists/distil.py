"""Finalists: distilled for a real budget, confirmed on latency, tested, exported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from moodistill.bundle.model import Origin
from moodistill.bundle.parity import checked_onnx
from moodistill.errors import UserError
from moodistill.io.atomic import TEMPORARY, write_atomic, write_json_atomic
from moodistill.io.cache import default_cache_dir
from moodistill.io.records import parse_json
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Evaluation
from moodistill.storage.folder import MODEL_FILE, RESULT_FILE, student_folder
from moodistill.storage.searched import Searched
from moodistill.student.accuracy import inherited_accuracy, student_accuracy
from moodistill.student.context import TeacherContext
from moodistill.student.evaluator import Recipe, make_student
from moodistill.student.file import load_student, save_student
from moodistill.training.distill import DistillConfig, SoftTargets, distill

STUDENT_FILE = "student.safetensors"
CHECKPOINT_FILES = "distilling-*.checkpoint"  # by the number of steps they are on the way to


@dataclass(frozen=True)
class Finalist:
    """What is kept of a distilled student in `students/<id>/result.json`."""

    student: str
    genome_hash: str
    budget: dict
    accuracy_before: float
    accuracy: float
    test_accuracy: float
    size_bytes: int
    parity_images: int
    parity_max_difference: float
    seconds: float


# Distils students by name into their folders under one; each result or error as it comes.
# The last argument hears of a name, its steps done and its loss; of a worker elsewhere it does not.
Distiller = Callable[
    [Mapping[str, Evaluation], Path, Callable[[str, int, float], None]],
    Iterator[tuple[str, Finalist | Exception]],
]


def distil_here(context: TeacherContext, recipe: Recipe, config: DistillConfig) -> Distiller:
    """Distils one student after another in this process."""

    def distil(
        students: Mapping[str, Evaluation], folder: Path, report: Callable[[str, int, float], None]
    ) -> Iterator[tuple[str, Finalist | Exception]]:
        targets = SoftTargets(
            context.solver.module, context.data, config, default_cache_dir(), context.teacher_digest
        )
        for name, evaluation in students.items():
            heard = partial(report, name)
            try:
                yield (
                    name,
                    finish(
                        context, evaluation, name, folder / name, recipe, config, targets, heard
                    ),
                )
            except (FloatingPointError, UserError) as error:
                yield name, error
            targets.save()

    return distil


def finish(
    context: TeacherContext,
    evaluation: Evaluation,
    student_id: str,
    folder: Path,
    recipe: Recipe,
    config: DistillConfig,
    targets: SoftTargets,
    report: Callable[[int, float], None] | None = None,
) -> Finalist:
    """Distil one student, save it, export it with the parity check and test it.

    Distilled weights that are worse on the validation images than the inherited ones, or than those
    of an earlier distillation in `folder`, are dropped. A result that is there for the same budget
    or a larger one is read back instead, and a distillation that was interrupted is carried on.

    Raises:
        FloatingPointError, UserError: if the loss diverges, or torch and ONNX Runtime differ; what
            was in `folder` is as it was then.
    """
    found = finished_before(folder, evaluation, config)
    if found is not None:
        return found
    budget = asdict(config)
    began = time.perf_counter()
    genome = context.layout.unpack(evaluation.genome)
    student = make_student(context, genome, recipe)
    data = context.data
    before = inherited_accuracy(student.module, data, recipe, evaluation.accuracy)
    seed = int(evaluation.genome_hash[:8], 16)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT_FILES.replace("*", str(config.steps))
    module = distill(student.module, targets, config, seed, report, checkpoint)
    reached = student_accuracy(module, data, data.validation)
    if reached < before:
        # Few steps can cost a good start more than they bring.
        module, reached = student.module, before
    earlier = read_finalist(folder)
    if earlier is not None and is_better(earlier, evaluation.genome_hash, reached):
        write_json_atomic(folder / RESULT_FILE, asdict(replace(earlier, budget=budget)))
        checkpoint.unlink(missing_ok=True)
        return replace(earlier, budget=budget)
    kept = replace(student, module=module)
    origin = Origin(context.task.name, context.teacher_digest, evaluation.genome)
    model, parity = checked_onnx(kept.module, data, origin)
    result = Finalist(
        student=student_id,
        genome_hash=evaluation.genome_hash,
        budget=budget,
        accuracy_before=before,
        accuracy=reached,
        test_accuracy=onnx_accuracy(model, data, data.test, torch.get_num_threads()),
        size_bytes=len(model),
        parity_images=parity.images,
        parity_max_difference=parity.max_difference,
        seconds=time.perf_counter() - began,
    )
    # Both files are written before either is replaced: a full disk leaves what there was.
    drafts = {name: folder / f".{name}{TEMPORARY}" for name in (STUDENT_FILE, MODEL_FILE)}
    save_student(kept, context.layout, genome, drafts[STUDENT_FILE], context.task.name)
    write_atomic(drafts[MODEL_FILE], model)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    for name, draft in drafts.items():
        os.replace(draft, folder / name)
    write_json_atomic(folder / RESULT_FILE, asdict(result))
    checkpoint.unlink(missing_ok=True)
    return result


def is_better(earlier: Finalist, genome_hash: str, reached: float) -> bool:
    """Whether an earlier distillation of this student is to stay beside one that reached less."""
    return earlier.genome_hash == genome_hash and earlier.accuracy > reached


def finished_before(folder: Path, evaluation: Evaluation, config: DistillConfig) -> Finalist | None:
    """The result in `folder` if it is of this student and of this budget, or of more steps."""
    found = read_finalist(folder)
    if found is None or found.genome_hash != evaluation.genome_hash:
        return None
    steps = found.budget.get("steps")
    longer = type(steps) is int and steps >= config.steps
    return found if longer and found.budget == {**asdict(config), "steps": steps} else None


def read_finalist(folder: Path) -> Finalist | None:
    """The complete result in a student's folder, or None."""
    path = folder / RESULT_FILE
    return parse_finalist(path.read_bytes()) if path.is_file() else None


def parse_finalist(content: bytes) -> Finalist | None:
    """What a `result.json` holds, or None if it is damaged."""
    try:
        return parse_json(content, Finalist)
    except ValueError:
        return None


def float_model(folder: Path, context: TeacherContext) -> bytes:
    """A finalist's ONNX file without preprocessing, made from its weights in `folder`."""
    shape = context.data.input_shape
    student, _ = load_student(folder / STUDENT_FILE, context.task.build(), shape)
    return to_onnx(student.module, shape)


def read_finalists(folder: Path, searched: Searched) -> dict[str, Finalist]:
    """Distilled students of a run whose results are complete on disk, whatever their budget."""
    found = {name: read_finalist(student_folder(folder, name)) for name in searched.students}
    return {
        name: one
        for name, one in found.items()
        if one is not None and one.genome_hash == searched.students[name].genome_hash
    }
