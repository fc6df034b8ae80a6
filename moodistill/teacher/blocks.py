"""From the traced teacher and its statistics to the genome's layout: blocks, importance, edges."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout, Group, Node
from moodistill.teacher.graph import TeacherGraph
from moodistill.teacher.kernels import Conv, ranks_of, rings_of, weight_of
from moodistill.teacher.samples import TeacherSamples
from moodistill.teacher.steps import Step

MAX_BLOCKS = 4
MIN_BLOCK_CHANNELS = 16
LARGEST_EXACT = 1024  # channels whose blocks are assigned by the exact solver


@dataclass(frozen=True)
class LayerRules:
    """What the user says about single layers, by module path.

    Attributes:
        keep: layers to leave alone: all their outputs and connections stay, they are not bypassed.
            What they read may still lose channels.
        least, most: bounds of a layer's width, in channels or neurons.
        opaque: modules that stay as they are, as one operation that is not looked into.
    """

    keep: tuple[str, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    opaque: tuple[str, ...] = ()

    def check(self, graph: TeacherGraph) -> None:
        """Refuse layers that the network does not have, and bounds that cannot be kept.

        Raises:
            UserError: names the layer and the layers there are.
        """
        sizes = {layer.name: layer.form.channels for layer in graph.layers}
        for name in (*self.keep, *self.least, *self.most):
            if name not in sizes:
                raise UserError(f"unknown layer {name!r}; expected one of {', '.join(sizes)}")
        for name, size in sizes.items():
            least, most = self.least.get(name, 1), self.most.get(name, size)
            if not 1 <= least <= most <= size:
                raise UserError(
                    f"layer {name} is to keep between {least} and {most} of its {size} outputs; "
                    f"expected 1 <= least <= most <= {size}"
                )


def build_layout(
    graph: TeacherGraph, samples: TeacherSamples, rules: LayerRules | None = None
) -> GenomeLayout:
    """Cluster every group's channels into blocks and rank them; deterministic.

    Blocks follow the energy `|W|^2 * var(input)` between channels (spectral co-clustering after
    Dhillon 2001 for the first group, a balanced assignment along the network afterwards), so that
    a removed connection costs little. A channel's importance is its variance at its consumers'
    inputs times their weight energy, as a share of each consumer, summed over consumers.
    """
    rules = rules or LayerRules()
    rules.check(graph)
    energy = {layer.name: _energy(graph, samples, layer) for layer in graph.layers}
    blocks: dict[str, np.ndarray] = {}
    for layer in graph.layers:
        for name in layer.reads:
            if name not in blocks:
                blocks[name] = _cluster(graph, energy, blocks, name)
    for name in graph.groups:
        if name not in blocks:
            blocks[name] = np.zeros(graph.groups[name], dtype=int)
    importance = {name: np.zeros(size) for name, size in graph.groups.items()}
    for layer in graph.layers:
        share = energy[layer.name].sum(axis=0)
        share = share / max(share.sum(), 1e-30)
        for name, part in _parts(graph, layer.reads).items():
            importance[name] += share[part]
    frozen = set(graph.grouping.frozen)
    for layer in graph.layers:
        if layer.name in rules.keep:
            frozen |= set(layer.groups)
    groups = {
        name: Group(
            name, blocks[name], importance[name], name in frozen,
            *_bounds(graph, rules, name), graph.grouping.widths[name],
        )
        for name in graph.groups
    }  # fmt: skip
    return GenomeLayout(groups, skeleton(graph, blocks, energy, rules.keep))


def _bounds(graph: TeacherGraph, rules: LayerRules, group: str) -> tuple[int | None, int | None]:
    """Least and most channels of a group's mask.

    Layers that write one group share its width: the narrowest bounds hold. Where a layer writes
    several groups, each has its share of the layer's bounds.
    """
    least: list[int] = []
    most: list[int] = []
    for layer in graph.layers:
        if group in layer.groups:
            share = graph.groups[group] / layer.form.channels
            if layer.name in rules.least:
                least.append(math.ceil(rules.least[layer.name] * share))
            if layer.name in rules.most:
                most.append(max(1, math.floor(rules.most[layer.name] * share)))
    bounds = max(least, default=None), min(most, default=None)
    if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
        raise UserError(
            f"layers that share their width with {group} are to keep at least {bounds[0]} and at "
            f"most {bounds[1]} of its channels (a layer that writes several groups shares its "
            "bounds among them); expected bounds that can both be kept"
        )
    return bounds


def _parts(graph: TeacherGraph, groups: tuple[str, ...]) -> dict[str, slice]:
    """The place of each group's channels where several lie one after another."""
    result = {}
    start = 0
    for name in groups:
        result[name] = slice(start, start + graph.groups[name])
        start += graph.groups[name]
    return result


