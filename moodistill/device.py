"""What of the device shapes the search: the width of its SIMD blocks."""

from __future__ import annotations

from moodistill.latency import device_fingerprint


def simd_step() -> int:
    """Channels in one block of ONNX Runtime's blocked layout on this CPU.

    16 with AVX-512, else 8 (AVX2; 4-wide units divide it).
    """
    return 16 if "avx512f" in str(device_fingerprint()) else 8
