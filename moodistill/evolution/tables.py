"""What single changes of the teacher cost and save: tables that the search begins with.

Every change of one gene (a width, a kernel, a rank, a bypass, a merge edge) has an *error*: how far
the outputs of the network with this change alone are from the teacher's. Errors of several changes
add up, roughly; so do the latencies of a network's layers. Both make an estimate of any genome
without building it (SPDY, Frantar and Alistarh 2022; AOWS, Berman et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import lsq_linear

from moodistill.evolution.operators.widths import snap
from moodistill.evolution.sizes import (
    LayerSizes,
    group_widths,
    kernel_sizes,
    layer_sizes,
    live_nodes,
)
from moodistill.genome.canonical import canonical
from moodistill.genome.kernels import write_kernel
from moodistill.genome.layout import GenomeLayout, Group, Node
from moodistill.genome.ranks import nearest_rank, write_rank

SHARES = (0.75, 0.5, 0.25, 0.125, 0.06)  # of a width, that are tried
RANK_SHARES = (0.25, 0.125, 0.06, 0.0)  # of a full rank; the last one is the least rank


Errors = dict[str, dict[tuple[int, ...], float]]  # by gene and level of it


@dataclass(frozen=True)
class Change:
    """One gene that is changed.

    Attributes:
        gene: the name of its slice of the genome.
        level: the width, the taps, the rank, or which input of an Add is dropped; 0 for a bypass.
        genome: `(length,)`, canonical, the teacher's but for this gene.
    """

    gene: str
    level: tuple[int, ...]
    genome: np.ndarray


def single_changes(layout: GenomeLayout, step: int, kept: np.ndarray) -> Iterator[Change]:
    """All changes of one gene that a table holds, gene by gene from the mildest.

    Args:
        layout: of the teacher.
        step: SIMD step of the widths and ranks.
        kept: `(length,)` bits that are never changed (`GenomeLayout.unsearched`).
    """
    for gene, level, genome in _raw_changes(layout, step):
        if (~genome & kept).any():
            continue
        settled = canonical(layout, genome, step)
        if not settled.all():  # repair may take a change back
            yield Change(gene, level, settled)


def _raw_changes(
    layout: GenomeLayout, step: int
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    for group in layout.groups.values():
        for width in _widths(group, step):
            genome = layout.teacher()
            layout.view(genome, f"mask/{group.name}")[:] = most_important(group, width)
            yield f"mask/{group.name}", (width,), genome
    for path, node in layout.kernels.items():
        for taps in kernel_shapes(node):
            genome = layout.teacher()
            write_kernel(layout.view(genome, f"kernel/{path}"), node.kernel, node.rings, taps)
            yield f"kernel/{path}", taps, genome
    for path, node in layout.ranked.items():
        ranks = {
            nearest_rank(share * full_rank(node), node.ranks, step) for share in RANK_SHARES
        } - {None}
        for rank in sorted((r for r in ranks if r is not None), reverse=True):
            genome = layout.teacher()
            write_rank(layout.view(genome, f"rank/{path}"), node.ranks, rank)
            yield f"rank/{path}", (rank,), genome
    for layer in layout.layers:
        if layer.bypassable:
            genome = layout.teacher()
            layout.view(genome, f"bypass/{layer.name}")[0] = False
            yield f"bypass/{layer.name}", (0,), genome
    for merge in layout.merges:
        for place in range(len(merge.inputs)):
            genome = layout.teacher()
            layout.view(genome, f"merge/{merge.name}")[place] = False
            yield f"merge/{merge.name}", (place,), genome


def _widths(group: Group, step: int) -> list[int]:
    """Widths of a group that are tried, descending."""
    if group.frozen:
        return []
    least, most = group.least or 1, group.most or group.size
    widths = {snap(share * group.size, group.size, group.step(step)) for share in SHARES}
    return sorted((w for w in widths if least <= w <= most and w < group.size), reverse=True)


def kernel_shapes(node: Node) -> list[tuple[int, ...]]:
    """Kernels that a node may have below its full one: squares, and one tap along single axes."""
    shapes = []
    for gone in range(1, max(node.rings) + 1):
        shapes.append(
            tuple(k - 2 * min(gone, r) for k, r in zip(node.kernel, node.rings, strict=True))
        )
    for axis, rings in enumerate(node.rings):
        if rings:
            thin = [k if a != axis else k - 2 * rings for a, k in enumerate(node.kernel)]
            shapes.append(tuple(thin))
    return sorted(set(shapes), key=math.prod, reverse=True)


def most_important(group: Group, width: int) -> np.ndarray:
    """`(size,)` mask of the most important channels of a group."""
    mask = np.zeros(group.size, dtype=bool)
    mask[np.argsort(-group.importance, kind="stable")[:width]] = True
    return mask


# Features of a convolution's time, all of logarithms: inputs, outputs, taps, pixels.
COLUMNS = 4
SCALE = 8.0  # of their logarithms to base 2
RIDGE = 1e-5
MOST_ERROR = 1.5  # of a student whose error is compared with a sum
PULL = 0.1  # of the scales of a correction towards the common one
MOST_SCALED = 3.0  # times the common scale, or a part of it


@dataclass(frozen=True)
class LayerTimes:
    """Time of a convolution or linear layer, fitted to those of a few measured networks.

    The logarithm of the time is a quadratic polynomial of the logarithms of inputs, outputs, taps
    and output pixels.

    Attributes:
        coefficients: of the polynomial's terms.
        per_value: ms of everything else (norms, activations, pools, copies) per output value.
        constant: ms of a network without layers.
        measured: whether on the device; else these are multiply-accumulates.
    """

    coefficients: np.ndarray
    per_value: float
    constant: float
    measured: bool = True

    @classmethod
    def by_macs(cls) -> LayerTimes:
        """In proportion to multiply-accumulates, where nothing can be measured."""
        power = np.log(2.0) * SCALE
        return cls(np.array([-20.0, *[power] * COLUMNS, *[0.0] * 10]), 0.0, 0.0, measured=False)

    @classmethod
    def fit(
        cls, layers: np.ndarray, times: np.ndarray, values: np.ndarray, rest: np.ndarray
    ) -> LayerTimes:
        """Of measured networks.

        Args:
            layers: `(n, 4)` inputs, outputs, taps and pixels of layers.
            times: `(n,)` their ms.
            values: `(m,)` values that all layers of a network write.
            rest: `(m,)` ms of a network beside its layers.
        """
        terms = _terms(layers)
        # A little ridge: four sizes of a network's layers are not independent of one another.
        pull = RIDGE * len(terms) * np.diag([0.0, *np.ones(terms.shape[1] - 1)])
        moments = terms.T @ terms + pull
        coefficients = np.linalg.solve(moments, terms.T @ np.log(np.maximum(times, 1e-6)))
        slope = max(0.0, float(np.polyfit(values, rest, 1)[0])) if len(set(values)) > 1 else 0.0
        return cls(coefficients, slope, max(0.0, float(np.mean(rest - slope * values))))

    def layer(
        self, inputs: np.ndarray, outputs: np.ndarray, taps: np.ndarray | float, pixels: float
    ) -> np.ndarray:
        """ms of layers, broadcast; what it writes is counted in."""
        inputs, outputs, taps = np.broadcast_arrays(inputs, outputs, taps)
        sizes = np.stack([inputs, outputs, taps, np.full(inputs.shape, pixels)], axis=-1)
        own = np.exp(_terms(sizes.reshape(-1, COLUMNS)) @ self.coefficients).reshape(inputs.shape)
        return np.asarray(own + self.per_value * outputs * pixels)


def _terms(sizes: np.ndarray) -> np.ndarray:
    """`(n, 15)` of `(n, 4)`: 1, logarithms, and their products."""
    logs = np.log2(np.maximum(sizes, 1.0)) / SCALE
    pairs = [logs[:, i] * logs[:, j] for i in range(COLUMNS) for j in range(i, COLUMNS)]
    return np.column_stack([np.ones(len(logs)), logs, *pairs])


@dataclass(frozen=True)
class Tables:
    """Errors of single changes and times of layers.

    Attributes:
        errors: by gene and level, how far a change alone moves the outputs from the teacher's
            (`teacher.divergence`).
        times: of layers.
        pixels: by layer or depthwise convolution, the pixels of its output.
    """

    errors: Errors
    times: LayerTimes
    pixels: dict[str, int]

    def size_error(self, gene: str, sizes: np.ndarray, full: int) -> np.ndarray:
        """Error of widths or ranks `sizes`, on lines over their logarithm; 0 for `full`.

        Below the least that was tried it goes on along the last line; it never falls with a size.
        """
        levels = sorted((level[0], error) for level, error in self.errors.get(gene, {}).items())
        if not levels:
            return np.zeros(np.shape(sizes))
        logs = np.log([size for size, _ in levels] + [full])
        errors = np.array([error for _, error in levels] + [0.0])
        errors = np.maximum.accumulate(errors[::-1])[::-1]
        at = np.log(np.maximum(sizes, 1))
        slope = (errors[0] - errors[1]) / (logs[0] - logs[1])
        return np.asarray(np.interp(at, logs, errors) + np.minimum(at - logs[0], 0.0) * slope)

    def kernel_error(self, path: str, kernels: np.ndarray, full: tuple[int, ...]) -> np.ndarray:
        """Error of kernels `(n, axes)`; of one that was not tried, of the next smaller one."""
        tried = sorted(self.errors.get(f"kernel/{path}", {}).items(), key=lambda e: e[1])
        result = np.zeros(len(kernels))
        open_ = (kernels < np.array(full)).any(axis=1)
        for taps, error in tried:
            fits = open_ & (np.array(taps) <= kernels).all(axis=1)
            result[fits] = error
            open_ &= ~fits
        return result

    def estimate(self, layout: GenomeLayout, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Error and ms of genomes `(n, length)`, each `(n,)`."""
        errors = np.sum(list(self.parts(layout, genomes).values()), axis=0)
        return np.zeros(len(genomes)) + errors, self.milliseconds(layout, genomes)

    def parts(self, layout: GenomeLayout, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """By gene, what it adds to the error of genomes `(n, length)`, `(n,)`."""
        found: dict[str, np.ndarray] = {}
        read = {name: np.zeros(len(genomes), dtype=bool) for name in layout.groups}
        for one in layer_sizes(layout, genomes):
            layer, there = one.layer, one.live & one.kept
            for group in layer.groups:
                read[group] |= there
            if layer.bypassable:
                gene = f"bypass/{layer.name}"
                found[gene] = (one.live & ~one.kept) * self._single(gene, 0)
            if layer.path in layout.kernels:
                kernels = kernel_sizes(layout, genomes, layer)
                lost = self.kernel_error(layer.path, kernels, layer.kernel)
                found[f"kernel/{layer.path}"] = there * lost
            if layer.path in layout.ranked:
                gene, full = f"rank/{layer.path}", full_rank(layer)
                rank = np.where(one.ranked, one.rank, full)
                found[gene] = there * self.size_error(gene, rank, full)
        live = live_nodes(layout, genomes)
        for node in layout.nodes:
            if node.kind == "channelwise" and node.path in layout.kernels:
                kernels = kernel_sizes(layout, genomes, node)
                lost = self.kernel_error(node.path, kernels, node.kernel)
                found[f"kernel/{node.path}"] = live[node.name] * lost
        for each in layout.groups.values():
            if not each.frozen:
                gene = f"mask/{each.name}"
                sizes = group_widths(layout, genomes, each.name)
                found[gene] = read[each.name] * self.size_error(gene, sizes, each.size)
        for merge in layout.merges:
            gene = f"merge/{merge.name}"
            bits = layout.view_all(genomes, gene)
            gone = live[merge.name][:, None] & ~bits & bits.any(axis=1, keepdims=True)
            alone = np.array([self._single(gene, place) for place in range(bits.shape[1])])
            found[gene] = gone @ alone
        return found

    def milliseconds(self, layout: GenomeLayout, genomes: np.ndarray) -> np.ndarray:
        """`(n,)` of genomes `(n, length)`."""
        times = np.full(len(genomes), self.times.constant)
        for one in layer_sizes(layout, genomes):
            times += (one.live & one.kept) * self._layer_ms(one)
        live = live_nodes(layout, genomes)
        for node in layout.nodes:
            if node.kind == "channelwise" and node.name in self.pixels and node.kernel:
                widths = [group_widths(layout, genomes, name) for name in node.groups]
                width = np.sum([w * n for w, n in zip(widths, node.lanes, strict=True)], axis=0)
                taps = np.prod(kernel_sizes(layout, genomes, node), axis=1)
                own = self.times.layer(np.ones(len(genomes)), width, taps, self.pixels[node.name])
                times += live[node.name] * own
        return times

    def corrected(self, layout: GenomeLayout, genomes: np.ndarray, errors: np.ndarray) -> Tables:
        """Tables whose errors are scaled gene by gene so that sums come nearer to what is known.

        By least squares of the relative differences, each scale drawn towards the one that is best
        for all genes together (as SPDY's coefficients, which a search finds there).

        Args:
            layout: of the teacher.
            genomes: `(n, length)` scored students.
            errors: `(n,)` their errors, above 0.
        """
        parts = self.parts(layout, genomes)
        shares = np.column_stack(list(parts.values())) / errors[:, None]
        # Students that hardly do more than guess say nothing of single changes.
        known = (shares.sum(axis=1) > 0) & (errors < MOST_ERROR)
        shares = shares[known]
        if not len(shares):
            return self
        common = float(np.exp(-np.log(shares.sum(axis=1)).mean()))
        pull = np.sqrt(PULL * len(shares) / shares.shape[1])
        rows = np.vstack([shares * common, pull * np.eye(shares.shape[1])])
        wanted = np.concatenate([np.ones(len(shares)), np.full(shares.shape[1], pull)])
        # A genome that is best by the table is best where the table errs: so no gene comes free.
        scales = common * lsq_linear(rows, wanted, (1.0 / MOST_SCALED, MOST_SCALED)).x
        scaled = {
            gene: {level: float(scale * error) for level, error in self.errors[gene].items()}
            for gene, scale in zip(parts, scales, strict=True)
            if gene in self.errors
        }
        return replace(self, errors={**self.errors, **scaled})

    def _single(self, gene: str, level: int) -> float:
        """Error of a bypass or a merge edge."""
        return self.errors.get(gene, {}).get((level,), 0.0)

    def _layer_ms(self, one: LayerSizes) -> np.ndarray:
        """`(n,)` ms of a layer, of its two where it has a rank."""
        pixels = self.pixels[one.layer.name]
        inputs = one.connected / np.maximum(one.outputs, 1)
        whole = self.times.layer(inputs, one.outputs, one.taps, pixels)
        rank = np.where(one.ranked, one.rank, 1.0)
        reduced = self.times.layer(one.inputs, rank, one.taps, pixels)
        expanded = self.times.layer(rank, one.outputs, 1.0, pixels)
        return np.where(one.ranked, reduced + expanded, whole)


def full_rank(layer: Node) -> int:
    """The rank from which a layer's gene counts: the next above its highest."""
    return 2 * max(layer.ranks)
