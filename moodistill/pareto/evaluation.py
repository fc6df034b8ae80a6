"""The record of one scored student: what the search minimises and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Fewer timings say nothing about a 90th percentile (MLPerf LoadGen's floor).
P90_SAMPLES = 64


@dataclass(frozen=True)
class Latency:
    """Measured time of one run of a student, next to the teacher.

    Attributes:
        latency_ms: median per-round ratio to the teacher times the calibrated teacher time.
        low_ms, high_ms: 95% bootstrap interval of `latency_ms`.
        ratio: the median per-round ratio (student time / teacher time).
        samples_ms: raw student times, one per round.
        reference_ms: raw teacher times, one per round.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    samples_ms: tuple[float, ...] = ()
    reference_ms: tuple[float, ...] = ()

    @property
    def p90_ms(self) -> float | None:
        """90th percentile of the times on the scale of `latency_ms`; None below 64 samples."""
        if len(self.samples_ms) < P90_SAMPLES:
            return None
        middle, high = np.percentile(self.samples_ms, [50, 90])
        return self.latency_ms * float(high / middle)


@dataclass(frozen=True)
class Evaluation:
    """One evaluated genome (canonical form).

    Attributes:
        genome_hash: hex digest of the canonical genome; the key in the store.
        genome: the canonical genome, packed (`GenomeLayout.pack`).
        accuracy: fraction right on the search-validation images, 0 if failed.
        parameters: of the student before BN folding.
        macs: multiply-accumulates of one image.
        size_bytes: of the ONNX file.
        latency: None if failed.
        seconds: time spent by stage (`build`, `inherit`, `accuracy`, `export`, `latency`).
        failure: None, or one line on why the student could not be scored.
        summary: one human-readable line.
        memory_bytes: weights and largest activations at batch 1, computed from the ONNX file.
        error: how far its outputs are from the teacher's on the same images
            (`teacher.divergence`); None if that is not known.
    """

    genome_hash: str
    genome: bytes
    accuracy: float
    parameters: int
    macs: int
    size_bytes: int
    latency: Latency | None
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    summary: str = ""
    memory_bytes: int = 0
    error: float | None = None


def accuracy_interval(fraction: float, count: int) -> tuple[float, float]:
    """95% interval of a fraction measured on `count` images (Wilson 1927)."""
    z = 1.96
    middle = fraction + z * z / (2 * count)
    width = z * float(np.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2))
    scale = 1 + z * z / count
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)
