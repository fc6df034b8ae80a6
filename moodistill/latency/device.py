"""The device that latencies are measured on: its fingerprint and the width of its SIMD blocks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moodistill.errors import UserError
from moodistill.latency import worker as latency_worker
from moodistill.latency.meter import LatencyConfig

_SIMD_FLAGS = (
    "sse4_2 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 asimd asimdhp asimddp sve sve2 i8mm bf16"
)


def device_fingerprint(config: LatencyConfig | None = None) -> dict[str, Any]:
    """What a latency depends on besides the model: processor, ONNX Runtime and its options."""
    model, flags = platform.processor(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            model = value
        elif name in ("flags", "Features"):
            flags.update(value.split())
    return {
        "cpu": model,
        "simd": [flag for flag in _SIMD_FLAGS.split() if flag in flags],
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "options": {"graph_optimization": "all", "execution_mode": "sequential"}
        | latency_worker.SESSION_CONFIG,
        **asdict(config or LatencyConfig()),
    }


def check_provider(provider: str) -> None:
    """Refuse an execution provider that this ONNX Runtime does not have.

    Raises:
        UserError: names those that it has.
    """
    import onnxruntime

    installed = onnxruntime.get_available_providers()
    if provider not in installed:
        raise UserError(
            f"the provider {provider} is not in this ONNX Runtime; expected one of "
            f"{', '.join(installed)}: choose one of them, or install the onnxruntime package that "
            "brings it"
        )
