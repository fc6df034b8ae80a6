"""What is read of a graph: steps, what ties their channels, and what is left whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.genome.layout import INPUT
from moodistill.teacher import operations as ops
from moodistill.teacher.channel_groups import Channels
from moodistill.teacher.rearrange import PICTURES, Elements, Form, map_form
from moodistill.teacher.steps import Step

READERS_ASKED = 4  # steps from what is left whole to the layer that says where its channels are


class NotUnderstood(Exception):
    """An operation whose effect on channels is not known."""


class ReadAgain(Exception):
    """What has been read shows that some nodes must be left whole."""

    def __init__(self, nodes: dict[fx.Node, str]) -> None:
        super().__init__()
        self.nodes = nodes


class Recorder:
    """Collects the steps of a flat graph and what ties their channels.

    Attributes:
        channels: of all steps.
        steps: by name, in topological order.
        whole: steps that are left whole, and why.
    """

    def __init__(
        self, module: fx.GraphModule, left: dict[str, str], nodes: dict[fx.Node, str]
    ) -> None:
        """`left` are modules, `nodes` nodes of the graph to be left whole, with reasons."""
        self.module = module
        self.left = left
        self.forced = nodes
        self.whole: dict[str, str] = {}
        self.channels = Channels()
        self.elements = Elements()
        self.steps: dict[str, Step] = {}
        self.of: dict[fx.Node, Step] = {}
        # Rearranged values whose channels are not on one axis: numbers of their elements.
        self.raw: dict[fx.Node, Any] = {}
        self.moved_by: dict[fx.Node, str] = {}  # the operation that took them off one axis
        self.calls: dict[str, Step] = {}  # first call of every layer
        self.uses: dict[str, Step] = {}  # and what other modules and parameters were first used on
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.taken = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}

    def _called(self, node: fx.Node) -> str:
        return ops.called(self.module, node.target, node.op == "call_module")

    def _refuse(self, node: fx.Node, why: str = "") -> NotUnderstood:
        return NotUnderstood(
            f"operation {self._called(node)} ({self._place(node)}) is not supported"
            f"{f' {why}' if why else ''}"
        )

    @staticmethod
    def _place(node: fx.Node) -> str:
        where = node.meta.get("where")
        return f"at {node.name}, {where}" if where else f"at {node.name}"

    def _forbid(self, node: fx.Node, why: str) -> UserError:
        """For what would be wrong in a student, too."""
        return UserError(f"{self._called(node)} ({self._place(node)}) {why}")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of one image; refuses what mixes images."""
        value = node.meta["value"]
        assert isinstance(value, torch.Tensor)
        if not value.ndim or value.shape[0] != PICTURES:
            raise NotUnderstood(
                f"{self._called(node)} ({self._place(node)}) mixes images, or moves the first "
                "axis, that of the batch"
            )
        return tuple(value.shape[1:])

    def _add(
        self,
        node: fx.Node,
        kind: str,
        form: Form,
        channels: np.ndarray | None = None,
        inputs: tuple[Step, ...] = (),
        origin: np.ndarray | None = None,
        name: str = "",
        again: bool = False,
    ) -> Step:
        # A layer is named by its module path; no other step may have that name.
        own = node.op == "call_module" and node.target == node.name
        taken = node.name in self.taken and not own
        name = name or (f"{node.name} operation" if taken else node.name)
        if channels is None:
            channels = self.channels.new(INPUT if kind == "input" else node.target, form.channels)  # type: ignore
            if kind == "input":
                self.channels.freeze(channels, "the network's input")
        elif origin is not None:
            self.channels.occurs(channels, tuple(s.channels for s in inputs), origin)
        sources = tuple(s.name for s in inputs)
        step = Step(name, kind, node, sources, form, channels, origin=origin, again=again)
        self.steps[name] = self.of[node] = step
        return step

    def _pass(self, node: fx.Node, kind: str, source: Step) -> None:
        self._add(node, kind, source.form, source.channels, (source,))

    def _once(self, node: fx.Node, source: Step) -> None:
        """Tie what a module, or a parameter, is used on: it is cut once for all its uses."""
        first = self.uses.setdefault(str(node.target), source)
        if first is not source:
            self.channels.tie(first.channels, source.channels)

    def _leave_whole(self, node: fx.Node, why: str) -> None:
        """Add a node as it is; what it reads and gives keeps all channels in their order."""
        if node.op == "call_module" and list(
            self.module.get_submodule(str(node.target)).parameters()
        ):
            calls = [s for s in self.steps.values() if s.node.op == "call_module"]
            others = [
                s.node for s in calls if s.node.target == node.target and s.kind != "opaque"
            ]  # fmt: skip
            if others:  # its weights are used both ways: left whole wherever it is called
                raise ReadAgain({node: why, **dict.fromkeys(others, why)})
            self.left.setdefault(str(node.target), why)
        for source in node.all_input_nodes:
            if source in self.raw:
                self._hold(source, node, why)
        inputs = tuple(dict.fromkeys(self.of[s] for s in node.all_input_nodes if s in self.of))
        form = self._form_of_whole(node)
        # A module's path, by which it can be named as opaque again.
        name = str(node.target) if node.op == "call_module" else ""
        name = f"{name} ({node.name})" if name in self.steps else name
        made = self.channels.new(name or node.name, form.channels)
        step = self._add(node, "opaque", form, made, inputs, name=name)
        for channels in (made, *(source.channels for source in inputs)):
            self.channels.freeze(channels, why)
        self.whole[step.name] = why

    def _hold(self, node: fx.Node, reader: fx.Node, why: str = "") -> None:
        """Leave a rearrangement whole whose outcome `reader` needs as it is."""
        del self.raw[node]
        what = f"{self._called(reader)} ({self._place(reader)}) reads {self.moved_by[node]}"
        self._leave_whole(node, why or f"{what}, which moves more than whole channels")

    def _form_of_whole(self, node: fx.Node) -> Form:
        """The form of what an operation gives that is left whole, by who reads it."""
        value, more = node.meta["value"], node.meta["more"]
        whole = Form("whole", 1, (1, 1))
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return whole
        batched = (value.shape[0], more.shape[0]) == (PICTURES, PICTURES + 1)
        if not batched or value.shape[1:] != more.shape[1:]:
            return whole
        shape = tuple(value.shape[1:])
        if len(shape) == 1:
            return map_form(shape)
        frontier = [node]
        for _ in range(READERS_ASKED):
            frontier = [user for reader in frontier for user in reader.users]
            for user in frontier:
                if user.op != "call_module":
                    continue
                module = self.module.get_submodule(str(user.target))
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    return Form("last", shape[-1], shape[:-1])
                if type(module) in (*ops.CONVS, *ops.TRANSPOSED) or isinstance(module, ops.NORMS):
                    return map_form(shape)
        return map_form(shape) if len(shape) == 3 else whole

    def obstacles(self) -> str:
        """All reasons why something is left whole, each once."""
        reasons = list(dict.fromkeys(self.whole.values()))
        more = f"; and {len(reasons) - 8} more" if len(reasons) > 8 else ""
        return "; ".join(reasons[:8]) + more
