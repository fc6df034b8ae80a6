"""Closed-form inheritance: the student's weights solved from the teacher, without training.

Whatever a layer of the student can still read, it should see the best linear estimate of what it
read in the teacher. With `u` `(n, k)` the student's input pixels and `a` `(n, C)` the teacher's at
the same places,

    A = argmin |a - u A^T|^2 + ridge * |A - A0|^2,    W'[o, k] = sum_c W[o, c] A[c, k],

where `A0` picks the kept channels (0 past a bypassed layer). Masks, missing connections, merge
edges and bypasses are one operation: the gene says what may be read, the solve says how.
Sources: least squares for channel pruning (He et al. 2017), Gram-based compensation (GRAIL),
recalibrated batch statistics (EagleEye, Li et al. 2020).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from moodistill.student.builder import Student
from moodistill.student.slicing import Unit, tapped, write_weights
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.samples import TeacherSamples, as_map, sample_pixels

Mode = Literal["slice", "teacher", "student"]


@dataclass(frozen=True)
class InheritConfig:
    """How weights are inherited.

    Attributes:
        mode: `slice` keeps the sliced weights; `teacher` solves with the teacher's own channels as
            `u`; `student` walks the student layer by layer and solves with what it produces. All
            three recalibrate the batch statistics on the calibration images.
        ridge: pull towards `A0`, relative to the mean diagonal of the Gram matrix, where samples
            abound.
        scarce: added to `ridge` times `(k / n)^2`, `k` unknowns from `n` samples.
    """

    mode: Mode = "student"
    ridge: float = 1e-2
    scarce: float = 2.0


@torch.no_grad()
def inherit(
    student: Student,
    graph: TeacherGraph,
    samples: TeacherSamples,
    config: InheritConfig | None = None,
) -> None:
    """Set the student's weights and batch statistics in place, in one pass over its graph."""
    config = config or InheritConfig()
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
            values[node] = samples.images.contiguous(memory_format=torch.channels_last)
        elif node.op == "output":
            break
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(student.module)
        elif node.op == "call_module":
            module = student.module.get_submodule(str(node.target))
            source = values[node.args[0]]
            unit = units.get(str(node.target))
            # A shared layer is solved where it is first called, from samples of that call. If the
            # teacher's first call is gone and this one has another resolution it stays sliced.
            if unit is not None and config.mode != "slice" and unit.target not in called:
                called.add(unit.target)
                assert isinstance(module, nn.Conv2d | nn.Linear)
                if _sampled_like(source, module, unit, graph):
                    _solve_unit(unit, student.module, source, graph, samples, config)
            known = str(node.target) in norms
            values[node] = _recalibrated(module, source) if known else module(source)
        else:
            arguments, keywords = read(node.args), read(node.kwargs)
            if node.op == "call_function":
                values[node] = node.target(*arguments, **keywords)
            else:
                first, *rest = arguments
                values[node] = getattr(first, str(node.target))(*rest, **keywords)
        for done in last_use.get(node, ()):
            del values[done]


def _sampled_like(source: torch.Tensor, module: nn.Module, unit: Unit, graph: TeacherGraph) -> bool:
    """Whether the teacher's samples for a unit are of the places that this input has."""
    layer = next(step for step in graph.layers if step.target == unit.layer)
    sampled = graph.step(layer.inputs[0]).form.area
    return source.ndim == 2 or as_map(source, module)[0, 0].numel() == sampled


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
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
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


