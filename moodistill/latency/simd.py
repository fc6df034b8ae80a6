"""How many channels fill a SIMD block of this processor, by timing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moodistill.io.atomic import write_json_atomic
from moodistill.io.cache_dir import cache_key, cached
from moodistill.io.records import parse_json
from moodistill.latency.device import device_fingerprint
from moodistill.latency.meter import LatencyConfig, LatencyError, LatencyMeter

STEPS = (4, 8, 16, 32)


PROBED_WIDTHS = tuple(range(32, 65, 4))


WORTHWHILE = 0.5


@dataclass(frozen=True)
class SimdProbe:
    """The channels in one SIMD block, and how they were found.

    Attributes:
        step: widths off a multiple of it waste time on this device.
        ratios: latency of a chain of 3x3 convolutions by width, relative to the widest; empty if
            the step was not measured.
    """

    step: int
    ratios: dict[int, float]


def probe_simd(config: LatencyConfig | None = None, cache_dir: Path | None = None) -> SimdProbe:
    """Find the widths at which this device's latency drops, by a sweep of about two seconds.

    The result is kept in `cache_dir` by fingerprint, so that every run on a device has the same
    step. A device that cannot be timed gets the step of its instruction set.

    Raises:
        UserError: if the cache cannot be written.
    """
    fingerprint = device_fingerprint(config)
    key = cache_key(json.dumps(fingerprint, sort_keys=True))
    path = cache_dir / f"simd-{key}.json" if cache_dir else None
    try:
        return cached(
            path,
            _read_probe,
            lambda: _sweep(config),
            lambda probe, to: write_json_atomic(to, asdict(probe)),
        )
    except LatencyError:
        return SimdProbe(16 if "avx512f" in fingerprint["simd"] else 8, {})


def _sweep(config: LatencyConfig | None) -> SimdProbe:
    widest = max(PROBED_WIDTHS)
    with LatencyMeter(_chain(widest), (3, 16, 16), config) as meter:
        found = meter.confirm({str(w): partial(_chain, w) for w in PROBED_WIDTHS}, 32)
    ratios = {width: found[str(width)].ratio / found[str(widest)].ratio for width in PROBED_WIDTHS}
    return SimdProbe(simd_step_of(ratios), dict(sorted(ratios.items())))


def _read_probe(path: Path) -> SimdProbe:
    probe = parse_json(path.read_bytes(), SimdProbe)
    if not 0 < probe.step <= max(PROBED_WIDTHS) or min(probe.ratios.values(), default=1) <= 0:
        raise ValueError(f"{probe} is no probe of a device")
    return probe


def simd_step_of(ratios: Mapping[int, float]) -> int:
    """The smallest step whose multiples are worth their width.

    A width is worthwhile if going down to it from the next multiple of twice the step saves at
    least half of what the smaller number of multiplications promises; a step is, if at least half
    of its odd multiples are and all larger steps are too.

    Args:
        ratios: latency by width, for every multiple of 4 from 32 to 64.
    """
    best = STEPS[-1]
    for step in reversed(STEPS[:-1]):
        gains = []
        for width in (w for w in ratios if w % (2 * step) == step):
            above = width + step
            promised = 1.0 - (width / above) ** 2
            gains.append((1.0 - ratios[width] / ratios[above]) / promised)
        if np.median(gains) < WORTHWHILE:
            break
        best = step
    return best


def _chain(width: int, layers: int = 4) -> bytes:
    """3x3 convolutions of equal width with ReLUs on 16x16 maps, as an ONNX file."""
    rng = np.random.default_rng(0)
    nodes, tensors, value, channels = [], [], "input", 3
    for i in range(layers + 1):
        weight = rng.standard_normal((width, channels, 3, 3), np.float32) / (3 * channels**0.5)
        tensors.append(numpy_helper.from_array(weight, f"weight{i}"))
        nodes.append(helper.make_node("Conv", [value, f"weight{i}"], [f"conv{i}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"]))
        value, channels = f"relu{i}", width
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["logits"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("input", (3, 16, 16)), ("logits", (width, 1, 1)))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()
