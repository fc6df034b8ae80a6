"""A run's rows, files and figures, from what its store and its `students/` folder hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moodistill import front, pareto, report
from moodistill.context import TeacherContext
from moodistill.evaluation import Evaluation, Latency
from moodistill.files import write_json_atomic
from moodistill.finalists import Finalist, read_finalist
from moodistill.recipe import Recipe, make_student
from moodistill.store import Store
from moodistill.training import accuracy


def student_id(number: int) -> str:
    """The name of the student that was evaluated as number `number`."""
    return f"s{number:04d}"


def objectives(evaluations: list[Evaluation]) -> np.ndarray:
    """`(n, 3)` error, parameters and latency of successful evaluations."""
    rows = [one.objectives for one in evaluations if one.objectives is not None]
    return np.array(rows, dtype=float).reshape(-1, 3)


@dataclass(frozen=True)
class Searched:
    """The usable students of a store.

    Attributes:
        teacher: the first evaluation.
        students: name to evaluation, in order, without failed and infeasible ones.
    """

    teacher: Evaluation
    students: dict[str, Evaluation]

    @staticmethod
    def read(store: Store, min_accuracy: float) -> Searched | None:
        """What the store holds, or None if not even the teacher was scored."""
        evaluations = store.all()
        if not evaluations or evaluations[0].latency is None:
            return None
        students = {
            student_id(n): e
            for n, e in enumerate(evaluations)
            if n > 0 and e.latency is not None and e.accuracy >= min_accuracy
        }
        return Searched(evaluations[0], students)

    def front(self) -> dict[str, Evaluation]:
        """The non-dominated students."""
        if not self.students:
            return {}
        mask = pareto.non_dominated(objectives(list(self.students.values())))
        return {
            name: e for (name, e), keep in zip(self.students.items(), mask, strict=True) if keep
        }

    def finalists(self, folder: Path) -> dict[str, Finalist]:
        """Distilled students whose results are complete on disk, whatever their budget."""
        found = {name: read_finalist(folder / "students" / name) for name in self.students}
        return {
            name: one
            for name, one in found.items()
            if one is not None and one.genome_hash == self.students[name].genome_hash
        }


class Accuracies:
    """Accuracies on all held-out images, in a JSON file, so that a resume has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        if path.is_file():
            try:
                self.known = {k: float(v) for k, v in json.loads(path.read_text()).items()}
            except (ValueError, AttributeError, TypeError):
                self.known = {}

    def add(self, key: str, value: float) -> None:
        """Remember and write at once."""
        self.known[key] = value
        write_json_atomic(self.path, self.known)


def measure_teacher(known: Accuracies, context: TeacherContext, cache_dir: Path) -> None:
    """The teacher's accuracy on all validation and test images, under `teacher` and `teacher_test`.

    Kept in the cache by teacher and data, since it is the same for every run.
    """
    data, teacher = context.data, context.graph.module
    key = f"{context.teacher_digest[:16]}-{data.digest[:16]}"
    cached = Accuracies(cache_dir / f"accuracy-{key}.json")
    for name, split in (("teacher", data.validation), ("teacher_test", data.test)):
        if name not in cached.known:
            cached.add(name, accuracy(teacher, data, split))
        known.add(name, cached.known[name])


def measure_front(
    known: Accuracies, searched: Searched, context: TeacherContext, recipe: Recipe, skip: set[str]
) -> None:
    """Accuracy of the front's students but `skip` on all validation images."""
    todo = {
        name: e
        for name, e in searched.front().items()
        if name not in skip and e.genome_hash not in known.known
    }
    bar = tqdm(todo.values(), unit="student", desc="front", disable=None, file=sys.stderr)
    for one in bar:
        student = make_student(context, context.layout.unpack(one.genome), recipe)
        known.add(one.genome_hash, accuracy(student.module, context.data, context.data.validation))


def make_rows(
    folder: Path,
    searched: Searched,
    known: Mapping[str, float],
    confirmed: Mapping[str, Latency],
    teacher_latency_ms: float,
) -> list[front.FrontRow]:
    """The teacher, the finalists, and the rest of the searched front."""
    finalists = searched.finalists(folder)

    def row(name: str, one: Evaluation) -> front.FrontRow:
        finalist = finalists.get(name)
        latency = confirmed.get(name, one.latency)
        assert latency is not None
        return front.FrontRow(
            student=name,
            stage="distilled" if finalist else "searched",
            search_accuracy=one.accuracy,
            accuracy=finalist.accuracy if finalist else known.get(one.genome_hash),
            test_accuracy=finalist.test_accuracy if finalist else None,
            parameters=one.parameters,
            macs=one.macs,
            latency_ms=latency.latency_ms,
            latency_ms_low=latency.low_ms,
            latency_ms_high=latency.high_ms,
            teacher_latency_ms=teacher_latency_ms,
            size_bytes=finalist.size_bytes if finalist else one.size_bytes,
            onnx=f"students/{name}/model.onnx" if finalist else "",
            genome_hash=one.genome_hash,
            summary=one.summary,
        )

    teacher = replace(
        row("teacher", searched.teacher),
        stage="teacher",
        accuracy=known.get("teacher"),
        test_accuracy=known.get("teacher_test"),
    )
    # A finalist of an earlier, smaller preset may have left the front: it stays exported.
    members = {**{n: searched.students[n] for n in finalists}, **searched.front()}
    return [teacher, *(row(name, members[name]) for name in sorted(members))]


def write_results(folder: Path, store: Store, rows: list[front.FrontRow], title: str) -> None:
    """`pareto.csv`, `pareto.json` and the figures."""
    front.write_front(folder / "pareto.csv", rows)
    report.plot_front(rows, folder / "pareto.png", title)
    report.plot_history(store.generations(), folder / "history.png")
