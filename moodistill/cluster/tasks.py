"""What runs on a Dask worker: scoring a student, or timing a model on the device that it stands on.

Teacher, statistics and data are loaded once a process; what travels is the genome, digests and ONNX
files. A worker of another version, teacher or data set refuses by its own name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moodistill.accelerator import device_count, find_device
from moodistill.errors import UserError
from moodistill.latency.meter import LatencyConfig, LatencyError, LatencyMeter
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.student.evaluator import Evaluator, Scored
from moodistill.teacher.weights import is_other_network, network_digest
from moodistill.version import __version__

if TYPE_CHECKING:
    import torch

    from moodistill.config import RunConfig
    from moodistill.student.context import TeacherContext

STUDENTS = "student"  # the resource of a worker that scores students; of each it has one
OWN_DEVICE = "MOODISTILL_DEVICE"  # by which a worker elsewhere says what it computes on
DEVICE = "latency:"  # and of one that times models, followed by the device's name


class WorkerMismatch(UserError):
    """A worker that cannot take part, and why."""


@dataclass(frozen=True)
class ScoreSetup:
    """What a worker must have to score students.

    Attributes:
        version: moodistill's.
        config: the run's configuration as JSON.
        teacher_digest, data_digest: of the driver's teacher and data.
        network_digest: of its traced network.
        data_dir: where to look for a problem's data, as on the driver; None for the default.
        threads: torch's.
        images_in_memory: whether a folder's images are held; None decides by their number.
        device: that students are computed on; each worker takes its own of that kind.
    """

    version: str
    config: str
    teacher_digest: str
    data_digest: str
    network_digest: str
    data_dir: str | None
    threads: int
    images_in_memory: bool | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class TimeSetup:
    """How a device times models: as `LatencyMeter`'s arguments."""

    version: str
    input_shape: tuple[int, ...]
    config: LatencyConfig
    teacher_latency_ms: float | None


def _name() -> str:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # called outside a worker
        return "this process"
    return f"worker {worker.name} at {worker.address}"


def _check_version(version: str) -> None:
    if version != __version__:
        raise WorkerMismatch(
            f"{_name()} has moodistill {__version__}, the run has {version}; install the same there"
        )


@lru_cache(maxsize=1)
def _prepared(setup: ScoreSetup) -> tuple[TeacherContext, RunConfig]:
    from moodistill.config import RunConfig
    from moodistill.student.context import load_context, use_threads

    _check_version(setup.version)
    use_threads(setup.threads)
    config = RunConfig.from_dict(json.loads(setup.config))
    data_dir = None if setup.data_dir is None else Path(setup.data_dir)
    try:
        task = config.task(setup.images_in_memory)
        context = load_context(
            task, data_dir, config.calibration, rules=config.rules, device=_device(setup)
        )
    except UserError as error:
        raise WorkerMismatch(f"{_name()}: {error}") from error
    network = network_digest(context.graph.module)
    for what, found, wanted in (
        ("teacher", context.teacher_digest, setup.teacher_digest),
        ("data set", context.data.digest, setup.data_digest),
        ("forward", network, setup.network_digest),
    ):
        same = not is_other_network(wanted, found) if what == "forward" else found == wanted
        if not same:
            raise WorkerMismatch(
                f"{_name()} has another {what} ({found[:12]}, the run has {wanted[:12]}); "
                "copy it there"
            )
    return context, config


def _device(setup: ScoreSetup) -> torch.device:
    """This worker's device.

    Raises:
        UserError: if it has none of the run's kind.
    """
    from distributed import get_worker

    try:
        name = get_worker().name
    except ValueError:  # called outside a worker
        name = None
    place = name if isinstance(name, int) else None
    return find_device(device_here(setup.device, place, os.environ.get(OWN_DEVICE)))


def device_here(asked: str, place: int | None, own: str | None) -> str:
    """The name of a worker's device.

    Args:
        asked: of the run, such as `cuda`; with a number (`cuda:1`) all workers share that one.
        place: of the worker among those that were started beside the driver, from 0: they take
            the devices of this machine in turn. None for a worker elsewhere.
        own: what that worker says of itself (`MOODISTILL_DEVICE`).

    Raises:
        UserError: if it says another kind than the run's: their answers differ a little.
    """
    kind, _, number = asked.partition(":")
    if own:
        if own.partition(":")[0] != kind:
            raise UserError(
                f"{OWN_DEVICE} is {own}, the run computes on {kind}; expected a device of that kind"
            )
        return own
    count = device_count(kind)
    if place is None or number or not count:
        return asked
    return f"{kind}:{place % count}"


