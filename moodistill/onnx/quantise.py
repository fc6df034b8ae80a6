"""Static INT8 quantisation (QDQ) of students' ONNX files by ONNX Runtime's quantiser.

It is `onnxruntime.quantization.quantize_static` taken apart: the ranges of the activations are
measured once and serve every variant of a model, and nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from moodistill.errors import UserError

# What ONNX Runtime has integer kernels for; others would only be rounded around float kernels.
ACTIVATIONS = ("Relu", "Clip")
FOLLOWERS = (*ACTIVATIONS, "MaxPool", "AveragePool", "Flatten")  # quantised if their input is
_JOINS = ("Add", "Mul", "Concat")
LEADERS = ("Conv", "Gemm", *_JOINS, "GlobalAveragePool", "LeakyRelu", "Sigmoid")
BATCH = 32  # images run at once; the first so many also tell the nodes that INT8 spoils
_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


@dataclass(frozen=True)
class Int8Scheme:
    """Types of an INT8 model; weights are symmetric with a scale for each output channel.

    Attributes:
        activation: `uint8` or `int8`, with a zero point.
        weight: `int8`.
        reduce_range: 7-bit weights, where sums of two 8-bit products saturate (x86 without VNNI).
    """

    activation: str
    weight: str
    reduce_range: bool

    def __post_init__(self) -> None:
        """Refuse types that there are no kernels for."""
        if self.activation not in _TYPES or self.weight != "int8":
            raise UserError(
                f"types are {self.activation!r} and {self.weight!r}; expected uint8 or int8 "
                "activations and int8 weights: take what int8_scheme gives for the device"
            )


@dataclass(frozen=True)
class Quantised:
    """An INT8 model and what is known of it.

    Attributes:
        model: ONNX file.
        accuracy: of the model, as the caller measures it.
        excluded: nodes that stay in float, worst first, each named by its output.
        scheme: types of activations and weights.
    """

    model: bytes
    accuracy: float
    excluded: tuple[str, ...]
    scheme: Int8Scheme


@dataclass(frozen=True)
class _Calibrated:
    """A float model with named nodes and known types, and the range of every activation."""

    model: onnx.ModelProto
    ranges: dict[str, tuple[np.float32, np.float32]]


def int8_scheme(device: Mapping[str, Any]) -> Int8Scheme:
    """The types that ONNX Runtime's kernels for a device want.

    Args:
        device: fingerprint with `machine` and `simd`; where flags are unknown, VNNI is not assumed.
    """
    if str(device.get("machine")).lower() in ("x86_64", "amd64", "x86", "i386", "i686"):
        vnni = {"avx512_vnni", "avx_vnni"} & set(device.get("simd") or ())
        return Int8Scheme("uint8", "int8", reduce_range=not vnni)
    return Int8Scheme("int8", "int8", reduce_range=False)


def quantise(
    model: bytes, images: np.ndarray, scheme: Int8Scheme, exclude: Sequence[str] = ()
) -> bytes:
    """An INT8 model with the float model's input and output; the same arguments, the same bytes.

    Args:
        model: ONNX file with one float input `(batch, C, H, W)`.
        images: `(N, C, H, W)` float32, normalised; their activations span the integer ranges.
        scheme: types of activations and weights.
        exclude: nodes that stay in float, each named by its output.

    Raises:
        UserError: if the images do not fit the model, or `exclude` names no node.
    """
    calibrated = _calibrate(model, images)
    if unknown := set(exclude) - {node.name for node in calibrated.model.graph.node}:
        raise UserError(
            f"exclude names {min(unknown)!r}, which no node computes; give outputs of nodes"
        )
    return _quantised(calibrated, scheme, exclude)


def quantise_measured(
    model: bytes,
    images: np.ndarray,
    scheme: Int8Scheme,
    accuracy: Callable[[bytes], float],
    floor: float,
    max_trials: int = 6,
) -> Quantised:
    """Quantise every node, or all but the worst 1, 2, 4, ... until `floor` is reached.

    The worst are those that change the logits of some of `images` most if they alone are
    quantised, so `accuracy` is not asked once for every node.

    Args:
        model, images, scheme: as for `quantise`.
        accuracy: of an ONNX file, a fraction.
        floor: accuracy that is good enough.
        max_trials: models whose accuracy is measured at most.

    Returns:
        The first model that reaches `floor`, else the most accurate one.
    """
    if max_trials < 1:
        raise UserError(f"max_trials is {max_trials}; give a whole number of at least 1")
    calibrated = _calibrate(model, images)

    def attempt(excluded: Sequence[str]) -> Quantised:
        made = _quantised(calibrated, scheme, excluded)
        return Quantised(made, accuracy(made), tuple(excluded), scheme)

    trials = [attempt(())]
    worst: list[str] = []
    while trials[-1].accuracy < floor and len(trials) < max_trials:
        worst = worst or _worst_first(calibrated, images, scheme)
        count = 2 ** (len(trials) - 1)
        if count >= len(worst):  # all in float would not be an INT8 model
            break
        trials.append(attempt(worst[:count]))
    # Only the last can have reached the floor, and then none is more accurate.
    return max(trials, key=lambda trial: trial.accuracy)


def _worst_first(calibrated: _Calibrated, images: np.ndarray, scheme: Int8Scheme) -> list[str]:
    """Nodes by the logits' squared error if each is quantised alone, its activation with it."""
    expected = next(_batches(calibrated.model.SerializeToString(), images))[0]
    errors: dict[str, float] = {}
    nodes = calibrated.model.graph.node
    for name in (node.name for node in nodes if node.op_type in LEADERS):
        behind = [n.name for n in nodes if n.op_type in ACTIVATIONS and n.input[0] == name]
        alone = _quantised(calibrated, scheme, only=[name, *behind])
        errors[name] = float(np.square(next(_batches(alone, images))[0] - expected).mean())
    return sorted(errors, key=errors.__getitem__, reverse=True)


