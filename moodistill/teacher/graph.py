"""From a trained network to channel groups, connection sites and edges, by general rules.

The network is traced to a flat graph (`tracing.py`); every channel is followed through it: layers
start channels, Add ties them, everything element-wise or spatial passes them on, cat and chunk
move them. An operation that is not known is left whole with the channels that it touches, and said
by name.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import fx, nn

from moodistill.accelerator import device_of
from moodistill.errors import UserError
from moodistill.heads.outputs import outputs_of
from moodistill.teacher.channel_flow import Reader
from moodistill.teacher.channel_groups import Grouping
from moodistill.teacher.kernels import Layer
from moodistill.teacher.operations import SUPPORTED, called
from moodistill.teacher.recorder import ReadAgain
from moodistill.teacher.steps import Step
from moodistill.teacher.tracing import flat_graph

NAMED = 4  # layers for one reason why they cannot be cut
_GIVES = {
    "softmax": "probabilities", "sigmoid": "probabilities", "logsoftmax": "log_probabilities",
    "logsigmoid": "log_probabilities",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TeacherGraph:
    """The traced teacher.

    Attributes:
        module: the flat graph that was read.
        steps: its values in topological order.
        grouping: channel groups, with their sizes and what is frozen.
        input_shape: `(C, *size)`, `(C, H, W)` of images.
        whole: steps that are not understood and stay as they are, and why.
    """

    module: fx.GraphModule
    steps: tuple[Step, ...]
    grouping: Grouping
    input_shape: tuple[int, ...]
    whole: dict[str, str] = field(default_factory=dict)

    def on(self, device: torch.device) -> TeacherGraph:
        """The same with its weights on a device: itself where they are there."""
        if device_of(self.module) == device:
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device))

    @property
    def groups(self) -> dict[str, int]:
        """Number of classes (mask bits) of every channel group."""
        return self.grouping.sizes

    @property
    def layers(self) -> list[Step]:
        """Conv and linear layers in topological order, each once."""
        return [step for step in self.steps if step.kind == "layer" and not step.again]

    def uncut(self) -> dict[str, str]:
        """Channel groups that cannot be cut, and why; without the network's input and output."""
        ends = {*self.steps[0].groups, *self.steps[-1].groups}
        frozen = {n: why for n, why in self.grouping.frozen.items() if n not in ends}
        # What a part gives that is left whole need not be named beside what it reads.
        made = {g for step in self.steps if step.kind == "opaque" for g in step.groups}
        said = {why for name, why in frozen.items() if name not in made}
        return {n: why for n, why in frozen.items() if n not in made or why not in said}

    def describe_uncut(self) -> str:
        """What cannot be cut, reason by reason; empty if everything can."""
        layers = {group for layer in self.layers for group in layer.groups}
        by_reason: dict[str, list[str]] = {}
        for name, why in self.uncut().items():
            by_reason.setdefault(why, []).extend([name] if name in layers else [])
        parts = []
        for why, names in by_reason.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{', '.join(names[:NAMED])}{more} ({why})" if names else why)
        return "; ".join(parts)

    @property
    def outputs(self) -> dict[str, Step]:
        """The steps that are the network's outputs, by name."""
        by_node = {step.node: step for step in self.steps}
        given = outputs_of(self.steps[-1].node.args[0])
        return {name: by_node[node] for name, node in given.items()}

    def gives(self) -> dict[str, str]:
        """Of outputs whose last operation is a Softmax, Sigmoid or their logarithm, what it is."""
        found = {}
        for name, step in self.outputs.items():
            module = step.node.op == "call_module"
            called_name = called(self.module, step.node.target, module).lower().replace("_", "")
            if called_name in _GIVES:
                found[name] = _GIVES[called_name]
        return found

    def layer_module(self, name: str) -> Layer:
        """The teacher's conv or linear layer at a module path."""
        module = self.module.get_submodule(name)
        assert isinstance(module, Layer)
        return module

    @cached_property
    def _by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    def step(self, name: str) -> Step:
        """The step of a name."""
        return self._by_name[name]


def trace(
    teacher: nn.Module, input_shape: tuple[int, ...], opaque: Collection[str] = ()
) -> TeacherGraph:
    """Trace `teacher` and find its channel groups.

    Args:
        teacher: the network; it is not changed.
        input_shape: `(C, H, W)` of one image, `(C, L)` of one signal.
        opaque: paths of modules that are to be left whole.

    Raises:
        UserError: if it cannot be traced, or nothing that could be cut is left.
    """
    module, left = flat_graph(teacher, input_shape, opaque)
    nodes: dict[fx.Node, str] = {}
    while True:
        try:
            return _read(module, input_shape, dict(left), nodes)
        except ReadAgain as found:
            nodes |= found.nodes


def _read(
    module: fx.GraphModule,
    input_shape: tuple[int, ...],
    left: dict[str, str],
    nodes: dict[fx.Node, str],
) -> TeacherGraph:
    reader = Reader(module, left, nodes)
    for node in module.graph.nodes:
        reader.read(node)
    grouping = reader.channels.group()
    steps = tuple(_placed(step, grouping) for step in reader.steps.values())
    by_name = {step.name: step for step in steps}
    apart = {step.node: why for step in steps if (why := _taken_apart(step, by_name, grouping))}
    if apart:
        raise ReadAgain(apart)
    shared = {step.target for step in steps if step.again}
    steps = tuple(
        replace(s, reads=by_name[s.inputs[0]].groups, shared=s.target in shared)
        if s.kind == "layer" else s
        for s in steps
    )  # fmt: skip
    merges = any(step.kind == "merge" for step in steps)
    if reader.whole and not merges and len(grouping.frozen) == len(grouping.names):
        raise UserError(
            f"nothing of this network could be cut: {reader.obstacles()}; supported are {SUPPORTED}"
        )
    return TeacherGraph(module, steps, grouping, input_shape, reader.whole)


def _taken_apart(step: Step, by_name: dict[str, Step], grouping: Grouping) -> str:
    """Why a rearrangement cannot be followed: it parts what a grouped convolution holds."""
    if step.origin is None:
        return ""
    bound = np.isin(step.owner, [i for i, g in enumerate(step.groups) if g in grouping.together])
    for owner, place in {*zip(step.owner[bound], step.place[bound], strict=True)}:
        here = step.origin[(step.owner == owner) & (step.place == place)]
        source = by_name[step.inputs[here[0, 0]]]
        group = source.groups.index(step.groups[owner])
        whole = np.flatnonzero((source.owner == group) & (source.place == place))
        if len({*here[:, 0]}) > 1 or not np.array_equal(here[:, 1], whole):
            where = step.node.meta.get("where")
            return (
                f"{step.name}{f' ({where})' if where else ''} takes apart channels that a grouped "
                "convolution keeps together"
            )
    return ""


def _placed(step: Step, grouping: Grouping) -> Step:
    """The step with its channels' groups."""
    group = grouping.group[step.channels]
    numbers, first = np.unique(group, return_index=True)
    numbers = numbers[np.argsort(first)]
    owner = np.argsort(numbers)[np.searchsorted(np.sort(numbers), group)]
    names = tuple(grouping.names[n] for n in numbers)
    return replace(step, groups=names, owner=owner, place=grouping.index[step.channels])
