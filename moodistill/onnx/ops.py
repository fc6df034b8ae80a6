"""ONNX operations in a row: emitted one by one, then pruned and batch normalisation folded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

INPUT = "input"
# Kinds whose output may share its input's memory in torch.
VIEWS = ("Flatten", "Reshape", "Transpose", "Slice", "Identity")

Shape = tuple[int, ...]


class UnsupportedOperation(Exception):
    """An operation without an ONNX form here; `to_onnx` then falls back to torch."""


@dataclass(frozen=True)
class OnnxOp:
    """One ONNX node; its `tensors` become initializers behind its `inputs`, or in front of them."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    tensors: tuple[np.ndarray, ...] = ()
    front: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)


class OpList:
    """Operations by the value they make, in order; shapes are without the batch axis."""

    def __init__(self, input_shape: Shape) -> None:
        self.ops: dict[str, OnnxOp] = {}
        self.shapes: dict[str, Shape] = {INPUT: input_shape}

    def emit(
        self,
        kind: str,
        inputs: str | Sequence[str],
        name: str,
        shape: Shape,
        *tensors: Any,
        front: bool = False,
        **attributes: Any,
    ) -> str:
        """Add an operation and return its value; a tensor that is None is left out."""
        output = f"{name}.{len(self.ops)}"  # the dot keeps it apart from inputs and outputs
        inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        arrays = tuple(_array(t) for t in tensors if t is not None)
        self.ops[output] = OnnxOp(kind, inputs, output, arrays, front, attributes)
        self.shapes[output] = shape
        return output

    def like(
        self, kind: str, inputs: str | Sequence[str], name: str, *tensors: Any, **attributes: Any
    ) -> str:
        """Add an operation whose output has the shape of its first input."""
        first = inputs if isinstance(inputs, str) else inputs[0]
        return self.emit(kind, inputs, name, self.shapes[first], *tensors, **attributes)

    def reshape(self, x: str, name: str, shape: Shape) -> str:
        """The value `x` in another shape of as many numbers."""
        if shape == self.shapes[x]:
            return x
        assert math.prod(shape) == math.prod(self.shapes[x]), (self.shapes[x], shape)
        if len(shape) == 1:
            return self.emit("Flatten", x, name, shape, axis=1)
        sizes = torch.tensor([0, *shape])  # 0 takes over the batch
        return self.emit("Reshape", x, name, shape, sizes)

    def storage(self, value: str) -> str:
        """The value whose memory `value` may share."""
        while value in self.ops and self.ops[value].kind in VIEWS:
            value = self.ops[value].inputs[0]
        return value

    def finished(self, results: Mapping[str, str]) -> list[OnnxOp]:
        """The operations that the results need, without copies.

        `results` are values by the names that the network's outputs are to have.
        """
        same: dict[str, str] = {}
        ops = []
        for op in self.ops.values():
            op = replace(op, inputs=tuple(same.get(name, name) for name in op.inputs))
            if op.kind == "Identity":
                same[op.output] = op.inputs[0]
            else:
                ops.append(op)
        wanted = {name: same.get(value, value) for name, value in results.items()}
        ops = _fold(_pruned(ops, set(wanted.values())), set(wanted.values()))
        named: dict[str, str] = {}
        for name, value in wanted.items():
            if value == INPUT or value in named:  # given twice, or what goes in
                ops.append(OnnxOp("Identity", (value,), name))
            else:
                named[value] = name
        return [
            replace(
                op, inputs=tuple(named.get(name, name) for name in op.inputs),
                output=named.get(op.output, op.output),
            )
            for op in ops
        ]  # fmt: skip


def _array(value: Any) -> np.ndarray:
    tensor = torch.as_tensor(value).detach().cpu()
    # Whole numbers are sizes and axes; all else is computed with.
    array: np.ndarray = (tensor if tensor.dtype == torch.int64 else tensor.float()).numpy()
    return array


def _pruned(ops: list[OnnxOp], results: set[str]) -> list[OnnxOp]:
    needed, kept = set(results), []
    for op in reversed(ops):
        if op.output in needed:
            needed.update(op.inputs)
            kept.append(op)
    return kept[::-1]


def _fold(ops: list[OnnxOp], results: set[str]) -> list[OnnxOp]:
    """Batch normalisation folded into the convolution or linear layer it alone reads."""
    users = Counter([*(name for op in ops for name in op.inputs), *results])
    kept: dict[str, OnnxOp] = {}
    for op in ops:
        layer = kept.get(op.inputs[0]) if op.kind == "BatchNormalization" else None
        layers = ("Conv", "Gemm", "ConvTranspose")
        grouped = layer and layer.kind == "ConvTranspose" and layer.attributes["group"] > 1
        if layer and layer.kind in layers and users[layer.output] == 1 and not grouped:
            del kept[layer.output]
            scale, shift, mean, variance = (t.astype(np.float64) for t in op.tensors)
            factor = scale / np.sqrt(variance + op.attributes["epsilon"])
            weight, *bias = layer.tensors
            shift = shift + ((bias[0] if bias else 0.0) - mean) * factor
            # The outputs are the first axis of a weight, the second of a transposed one.
            ahead = [1] if layer.kind == "ConvTranspose" else []
            spread = (*ahead, -1, *[1] * (weight.ndim - 1 - len(ahead)))
            weight = weight * factor.astype(np.float32).reshape(spread)
            tensors = (weight, shift.astype(np.float32))
            op = replace(layer, output=op.output, tensors=tensors)
        kept[op.output] = op
    return list(kept.values())
