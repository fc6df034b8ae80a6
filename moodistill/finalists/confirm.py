"""Measuring the front again, side by side in a fresh process, so that no place is owed to luck."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from moodistill.bundle.model import Origin, ShipOptions, ship
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import parse_json
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.progress import Reporter
from moodistill.storage.folder import model_file
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

    def close(self) -> None:
        """End what times here."""


@dataclass(frozen=True)
class Confirmed:
    """Latencies that were measured again; what `confirmed.json` holds.

    Attributes:
        measured: digest of what was timed, by name.
        latencies: by name, as the objective has them.
        devices: by device and name, where there are several devices.
    """

    measured: Mapping[str, str] = field(default_factory=dict)
    latencies: Mapping[str, Latency] = field(default_factory=dict)
    devices: Mapping[str, Mapping[str, Latency]] = field(default_factory=dict)

    def on_devices(self, name: str) -> dict[str, float]:
        """Milliseconds of one student by device."""
        return {
            device: ones[name].latency_ms for device, ones in self.devices.items() if name in ones
        }


def confirm(
    folder: Path,
    searched: Searched,
    shipped: Mapping[str, Path],
    context: TeacherContext,
    meter: Timer,
    reporter: Reporter,
) -> Confirmed:
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
    before = read_confirmed(folder)
    if all(before.measured.get(name) == digest for name, digest in measured.items()):
        return before
    rejected = meter.rejected_windows
    with reporter.stage("confirming latency", len(models), "student") as stage:
        found = meter.confirm(models, report=stage.update)
    confirmed = Confirmed(measured, found, dict(meter.elsewhere))
    record = {
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else (),  # not on Windows
        "rejected_windows": meter.rejected_windows - rejected,
        "measured": measured,
        "students": {name: asdict(latency) for name, latency in found.items()},
        "devices": {
            device: {name: asdict(latency) for name, latency in ones.items()}
            for device, ones in confirmed.devices.items()
        },
    }
    write_json_atomic(folder / CONFIRMED_FILE, record)
    return confirmed


def still_confirmed(folder: Path, searched: Searched) -> Confirmed:
    """The latencies in `folder` of students and files that are still those that were measured."""
    record, kept = read_confirmed(folder), set()
    for name, digest in record.measured.items():
        path = model_file(folder, name)
        now = {hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else set()
        if name in searched.students:
            now.add(searched.students[name].genome_hash)
        if digest in now:
            kept.add(name)
    return Confirmed(
        {name: digest for name, digest in record.measured.items() if name in kept},
        {name: latency for name, latency in record.latencies.items() if name in kept},
        record.devices,
    )


def read_confirmed(folder: Path) -> Confirmed:
    """What `confirmed.json` holds; nothing if it is damaged."""
    try:
        record = parse_json((folder / CONFIRMED_FILE).read_bytes(), _Record)
        for ones in (record.students, *record.devices.values()):
            if not all(0 < one.latency_ms < 1e15 for one in ones.values()):
                raise ValueError(f"{CONFIRMED_FILE} holds a latency that is no time")
        measured = {name: record.measured[name] for name in record.students}
    except (OSError, ValueError, KeyError):
        return Confirmed()
    return Confirmed(measured, record.students, record.devices)


@dataclass(frozen=True)
class _Record:
    """`Confirmed` as `confirmed.json` has it."""

    students: Mapping[str, Latency]
    measured: Mapping[str, str]
    devices: Mapping[str, Mapping[str, Latency]] = field(default_factory=dict)
