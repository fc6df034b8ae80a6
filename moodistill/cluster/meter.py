"""Named devices of a cluster as a latency meter; the driver's side of `remote`'s timing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moodistill.cluster import tasks as remote
from moodistill.cluster.client import Cluster
from moodistill.latency.meter import CONFIRMED_ROUNDS, LatencyConfig, timed_together
from moodistill.pareto.evaluation import Latency
from moodistill.version import __version__

if TYPE_CHECKING:
    from distributed import Future


class RemoteMeter:
    """One named device: models go there as ONNX bytes, raw timings come back.

    Attributes:
        teacher_latency_ms: the calibrated time of the teacher on the device.
        device: its fingerprint.
        rejected_windows: windows timed again because the teacher's time drifted.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        reference: bytes,
        input_shape: tuple[int, ...],
        config: LatencyConfig,
        teacher_latency_ms: float | None,
    ) -> None:
        self.cluster = cluster
        self.resource = remote.DEVICE + name
        self.rejected_windows = 0
        # One copy on the device, not one a task; as a task's result it is made again where a
        # device that was gone comes back (scattered data would be lost).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is large
            self.reference = cluster.submit(remote.hold, self.resource, reference)
        setup = remote.TimeSetup(__version__, input_shape, config, teacher_latency_ms)
        future = cluster.submit(remote.calibrate, self.resource, setup, self.reference)
        scale, self.device = cluster.result(future, self.resource)
        self.teacher_latency_ms = float(scale)
        self.setup = replace(setup, teacher_latency_ms=self.teacher_latency_ms)

    def submit(self, scored: Future) -> Future:
        """A task that adds the latency to a scored student, from worker to worker."""
        return self.cluster.submit(
            remote.time_model, self.resource, self.setup, self.reference, scored
        )

    def profile(self, model: bytes) -> tuple[list[list[float]], float]:
        """Times of a model's layers on the device, and of the rest."""
        future = self.cluster.submit(
            remote.profile_model, self.resource, self.setup, self.reference, model
        )
        rows, rest = self.cluster.result(future, self.resource)
        return rows, rest

    def confirm(self, files: Mapping[str, bytes], rounds: int) -> Future:
        """A task that times several models side by side."""
        return self.cluster.submit(
            remote.confirm_models, self.resource, self.setup, self.reference, dict(files), rounds
        )


class DeviceMeters:
    """`LatencyMeter` on the named devices of a cluster.

    Attributes:
        device: fingerprint of the first device.
        elsewhere: latencies that `confirm` found, by device and model; empty if there is one
            device alone.
    """

    def __init__(
        self,
        cluster: Cluster,
        reference: bytes,
        input_shape: tuple[int, ...],
        config: LatencyConfig,
        calibrated: Mapping[str, float] | None,
    ) -> None:
        self.cluster = cluster
        self.meters = {
            name: RemoteMeter(
                cluster, name, reference, input_shape, config, (calibrated or {}).get(name)
            )
            for name in cluster.config.latency_on
        }
        self.first = next(iter(self.meters.values()))
        self.device = self.first.device
        self.elsewhere: dict[str, dict[str, Latency]] = {}

    @property
    def timing(self) -> list[RemoteMeter]:
        """The devices that the search waits for."""
        return list(self.meters.values()) if self.cluster.config.worst_latency else [self.first]

    @property
    def teacher_latency_ms(self) -> float:
        """The calibrated time of the teacher, as the objective has it."""
        return max(meter.teacher_latency_ms for meter in self.timing)

    @property
    def rejected_windows(self) -> int:
        """Windows timed again because the teacher's time drifted."""
        return sum(meter.rejected_windows for meter in self.meters.values())

    def profile(self, model: bytes) -> tuple[list[list[float]], float]:
        """Times of a model's layers on the first device, and of the rest."""
        return self.first.profile(model)

    def submit(self, scored: Future) -> Future:
        """A task that adds the objective's latency to a scored student, from worker to worker."""
        timed = [meter.submit(scored) for meter in self.timing]
        if len(timed) == 1:
            return timed[0]
        return self.cluster.submit(remote.slowest, self.first.resource, timed)

    def confirm(
        self,
        models: Mapping[str, Callable[[], bytes]],
        rounds: int = CONFIRMED_ROUNDS,
        report: Callable[[int], None] | None = None,
    ) -> dict[str, Latency]:
        """As `LatencyMeter.confirm`, on all devices at once."""
        found: dict[str, dict[str, Latency]] = {name: {} for name in self.meters}
        for files in timed_together(models, seed=0):
            futures = {name: meter.confirm(files, rounds) for name, meter in self.meters.items()}
            for name, future in futures.items():
                meter = self.meters[name]
                latencies, rejected = self.cluster.result(future, meter.resource)
                meter.rejected_windows += rejected
                found[name] |= latencies
            if report is not None:
                report(len(found[name]))
        if len(self.meters) > 1:
            self.elsewhere = found
        objective = [found[name] for name, meter in self.meters.items() if meter in self.timing]
        return {
            model: max((one[model] for one in objective), key=lambda latency: latency.latency_ms)
            for model in models
        }

    def close(self) -> None:
        """Nothing to end here: the devices' processes stay for the next run."""

    def __enter__(self) -> DeviceMeters:  # noqa: D105
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        self.close()