def score(setup: ScoreSetup, genome: bytes) -> Scored:
    """Score a packed genome, latency aside."""
    evaluator = _evaluator(setup)
    return evaluator.score(evaluator.context.layout.unpack(genome))


@lru_cache(maxsize=1)
def _evaluator(setup: ScoreSetup) -> Evaluator:
    context, config = _prepared(setup)
    return Evaluator(context, config.recipe, None, config.search.simd_step)


def distil(setup: ScoreSetup, evaluation: Evaluation, name: str) -> dict[str, bytes]:
    """Distil one finalist; the files of its folder.

    Raises:
        FloatingPointError, UserError: as `finalists.finish`.
    """
    from moodistill.finalists.distil import distil_here

    context, config = _prepared(setup)
    with tempfile.TemporaryDirectory() as folder:
        distiller = distil_here(context, config.recipe, config.distill)
        for _, result in distiller({name: evaluation}, Path(folder), lambda *_: None):
            if isinstance(result, Exception):
                raise result
        return {path.name: path.read_bytes() for path in (Path(folder) / name).iterdir()}


_meters: dict[str, LatencyMeter] = {}


def _meter(setup: TimeSetup, reference: bytes) -> LatencyMeter:
    _check_version(setup.version)
    key = hashlib.sha256(reference).hexdigest() + repr(setup)
    if key not in _meters:
        for meter in _meters.values():
            meter.close()
        _meters.clear()
        try:
            _meters[key] = LatencyMeter(
                reference,
                setup.input_shape,
                setup.config,
                teacher_latency_ms=setup.teacher_latency_ms,
            )
        except LatencyError as error:
            raise WorkerMismatch(f"{_name()} cannot time the teacher: {error}") from error
    return _meters[key]


def hold(reference: bytes) -> bytes:
    """Keep the teacher's file on this worker for the tasks that follow."""
    return reference


def calibrate(setup: TimeSetup, reference: bytes) -> tuple[float, dict[str, Any]]:
    """The teacher's latency on this device, and the device's fingerprint."""
    from moodistill.latency.device import check_provider, device_fingerprint

    try:
        check_provider(setup.config.provider)
    except UserError as error:
        raise WorkerMismatch(f"{_name()}: {error}") from error
    meter = _meter(setup, reference)
    return meter.teacher_latency_ms, device_fingerprint(setup.config)


def probe_step(version: str, config: LatencyConfig) -> int:
    """Channels per SIMD block of this device."""
    from moodistill.io.cache import default_cache_dir
    from moodistill.latency.simd import probe_simd

    _check_version(version)
    return probe_simd(config, default_cache_dir()).step


def time_model(setup: TimeSetup, reference: bytes, scored: Scored) -> Evaluation:
    """The evaluation with its latency on this device; a model that cannot be timed has failed."""
    if scored.evaluation.failure is not None:
        return scored.evaluation
    began = time.perf_counter()
    try:
        latency = _meter(setup, reference).measure(scored.model, scored.key)
    except LatencyError as error:
        failure = f"LatencyError: {error}"
        return replace(scored.evaluation, accuracy=0.0, failure=failure)
    seconds = scored.evaluation.seconds | {"latency": time.perf_counter() - began}
    return replace(scored.evaluation, latency=latency, seconds=seconds)


def slowest(timed: list[Evaluation]) -> Evaluation:
    """One student timed on several devices, with the largest latency; it fails if one failed."""
    for one in timed:
        if one.latency is None:
            return one
    return max(timed, key=lambda one: one.latency.latency_ms if one.latency else 0.0)


def confirm_models(
    setup: TimeSetup, reference: bytes, models: dict[str, bytes], rounds: int
) -> tuple[dict[str, Latency], int]:
    """Latencies of several models side by side, and how many windows were timed again."""
    meter = _meter(setup, reference)
    before = meter.rejected_windows
    files = {name: (lambda file=file: file) for name, file in models.items()}
    return meter.confirm(files, rounds), meter.rejected_windows - before


def profile_model(
    setup: TimeSetup, reference: bytes, model: bytes
) -> tuple[list[list[float]], float]:
    """Times of a model's layers, and of the rest."""
    return _meter(setup, reference).profile(model)