def _solve_unit(
    unit: Unit,
    student: nn.Module,
    source: torch.Tensor,
    graph: TeacherGraph,
    samples: TeacherSamples,
    config: InheritConfig,
) -> None:
    """Solve one unit of the student from the teacher's layer."""
    paths = [unit.target] if unit.expand is None else [unit.target, unit.expand]
    modules = {path: student.get_submodule(path) for path in paths}
    module = modules[unit.target]
    layer = graph.layer_module(unit.layer)
    target = samples.inputs[unit.layer]
    # Only a layer without padding may take the constant of the estimate into its bias: at a
    # padded border some taps see no input and no constant either.
    padded = isinstance(module, nn.Conv2d) and any(p != 0 for p in _padding(module))
    centred = not padded and layer.bias is not None
    whole = not unit.through and [len(i) for i in unit.inputs] == [target.shape[1]]
    if whole and config.mode == "teacher":
        return
    # Past a bypassed linear layer behind a flatten every feature is a channel of its own; else the
    # positions of a flatten share one estimate.
    own_repeat = layer.in_features // target.shape[1] if isinstance(layer, nn.Linear) else 1
    repeat = unit.repeat if unit.repeat == own_repeat else 1
    offered = None
    if config.mode == "student" or unit.through:
        offered = sample_pixels(as_map(source, layer), repeat, samples.config)
    start = 0
    rows, biases = [], []
    for outputs, inputs in zip(unit.outputs, unit.inputs, strict=True):
        if offered is not None:
            width = len(inputs) * unit.repeat // repeat
            u = offered[:, start : start + width]
            start += width
        else:
            u = target[:, torch.from_numpy(inputs)]
        estimate, constant = estimate_inputs(
            target, u, None if unit.through else inputs, centred, config
        )
        weight = tapped(layer.weight[torch.from_numpy(outputs)], unit.taps)
        rows.append(_fold(weight, estimate, target.shape[1], repeat))
        if centred:
            taps = weight.reshape(len(weight), target.shape[1], -1).sum(2)
            assert layer.bias is not None
            biases.append(layer.bias[torch.from_numpy(outputs)] + taps @ constant)
    write_weights(unit, modules, torch.cat(rows), torch.cat(biases) if biases else None)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        return (0,) if layer.padding == "valid" else tuple(k - 1 for k in layer.kernel_size)
    return tuple(layer.padding)


def estimate_inputs(
    target: torch.Tensor,
    offered: torch.Tensor,
    channels: np.ndarray | None,
    centred: bool,
    config: InheritConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A` `(C, k)` and constant `d` `(C,)` that estimate `target` `(n, C)` from `offered` `(n, k)`.

    `channels` names the teacher channel that each offered channel stands for (None if it stands
    for none); the ridge pulls towards it. Not centred: `d` is 0.
    """
    count, width = offered.shape
    mean_u = offered.mean(0) if centred else torch.zeros(width)
    mean_a = target.mean(0) if centred else torch.zeros(target.shape[1])
    u = offered - mean_u if centred else offered
    a = target - mean_a if centred else target
    gram = (u.T @ u).double() / count
    cross = (u.T @ a).double() / count
    scale = gram.diagonal().mean().clamp_min(1e-12)
    ridge = scale * (config.ridge + config.scarce * (width / count) ** 2)
    gram.diagonal().add_(ridge)
    if channels is not None:
        cross[torch.arange(width), torch.from_numpy(channels)] += ridge
    factor = torch.linalg.cholesky(gram)
    estimate = torch.cholesky_solve(cross, factor).T.float()
    return estimate, mean_a - estimate @ mean_u


def _fold(weight: torch.Tensor, estimate: torch.Tensor, channels: int, repeat: int) -> torch.Tensor:
    """`W'[o, k, ...] = sum_c W[o, c, ...] A[c, k]`, shared over the positions of a flatten."""
    outputs, width = len(weight), estimate.shape[1]
    taps = weight.reshape(outputs, channels, -1)  # a conv's taps, or a linear layer's positions
    folded = (taps.transpose(1, 2).reshape(-1, channels) @ estimate).reshape(outputs, -1, width)
    folded = folded.transpose(1, 2)
    if weight.ndim == 4:
        return folded.reshape(outputs, width, *weight.shape[2:])
    if repeat == 1:
        return folded.reshape(outputs, width)
    return folded.reshape(outputs, width * repeat)
