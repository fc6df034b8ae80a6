"""Accuracies on all held-out images: the teacher's, and those of the front's students."""

from __future__ import annotations

from pathlib import Path

from moodistill.io.atomic import write_json_atomic
from moodistill.io.cache_dir import cache_key, cached
from moodistill.io.records import parse_json
from moodistill.student.accuracy import student_accuracy
from moodistill.student.context import TeacherContext
from moodistill.teacher.weights import network_digest


class Accuracies:
    """Accuracies on all held-out images, in a JSON file, so that a resume has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        if path.is_file():
            try:
                found = parse_json(path.read_bytes()).items()
                numbers = {k: float(v) for k, v in found if type(v) in (int, float)}
                self.known = {k: v for k, v in numbers.items() if 0 <= v <= 1}
            except (ValueError, AttributeError, OverflowError):
                self.known = {}

    def add(self, key: str, value: float) -> None:
        """Remember and write at once."""
        self.known[key] = value
        write_json_atomic(self.path, self.known)


def measure_teacher(known: Accuracies, context: TeacherContext, cache_dir: Path) -> None:
    """The teacher's accuracy on all validation and test images, under `teacher` and `teacher_test`.

    Kept in the cache by teacher and data, since it is the same for every run; in the run alone by
    another metric than accuracy, which no name tells for certain.
    """
    data, teacher = context.data, context.graph.module
    splits = {"teacher": data.validation, "teacher_test": data.test}

    def measure() -> dict[str, float]:
        return {
            name: known.known[name] if name in known.known else student_accuracy(teacher, data, one)
            for name, one in splits.items()
        }

    def read(path: Path) -> dict[str, float]:
        found = Accuracies(path).known
        return {name: found[name] for name in splits}

    key = cache_key(context.teacher_digest, network_digest(teacher), data.digest)
    path = cache_dir / f"accuracy-{key}.json" if data.by_accuracy else None
    found = cached(path, read, measure, lambda values, to: write_json_atomic(to, values))
    for name, value in found.items():
        known.add(name, value)
