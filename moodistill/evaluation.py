"""The record of one scored student: what the search minimises and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latency:
    """Measured time of one student at batch 1, next to the teacher.

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

    @property
    def objectives(self) -> tuple[float, float, float] | None:
        """1 - accuracy, parameters and latency in ms, all minimised; None if it failed."""
        if self.failure is not None or self.latency is None:
            return None
        return 1.0 - self.accuracy, float(self.parameters), self.latency.latency_ms
