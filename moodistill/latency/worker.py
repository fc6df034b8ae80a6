"""The process that times ONNX models: `python -m moodistill.latency.worker`.

It reads requests from stdin and answers on stdout until stdin closes. Each message is a JSON
header and a run of bytes, both preceded by their length. Only numpy and ONNX Runtime are loaded,
so that neither torch's threads nor its memory disturb the clock.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moodistill.latency.profile import layer_times

# What every session runs with, apart from the number of threads and the batch.
SESSION_CONFIG = {"session.intra_op.allow_spinning": "0"}
CPU = "CPUExecutionProvider"
SHORTEST_TIMING_MS = 0.3  # shorter runs are repeated: clock and call overhead would show
STABLE = 0.1  # two runs in a row that differ less end the warm-up
MAX_WARMUP_RUNS, MAX_WARMUP_SECONDS = 20, 1.0
CALIBRATION_RUNS = 31
DRIFT = 0.2  # of the reference between the halves of a window
OUTLIER = 2.0  # a reference time this often its median ...
OUTLIER_SHARE = 0.05  # ... in more than this share of a window's rounds
MAX_REPEATED_WINDOWS = 2

_LENGTHS = struct.Struct(">IQ")


def write_message(stream: BinaryIO, header: dict[str, Any], body: bytes = b"") -> None:
    """Send one message."""
    text = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(text), len(body)))
    stream.write(text)
    stream.write(body)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Receive one message, or None if the other side has closed the stream."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, body_bytes = _LENGTHS.unpack(lengths)
    text, body = stream.read(header_bytes), stream.read(body_bytes)
    if len(text) < header_bytes or len(body) < body_bytes:
        return None
    return json.loads(text), body


class TimedModel:
    """One session, warm, with the input that it is timed on.

    Attributes:
        repeats: runs in one timing.
    """

    def __init__(
        self,
        model: bytes,
        input_shape: list[int],
        threads: int,
        batch: int,
        provider: str = CPU,
        profile: str | None = None,
    ) -> None:
        """Load the model and warm it up; it may take float or uint8 pixels.

        `profile` is what the name of a file of its operations' times begins with.
        """
        import onnxruntime  # here, so that the meter does not load it along with this module

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_free_dimension_override_by_name("batch", batch)
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        # What the provider lacks runs on the CPU, as it would on the device.
        providers = list(dict.fromkeys((provider, CPU)))
        self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        if provider not in self._session.get_providers():
            raise RuntimeError(f"ONNX Runtime could not start {provider}")
        images = np.random.default_rng(0).standard_normal((batch, *input_shape), np.float32)
        first = self._session.get_inputs()[0]
        if first.type == "tensor(uint8)":
            images = (images * 64 + 128).clip(0, 255).astype(np.uint8)
        self._feed = {first.name: images}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.repeats = 1
        self.warm_up()

    def time_ms(self) -> float:
        """Milliseconds of one run, averaged over `repeats` of them."""
        run, outputs, feed = self._session.run, self._outputs, self._feed
        start = time.perf_counter_ns()
        for _ in range(self.repeats):
            run(outputs, feed)
        return (time.perf_counter_ns() - start) / 1e6 / self.repeats

    def events(self) -> list[dict[str, Any]]:
        """What the profile recorded, which ends with this call."""
        return json.loads(Path(self._session.end_profiling()).read_bytes())

    def warm_up(self) -> None:
        """Run until the times settle (three runs at least), then choose `repeats`."""
        self.repeats = 1
        times: list[float] = []
        deadline = time.perf_counter() + MAX_WARMUP_SECONDS
        while len(times) < 3 or (
            abs(times[-1] - times[-2]) > STABLE * times[-2]
            and len(times) < MAX_WARMUP_RUNS
            and time.perf_counter() < deadline
        ):
            times.append(self.time_ms())
        self.repeats = max(1, math.ceil(SHORTEST_TIMING_MS / max(min(times), 1e-3)))


def order_interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of the median from order statistics."""
    ordered = np.sort(values)
    n = len(ordered)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return float(ordered[low]), float(ordered[n - 1 - low])


def half_width(ratios: np.ndarray) -> float:
    """Half the interval of the median, relative to it."""
    low, high = order_interval(ratios)
    return (high - low) / 2 / float(np.median(ratios))


