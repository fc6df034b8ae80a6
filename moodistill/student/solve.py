"""The closed form of one layer: weights solved from the teacher, without training.

Whatever a layer of the student can still read, it should give the best linear estimate of what
the teacher's layer gives. A convolution larger than 1x1 is solved on whole patches (`regression`).
For a layer that reads one pixel at a time it is enough to estimate its inputs: with `u` `(n, k)`
the student's input pixels and `a` `(n, C)` the teacher's at the same places,

    A = argmin |a - u A^T|^2 + ridge * |A - A0|^2,    W'[o, k] = sum_c W[o, c] A[c, k],

where `A0` picks the kept channels (0 past a bypassed layer). Masks, missing connections, merge
edges and bypasses are one operation: the gene says what may be read, the solve says how.
Sources: least squares for channel pruning (He et al. 2017), Gram-based compensation (GRAIL).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from moodistill.accelerator import in_double
from moodistill.student.network import Student
from moodistill.student.patches import as_kernel, as_matrix, output_size, sample_patches
from moodistill.student.regression import reduce_rank, regress, solve_exactly
from moodistill.student.slicing import Unit, low_rank, tapped
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv, Layer, Transposed, padding_of, weight_of
from moodistill.teacher.samples import TeacherSamples, as_map, sample_pixels, sample_positions

Mode = Literal["slice", "student", "patches"]


@dataclass(frozen=True)
class InheritConfig:
    """How weights are inherited; the batch statistics are always recalibrated.

    Attributes:
        mode: `slice` keeps the sliced weights; `student` walks the student layer by layer and
            estimates the inputs of the teacher's layers from what it produces, at single pixels;
            `patches` does so, but solves convolutions larger than 1x1 on whole patches.
        ridge: pull towards the sliced weights, relative to the mean diagonal of the Gram matrix,
            where samples abound.
        scarce: added to `ridge` times `(k / n)^2`, `k` unknowns from `n` samples, at single pixels.
        scarce_patches: the same on whole patches.
        widest: unknowns of one output above which a convolution is solved at single pixels: the
            cost grows with their cube, and so wide a layer gains little (docs/method.md).
    """

    mode: Mode = "patches"
    ridge: float = 1e-2
    scarce: float = 2.0
    scarce_patches: float = 0.3
    widest: int = 1536


def _layer(student: nn.Module, path: str) -> Layer:
    module = student.get_submodule(path)
    assert isinstance(module, Layer)
    return module


@dataclass(frozen=True)
class Solution:
    """Solved weights of one unit.

    Attributes:
        matrix: `(outputs, k)`, one column for each number that the unit reads at a place.
        rows: `(n, k)` these numbers at the sampled places, centred where there is a `level`; None
            where they are not at hand.
        tapwise: whether the columns are tap by tap; else channel by channel.
        constant: `(outputs,)`; None where none may be taken.
        level: `(outputs,)` the mean output, where a constant is taken.
    """

    matrix: torch.Tensor
    rows: torch.Tensor | None
    tapwise: bool
    constant: torch.Tensor | None
    level: torch.Tensor | None

    def weight(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A matrix with these columns as a module's weight."""
        return as_kernel(matrix, tuple(shape)) if self.tapwise else matrix.reshape(shape)


def solve_unit(
    unit: Unit,
    source: torch.Tensor,
    student: Student,
    graph: TeacherGraph,
    samples: TeacherSamples,
    config: InheritConfig,
) -> Solution | None:
    """The weights of a unit that reads `source`; None where the samples are of other places.

    A shared layer is solved where it is first called, from samples of that call. If the teacher's
    first call is gone and this one has another resolution it stays sliced.
    """
    module = _layer(student.module, unit.target)
    layer = graph.layer_module(unit.layer)
    step = next(step for step in graph.layers if step.target == unit.layer)
    unknowns = weight_of(module)[0].numel()
    if config.mode == "patches" and unit.layer in samples.outputs and unknowns <= config.widest:
        assert isinstance(module, Conv)
        if math.prod(output_size(module, source.shape[2:])) != step.form.area:
            return None
        free = _takes_constant(unit, student)
        return _on_patches(unit, module, source, layer, samples, free, config)
    area = graph.step(step.inputs[0]).form.area
    if source.ndim > 2 and as_map(source, layer)[0, 0].numel() != area:
        return None
    return _on_pixels(unit, module, source, layer, samples, config)