def skeleton(
    graph: TeacherGraph,
    blocks: dict[str, np.ndarray],
    energy: dict[str, np.ndarray] | None = None,
    keep: Collection[str] = (),
) -> tuple[Node, ...]:
    """The teacher as numpy-only nodes, block energies included where `energy` is given.

    Layers named in `keep` have no connection genes and cannot be bypassed.
    """
    nodes = []
    for step in graph.steps:
        matrix = None
        fixed = step.kind == "layer" and step.target in keep
        if step.name in (energy or {}):
            rows, columns = (_block_of(blocks, groups) for groups in (step.groups, step.reads))
            matrix = rows.T @ energy[step.name] @ columns  # type: ignore[index]
        nodes.append(
            Node(
                step.name, step.kind, step.inputs, step.groups, step.reads,
                step.kind == "layer" and not fixed and not step.shared and _bypassable(graph, step),
                matrix, fixed, step.shared,
                lanes=tuple(
                    int((step.owner == place).sum()) // graph.groups[group]
                    for place, group in enumerate(step.groups)
                ),
                repeat=step.form.repeat,
                **_thinning(graph, step, fixed),
            )
        )  # fmt: skip
    return tuple(nodes)


def _thinning(graph: TeacherGraph, step: Step, fixed: bool) -> dict[str, Any]:
    """The fields of a node that say which kernel and rank genes it has."""
    if step.kind not in ("layer", "channelwise") or step.node.op != "call_module":
        return {}
    module = graph.module.get_submodule(step.target)
    found: dict[str, Any] = {"module": step.target}
    if isinstance(module, Conv):
        found["kernel"] = tuple(module.kernel_size)
        found["rings"] = () if fixed else rings_of(module)
    if isinstance(module, Conv | nn.Linear):
        found["ranks"] = () if fixed else ranks_of(module)
    return found


def _block_of(blocks: dict[str, np.ndarray], groups: tuple[str, ...]) -> np.ndarray:
    """`(channels, blocks)` one-hot blocks of several groups, one after another."""
    parts = [np.eye(blocks[name].max() + 1)[blocks[name]] for name in groups]
    return scipy.linalg.block_diag(*parts)


def _energy(graph: TeacherGraph, samples: TeacherSamples, layer: Step) -> np.ndarray:
    """`(output, input)` squared weights, summed over taps, times input variance.

    Both sides are the channels of the masks, group by group.
    """
    weight = weight_of(graph.layer_module(layer.target)).detach()
    source = graph.step(layer.inputs[0])
    squared = weight.pow(2).reshape(len(weight), source.form.channels, -1).sum(2)
    full = (squared * samples.inputs[layer.name].var(0, unbiased=False)).double().numpy()
    rows, columns = _mask_place(graph, layer), _mask_place(graph, source)
    if np.array_equal(rows, np.arange(len(rows))) and np.array_equal(
        columns, np.arange(len(columns))
    ):
        return full
    result = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(result, (rows[:, None], columns[None, :]), full)
    return result


def _mask_place(graph: TeacherGraph, step: Step) -> np.ndarray:
    """`(channels,)`: each real channel's place among the mask's channels of the step's groups."""
    starts = np.cumsum([0, *(graph.groups[name] for name in step.groups)])[:-1]
    return starts[step.owner] + step.place


