"""What scores and times a run's students: this process and machine, or a cluster's workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moodistill.config import RunConfig
from moodistill.errors import UserError
from moodistill.finalists.distil import Distiller, distil_here
from moodistill.latency.device import device_fingerprint
from moodistill.latency.meter import LatencyError, LatencyMeter
from moodistill.search.executor import Executor, SerialExecutor
from moodistill.student.context import TeacherContext, default_threads
from moodistill.student.evaluator import Evaluator, teacher_onnx
from moodistill.teacher.weights import network_digest
from moodistill.version import __version__

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster
    from moodistill.cluster.meter import DeviceMeters
    from moodistill.cluster.tasks import ScoreSetup

    Meter: TypeAlias = LatencyMeter | DeviceMeters


HERE = "this machine"  # the device's name where no other is given


@dataclass(frozen=True)
class Places:
    """Where data and caches are on this machine (not part of a run's identity)."""

    data_dir: Path | None = None
    weights: Path | None = None
    threads: int | None = None


def make_meter(
    context: TeacherContext,
    config: RunConfig,
    calibrated: Mapping[str, float] | None,
    cluster: Cluster | None,
) -> Meter:
    """What times students: a process of this machine, or the cluster's named devices.

    Args:
        context: of the teacher, which is the reference.
        config: the run's.
        calibrated: the teacher's ms by device, as `calibration` gave it to an earlier part of the
            run.
        cluster: None for this process alone.

    Raises:
        UserError: if the teacher cannot be timed there.
    """
    teacher, shape = teacher_onnx(context), context.data.input_shape
    try:
        if cluster is not None and cluster.config.latency_on:
            from moodistill.cluster.meter import DeviceMeters

            return DeviceMeters(cluster, teacher, shape, config.latency, calibrated)
        return LatencyMeter(
            teacher,
            shape,
            config.latency,
            teacher_latency_ms=(calibrated or {}).get(HERE),
        )
    except LatencyError as error:
        raise UserError(
            f"the teacher cannot be timed in ONNX Runtime ({error}); expected a network that runs "
            "there"
        ) from error


def calibration(meter: Meter) -> dict[str, float]:
    """The teacher's calibrated ms by device, which a resumed run keeps as its scale."""
    if isinstance(meter, LatencyMeter):
        return {HERE: meter.teacher_latency_ms}
    return {name: one.teacher_latency_ms for name, one in meter.meters.items()}


def timing_devices(meter: Meter, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Fingerprints of all devices by name."""
    if isinstance(meter, LatencyMeter):
        return {HERE: timing_device(meter, config)}
    return {name: one.device for name, one in meter.meters.items()}


def timing_device(meter: Meter, config: RunConfig) -> dict[str, Any]:
    """Fingerprint of the device that latencies are of, the first of several."""
    return device_fingerprint(config.latency) if isinstance(meter, LatencyMeter) else meter.device


def make_executor(
    context: TeacherContext,
    config: RunConfig,
    places: Places,
    meter: Meter,
    cluster: Cluster | None,
) -> Executor:
    """What scores the students: this process, or the cluster's workers."""
    local = meter.measure if isinstance(meter, LatencyMeter) else None
    if cluster is None:
        return SerialExecutor(Evaluator(context, config.recipe, local).evaluate)
    from moodistill.cluster.executor import DaskExecutor

    remote = None if isinstance(meter, LatencyMeter) else meter
    setup = _setup(context, config, places, cluster)
    return DaskExecutor(cluster, context.layout, setup, remote, local)


def make_distiller(
    context: TeacherContext, config: RunConfig, places: Places, cluster: Cluster | None
) -> Distiller:
    """What distils the finalists: this process, or the cluster's workers side by side."""
    if cluster is None:
        return distil_here(context, config.recipe, config.distill)
    from moodistill.cluster.executor import distil_there

    return distil_there(cluster, _setup(context, config, places, cluster), config.distill)


def _setup(
    context: TeacherContext, config: RunConfig, places: Places, cluster: Cluster
) -> ScoreSetup:
    """What the cluster's workers must have."""
    from moodistill.cluster.tasks import ScoreSetup

    workers = cluster.config.workers
    threads = max(1, default_threads() // workers) if workers is not None else 1
    return ScoreSetup(
        version=__version__,
        config=json.dumps(asdict(config)),
        teacher_digest=context.teacher_digest,
        data_digest=context.data.digest,
        network_digest=network_digest(context.graph.module),
        data_dir=None if places.data_dir is None else str(places.data_dir.resolve()),
        weights=None if places.weights is None else str(places.weights.resolve()),
        threads=places.threads or threads,
    )
