"""Scoring one genome: student, inheritance, accuracy, ONNX, latency. Never raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moodistill.context import TeacherContext
from moodistill.evaluation import Evaluation, Latency
from moodistill.genome import canonical
from moodistill.graph import TeacherGraph
from moodistill.inherit import InheritConfig, inherit
from moodistill.onnx_writer import structure_hash, to_onnx
from moodistill.student import Student, build_student
from moodistill.training import accuracy

Measure = Callable[[bytes, str], Latency]


@dataclass(frozen=True)
class Recipe:
    """How every student of one search is scored.

    Attributes:
        validation_images: the first so many of the search-validation split.
        simd_step: widths are whole multiples of it.
    """

    simd_step: int = 8
    validation_images: int = 1000
    inherit: InheritConfig = field(default_factory=InheritConfig)


def make_student(context: TeacherContext, genome: np.ndarray, recipe: Recipe) -> Student:
    """The student of a genome with inherited weights."""
    student = build_student(context.graph, context.layout, genome)
    inherit(student, context.graph, context.samples, recipe.inherit)
    return student


def count_macs(student: Student, graph: TeacherGraph) -> int:
    """Multiply-accumulates of one image, bias additions included, as the literature counts."""
    shapes = {layer.name: layer.shape for layer in graph.layers}
    total = 0
    for unit in student.units:
        module = student.module.get_submodule(unit.target)
        area = int(np.prod(shapes[unit.layer][1:]))
        weights = sum(p.numel() for p in module.parameters())
        total += weights * area
    return total


class Evaluator:
    """Scores genomes of one teacher by one recipe.

    `measure(onnx_bytes, structure_hash)` gives the latency: `LatencyMeter.measure`, or a recorded
    table in tests.
    """

    def __init__(self, context: TeacherContext, recipe: Recipe, measure: Measure) -> None:
        self.context = context
        self.recipe = recipe
        self.measure = measure
        self.validation = context.data.validation.head(recipe.validation_images)

    def evaluate(self, genome: np.ndarray) -> Evaluation:
        """Score one genome; whatever goes wrong becomes the evaluation's `failure`."""
        layout = self.context.layout
        genome = canonical(layout, genome, self.recipe.simd_step)
        digest, packed = layout.digest(genome), layout.pack(genome)
        seconds: dict[str, float] = {}
        summary = ""
        parameters = macs = size = 0
        try:
            summary = layout.summary(genome)
            with _timed(seconds, "build"):
                student = build_student(self.context.graph, layout, genome)
                parameters = student.parameters
                macs = count_macs(student, self.context.graph)
            with _timed(seconds, "inherit"):
                inherit(student, self.context.graph, self.context.samples, self.recipe.inherit)
            with _timed(seconds, "accuracy"):
                reached = accuracy(student.module, self.context.data, self.validation)
            with _timed(seconds, "export"):
                model = to_onnx(student.module, self.context.data.input_shape)
                key = structure_hash(student.module)
                size = len(model)
            with _timed(seconds, "latency"):
                latency = self.measure(model, key)
        except Exception as error:
            # One bad student must not end a search of hours: it becomes a row with a reason.
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0][:200]}"
            return Evaluation(
                digest, packed, 0.0, parameters, macs, size, None, seconds, failure, summary
            )
        return Evaluation(
            digest, packed, reached, parameters, macs, size, latency, seconds, None, summary
        )


class _timed:
    """Adds the seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def teacher_onnx(context: TeacherContext) -> bytes:
    """The teacher as ONNX bytes, the reference of every latency."""
    student = build_student(context.graph, context.layout, context.layout.teacher())
    return to_onnx(student.module, context.data.input_shape)