def _takes_constant(unit: Unit, student: Student) -> bool:
    """Whether a unit may add a constant: by its bias, or as a norm that is recalibrated follows."""
    path = unit.target if unit.expand is None else unit.expand
    if student.module.get_submodule(path).bias is not None:
        return True
    norms = {norm.target for norm in student.norms}
    calls = [node for node in student.module.graph.nodes if node.target == path]
    return all(str(user.target) in norms for node in calls for user in node.users)


def _on_patches(
    unit: Unit,
    module: Conv,
    source: torch.Tensor,
    layer: Layer,
    samples: TeacherSamples,
    free: bool,
    config: InheritConfig,
) -> Solution:
    """From what the teacher's convolution gave, on whole patches; `free` to take a constant."""
    count, channels, *size = source.shape
    drawn = samples.config
    area = math.prod(output_size(module, size))
    positions = sample_positions(count, area, drawn.patches, drawn.seed).to(source.device)
    patches = sample_patches(source, module, positions)
    given = samples.outputs[unit.layer]
    matrices, constants = [], []
    start = 0
    for outputs, inputs in zip(unit.outputs, unit.inputs, strict=True):
        part, end = patches, start + len(inputs)
        if len(inputs) < channels:
            part = patches.unflatten(1, (-1, channels))[:, :, start:end].flatten(1)
        start = end
        index = indices(outputs, source.device)
        anchor = part.new_zeros(len(outputs), part.shape[1])
        if not unit.through:
            weight = tapped(layer.weight[index], unit.taps)
            anchor = as_matrix(weight[:, indices(inputs, source.device)])
        matrix, constant = regress(
            part, given[:, index], anchor, free, config.ridge, config.scarce_patches
        )
        matrices.append(matrix)
        constants.append(constant)
    every = indices(np.concatenate(unit.outputs), source.device)
    return Solution(
        torch.cat(matrices),
        patches,
        tapwise=True,
        constant=torch.cat(constants) if free else None,
        level=given[:, every].mean(0) if free else None,
    )


def _on_pixels(
    unit: Unit,
    module: nn.Module,
    source: torch.Tensor,
    layer: Layer,
    samples: TeacherSamples,
    config: InheritConfig,
) -> Solution:
    """From estimates of what the teacher's layer read, at single pixels."""
    target = samples.inputs[unit.layer]
    # Only a layer without padding may take the constant of the estimate into its bias: at a
    # padded border some taps see no input and no constant either.
    # So do some taps of a transposed convolution, at most of its places.
    padded = isinstance(module, Transposed) or (
        isinstance(module, Conv) and any(p != 0 for p in padding_of(module))
    )
    centred = not padded and layer.bias is not None
    # Past a bypassed linear layer behind a flatten every feature is a channel of its own; else the
    # positions of a flatten share one estimate.
    own_repeat = layer.in_features // target.shape[1] if isinstance(layer, nn.Linear) else 1
    repeat = unit.repeat if unit.repeat == own_repeat else 1
    offered = sample_pixels(as_map(source, layer), repeat, samples.config)
    matrices, biases = [], []
    start = 0
    for outputs, inputs in zip(unit.outputs, unit.inputs, strict=True):
        width = len(inputs) * unit.repeat // repeat
        estimate, constant = estimate_inputs(
            target, offered[:, start : start + width], None if unit.through else inputs, centred,
            config,
        )  # fmt: skip
        start += width
        index = indices(outputs, source.device)
        weight = tapped(weight_of(layer)[index], unit.taps)
        matrices.append(_fold(weight, estimate, target.shape[1], repeat).flatten(1))
        if centred:
            taps = weight.reshape(len(weight), target.shape[1], -1).sum(2)
            assert layer.bias is not None
            biases.append(layer.bias[index] + taps @ constant)
    matrix = torch.cat(matrices)
    rows = source if source.ndim == 2 else offered
    if rows.shape[1] != matrix.shape[1]:  # several taps
        return Solution(matrix, None, False, torch.cat(biases) if centred else None, None)
    if not centred:
        return Solution(matrix, rows, False, None, None)
    mean, bias = rows.mean(0), torch.cat(biases)
    return Solution(matrix, rows - mean, False, bias, matrix @ mean + bias)


