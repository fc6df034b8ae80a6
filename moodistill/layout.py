"""From the traced teacher and its statistics to the genome's layout: blocks, importance, edges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moodistill.errors import UserError
from moodistill.genome import GenomeLayout, Group, Node
from moodistill.graph import Step, TeacherGraph
from moodistill.statistics import TeacherSamples

MAX_BLOCKS = 4
MIN_BLOCK_CHANNELS = 16


@dataclass(frozen=True)
class LayerRules:
    """What the user says about single layers, by module path.

    Attributes:
        keep: layers to leave alone: all their outputs and connections stay, they are not bypassed.
            What they read may still lose channels.
        least, most: bounds of a layer's width, in channels or neurons.
    """

    keep: tuple[str, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)

    def check(self, graph: TeacherGraph) -> None:
        """Refuse layers that the network does not have, and bounds that cannot be kept.

        Raises:
            UserError: names the layer and the layers there are.
        """
        sizes = {layer.name: graph.groups[layer.group] for layer in graph.layers}
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
    energy = {layer.name: _energy(graph, samples, layer) for layer in graph.layers}
    blocks: dict[str, np.ndarray] = {}
    for layer in graph.layers:
        if layer.reads not in blocks:
            blocks[layer.reads] = _cluster(graph, energy, blocks, layer.reads)
    for name in graph.groups:
        if name not in blocks:
            blocks[name] = np.zeros(graph.groups[name], dtype=int)
    importance = {name: np.zeros(size) for name, size in graph.groups.items()}
    for layer in graph.layers:
        share = energy[layer.name].sum(axis=0)
        importance[layer.reads] += share / max(share.sum(), 1e-30)
    rules = rules or LayerRules()
    rules.check(graph)
    frozen = {graph.output_group, graph.steps[0].group}
    least: dict[str, int] = {}
    most: dict[str, int] = {}
    for layer in graph.layers:
        if layer.name in rules.keep:
            frozen.add(layer.group)
        # Layers that write one group share its width: the narrowest bounds hold.
        if layer.name in rules.least:
            least[layer.group] = max(least.get(layer.group, 1), rules.least[layer.name])
        if layer.name in rules.most:
            most[layer.group] = min(most.get(layer.group, 1 << 30), rules.most[layer.name])
    groups = {
        name: Group(
            name, blocks[name], importance[name], name in frozen, least.get(name), most.get(name)
        )
        for name in graph.groups
    }
    return GenomeLayout(groups, skeleton(graph, blocks, energy, rules.keep))


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
        if step.kind == "layer" and energy is not None:
            rows = np.eye(blocks[step.group].max() + 1)[blocks[step.group]]
            columns = np.eye(blocks[step.reads].max() + 1)[blocks[step.reads]]
            matrix = rows.T @ energy[step.name] @ columns
        nodes.append(
            Node(
                step.name, step.kind, step.inputs, step.group, step.reads,
                step.kind == "layer" and step.name not in keep and _bypassable(graph, step),
                matrix, step.name in keep,
            )
        )  # fmt: skip
    return tuple(nodes)


def _energy(graph: TeacherGraph, samples: TeacherSamples, layer: Step) -> np.ndarray:
    """`(out channels, in channels)`: squared weights, summed over taps, times input variance."""
    weight = graph.layer_module(layer.name).weight.detach()
    channels = graph.groups[layer.reads]
    squared = weight.pow(2).reshape(len(weight), channels, -1).sum(2)
    return (squared * samples.inputs[layer.name].var(0, unbiased=False)).double().numpy()


def _cluster(
    graph: TeacherGraph,
    energy: dict[str, np.ndarray],
    blocks: dict[str, np.ndarray],
    group: str,
) -> np.ndarray:
    size = graph.groups[group]
    count = max(1, min(MAX_BLOCKS, size // MIN_BLOCK_CHANNELS))
    if count == 1:
        return np.zeros(size, dtype=int)
    affinity = np.zeros((size, count))
    for layer in graph.layers:
        if layer.group != group or layer.reads not in blocks:
            continue
        reads = blocks[layer.reads]
        sources = int(reads.max()) + 1
        if sources == 1:
            continue
        share = energy[layer.name] @ np.eye(sources)[reads]
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-30)
        affinity += share @ _overlap(sources, count)
    capacity = np.bincount(np.arange(size) * count // size, minlength=count)
    if not affinity.any():
        consumer = next(layer for layer in graph.layers if layer.reads == group)
        matrix = torch.from_numpy(energy[consumer.name])
        rows = matrix.sum(1, keepdim=True).clamp_min(1e-30).sqrt()
        columns = matrix.sum(0, keepdim=True).clamp_min(1e-30).sqrt()
        _, _, right = torch.linalg.svd(matrix / rows / columns, full_matrices=False)
        second = right[min(1, len(right) - 1)].numpy()
        second = second * np.sign(second[np.abs(second).argmax()])
        result = np.empty(size, dtype=int)
        result[np.argsort(second, kind="stable")] = np.repeat(np.arange(count), capacity)
        return result
    slots = np.repeat(np.arange(count), capacity)
    rows, columns = linear_sum_assignment(-affinity[:, slots])
    result = np.empty(size, dtype=int)
    result[rows] = slots[columns]
    return result


def _overlap(sources: int, targets: int) -> np.ndarray:
    """`(sources, targets)`: overlap of two even cuts of the unit interval."""
    low = np.maximum.outer(np.arange(sources) / sources, np.arange(targets) / targets)
    high = np.minimum.outer((np.arange(sources) + 1) / sources, (np.arange(targets) + 1) / targets)
    return np.maximum(high - low, 0.0)


def _bypassable(graph: TeacherGraph, layer: Step) -> bool:
    """Whether consumers can read what `layer` reads: same resolution, consumers hold weights."""
    first, output = graph.steps[0].group, graph.output_group
    writers = sum(other.group == layer.group for other in graph.layers)
    if layer.reads == first or layer.group == output or writers != 1:
        return False
    source = next(step for step in graph.steps if step.name == layer.inputs[0])
    if layer.shape[1:] != source.shape[1:]:
        return False
    frontier = [layer.name]
    while frontier:
        name = frontier.pop()
        for step in graph.steps:
            if name in step.inputs:
                if step.kind in ("merge", "output"):
                    return False
                if step.kind != "layer":
                    frontier.append(step.name)
    return True
