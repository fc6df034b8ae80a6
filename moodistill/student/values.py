"""The tensors that hold a student's values: which channels are where, and how they are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import fx

from moodistill.student.partition import Parts
from moodistill.teacher.channel_groups import ranks
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.rearrange import Form
from moodistill.teacher.steps import Step

Key = tuple[str, int, int]  # group, part of it, which of a class's channels in this value


@dataclass(frozen=True)
class Tensor:
    """One tensor of the student and the keys of the channels in it, in order."""

    node: fx.Node
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Value:
    """A teacher's value in the student.

    Attributes:
        tensors: that hold it.
        of: the step whose channels the keys refer to (an earlier one past a bypassed layer).
        form: how it lies in memory.
        through: whether it comes past a bypassed layer.
    """

    tensors: tuple[Tensor, ...]
    of: Step
    form: Form
    through: bool = False

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys, tensor by tensor."""
        return tuple(key for tensor in self.tensors for key in tensor.keys)


class Tensors:
    """Looks up channels by key, and joins or cuts tensors in the student's graph."""

    def __init__(
        self, teacher: TeacherGraph, parts: Parts, graph: fx.Graph, modules: dict[str, Any]
    ) -> None:
        self.teacher = teacher
        self.parts = parts
        self.graph = graph
        self.modules = modules
        self.positions = cache(self._positions)
        self.table = cache(self._table)
        self.joined = cache(self._join)
        self.narrowed = cache(self._narrow)

    def _table(self, name: str, group: str) -> np.ndarray:
        """`(size, n)`: where the channels of each class of a group lie in a step's output."""
        step = self.teacher.step(name)
        here = np.flatnonzero(step.owner == step.groups.index(group))
        place = step.place[here]
        rank = ranks(place)
        table = np.full((self.teacher.groups[group], int(rank.max()) + 1), -1)
        table[place, rank] = here
        return table

    def _positions(self, name: str, key: Key) -> np.ndarray:
        """Channels of a step's output that a key stands for, in order."""
        group, part, lane = key
        table = self.table(name, group)[self.parts.members(group, part)]
        if group in self.teacher.grouping.together:
            return table.reshape(-1)
        return table[:, lane]

    def channels(self, step: Step, keys: Sequence[Key]) -> np.ndarray:
        """Channels of a step's output that some keys stand for, in order."""
        return np.concatenate([self.positions(step.name, key) for key in keys])

    def keys(self, step: Step, group: str, part: int) -> tuple[Key, ...]:
        """The keys of one part of a group in a step's output."""
        if group in self.teacher.grouping.together:
            return ((group, part, 0),)
        lanes = self.table(step.name, group).shape[1]
        return tuple((group, part, lane) for lane in range(lanes))

    def natural(self, step: Step) -> tuple[Key, ...]:
        """All keys of a step's output."""
        return tuple(
            key
            for group in step.groups
            for part in range(len(self.parts.cut[group]))
            for key in self.keys(step, group, part)
        )

    def _join(self, nodes: tuple[fx.Node, ...], axis: int) -> fx.Node:
        return self.graph.call_function(torch.cat, (list(nodes), axis))

    def _narrow(self, node: fx.Node, axis: int, start: int, length: int) -> fx.Node:
        return self.graph.call_function(torch.narrow, (node, axis, start, length))

    def gather(self, value: Value, keys: Sequence[Key]) -> fx.Node:
        """One tensor with exactly these keys in this order; whole tensors where possible."""
        place = {k: (t, i) for t in value.tensors for i, k in enumerate(t.keys)}
        axis, repeat = value.form.axis, value.form.repeat
        pieces = []
        start = 0
        while start < len(keys):
            tensor, first = place[keys[start]]
            count = 1
            while tensor.keys[first + count : first + count + 1] == tuple(
                keys[start + count : start + count + 1]
            ) != ():  # fmt: skip
                count += 1
            if count == len(tensor.keys):
                pieces.append(tensor.node)
            else:
                before, here = tensor.keys[:first], tensor.keys[first : first + count]
                offset = len(self.channels(value.of, before)) * repeat if before else 0
                length = len(self.channels(value.of, here)) * repeat
                pieces.append(self.narrowed(tensor.node, axis, offset, length))
            start += count
        return pieces[0] if len(pieces) == 1 else self.joined(tuple(pieces), axis)

    def ordered(self, value: Value) -> fx.Node:
        """The whole value as one tensor in the teacher's order of channels."""
        node = self.gather(value, value.keys)
        order = np.argsort(self.channels(value.of, value.keys))
        repeat = value.form.repeat
        order = (order[:, None] * repeat + np.arange(repeat)).reshape(-1)
        if np.array_equal(order, np.arange(len(order))):
            return node
        name = f"{node.name}_order"
        self.modules[name] = torch.from_numpy(order)
        return self.graph.call_function(
            torch.index_select, (node, value.form.axis, self.graph.get_attr(name))
        )
