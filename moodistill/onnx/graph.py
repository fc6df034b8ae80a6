"""The student's fx graph read as a list of ONNX operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moodistill.heads.outputs import outputs_of
from moodistill.onnx.calls import converted_call, converted_module
from moodistill.onnx.ops import INPUT, Shape, UnsupportedOperation
from moodistill.onnx.values import Values

_MUTATING = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_SIZES = ("size", getattr, operator.getitem)
# What shapes a parameter before it is used: done here, once.
_SHAPING = (
    *_SIZES, torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze,
    torch.permute, torch.transpose, "view", "reshape", "flatten", "unflatten", "unsqueeze",
    "squeeze", "permute", "transpose", "contiguous",
)  # fmt: skip


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.update((node, *node.all_input_nodes))
    return live


class OnnxGraph:
    """The student's operations from `INPUT` to its outputs, pruned and folded.

    Shapes are of one image, without the batch axis; `outputs` has those of the outputs by name.
    """

    def __init__(self, student: fx.GraphModule, input_shape: Shape) -> None:
        """Translate the student; `UnsupportedOperation` if it holds one that counts."""
        self.input_shape = input_shape
        self._student = student
        self._values = values = Values(input_shape)
        live = live_nodes(student.graph)
        result: dict[str, Any] = {}
        for node in student.graph.nodes:
            values.visited.add(node)
            if node.op == "output":
                result = outputs_of(node.args[0])
            elif node.op == "placeholder":
                if values.of:
                    raise UnsupportedOperation("a second input")
                values.of[node] = INPUT
            else:
                try:
                    value = self._visit(node)
                    if value is not None:
                        values.of[node] = value
                except UnsupportedOperation:
                    # A method like clamp_ acts on its input even if nobody reads its result.
                    if node in live or self._in_place(node):
                        raise
        results = {name: values.value(value) for name, value in result.items()}
        self.outputs = {name: values.ops.shapes[value] for name, value in results.items()}
        self.ops = values.ops.finished(results)

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._student.get_submodule(str(node.target)), "inplace", False))
        name = getattr(node.target, "__name__", str(node.target))
        return name.endswith("_") or node.target in _MUTATING or bool(node.kwargs.get("inplace"))

    def _visit(self, node: fx.Node) -> str | None:
        """The value of a node, None if it has none: a constant, or a size.

        Sizes are read where a view uses them.
        """
        values, target = self._values, node.target
        unknown = UnsupportedOperation(f"{node.op} {getattr(target, '__name__', target)}")
        if node.op == "get_attr":
            constant = operator.attrgetter(str(target))(self._student)
            if not isinstance(constant, torch.Tensor):
                raise unknown
            values.constants[node] = constant.detach()
            return None
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise unknown
            module = self._student.get_submodule(str(target))
            return converted_module(values, node, type(module), module)
        if node.op not in ("call_function", "call_method"):
            raise unknown
        if target in _SHAPING and all(n in values.constants for n in node.all_input_nodes):
            values.constants[node] = self._shaped(node)
            return None
        if target in _SIZES:
            return None
        value = converted_call(values, node, _plain(target))
        if value is None:
            raise unknown
        in_place = target in _MUTATING or _plain(target) != target
        return values.mutated(values.value(node.args[0]), value) if in_place else value

    def _shaped(self, node: fx.Node) -> Any:
        """A constant in another shape, or a size of it."""
        constants = self._values.constants
        args, keywords = fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
        call: Any = node.target
        if node.op == "call_method":
            call = getattr(args[0], str(node.target))
        return call(*args[node.op == "call_method" :], **keywords)


def _plain(target: Any) -> Any:
    """A function or method; a method that works in place as the one that does not."""
    return target.removesuffix("_") if isinstance(target, str) else target
