"""Closed-form inheritance: the student is walked layer by layer and solved from the teacher.

Every layer is solved (`solve`) with what the student in front of it really produces, and the batch
statistics are set on the way, so that errors do not add up (recalibrated batch statistics:
EagleEye, Li et al. 2020).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from moodistill.student.network import Student
from moodistill.student.solve import InheritConfig, Mode, solve_unit, write_solution
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.operations import NORMS
from moodistill.teacher.samples import TeacherSamples

__all__ = ["InheritConfig", "Mode", "inherit"]


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
    config = config or InheritConfig()
    unsolved: list[str] = []
    units = {unit.target: unit for unit in student.units}
    norms = {norm.target for norm in student.norms}
    values: dict[fx.Node, torch.Tensor] = {}
    called: set[str] = set()
    last_use = _last_uses(student.module.graph)

    def read(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: values[node])

    for node in student.module.graph.nodes:
        if node.op == "placeholder":
            # Convolutions run up to twice as fast on maps whose channels lie together.
            pictures = samples.images.ndim == 4
            layout = torch.channels_last if pictures else torch.contiguous_format
            values[node] = samples.images.contiguous(memory_format=layout)
        elif node.op == "output":
            break
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(student.module)
        elif node.op == "call_module":
            module = student.module.get_submodule(str(node.target))
            arguments, keywords = read((node.args, node.kwargs))
            unit = units.get(str(node.target))
            if unit is not None and config.mode != "slice" and unit.target not in called:
                called.add(unit.target)
                solution = solve_unit(unit, arguments[0], student, graph, samples, config)
                if solution is not None and not write_solution(unit, student.module, solution):
                    unsolved.append(unit.target)
            known = str(node.target) in norms
            if known:
                values[node] = _recalibrated(module, arguments[0])
            else:  # what is left whole may have several arguments
                values[node] = module(*arguments, **keywords)
        else:
            arguments, keywords = read(node.args), read(node.kwargs)
            if node.op == "call_function":
                values[node] = node.target(*arguments, **keywords)
            else:
                first, *rest = arguments
                values[node] = getattr(first, str(node.target))(*rest, **keywords)
        for done in last_use.get(node, ()):
            del values[done]
    return tuple(unsolved)


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
