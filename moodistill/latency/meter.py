"""Latency of students in ONNX Runtime, measured against the teacher in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.io.measuring import measuring
from moodistill.latency import worker as latency_worker
from moodistill.pareto.evaluation import Latency

RESAMPLES = 400
STOP_SECONDS = 5.0  # for a worker to leave after its stdin closed
CONFIRMED_ROUNDS = 64  # so that a 90th percentile means something
PROFILED_RUNS = 15  # the first of which warm up
CONFIRMED_TOGETHER = 16  # models in one window of a confirmation


class LatencyError(RuntimeError):
    """A model could not be timed: one line on why. The meter stays usable."""


@dataclass(frozen=True)
class LatencyConfig:
    """What a latency is measured with, besides the device.

    Attributes:
        threads: of ONNX Runtime within one operation.
        batch: images in one run; a latency is that of the whole batch.
        provider: ONNX Runtime's execution provider; what it lacks runs on the CPU.
    """

    threads: int = 1
    batch: int = 1
    provider: str = latency_worker.CPU

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name} is {value}; give a whole number of at least 1")


class _WorkerProcess:
    """One running worker and the pipes to it."""

    def __init__(self) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            # -P: a file of the working directory must not stand in for a library.
            [sys.executable, "-P", "-m", "moodistill.latency.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def request(self, header: dict[str, Any], body: bytes, timeout_s: float) -> dict[str, Any]:
        """Answer of the worker.

        Raises:
            LatencyError: if it reports an error, died, or took longer than `timeout_s`.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            latency_worker.write_message(stdin, header, body)  # type: ignore[arg-type]
            answer = latency_worker.read_message(stdout)  # type: ignore[arg-type]
        except OSError:
            answer = None
        except BaseException:
            self.stop(kill=True)  # its answer would be taken for that to the next request
            raise
        finally:
            timer.cancel()
        if answer is None:
            self.stop(kill=True)
            if expired.is_set():
                raise LatencyError(f"no answer within {timeout_s:g} s; the worker was stopped")
            raise LatencyError(f"the latency worker died (exit code {self.process.returncode})")
        if "error" in answer[0]:
            raise LatencyError(answer[0]["error"])
        return answer[0]

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def stop(self, kill: bool = False) -> None:
        """End the process and reap it."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes of a request to a dead worker
                if stream is not None:
                    stream.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def timed_together(
    models: Mapping[str, Callable[[], bytes]], seed: int
) -> Iterator[dict[str, bytes]]:
    """The ONNX files of a confirmation, window by window; who shares one is drawn at random."""
    names = [str(n) for n in np.random.default_rng(seed).permutation(sorted(models))]
    for start in range(0, len(names), CONFIRMED_TOGETHER):
        yield {name: models[name]() for name in names[start : start + CONFIRMED_TOGETHER]}


CALIBRATION_PATIENCE = 5  # times the longest time of a request: how slow it is is not known yet


class LatencyMeter:
    """Times models against a reference, the teacher, in rounds that hold both.

    Load on the machine slows both alike, so the ratio of their times is steadier than either;
    the objective is the median ratio times the teacher's calibrated time.

    Attributes:
        rejected_windows: windows timed again because the reference was unsteady in them.
        elsewhere: latencies by other devices (`remote_meter.DeviceMeters` has some); none here.
    """

    elsewhere: Mapping[str, Mapping[str, Latency]] = {}

    def __init__(
        self,
        reference: bytes,
        input_shape: tuple[int, ...],
        config: LatencyConfig | None = None,
        *,
        teacher_latency_ms: float | None = None,
        seed: int = 0,
        timeout_s: float = 60.0,
    ) -> None:
        """Start the worker and calibrate the reference.

        Args:
            reference: the teacher as an ONNX file.
            input_shape: `(C, H, W)` of one image.
            config: threads, batch and execution provider.
            teacher_latency_ms: an earlier calibration, to keep its scale; None measures.
            seed: of the order within the rounds and of the bootstrap.
            timeout_s: longest time of one request; `confirm` has as much for each model, a
                calibration five times as much, and all have more where the reference is slow.

        Raises:
            LatencyError: if the reference cannot be run.
        """
        if teacher_latency_ms is not None and not 0 < teacher_latency_ms < float("inf"):
            raise UserError(
                f"teacher_latency_ms is {teacher_latency_ms}; give a positive number of "
                "milliseconds, or None to measure it"
            )
        self._reference = reference
        self._settings = {"input_shape": list(input_shape), **asdict(config or LatencyConfig())}
        self._teacher_latency_ms = teacher_latency_ms
        self._seed, self._timeout_s = seed, timeout_s
        self._cache: dict[str, Latency] = {}
        self.rejected_windows = 0
        self._worker: _WorkerProcess | None = self._start()

    @property
    def teacher_latency_ms(self) -> float:
        """The calibrated time of the reference, which sets the scale of every latency."""
        assert self._teacher_latency_ms is not None
        return self._teacher_latency_ms

    def measure(
        self,
        model: bytes,
        key: str | None = None,
        min_rounds: int = 8,
        max_rounds: int = 200,
        target: float = 0.02,
        max_seconds: float = 0.4,
    ) -> Latency:
        """Latency of one model.

        Args:
            model: an ONNX file.
            key: of the cache; models with equal keys are timed once.
            min_rounds: rounds that are run in any case, whatever `max_seconds` says.
            max_rounds: end of a window that does not reach `target`.
            target: relative half width of the ratio's 95% interval that ends a window.
            max_seconds: of one window; an unsteady window is repeated up to two times.

        Raises:
            LatencyError: if the model cannot be run or its worker died or timed out.
        """
        if key is not None and key in self._cache:
            return self._cache[key]
        if not 2 <= min_rounds <= max_rounds:
            raise UserError(
                f"min_rounds is {min_rounds} and max_rounds {max_rounds}; "
                "give at least 2 and no more than max_rounds"
            )
        request: dict[str, Any] = {"op": "measure", "target": target, "max_seconds": max_seconds}
        request |= {"min_rounds": min_rounds, "max_rounds": max_rounds}
        worker = self._running()
        with measuring():
            answer = worker.request(request, model, self._allowed_s)
        self.rejected_windows += answer["rejected_windows"]
        latency = self._latency(answer["samples_ms"], answer["reference_ms"])
        if key is not None:
            self._cache[key] = latency
        return latency

    def profile(self, model: bytes, runs: int = PROFILED_RUNS) -> tuple[list[list[float]], float]:
        """Times of a model's layers, as `latency.profile.layer_times` has them, and of the rest.

        Raises:
            LatencyError: if the model cannot be run or its worker died or timed out.
        """
        worker = self._running()
        with measuring():
            answer = worker.request({"op": "profile", "runs": runs}, model, self._allowed_s)
        return answer["layers"], answer["rest_ms"]

    def _running(self) -> _WorkerProcess:
        """The worker, a new one if it has ended."""
        if self._worker is None or not self._worker.alive:
            self._discard_worker()
            self._worker = self._start()
        return self._worker

    def confirm(
        self,
        models: Mapping[str, Callable[[], bytes]],
        rounds: int = CONFIRMED_ROUNDS,
        report: Callable[[int], None] | None = None,
    ) -> dict[str, Latency]:
        """Latency of several models, timed side by side in shuffled rounds of a fresh worker.

        Args:
            models: what makes each model's ONNX file; at most `CONFIRMED_TOGETHER` of them are in
                memory at a time. Which ones are timed together is drawn at random.
            rounds: timings of every model.
            report: called with the number of models done.

        Raises:
            LatencyError: if one of the models cannot be run; the message names it.
        """
        if rounds < 2:
            raise UserError(f"rounds is {rounds}; give at least 2")
        if not models:
            return {}
        found: dict[str, Latency] = {}
        worker = self._start()
        try:
            for files in timed_together(models, self._seed):
                request = {
                    "op": "confirm", "models": [[n, len(file)] for n, file in files.items()],
                    "min_rounds": rounds, "max_rounds": rounds, "target": 0.0, "max_seconds": 0.0,
                }  # fmt: skip
                timeout_s = self._allowed_s * (len(files) + 1)
                with measuring():
                    answer = worker.request(request, b"".join(files.values()), timeout_s)
                self.rejected_windows += answer["rejected_windows"]
                reference, *samples = answer["times_ms"]
                for name, times in zip(files, samples, strict=True):
                    found[name] = self._latency(times, reference)
                if report is not None:
                    report(len(found))
        finally:
            worker.stop()
        return {name: found[name] for name in models}

    @property
    def _allowed_s(self) -> float:
        """The longest time of a request: 150 runs of the reference, if that is more."""
        return max(self._timeout_s, 150 * (self._teacher_latency_ms or 0.0) / 1000)

    def close(self) -> None:
        """End the worker; a later `measure` starts another."""
        self._discard_worker()

    def __enter__(self) -> LatencyMeter:  # noqa: D105
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        self.close()

    def _discard_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _start(self) -> _WorkerProcess:
        worker = _WorkerProcess()
        calibrate = self._teacher_latency_ms is None
        request = {"op": "start", "seed": self._seed, "calibrate": calibrate, **self._settings}
        try:
            timeout_s = self._allowed_s * (CALIBRATION_PATIENCE if calibrate else 1)
            with measuring() if calibrate else contextlib.nullcontext():
                answer = worker.request(request, self._reference, timeout_s)
        except LatencyError as error:
            worker.stop(kill=True)
            raise LatencyError(f"the reference model cannot be timed: {error}") from error
        if calibrate:
            self._teacher_latency_ms = answer["reference_ms"]
        return worker

    def _latency(self, samples_ms: list[float], reference_ms: list[float]) -> Latency:
        ratios = np.asarray(samples_ms) / np.asarray(reference_ms)
        rng = np.random.default_rng(self._seed)
        picks = rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        ratio = float(np.median(ratios))
        scale = self.teacher_latency_ms
        return Latency(
            latency_ms=ratio * scale,
            low_ms=float(low) * scale,
            high_ms=float(high) * scale,
            ratio=ratio,
            samples_ms=tuple(samples_ms),
            reference_ms=tuple(reference_ms),
        )
