"""What scores, times and distils a run's students: this process and machine, or a cluster's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moodistill.accelerator import AUTO
from moodistill.config import RunConfig
from moodistill.data.images import ImageData
from moodistill.data.memory import are_held
from moodistill.errors import UserError
from moodistill.evolution.executor import Executor, SerialExecutor
from moodistill.finalists.confirm import Timer
from moodistill.finalists.distil import Distiller, distil_here
from moodistill.latency.device import device_fingerprint
from moodistill.latency.meter import LatencyError, LatencyMeter
from moodistill.pareto.evaluation import Latency
from moodistill.student.context import TeacherContext, default_threads
from moodistill.student.evaluator import Evaluator, teacher_onnx
from moodistill.teacher.weights import network_digest
from moodistill.version import __version__

if TYPE_CHECKING:
    from moodistill.cluster.client import Cluster
    from moodistill.cluster.meter import DeviceMeters
    from moodistill.cluster.tasks import ScoreSetup

HERE = "this machine"  # the device's name where no other is given


@dataclass(frozen=True)
class Places:
    """What is not part of a run's identity: where data and caches are on this machine, and so on.

    Attributes:
        network: a problem's file, or the module or file and the builder of a teacher, where it is
            now; None for where the run had it.
        data: folder of images of a teacher of one's own, likewise.
        weights: the teacher's, likewise.
        weights_key: of the set of weights in that file.
        data_dir: of a problem's data; None for the task's own.
        threads: of torch.
        expected_accuracy: a teacher that falls short of it by more than two points is refused.
        images_in_memory: whether a folder's images are held; None decides by their number.
        device: that students are computed on; `auto` takes an accelerator that is there, of a run
            that is carried on the kind that it was started on.
    """

    network: str | None = None
    data: Path | None = None
    weights: Path | None = None
    weights_key: str | None = None
    data_dir: Path | None = None
    threads: int | None = None
    expected_accuracy: float | None = None
    images_in_memory: bool | None = None
    device: str = AUTO


@dataclass(frozen=True)
class Timing:
    """What times students, on this machine or on the named devices of a cluster.

    Attributes:
        meter: times several models side by side.
        teacher_latency_ms: of the teacher, as the objective has it.
        teacher_latencies_ms: the teacher's calibrated ms by device, which a resumed run keeps as
            its scale.
        devices: fingerprints by name; the first one's latency is the objective.
        profile: times of a model's layers (`latency.profile`), on the first device.
        here: times one model in this process; None where other devices do.
        there: the cluster's devices; None where this machine times.
    """

    meter: Timer
    teacher_latency_ms: float
    teacher_latencies_ms: dict[str, float]
    devices: dict[str, dict[str, Any]]
    profile: Callable[[bytes], tuple[list[list[float]], float]]
    here: Callable[[bytes, str], Latency] | None = None
    there: DeviceMeters | None = None

    @property
    def device(self) -> dict[str, Any]:
        """Fingerprint of the device that latencies are of, the first of several."""
        return next(iter(self.devices.values()))


@dataclass(frozen=True)
class Backend:
    """What does a run's work."""

    timing: Timing
    executor: Executor
    distil: Distiller


@contextmanager
def open_backend(
    context: TeacherContext,
    config: RunConfig,
    places: Places,
    calibrated: Mapping[str, float] | None,
    cluster: Cluster | None,
) -> Iterator[Backend]:
    """Calibrate what times students, and make ready what scores and distils them.

    Args:
        context: of the teacher, which is the reference.
        config: the run's.
        places: where workers find data.
        calibrated: the teacher's ms by device of an earlier part of the run; None measures.
        cluster: None for this process alone.

    Raises:
        UserError: if the teacher cannot be timed there.
    """
    remote = cluster is not None and bool(cluster.config.latency_on)
    try:
        if cluster is not None and remote:
            timing = _time_there(context, config, calibrated, cluster)
        else:
            timing = _time_here(context, config, calibrated)
    except LatencyError as error:
        raise UserError(
            f"the teacher cannot be timed in ONNX Runtime ({error}); expected a network that runs "
            "there"
        ) from error
    with closing(timing.meter):
        yield _backend(context, config, places, timing, cluster)


def _time_here(
    context: TeacherContext, config: RunConfig, calibrated: Mapping[str, float] | None
) -> Timing:
    """A process of this machine."""
    meter = LatencyMeter(
        teacher_onnx(context),
        context.data.input_shape,
        config.latency,
        teacher_latency_ms=(calibrated or {}).get(HERE),
    )
    scale, device = meter.teacher_latency_ms, device_fingerprint(config.latency)
    return Timing(meter, scale, {HERE: scale}, {HERE: device}, meter.profile, here=meter.measure)


def _time_there(
    context: TeacherContext,
    config: RunConfig,
    calibrated: Mapping[str, float] | None,
    cluster: Cluster,
) -> Timing:
    """The cluster's named devices."""
    from moodistill.cluster.meter import DeviceMeters

    shape = context.data.input_shape
    meter = DeviceMeters(cluster, teacher_onnx(context), shape, config.latency, calibrated)
    return Timing(
        meter,
        meter.teacher_latency_ms,
        {name: one.teacher_latency_ms for name, one in meter.meters.items()},
        {name: one.device for name, one in meter.meters.items()},
        meter.profile,
        there=meter,
    )


def _backend(
    context: TeacherContext,
    config: RunConfig,
    places: Places,
    timing: Timing,
    cluster: Cluster | None,
) -> Backend:
    """This process, or the cluster's workers side by side."""
    if cluster is None:
        step = config.search.simd_step
        evaluator = Evaluator(context, config.recipe, timing.here, step)
        return Backend(
            timing,
            SerialExecutor(evaluator.evaluate),
            distil_here(context, config.recipe, config.distill),
        )
    from moodistill.cluster.executor import DaskExecutor, distil_there

    setup = _setup(context, config, places, cluster)
    return Backend(
        timing,
        DaskExecutor(cluster, context.layout, setup, timing.there, timing.here),
        distil_there(cluster, setup, config.distill),
    )


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
        threads=places.threads or threads,
        images_in_memory=_held_by_workers(context.data, places, workers),
        device=places.device if ":" in places.device else context.device.type,
    )


def _held_by_workers(data: ImageData, places: Places, workers: int | None) -> bool | None:
    """Whether workers hold the images: those of this machine share its memory."""
    if places.images_in_memory is not None or workers is None:
        return places.images_in_memory
    count = sum(len(split) for split in (data.train, data.validation, data.test))
    return are_held((1 + workers) * count, int(np.prod(data.input_shape)), None)
