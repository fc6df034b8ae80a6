"""Closed-form inheritance: the student is walked layer by layer and solved from the teacher.

Every layer is solved (`solve`) with what the student in front of it really produces, and the batch
statistics are set on the way, so that errors do not add up (recalibrated batch statistics:
EagleEye, Li et al. 2020).
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import fx, nn

from moodistill.student.network import Student
from moodistill.student.slicing import Unit
from moodistill.student.solve import InheritConfig, Mode, solve_unit, write_solution
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.operations import NORMS
from moodistill.teacher.samples import TeacherSamples

__all__ = ["InheritConfig", "Mode", "Walk", "inherit"]


@torch.no_grad()
def inherit(
    student: Student,
    graph: TeacherGraph,
    samples: TeacherSamples,
    config: InheritConfig | None = None,
) -> tuple[str, ...]:
    """Set the student's weights and batch statistics in place, in one pass over its graph.

    Returns:
        Paths of modules whose solve was not finite: they keep their sliced weights.
    """
    walk = Walk(student, graph, samples, config or InheritConfig())
    walk.run()
    return tuple(walk.unsolved)


class Walk:
    """One pass of the calibration images over a student's graph, which is solved on the way.

    Attributes:
        unsolved: paths of modules whose solve was not finite: they keep their sliced weights.
        values: what is held of the pass, by node name.
    """

    def __init__(
        self,
        student: Student,
        graph: TeacherGraph,
        samples: TeacherSamples,
        config: InheritConfig,
    ) -> None:
        self.student, self.graph, self.samples, self.config = student, graph, samples, config
        self.units = {unit.target: unit for unit in student.units}
        self.norms = {norm.target for norm in student.norms}
        self.unsolved: list[str] = []
        self.values: dict[str, Any] = {}
        self._called: set[str] = set()

    def run(
        self,
        known: Mapping[str, torch.Tensor] | None = None,
        solved: Container[str] | None = None,
        end: str | None = None,
    ) -> None:
        """Solve and set the statistics.

        Args:
            known: values by node name that are the same in this student and need no computing.
            solved: targets of the units that are solved; None for all.
            end: name of the node behind which nothing is left to do; None for the last one.
        """
        module = self.student.module
        self.values = dict(known or {})
        last_use = _last_uses(module.graph)
        for node in module.graph.nodes:
            if node.op == "output":
                break
            if node.name not in self.values:
                self.values[node.name] = self._value(node, solved)
            if node.name == end:
                break
            for done in last_use.get(node, ()):
                self.values.pop(done.name, None)

    def _read(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.values[node.name])

    def _value(self, node: fx.Node, solved: Container[str] | None) -> Any:
        """What a node gives; a unit that is to be solved is solved first."""
        if node.op == "placeholder":
            # Convolutions run up to twice as fast on maps whose channels lie together.
            images = self.samples.images
            pictures = images.ndim == 4
            layout = torch.channels_last if pictures else torch.contiguous_format
            return images.contiguous(memory_format=layout)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.student.module)
        arguments, keywords = self._read(node.args), self._read(node.kwargs)
        if node.op == "call_module":
            target = str(node.target)
            module = self.student.module.get_submodule(target)
            if target in self.units and (solved is None or target in solved):
                self._solve(self.units[target], arguments[0])
            if target in self.norms:
                return _recalibrated(module, arguments[0])
            return module(*arguments, **keywords)  # what is left whole may have several arguments
        if node.op == "call_function":
            return node.target(*arguments, **keywords)  # type: ignore[operator]
        first, *rest = arguments
        return getattr(first, str(node.target))(*rest, **keywords)

    def _solve(self, unit: Unit, source: torch.Tensor) -> None:
        """Solve a unit where it is first called."""
        if self.config.mode == "slice" or unit.target in self._called:
            return
        self._called.add(unit.target)
        solution = solve_unit(unit, source, self.student, self.graph, self.samples, self.config)
        if solution is not None and not write_solution(unit, self.student.module, solution):
            self.unsolved.append(unit.target)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    result: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        result.setdefault(node, []).append(source)
    return result


def _recalibrated(norm: nn.Module, source: torch.Tensor) -> torch.Tensor:
    """A norm's output of `source`, once its running mean and variance are those of `source`."""
    assert isinstance(norm, NORMS)
    # A step of training with all weight on the new batch: five times faster than `var_mean`.
    momentum, norm.momentum = norm.momentum, 1.0
    result = norm.train()(source)
    norm.eval()
    norm.momentum = momentum
    if norm.running_var is not None:
        count = source.numel() // source.shape[1]
        norm.running_var.mul_((count - 1) / count)  # of these images, no estimate beyond them
    assert isinstance(result, torch.Tensor)
    return result