def unsteady(reference_ms: np.ndarray) -> bool:
    """Whether the reference drifted or jumped, so that something else used the machine."""
    half = len(reference_ms) // 2
    first, second = np.median(reference_ms[:half]), np.median(reference_ms[half:])
    drifted = abs(first - second) > DRIFT * min(first, second)
    jumps = reference_ms > OUTLIER * np.median(reference_ms)
    return bool(drifted or jumps.mean() > OUTLIER_SHARE)


class Worker:
    """Answers the requests of one `LatencyMeter`."""

    def __init__(self) -> None:
        """A worker that waits for `start`."""
        self._settings: dict[str, Any] = {}
        self._reference: TimedModel | None = None
        self._rng = np.random.default_rng(0)

    def start(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Load the reference; calibrate it unless the caller knows its time."""
        keys = ("input_shape", "threads", "batch", "provider")
        self._settings = {key: request[key] for key in keys}
        self._rng = np.random.default_rng(request["seed"])
        self._reference = TimedModel(body, **self._settings)
        if not request["calibrate"]:
            return {}
        times = [self._reference.time_ms() for _ in range(CALIBRATION_RUNS)]
        return {"reference_ms": float(np.median(times))}

    def measure(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Time one model against the reference, in as few rounds as its ratio needs."""
        assert self._reference is not None
        pair = [self._reference, TimedModel(body, **self._settings)]
        times, rejected = self._steady(pair, request)
        return {
            "reference_ms": times[0].tolist(),
            "samples_ms": times[1].tolist(),
            "rejected_windows": rejected,
        }

    def confirm(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Time several models and the reference in the same shuffled rounds."""
        assert self._reference is not None
        models, offset = [self._reference], 0
        for name, size in request["models"]:
            try:
                models.append(TimedModel(body[offset : offset + size], **self._settings))
            except Exception as error:
                raise RuntimeError(f"model {name}: {error}") from error
            offset += size
        times, rejected = self._steady(models, request)
        return {"times_ms": times.tolist(), "rejected_windows": rejected}

    def profile(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Times of one model's layers."""
        with tempfile.TemporaryDirectory() as folder:
            timed = TimedModel(body, **self._settings, profile=str(Path(folder) / "profile"))
            for _ in range(request["runs"]):
                timed.time_ms()
            rows, rest = layer_times(timed.events())
        return {"layers": rows, "rest_ms": rest}

    def _steady(self, models: list[TimedModel], request: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Times `(models, rounds)` of the first window with a steady reference.

        If none is steady, of the one that says most; and how many windows were rejected.
        """
        windows: list[np.ndarray] = []
        while len(windows) <= MAX_REPEATED_WINDOWS:
            models[0].warm_up()
            windows.append(self._window(models, request))
            if not unsteady(windows[-1][0]):
                return windows[-1], len(windows) - 1
        best = min(windows, key=lambda times: max(half_width(row / times[0]) for row in times[1:]))
        return best, len(windows) - 1

    def _window(self, models: list[TimedModel], request: dict[str, Any]) -> np.ndarray:
        """Times `(models, rounds)` of shuffled rounds until every ratio is known well enough."""
        times = np.empty((len(models), request["max_rounds"]))
        deadline = time.perf_counter() + request["max_seconds"]
        for done in range(1, request["max_rounds"] + 1):
            for index in self._rng.permutation(len(models)):
                times[index, done - 1] = models[index].time_ms()
            if done < request["min_rounds"]:
                continue
            if time.perf_counter() > deadline:
                break
            ratios = times[1:, :done] / times[0, :done]
            if max(map(half_width, ratios)) <= request["target"]:
                break
        return times[:, :done]


def main() -> None:
    """Serve requests until stdin closes."""
    # Ctrl-C goes to the whole process group: whether to stop is up to the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not end up between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    worker = Worker()
    gc.disable()
    while (message := read_message(requests)) is not None:
        request, body = message
        handle = {
            "start": worker.start, "measure": worker.measure, "confirm": worker.confirm,
            "profile": worker.profile,
        }  # fmt: skip
        try:
            answer = handle[request["op"]](request, body)
        except Exception as error:  # ONNX Runtime has an exception class for every status
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        del message, body
        gc.collect()  # between timings, never during one
        try:
            write_message(answers, answer)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
