"""Measuring the front again, side by side in a fresh process, so that no place is owed to luck."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from moodistill.bundle.model import Origin, ShipOptions, ship
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import parse_json, typed
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.progress import Reporter
from moodistill.storage.searched import Searched
from moodistill.student.builder import build_student
from moodistill.student.context import TeacherContext

CONFIRMED_FILE = "confirmed.json"  # the latencies that were measured again
# A student this much slower than one that dominates it may have been unlucky.
SLACK = 0.05


class Timer(Protocol):
    """What times several models side by side: `LatencyMeter`, or one on other devices."""

    @property
    def rejected_windows(self) -> int:
        """Windows timed again because the reference was unsteady in them."""

    @property
    def elsewhere(self) -> Mapping[str, Mapping[str, Latency]]:
        """Where there are several devices, what `confirm` found by device and model."""

    def confirm(
        self,
        models: Mapping[str, Callable[[], bytes]],
        rounds: int = ...,
        report: Callable[[int], None] | None = None,
    ) -> dict[str, Latency]:
        """As `LatencyMeter.confirm`."""


def confirm(
    folder: Path,
    searched: Searched,
    shipped: Mapping[str, Path],
    context: TeacherContext,
    meter: Timer,
    reporter: Reporter,
) -> dict[str, Latency]:
    """Latency of the front, of what is near it, and of the files that ship; kept in `folder`.

    Args:
        folder: the run's; gets `confirmed.json` with all raw timings.
        searched: the search's students.
        shipped: id to ONNX file of the finalists and their INT8 twins: these very files are timed.
            Other students are timed with sliced weights, since values do not change the time.
        context: the teacher.
        meter: on the teacher's calibrated scale.
        reporter: hears how far it is.

    Raises:
        LatencyError: if a model cannot be timed.
    """

    def structure(one: Evaluation) -> Callable[[], bytes]:
        def make() -> bytes:
            genome = context.layout.unpack(one.genome)
            student = build_student(context.graph, context.layout, genome)
            origin = Origin(context.task.name, context.teacher_digest, one.genome)
            bare = to_onnx(student.module, context.data.input_shape)
            return ship(bare, context.data, origin, ShipOptions())

        return make

    near = searched.near_front(SLACK)
    models: dict[str, Callable[[], bytes]] = {name: structure(one) for name, one in near.items()}
    models |= {name: path.read_bytes for name, path in shipped.items()}
    # Measured anew only if something is: a resumed run keeps what it found.
    measured = {name: one.genome_hash for name, one in near.items()}
    measured |= {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in shipped.items()}
    found = _read(folder, measured)
    if found is not None:
        return found
    rejected = meter.rejected_windows
    with reporter.stage("latency again", len(models), "student") as stage:
        found = meter.confirm(models, report=stage.update)
    record = {
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else (),  # not on Windows
        "rejected_windows": meter.rejected_windows - rejected,
        "measured": measured,
        "students": {name: asdict(latency) for name, latency in found.items()},
        "devices": {
            device: {name: asdict(latency) for name, latency in ones.items()}
            for device, ones in meter.elsewhere.items()
        },
    }
    write_json_atomic(folder / CONFIRMED_FILE, record)
    return found


def still_confirmed(folder: Path, searched: Searched) -> dict[str, Latency]:
    """The latencies in `folder` of students and files that are still those that were measured."""
    record, found = _record(folder), {}
    for name, latency in record.items():
        path = folder / "students" / name / "model.onnx"
        now = {hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else set()
        if name in searched.students:
            now.add(searched.students[name].genome_hash)
        if latency[0] in now:
            found[name] = latency[1]
    return found


def _read(folder: Path, measured: Mapping[str, str]) -> dict[str, Latency] | None:
    """The latencies in `folder` if these very models are among those they are of."""
    record = _record(folder)
    if any(name not in record or record[name][0] != one for name, one in measured.items()):
        return None
    return {name: latency for name, (_, latency) in record.items()}


def _record(folder: Path) -> dict[str, tuple[str, Latency]]:
    """Digest of what was measured, and its latency, by name; empty if the file is damaged."""
    try:
        record = parse_json((folder / CONFIRMED_FILE).read_bytes())
        found = {}
        for name, one in record["students"].items():
            values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
            found[name] = record["measured"][name], typed(Latency, values)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