def _calibrate(model: bytes, images: np.ndarray) -> _Calibrated:
    """Name the nodes and measure the range of every activation.

    Minimum and maximum: percentiles and entropy cost VGG16 and its students as much or more. Where
    an outlier stretches a range, `quantise_measured` leaves the nodes beside it in float.
    """
    named = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    for node in named.graph.node:
        node.name = node.output[0]
    entry, float32 = named.graph.input[0], onnx.TensorProto.FLOAT
    shape = [dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:]]
    if images.dtype != np.float32 or list(images.shape[1:]) != shape or not len(images):
        raise UserError(
            f"images are {images.dtype} {images.shape}; expected float32 "
            f"(N, {', '.join(map(str, shape))}): give normalised images as the model takes them"
        )
    watched = copy.deepcopy(named)
    inner = [v for v in named.graph.value_info if v.type.tensor_type.elem_type == float32]
    watched.graph.output.extend(inner)
    names = [value.name for value in (entry, *watched.graph.output)]
    ranges = dict.fromkeys(names, (np.float32(np.inf), np.float32(-np.inf)))
    starts = range(0, len(images), BATCH)
    for start, outputs in zip(starts, _batches(watched.SerializeToString(), images), strict=True):
        values = (images[start : start + BATCH], *outputs)
        for name, value in zip(names, values, strict=True):
            low, high = ranges[name]
            ranges[name] = np.minimum(low, value.min()), np.maximum(high, value.max())
    for name, limits in ranges.items():
        if not np.isfinite(limits).all():
            raise UserError(
                f"{name} ranges from {limits[0]} to {limits[1]} on the calibration images; "
                "expected finite values: check the images and the model's weights"
            )
    return _Calibrated(named, ranges)


def _batches(model: bytes, images: np.ndarray) -> Iterator[list[np.ndarray]]:
    """All outputs of a model for `BATCH` images at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # so that no bit depends on the number of cores
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    for start in range(0, len(images), BATCH):
        yield session.run(None, {entry: images[start : start + BATCH]})


def _quantised(
    calibrated: _Calibrated,
    scheme: Int8Scheme,
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
) -> bytes:
    """The INT8 file without the nodes in `exclude`, or with those in `only` alone."""
    source = calibrated.model
    made = copy.deepcopy(source)
    # The quantiser's own mark, without which it writes and reads the model to infer shapes again.
    made.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    with _quiet():
        quantiser = QDQQuantizer(
            made,
            True,  # a scale for each output channel
            scheme.reduce_range,
            _TYPES[scheme.weight],
            _TYPES[scheme.activation],
            TensorsData(CalibrationMethod.MinMax, calibrated.ranges),
            list(only),
            list(exclude),
            [*LEADERS, *FOLLOWERS],
            # The integer Gemm gives floats at no cost; rounded logits had half as much error again.
            {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
    made = quantiser.model.model
    _protect(made.graph)
    made.producer_name, made.producer_version = source.producer_name, source.producer_version
    del made.metadata_props[:], made.graph.value_info[:]  # shapes of tensors that are gone
    made.metadata_props.extend(source.metadata_props)
    data: bytes = made.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    return data


def _protect(graph: onnx.GraphProto) -> None:
    """Keep ONNX Runtime from rounding what stays in float.

    Its WeightBiasQuantization does so as it loads a file, where the node stands between a
    DequantizeLinear and a QuantizeLinear: 8 bits, one scale for all channels. Nodes whose input
    has a scale for each channel are spared; here these scales are equal, so no number changes.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for index, node in reversed(list(enumerate(graph.node))):
        maker = makers.get(node.input[0]) if node.op_type in ("Conv", "Gemm") else None
        if maker is None or maker.op_type != "DequantizeLinear" or node.input[1] not in tensors:
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        axis = 0 if node.op_type == "Gemm" and not settings.get("transB") else 1
        channels = tensors[node.input[1]].dims[axis] * settings.get("group", 1)
        names = [f"{node.name}.{kind}" for kind in ("scale", "zero_point", "input")]
        for name, old in zip(names, maker.input[1:], strict=False):
            values = np.repeat(numpy_helper.to_array(tensors[old]), channels)
            graph.initializer.append(numpy_helper.from_array(values, name))
        inputs, output = [maker.input[0], *names[:2]], node.name + ".input"
        private = helper.make_node("DequantizeLinear", inputs, [output], output, axis=1)
        node.input[0] = output
        graph.node.insert(index, private)
    read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    for node in [node for node in graph.node if not read & set(node.output)]:
        graph.node.remove(node)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing: the quantiser would even leave a handler on the root logger."""
    before, handler = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(handler)
