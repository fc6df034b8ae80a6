"""Sizes of the layers of many genomes at once, before their repair.

Repair changes little of them and costs a hundred times as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moodistill.genome.layout import GenomeLayout, Node


@dataclass(frozen=True)
class LayerSizes:
    """One layer in `n` genomes.

    Attributes:
        layer: the node.
        live: `(n,)` bool, whether the output depends on what it gives, or on what it passes.
        kept: `(n,)` bool, False where it is bypassed.
        inputs: `(n,)` values that a place of its output is summed of, without taps.
        outputs: `(n,)`.
        connected: `(n,)` pairs of an input and an output that are connected.
        taps: `(n,)` of its kernel.
        rank: `(n,)`, infinite where it is full or saves nothing.
    """

    layer: Node
    live: np.ndarray
    kept: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    connected: np.ndarray
    taps: np.ndarray
    rank: np.ndarray

    @property
    def ranked(self) -> np.ndarray:
        """`(n,)` whether it is of a lower rank, and so two layers."""
        return np.isfinite(self.rank)

    @property
    def weights(self) -> np.ndarray:
        """`(n,)` of its module or two modules."""
        rank = np.where(self.ranked, self.rank, 0.0)
        thin = rank * (self.inputs * self.taps + self.outputs)
        return np.where(self.ranked, thin, self.connected * self.taps)


def layer_sizes(layout: GenomeLayout, genomes: np.ndarray) -> Iterator[LayerSizes]:
    """All layers in their order.

    Args:
        layout: of the teacher.
        genomes: `(n, length)`.
    """
    live = live_nodes(layout, genomes)
    counts, widths = _counts(layout, genomes)
    # Of groups that a layer writes which may be left out: whether it is there, and the width that
    # the group's readers find.
    there: dict[str, np.ndarray] = {}
    passed: dict[str, np.ndarray] = {}
    always = np.ones(len(genomes), dtype=bool)
    for layer in layout.layers:
        inputs = np.sum([passed.get(g, widths[g]) for g in layer.reads], axis=0)
        outputs = np.sum([widths[g] for g in layer.groups], axis=0)
        # Past a bypassed layer everything is connected.
        direct = always.copy()
        for group in layer.reads:
            direct &= there.get(group, True)
        pairs = outputs * inputs
        connected = np.where(direct, _connected(layout, genomes, layer, counts), pairs)
        kept = always
        if layer.bypassable:
            kept = layout.view_all(genomes, f"bypass/{layer.name}")[:, 0]
            there.update(dict.fromkeys(layer.groups, kept))
            passed.update(
                {g: np.where(kept, widths[g], inputs / len(layer.groups)) for g in layer.groups}
            )
        taps = kernel_taps(layout, genomes, layer)
        repeat = layout.by_name[layer.inputs[0]].repeat
        rank = np.full(len(genomes), np.inf)
        if layer.path in layout.ranked:
            # Where a layer is cut into several modules, its rank has no effect.
            rank = np.where(connected == pairs, _ranks(layout, genomes, layer), np.inf)
            thinned = rank * (inputs * taps * repeat + outputs)
            rank = np.where(thinned < connected * taps * repeat, rank, np.inf)
        yield LayerSizes(
            layer, live[layer.name], kept, inputs * repeat, outputs, connected * repeat, taps, rank
        )


def live_nodes(layout: GenomeLayout, genomes: np.ndarray) -> dict[str, np.ndarray]:
    """For every node `(n,)` whether the output depends on it, by the merge edges alone."""
    live = {node.name: np.zeros(len(genomes), dtype=bool) for node in layout.nodes}
    for node in reversed(layout.nodes):
        if node.kind == "output":
            live[node.name][:] = True
        for place, source in enumerate(node.inputs):
            edge = live[node.name]
            if f"merge/{node.name}" in layout.slices:
                bits = layout.view_all(genomes, f"merge/{node.name}")
                edge = edge & (bits[:, place] | ~bits.any(axis=1))
            live[source] |= edge
    return live


def group_widths(layout: GenomeLayout, genomes: np.ndarray, name: str) -> np.ndarray:
    """`(n,)` kept channels of a group."""
    if f"mask/{name}" not in layout.slices:
        return np.full(len(genomes), layout.groups[name].size)
    return np.asarray(layout.view_all(genomes, f"mask/{name}").sum(axis=1))


def _counts(
    layout: GenomeLayout, genomes: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For every group the kept channels of its blocks `(n, blocks)`, and of it all `(n,)`."""
    counts = {}
    for name, group in layout.groups.items():
        members = np.eye(group.blocks)[group.block]
        masks = (
            layout.view_all(genomes, f"mask/{name}")
            if f"mask/{name}" in layout.slices
            else np.ones((len(genomes), group.size), dtype=bool)
        )
        counts[name] = masks @ members
    return counts, {name: count.sum(axis=1) for name, count in counts.items()}


def _connected(
    layout: GenomeLayout, genomes: np.ndarray, layer: Node, counts: dict[str, np.ndarray]
) -> np.ndarray:
    """`(n,)` connected pairs of kept channels of a layer."""
    outputs = np.hstack([counts[name] for name in layer.groups])
    inputs = np.hstack([counts[name] for name in layer.reads])
    if f"block/{layer.name}" not in layout.slices:
        return np.asarray(outputs.sum(axis=1) * inputs.sum(axis=1))
    bits = layout.view_all(genomes, f"block/{layer.name}")
    return np.einsum("nr,nrc,nc->n", outputs, bits, inputs)


def kernel_taps(layout: GenomeLayout, genomes: np.ndarray, node: Node) -> np.ndarray:
    """`(n,)` taps of a convolution's kernel; 1 of a linear layer."""
    return np.asarray(np.prod(kernel_sizes(layout, genomes, node), axis=1, dtype=int))


def kernel_sizes(layout: GenomeLayout, genomes: np.ndarray, node: Node) -> np.ndarray:
    """`(n, axes)` taps by axis of a convolution's kernel; no axes of a linear layer."""
    sizes = np.tile(np.array(node.kernel, dtype=int), (len(genomes), 1))
    if node.path in layout.kernels:
        bits = layout.view_all(genomes, f"kernel/{node.path}")
        start = 0
        for axis, rings in enumerate(node.rings):
            sizes[:, axis] -= 2 * (rings - bits[:, start : start + rings].sum(axis=1))
            start += rings
    return sizes


def _ranks(layout: GenomeLayout, genomes: np.ndarray, layer: Node) -> np.ndarray:
    """`(n,)` rank that a layer's gene says, infinite where it is full."""
    counts = layout.view_all(genomes, f"rank/{layer.path}").sum(axis=1)
    return np.array([*layer.ranks, np.inf])[counts]


def full_taps(node: Node) -> int:
    """Taps of the teacher's kernel."""
    return math.prod(node.kernel)