def write_solution(unit: Unit, student: nn.Module, solution: Solution) -> bool:
    """Set the module or the two modules of a unit; whether the solution was finite."""
    if not torch.isfinite(solution.matrix).all():
        return False
    first = last = _layer(student, unit.target)
    matrix, basis, bias = solution.matrix, None, solution.constant
    if unit.expand is not None:
        last = _layer(student, unit.expand)
        try:
            matrix, basis, bias = _ranked(unit, solution)
        except torch.linalg.LinAlgError:  # the products of rows or weights are beyond float32
            return False
    if not all(bool(torch.isfinite(t).all()) for t in (matrix, basis, bias) if t is not None):
        return False
    if basis is not None:
        last.weight.copy_(basis.reshape(last.weight.shape))
    stored = weight_of(first)
    stored.copy_(solution.weight(matrix, stored.shape))
    if last.bias is not None and bias is not None:
        last.bias.copy_(bias)
    return True


def _ranked(
    unit: Unit, solution: Solution
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights `(rank, k)` and `(outputs, rank)` of a unit's two modules, and the bias."""
    assert unit.rank is not None
    bias = solution.constant
    if solution.rows is None:
        return *low_rank(solution.matrix, unit.rank), bias
    basis, matrix = reduce_rank(solution.matrix, solution.rows, unit.rank)
    if solution.level is not None and bias is not None:
        # The mean is no variation of the outputs: the basis need not hold it.
        bias = solution.level - basis @ (basis.T @ (solution.level - bias))
    return matrix, basis, bias


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
    mean_u = offered.mean(0) if centred else offered.new_zeros(width)
    mean_a = target.mean(0) if centred else target.new_zeros(target.shape[1])
    u = offered - mean_u if centred else offered
    a = target - mean_a if centred else target
    gram = in_double(u.T @ u) / count
    cross = in_double(u.T @ a) / count
    scale = gram.diagonal().mean().clamp_min(1e-12)
    ridge = scale * (config.ridge + config.scarce * (width / count) ** 2)
    gram.diagonal().add_(ridge)
    if channels is not None:
        place = torch.arange(width, device=cross.device), indices(channels, cross.device)
        cross[place] += ridge
    estimate = solve_exactly(gram, cross).T.to(offered.device)
    return estimate, mean_a - estimate @ mean_u


def indices(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Whole numbers `(n,)` as an index on a device."""
    return torch.from_numpy(numbers).to(device)


def _fold(weight: torch.Tensor, estimate: torch.Tensor, channels: int, repeat: int) -> torch.Tensor:
    """`W'[o, k, ...] = sum_c W[o, c, ...] A[c, k]`, shared over the positions of a flatten."""
    outputs, width = len(weight), estimate.shape[1]
    taps = weight.reshape(outputs, channels, -1)  # a conv's taps, or a linear layer's positions
    folded = (taps.transpose(1, 2).reshape(-1, channels) @ estimate).reshape(outputs, -1, width)
    folded = folded.transpose(1, 2)
    if weight.ndim > 2:
        return folded.reshape(outputs, width, *weight.shape[2:])
    if repeat == 1:
        return folded.reshape(outputs, width)
    return folded.reshape(outputs, width * repeat)
