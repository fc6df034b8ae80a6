"""Scoring one genome: student, inheritance, ONNX, latency, accuracy. Never raises."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from moodistill.accelerator import exact_convolutions, needs_memory
from moodistill.genome.canonical import settled
from moodistill.genome.canonical import summary as describe
from moodistill.heads.heads import Arrays
from moodistill.onnx.memory import peak_memory_bytes
from moodistill.onnx.runtime import outputs
from moodistill.onnx.writer import structure_hash, to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.student.builder import build_student
from moodistill.student.context import TeacherContext
from moodistill.student.inherit import InheritConfig, inherit
from moodistill.student.network import Student
from moodistill.student.torch_scorer import TorchScorer, is_checked
from moodistill.teacher.answers import answers_of
from moodistill.teacher.divergence import divergence
from moodistill.teacher.kernels import Layer, Transposed

Measure = Callable[[bytes, str], Latency]
MOST_ANSWER_BYTES = 64 * 2**20  # of the teacher's outputs that students are compared with


@dataclass(frozen=True)
class Recipe:
    """How every student of one search is scored.

    Attributes:
        validation_images: the first so many of the search-validation split.
        time_limit_s: a student that takes longer is a failed one.
    """

    validation_images: int = 1000
    time_limit_s: float = 600.0
    inherit: InheritConfig = field(default_factory=InheritConfig)


def make_student(context: TeacherContext, genome: np.ndarray, recipe: Recipe) -> Student:
    """The student of a genome with inherited weights."""
    student = build_student(context.graph, context.layout, genome)
    inherit_there(student, context, recipe.inherit)
    student.module.cpu()
    return student


def inherit_there(
    student: Student, context: TeacherContext, config: InheritConfig
) -> tuple[str, ...]:
    """Take a student to the teacher's device and set its weights; see `inherit`.

    Raises:
        UserError: if the device's memory is too small.
    """
    what = f"a student and {len(context.samples.images)} calibration images"
    with (
        exact_convolutions(),
        needs_memory(context.device, what, "set fewer `calibration_images`"),
    ):
        student.module.to(context.device)
        return inherit(student, context.solver, context.samples, config)


def try_device(context: TeacherContext, recipe: Recipe) -> None:
    """Solve and run the largest student there is on the device, that of the teacher's own genome.

    Raises:
        UserError: if the device's memory is too small for it.
    """
    student = build_student(context.graph, context.layout, context.layout.teacher())
    inherit_there(student, context, recipe.inherit)
    split = context.data.validation.head(recipe.validation_images)
    TorchScorer(context.data, split, context.device).answers(student.module)


def count_macs(student: Student) -> int:
    """Multiply-accumulates of one image, bias additions included, as the literature counts."""
    total = 0
    for node in student.module.graph.nodes:
        if node.op == "call_module":
            module = student.module.get_submodule(str(node.target))
            if isinstance(module, Layer):
                bias = 0 if module.bias is None else module.bias.numel()
                # Of a transposed convolution every input pixel meets all taps.
                place = "reads" if isinstance(module, Transposed) else "area"
                total += module.weight.numel() * int(node.meta[place])
                total += bias * int(node.meta["area"])
    return total


@dataclass(frozen=True)
class Scored:
    """A scored student and its file.

    Attributes:
        evaluation: without a latency if none was measured.
        model: the ONNX file; empty if the student failed.
        key: of the structure, for the latency's cache.
    """

    evaluation: Evaluation
    model: bytes = b""
    key: str = ""


class Evaluator:
    """Scores genomes of one teacher by one recipe.

    `measure(onnx_bytes, structure_hash)` gives the latency: `LatencyMeter.measure`, or a recorded
    table in tests; None where it is measured elsewhere. Widths are whole multiples of `simd_step`.
    """

    def __init__(
        self, context: TeacherContext, recipe: Recipe, measure: Measure | None, simd_step: int
    ) -> None:
        self.context = context
        self.recipe = recipe
        self.measure = measure
        self.simd_step = simd_step
        self.validation = context.data.validation.head(recipe.validation_images).held()
        self.scorer = None
        if context.device.type != "cpu":
            self.scorer = TorchScorer(context.data, self.validation, context.device)
        self.compared = False  # whether any student has been compared with ONNX Runtime

    def evaluate(self, genome: np.ndarray) -> Evaluation:
        """Score one genome; whatever goes wrong becomes the evaluation's `failure`."""
        return self.score(genome).evaluation

    def score(self, genome: np.ndarray) -> Scored:
        """Score one genome, without a latency if there is no `measure`; never raises."""
        layout = self.context.layout
        genome, structure = settled(layout, genome, self.simd_step)
        digest, packed = layout.digest(genome), layout.pack(genome)
        seconds: dict[str, float] = {}
        summary = ""
        parameters = macs = size = memory = 0
        try:
            with _limited(self.recipe.time_limit_s):
                summary = describe(layout, structure)
                with _timed(seconds, "build"):
                    student = build_student(self.context.graph, layout, structure)
                    parameters = student.parameters
                    macs = count_macs(student)
                with _timed(seconds, "inherit"):
                    unsolved = inherit_there(student, self.context, self.recipe.inherit)
                if unsolved:  # their solve was not finite
                    summary += f"; weights sliced {', '.join(unsolved)}"
                answers: list[Arrays] | None = None
                if self.scorer is not None:
                    with _timed(seconds, "accuracy"):
                        answers = self.scorer.answers(student.module)
                        student.module.cpu()
                with _timed(seconds, "export"):
                    model = to_onnx(student.module, self.context.data.input_shape)
                    key = structure_hash(student.module)
                    size, memory = len(model), peak_memory_bytes(model)
                latency = None
                if self.measure is not None:
                    with _timed(seconds, "latency"):
                        latency = self.measure(model, key)
                # Behind the latency: a file that brings ONNX Runtime down does so in its process.
                with _timed(seconds, "accuracy"):
                    reached, apart = self._compared(model, answers, digest)
        except Exception as error:
            # One bad student must not end a search of hours: it becomes a row with a reason.
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0][:200]}"
            return Scored(
                Evaluation(
                    digest, packed, 0.0, parameters, macs, size, None, seconds, failure, summary,
                    memory,
                )
            )  # fmt: skip
        made = Evaluation(
            digest, packed, reached, parameters, macs, size, latency, seconds, None, summary,
            memory, apart,
        )  # fmt: skip
        return Scored(made, model, key)

    def _compared(
        self, model: bytes, batches: list[Arrays] | None, digest: str
    ) -> tuple[float, float]:
        """The metric of a student's outputs, and their error against the teacher's.

        The outputs are those of its file, or the `batches` that torch gave, some of which are
        compared with the file's.
        """
        data, teacher = self.context.data, self._teacher_answers
        if self.scorer is None or batches is None:
            batches = list(outputs(model, data, self.validation, torch.get_num_threads()))
        elif not self.compared or is_checked(digest):
            self.scorer.check(batches, model)
            self.compared = True
        found = {
            name: torch.from_numpy(
                np.concatenate([batch[name] for batch in batches])[: len(wanted)]
            )
            for name, wanted in teacher.items()
        }
        return data.score(batches, self.validation), divergence(data.meaning, found, teacher)

    @cached_property
    def _teacher_answers(self) -> dict[str, torch.Tensor]:
        """What the teacher gives for images that students are scored on, by output.

        For the first ones alone where outputs are large.
        """
        context, images = self.context, self.validation.images
        batches: list[dict[str, np.ndarray]] = []
        size = 0
        for batch in answers_of(context.solver.module, context.data, images):
            batches.append(batch)
            size += sum(array.nbytes for array in batch.values())
            if size > MOST_ANSWER_BYTES:
                break
        return {
            name: torch.from_numpy(np.concatenate([batch[name] for batch in batches]))
            for name in batches[0]
        }


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in a block that takes longer; only the main thread can be limited."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"scoring took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _timed:
    """Adds the seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent


def teacher_onnx(context: TeacherContext) -> bytes:
    """The teacher as ONNX bytes, the reference of every latency."""
    student = build_student(context.graph, context.layout, context.layout.teacher())
    return to_onnx(student.module, context.data.input_shape)
