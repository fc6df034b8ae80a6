"""How much memory a model needs to run: computed, since processes hide what they use."""

from __future__ import annotations

import math

import onnx
from onnx import shape_inference


def peak_memory_bytes(model: bytes) -> int:
    """Weights plus the largest sum of activations alive at once, at batch 1, in bytes.

    Nodes run in the file's order and a tensor lives from the node that makes it to its last reader.
    An engine that fuses nodes can need less, one that pads or keeps buffers needs more.
    """
    graph = shape_inference.infer_shapes(onnx.load_from_string(model)).graph
    sizes = {
        value.name: _bytes(value.type.tensor_type)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = {value.name: sizes[value.name] for value in graph.input}
    peak = sum(alive.values())
    for place, node in enumerate(graph.node):
        alive |= {name: sizes.get(name, 0) for name in node.output}
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > place}
    return peak + sum(_tensor_bytes(tensor) for tensor in graph.initializer)


def _bytes(kind: onnx.TypeProto.Tensor) -> int:
    sizes = [axis.dim_value or 1 for axis in kind.shape.dim]  # a free axis is the batch
    return math.prod(sizes) * _width(kind.elem_type)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * _width(tensor.data_type)


def _width(kind: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
