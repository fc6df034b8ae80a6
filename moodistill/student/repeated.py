"""Steps of the teacher that the student repeats: activations, pooling, what is left whole."""

from __future__ import annotations

import copy

from torch import fx

from moodistill.student.draft import Draft
from moodistill.student.slicing import opaque_copy
from moodistill.student.values import Tensor, Value
from moodistill.teacher.operations import JOINS
from moodistill.teacher.steps import Step


def write_repeated(draft: Draft, step: Step, value: Value) -> Value:
    """A step without channels of its own (activation, pooling)."""
    if step.kind == "activation" and value.through:
        return value
    return draft.each(value, step, lambda tensor, _: _repeat(draft, step, tensor.node))


def _repeat(draft: Draft, step: Step, node: fx.Node) -> fx.Node:
    source = step.node
    if source.op == "call_module":
        if step.target not in draft.modules:
            made = copy.deepcopy(draft.module(step))
            if getattr(made, "inplace", False):
                # Where an edge is dropped, others may read the same tensor.
                made.inplace = False  # type: ignore[assignment]
            draft.modules[step.target] = made
        return draft.graph.call_module(step.target, (node,))

    def convert(argument: fx.Node) -> fx.Node:
        if argument.op != "get_attr":
            return node
        return draft.constant(str(argument.target), str(argument.target))

    arguments = fx.node.map_arg(source.args, convert)
    keywords = {k: v for k, v in source.kwargs.items() if k != "inplace"}
    keywords = fx.node.map_arg(keywords, convert)
    if source.target in JOINS:
        return draft.graph.call_function(JOINS[source.target], arguments, keywords)
    if source.op == "call_method":
        method = str(source.target).removesuffix("_")
        return draft.graph.call_method(method, arguments, keywords)
    return draft.graph.call_function(source.target, arguments, keywords)  # type: ignore


class OpaqueWriter:
    """Writes what is not understood, as it is: its inputs whole and in the teacher's order."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._step_of = {step.node: step for step in draft.teacher.steps}
        self._nodes: dict[fx.Node, fx.Node] = {}  # the student's node for one of the teacher's

    def write(self, step: Step) -> Value:
        """The value of an operation, or module, that is left whole."""
        draft, source = self.draft, step.node
        arguments, keywords = fx.node.map_arg((source.args, source.kwargs), self.whole)
        if source.op == "call_module":
            if step.target not in draft.modules:
                draft.modules[step.target] = opaque_copy(draft.module(step))
            node = draft.graph.call_module(step.target, arguments, keywords)
            node.meta["area"] = node.meta["reads"] = step.form.area
        else:
            node = draft.graph.create_node(source.op, source.target, arguments, keywords)
        return Value((Tensor(node, draft.tensors.natural(step)),), step, step.form)

    def whole(self, source: fx.Node) -> fx.Node:
        """The student's node for one of the teacher: a whole value, a constant, a size."""
        if source not in self._nodes:
            if source in self._step_of:
                made = self.draft.tensors.ordered(self.draft.values[self._step_of[source].name])
            elif source.op == "get_attr":
                made = self.draft.constant(str(source.target), f"{source.target}_whole")
            else:
                made = self.draft.graph.node_copy(source, self.whole)
            self._nodes[source] = made
        return self._nodes[source]
