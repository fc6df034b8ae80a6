"""Times of a model's layers, as ONNX Runtime's own profiler has them.

Like the worker it loads nothing but numpy and ONNX Runtime.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
ROW = 5  # inputs of one output (of its group), outputs, taps, output pixels, ms


def layer_times(events: list[dict[str, Any]]) -> tuple[list[list[float]], float]:
    """Rows of all layers (see `ROW`), and the ms of all other operations.

    Args:
        events: of ONNX Runtime's profile of several runs; the median of a time counts.
    """
    found: dict[tuple[str, Any], list[float]] = defaultdict(list)
    shapes: dict[tuple[str, Any], dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            key = event["name"], event["args"].get("node_index")
            found[key].append(event["dur"] / 1000)
            shapes[key] = event["args"]
    rows, rest = [], 0.0
    for key, times in found.items():
        row = _sizes(shapes[key]) if shapes[key].get("op_name") in LAYERS else None
        if row is None:
            rest += float(np.median(times))
        else:
            rows.append([*row, float(np.median(times))])
    return rows, rest


def _sizes(event: dict[str, Any]) -> list[float] | None:
    """Inputs, outputs, taps and pixels of a layer from the shapes of what it reads and gives."""
    reads = [_shape(one) for one in event.get("input_type_shape", [])]
    gives = [_shape(one) for one in event.get("output_type_shape", [])]
    if len(reads) < 2 or not gives or len(reads[1]) < 2:
        return None
    weight, result = reads[1], gives[0]
    if "Conv" in event["op_name"]:
        return [weight[1], weight[0], math.prod(weight[2:]), math.prod(result[2:])]
    outputs = result[-1]
    return [math.prod(weight) / max(1, outputs), outputs, 1.0, math.prod(result[1:-1])]


def _shape(typed: dict[str, list[int]]) -> list[int]:
    """The shape in `{"float": shape}`."""
    return next(iter(typed.values()), [])
