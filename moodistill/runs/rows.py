"""The rows of a run's table, from what its store and its `students/` folder hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moodistill.bundle.int8 import Int8Result, read_int8
from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.finalists.confirm import Confirmed
from moodistill.finalists.distil import Finalist, read_finalists
from moodistill.pareto import table as front
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.table import SUFFIX
from moodistill.runs.accuracies import Accuracies
from moodistill.storage.folder import read_run, relative_model_file, student_folder
from moodistill.storage.searched import Searched
from moodistill.storage.store import Store


def make_rows(
    folder: Path,
    searched: Searched,
    known: Mapping[str, float],
    confirmed: Confirmed,
    teacher_latency_ms: float,
) -> list[front.FrontRow]:
    """The teacher, the finalists with their INT8 twins, and the rest of the front.

    The front is that of the confirmed latencies, or of the search's where nothing was confirmed.

    Args:
        folder: the run's.
        searched: the search's students.
        known: accuracies on all held-out images, by `teacher`, `teacher_test` or genome's hash.
        confirmed: what was measured again.
        teacher_latency_ms: the scale of all latencies.
    """
    finalists, latencies = read_finalists(folder, searched), confirmed.latencies
    metric = str(read_run(folder).get("metric_label", "accuracy"))

    def row(name: str, one: Evaluation) -> front.FrontRow:
        assert one.latency is not None
        again = replace(one, latency=latencies.get(name, one.latency))
        made = replace(
            searched_row(name, again, teacher_latency_ms),
            accuracy=known.get(one.genome_hash),
            search_latency_ms=one.latency.latency_ms,
            on_devices=confirmed.on_devices(name),
            metric=metric,
        )
        return _distilled(made, finalists[name]) if name in finalists else made

    rows = [
        replace(
            row("teacher", searched.teacher),
            stage="teacher",
            accuracy=known.get("teacher"),
            test_accuracy=known.get("teacher_test"),
            on_devices=teacher_on_devices(folder) if confirmed.devices else {},
        )
    ]
    # A finalist of an earlier, smaller preset may have left the front: it stays exported.
    for name in sorted({*finalists, *exported_front(searched, latencies)}):
        rows.append(row(name, searched.students[name]))
        twin = read_int8(student_folder(folder, name + SUFFIX)) if name in finalists else None
        if twin is not None and not twin.refused and twin.student in latencies:
            quantised = int8_row(rows[-1], twin, latencies[twin.student])
            rows.append(replace(quantised, on_devices=confirmed.on_devices(twin.student)))
    return rows


def searched_row(name: str, one: Evaluation, teacher_latency_ms: float) -> front.FrontRow:
    """The row of a student as the search has scored it."""
    assert one.latency is not None
    return front.FrontRow(
        student=name, stage="searched", search_accuracy=one.accuracy, accuracy=None,
        test_accuracy=None, parameters=one.parameters, macs=one.macs,
        latency_ms=one.latency.latency_ms, latency_ms_low=one.latency.low_ms,
        latency_ms_high=one.latency.high_ms, teacher_latency_ms=teacher_latency_ms,
        size_bytes=one.size_bytes, onnx="", genome_hash=one.genome_hash, summary=one.summary,
        search_latency_ms=one.latency.latency_ms, latency_ms_p90=one.latency.p90_ms,
        latency_samples=len(one.latency.samples_ms), memory_bytes=one.memory_bytes,
    )  # fmt: skip


def _distilled(row: front.FrontRow, finalist: Finalist) -> front.FrontRow:
    """The row of a student that has been distilled since."""
    return replace(
        row,
        stage="distilled",
        accuracy=finalist.accuracy,
        test_accuracy=finalist.test_accuracy,
        size_bytes=finalist.size_bytes,
        onnx=relative_model_file(row.student),
    )


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
    if run.get("status") != "running" and front.has_front(folder):
        return front.read_front(folder)
    config = RunConfig.read(folder)
    searched = Searched.read(store, config.search.limits, config.search.objectives)
    if searched is None:
        raise UserError(f"{folder} has no scored student yet; try again in a minute")
    known = Accuracies(folder / "accuracies.json").known
    latency_ms = float(run.get("teacher_latency_ms", 0.0))
    return make_rows(folder, searched, known, Confirmed(), latency_ms)


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
        onnx=relative_model_file(twin.student),
        search_latency_ms=None,
    )
