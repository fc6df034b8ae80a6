"""What each node of the student's graph stands for: an ONNX value, a constant or a size."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from moodistill.onnx.ops import OpList, Shape, UnsupportedOperation


class Values:
    """The operations so far, and by node the value that holds its result.

    Attributes:
        ops: the operations that were emitted.
        of: value by node.
        constants: parameters and buffers by node.
        visited: nodes that were read, the present one included.
    """

    def __init__(self, input_shape: Shape) -> None:
        self.ops = OpList(input_shape)
        self.of: dict[fx.Node, str] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.visited: set[fx.Node] = set()

    def has(self, argument: Any) -> bool:
        """Whether an argument is a node with a value."""
        return isinstance(argument, fx.Node) and argument in self.of

    def value(self, argument: Any) -> str:
        """The value of a node; `UnsupportedOperation` if it has none."""
        if not self.has(argument):
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self.of[argument]

    def shape(self, argument: Any) -> Shape:
        """The shape of a node's value, without the batch axis."""
        return self.ops.shapes[self.value(argument)]

    def constant(self, argument: Any) -> Any:
        """The parameter or buffer behind a node; anything but a node as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.constants:
            raise UnsupportedOperation(f"{argument} where a tensor is expected")
        return self.constants[argument]

    def size(self, size: Any) -> int:
        """A size as a number, 0 for that of the batch: 3, x.size(1), x.size()[1] or x.shape[1]."""
        number = self.constant(size) if size in self.constants else size
        if isinstance(number, int):
            return number
        source: Any = None
        axis: Any = None
        if isinstance(size, fx.Node) and size.target == "size" and len(size.args) == 2:
            source, axis = size.args
        elif isinstance(size, fx.Node) and size.target is operator.getitem:
            whole: Any = size.args[0]
            if whole.args[1:] == {"size": (), getattr: ("shape",)}.get(whole.target):
                source, axis = whole.args[0], size.args[1]
        sizes = (0, *self.shape(source))
        if not isinstance(axis, int) or not -len(sizes) <= axis < len(sizes):
            raise UnsupportedOperation(f"{size} where a size is expected")
        return sizes[axis]

    def mutated(self, old: str, new: str) -> str:
        """After an in-place operation whoever reads the old tensor later sees the new one."""
        if new == old:
            return new
        storage = self.ops.storage(old)
        for node, value in self.of.items():
            shared = value != old and self.ops.storage(value) == storage
            if shared and not self.visited.issuperset(node.users):
                raise UnsupportedOperation(f"an in-place operation seen through {node}")
        self.of = {n: new if v == old else v for n, v in self.of.items()}
        return new