def _cluster(
    graph: TeacherGraph,
    energy: dict[str, np.ndarray],
    blocks: dict[str, np.ndarray],
    group: str,
) -> np.ndarray:
    size = graph.groups[group]
    if group in graph.grouping.frozen:
        return np.zeros(size, dtype=int)
    width = graph.grouping.widths[group]
    count = max(1, min(MAX_BLOCKS, size, size * width // MIN_BLOCK_CHANNELS))
    if count == 1:
        return np.zeros(size, dtype=int)
    affinity = np.zeros((size, count))
    for layer in graph.layers:
        if group not in layer.groups:
            continue
        own = energy[layer.name][_parts(graph, layer.groups)[group]]
        for name, part in _parts(graph, layer.reads).items():
            sources = int(blocks[name].max()) + 1 if name in blocks else 1
            if sources > 1:
                share = own[:, part] @ np.eye(sources)[blocks[name]]
                share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-30)
                affinity += share @ _overlap(sources, count)
    capacity = np.bincount(np.arange(size) * count // size, minlength=count)
    if not affinity.any():
        consumer = next(layer for layer in graph.layers if group in layer.reads)
        read = energy[consumer.name][:, _parts(graph, consumer.reads)[group]]
        matrix = torch.from_numpy(read)
        rows = matrix.sum(1, keepdim=True).clamp_min(1e-30).sqrt()
        columns = matrix.sum(0, keepdim=True).clamp_min(1e-30).sqrt()
        second = _second_vector((matrix / rows / columns).numpy())
        result = np.empty(size, dtype=int)
        result[np.argsort(second, kind="stable")] = np.repeat(np.arange(count), capacity)
        return result
    return _balanced(affinity, capacity)


def _balanced(affinity: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """`(size,)` block of every channel: the most affinity with each block at its capacity."""
    size, count = affinity.shape
    if size <= LARGEST_EXACT:
        slots = np.repeat(np.arange(count), capacity)
        _, columns = linear_sum_assignment(-affinity[:, slots])
        return slots[columns]
    # The exact solver takes minutes for thousands of nearly equal rows: those that would lose most
    # by their second choice choose first.
    ranked = np.sort(affinity, axis=1)
    regret = ranked[:, -1] - ranked[:, -2]
    left = capacity.copy()
    result = np.empty(size, dtype=int)
    for row in np.argsort(-regret, kind="stable"):
        block = int(np.where(left > 0, affinity[row], -np.inf).argmax())
        result[row] = block
        left[block] -= 1
    return result


def _second_vector(matrix: np.ndarray) -> np.ndarray:
    """The second right singular vector `(columns,)`, its largest entry positive."""
    if not (np.isfinite(matrix).all() and matrix.any()):
        return np.arange(matrix.shape[1])  # a dead layer: any blocks will do
    if min(matrix.shape) > 2:
        start = np.random.default_rng(0).normal(size=min(matrix.shape))
        _, values, right = scipy.sparse.linalg.svds(matrix, k=2, v0=start)
        second = right[np.argsort(-values)[1]]
    else:
        _, _, right = np.linalg.svd(matrix, full_matrices=False)
        second = right[-1]
    return np.asarray(second * np.sign(second[np.abs(second).argmax()]))


def _overlap(sources: int, targets: int) -> np.ndarray:
    """`(sources, targets)`: overlap of two even cuts of the unit interval."""
    low = np.maximum.outer(np.arange(sources) / sources, np.arange(targets) / targets)
    high = np.minimum.outer((np.arange(sources) + 1) / sources, (np.arange(targets) + 1) / targets)
    return np.maximum(high - low, 0.0)


def _bypassable(graph: TeacherGraph, layer: Step) -> bool:
    """Whether consumers can read what `layer` reads: same resolution, consumers hold weights."""
    source = graph.step(layer.inputs[0])
    taken = {*graph.steps[0].groups, *graph.grouping.frozen}
    if set(layer.reads) & set(graph.steps[0].groups) or set(layer.groups) & taken:
        return False
    writers = [s for s in graph.steps if s.kind == "layer" and set(s.groups) & set(layer.groups)]
    pixels = [(s.form.kind, s.form.size) if len(s.shape) > 1 else None for s in (layer, source)]
    if len(writers) != 1 or pixels[0] != pixels[1]:
        return False
    frontier = [layer.name]
    while frontier:
        name = frontier.pop()
        for step in graph.steps:
            if name not in step.inputs:
                continue
            if step.kind == "layer":
                if step.shared:
                    return False
            elif step.kind in ("norm", "activation", "spatial") or _reshapes(
                step, graph.step(step.inputs[0]), source
            ):
                frontier.append(step.name)
            else:
                return False
    return True


def _reshapes(step: Step, before: Step, source: Step) -> bool:
    """Whether a step only changes the form of one value, as a flatten does, past a bypass too.

    `before` is what it reads, `source` what it would read past the bypassed layer.
    """
    if step.kind != "rearrange" or len(step.inputs) != 1 or step.origin is None:
        return False
    unflattens = source.form.kind == "flat" and step.form.kind in ("map", "last")
    return not unflattens and np.array_equal(step.origin[:, 1], np.arange(before.form.channels))
