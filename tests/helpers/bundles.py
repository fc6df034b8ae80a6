"""What a bundle is made of, for tests that measure nothing."""

from moodistill.bundle.model import Origin
from moodistill.pareto.table import FrontRow

ORIGIN = Origin("digits", "ab" * 32, b"\x01\x02")
DEVICE = {"cpu": "test", "onnxruntime": "1", "provider": "CPUExecutionProvider", "threads": 1,
          "batch": 1}  # fmt: skip


def front_row(**changes):
    values = dict(
        student="s0001", stage="distilled", search_accuracy=0.9, accuracy=0.91, test_accuracy=0.9,
        parameters=1000, macs=2000, latency_ms=0.5, latency_ms_low=0.4, latency_ms_high=0.6,
        teacher_latency_ms=1.0, size_bytes=4000, onnx="students/s0001/model.onnx",
        genome_hash="ab", summary="channels 1/2",
    )  # fmt: skip
    return FrontRow(**{**values, **changes})
