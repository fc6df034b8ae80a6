"""A run's rows, files and figures, from what its store and its `students/` folder hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moodistill.bundle.int8 import Int8Result, read_int8
from moodistill.config import RunConfig
from moodistill.data.images import fraction_right
from moodistill.errors import UserError
from moodistill.finalists.confirm import CONFIRMED_FILE
from moodistill.finalists.distil import Finalist, read_finalists
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import parse_json
from moodistill.pareto import table as front
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.table import SUFFIX
from moodistill.progress import Reporter
from moodistill.report import figures as report
from moodistill.storage.folder import read_run
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store
from moodistill.student.accuracy import inherited_accuracy, student_accuracy
from moodistill.student.context import TeacherContext
from moodistill.student.evaluator import Recipe, make_student
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
    made_of = f"{context.teacher_digest} {network_digest(teacher)} {data.digest}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    usual = data.metric is fraction_right
    cached = Accuracies(cache_dir / f"accuracy-{key}.json") if usual else known
    for name, split in (("teacher", data.validation), ("teacher_test", data.test)):
        if name not in cached.known:
            cached.add(name, student_accuracy(teacher, data, split))
        known.add(name, cached.known[name])


def measure_front(
    known: Accuracies,
    front: Mapping[str, Evaluation],
    context: TeacherContext,
    recipe: Recipe,
    skip: set[str],
    reporter: Reporter,
) -> None:
    """Accuracy of the front's students but `skip` on all validation images."""
    todo = {
        name: e
        for name, e in front.items()
        if name not in skip and e.genome_hash not in known.known
    }
    with reporter.stage("accuracy of the front", len(todo), "student") as stage:
        for place, one in enumerate(todo.values()):
            student = make_student(context, context.layout.unpack(one.genome), recipe)
            reached = inherited_accuracy(student.module, context.data, recipe, one.accuracy)
            known.add(one.genome_hash, reached)
            stage.update(place + 1)


def make_rows(
    folder: Path,
    searched: Searched,
    known: Mapping[str, float],
    confirmed: Mapping[str, Latency],
    teacher_latency_ms: float,
) -> list[front.FrontRow]:
    """The teacher, the finalists with their INT8 twins, and the rest of the front.

    The front is that of the confirmed latencies, or of the search's where nothing was confirmed.
    """
    finalists = read_finalists(folder, searched)
    elsewhere = device_latencies(folder) if confirmed else {}

    def row(name: str, one: Evaluation, finalist: Finalist | None = None) -> front.FrontRow:
        latency = confirmed.get(name, one.latency)
        assert latency is not None and one.latency is not None
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
            search_latency_ms=one.latency.latency_ms,
            latency_ms_p90=latency.p90_ms,
            latency_samples=len(latency.samples_ms),
            memory_bytes=one.memory_bytes,
            on_devices=elsewhere.get(name, {}),
        )

    rows = [
        replace(
            row("teacher", searched.teacher),
            stage="teacher",
            accuracy=known.get("teacher"),
            test_accuracy=known.get("teacher_test"),
            on_devices=teacher_on_devices(folder) if elsewhere else {},
        )
    ]
    # A finalist of an earlier, smaller preset may have left the front: it stays exported.
    confirmed_front = exported_front(searched, confirmed)
    for name in sorted({*finalists, *confirmed_front}):
        rows.append(row(name, searched.students[name], finalists.get(name)))
        twin = read_int8(folder / "students" / (name + SUFFIX))
        if (
            name in finalists
            and twin is not None
            and not twin.refused
            and twin.student in confirmed
        ):
            rows.append(
                replace(
                    int8_row(rows[-1], twin, confirmed[twin.student]),
                    on_devices=elsewhere.get(twin.student, {}),
                )
            )
    return rows


def device_latencies(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by student and device, where a run timed its front on several devices."""
    found: dict[str, dict[str, float]] = {}
    try:
        devices = parse_json((folder / CONFIRMED_FILE).read_bytes())["devices"]
        for device, ones in devices.items():
            for name, one in ones.items():
                if _is_time(one["latency_ms"]):
                    found.setdefault(name, {})[device] = float(one["latency_ms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


def teacher_on_devices(folder: Path) -> dict[str, float]:
    """The teacher's calibrated milliseconds by device."""
    found = read_run(folder).get("teacher_latencies_ms")
    if not isinstance(found, dict):
        return {}
    return {device: float(ms) for device, ms in found.items() if _is_time(ms)}


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e15


def current_rows(folder: Path, store: Store) -> list[front.FrontRow]:
    """The rows of a run's table, or, while it is going on, of what its store holds.

    Raises:
        UserError: if not even the teacher has been scored.
    """
    run = read_run(folder)
    if run.get("status") != "running" and (folder / "pareto.csv").is_file():
        return front.read_front(folder)
    config = RunConfig.from_dict(run.get("config", {}))
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    if searched is None:
        raise UserError(f"{folder} has no scored student yet; try again in a minute")
    known = Accuracies(folder / "accuracies.json").known
    latency_ms = float(run.get("teacher_latency_ms", 0.0))
    return make_rows(folder, searched, known, {}, latency_ms)


def exported_front(searched: Searched, confirmed: Mapping[str, Latency]) -> dict[str, Evaluation]:
    """The front by the latencies that were measured again, or the search's own without them."""
    known = confirmed.keys() & searched.students.keys()
    return (searched.confirmed(confirmed) if known else searched).front()


def int8_row(floating: front.FrontRow, twin: Int8Result, latency: Latency) -> front.FrontRow:
    """The row of an INT8 twin, from that of its float student."""
    return replace(
        floating,
        student=twin.student,
        precision="int8",
        search_accuracy=None,
        accuracy=twin.accuracy,
        test_accuracy=twin.test_accuracy,
        latency_ms=latency.latency_ms,
        latency_ms_low=latency.low_ms,
        latency_ms_high=latency.high_ms,
        latency_ms_p90=latency.p90_ms,
        latency_samples=len(latency.samples_ms),
        size_bytes=twin.size_bytes,
        onnx=f"students/{twin.student}/model.onnx",
        search_latency_ms=None,
    )


def write_results(folder: Path, store: Store, rows: list[front.FrontRow], title: str) -> None:
    """`pareto.csv`, `pareto.json` and the figures."""
    front.write_front(folder / "pareto.csv", rows)
    report.plot_front(rows, folder / "pareto.png", title)
    report.plot_history(store.generations(), folder / "history.png")
