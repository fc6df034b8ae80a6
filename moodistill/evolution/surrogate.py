"""A model of the objectives over cheap features of a genome: which offspring are worth scoring.

Ridge regression of the log-odds of accuracy and of the logarithms of all costs. Screening offspring
by a model is pre-selection in surrogate-assisted evolution (Jin 2011, "Surrogate-assisted
evolutionary computation: recent advances and future challenges").
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from moodistill.genome.layout import GenomeLayout, Node
from moodistill.pareto.geometry import non_dominated, shrunk

LEAST = 16  # students before the model says anything
TRUSTED = 0.5  # rank correlation below which it is disabled for a generation
POINTS = 10_000  # that estimate a hypervolume
STRENGTHS = np.logspace(-2, 3, 12)  # of the ridge, the best by leave-one-out


def features(layout: GenomeLayout, genomes: np.ndarray) -> np.ndarray:
    """`(n, k)` of genomes `(n, length)`: widths, importance, weights, connections of each kind.

    Computed for all genomes at once and before their repair, which changes little of it and costs
    a hundred times as much.
    """
    live = _live(layout, genomes)
    counts, widths = _counts(layout, genomes)
    found: list[np.ndarray] = []
    # Of groups that a layer writes which may be left out: whether it is there, and the width that
    # the group's readers find.
    there: dict[str, np.ndarray] = {}
    passed: dict[str, np.ndarray] = {}
    total = np.zeros(len(genomes))
    for layer in layout.layers:
        stays = live[layer.name]
        inputs = sum(passed.get(g, widths[g]) for g in layer.reads)
        outputs = sum(widths[g] for g in layer.groups)
        # Past a bypassed layer everything is connected.
        direct = np.ones(len(genomes), dtype=bool)
        for group in layer.reads:
            direct &= there.get(group, True)
        pairs = outputs * inputs
        connected = np.where(direct, _connected(layout, genomes, layer, counts), pairs)
        if layer.bypassable:
            kept = layout.view_all(genomes, f"bypass/{layer.name}")[:, 0]
            there.update(dict.fromkeys(layer.groups, kept))
            passed.update(
                {g: np.where(kept, widths[g], inputs / len(layer.groups)) for g in layer.groups}
            )
            found.append((stays & ~kept).astype(float))
            stays = stays & kept
        # Weights for each pair of channels, behind a flatten too.
        taps = _taps(layout, genomes, layer) * layout.by_name[layer.inputs[0]].repeat
        weights, rank = connected * taps, None
        if layer.path in layout.ranked:
            # Where a layer is cut into several modules, its rank has no effect.
            rank = np.where(connected == pairs, _ranks(layout, genomes, layer), np.inf)
            thinned = rank * (inputs * taps + outputs)
            rank = np.where(thinned < weights, rank, np.inf)
            weights = np.minimum(weights, thinned)
        total += stays * weights
        found += [stays * np.log2(1 + weights), stays * connected / np.maximum(pairs, 1)]
        if layer.path in layout.kernels:
            found.append(stays * _taps(layout, genomes, layer) / math.prod(layer.kernel))
        if rank is not None:
            full = np.minimum(inputs * taps, outputs)
            found.append(stays * np.minimum(1.0, rank / np.maximum(full, 1)))
        found += [stays * np.log2(1 + outputs)]
        found += [stays * _worth(layout, genomes, group) for group in layer.groups]
    for node in layout.nodes:
        if node.kind == "channelwise" and node.path in layout.kernels:
            share = _taps(layout, genomes, node) / math.prod(node.kernel)
            found.append(live[node.name] * share)
    for merge in layout.merges:
        bits = layout.view_all(genomes, f"merge/{merge.name}") & live[merge.name][:, None]
        found += list(bits.T.astype(float))
    found += [np.log2(1 + total)]
    return np.column_stack(found)


def _live(layout: GenomeLayout, genomes: np.ndarray) -> dict[str, np.ndarray]:
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


def _taps(layout: GenomeLayout, genomes: np.ndarray, node: Node) -> np.ndarray:
    """`(n,)` taps of a convolution's kernel; 1 of a linear layer."""
    taps = np.full(len(genomes), math.prod(node.kernel))
    if node.path not in layout.kernels:
        return taps
    bits = layout.view_all(genomes, f"kernel/{node.path}")
    start, taps = 0, np.ones(len(genomes), dtype=int)
    for size, rings in zip(node.kernel, node.rings, strict=True):
        taps *= size - 2 * (rings - bits[:, start : start + rings].sum(axis=1))
        start += rings
    return taps


def _ranks(layout: GenomeLayout, genomes: np.ndarray, layer: Node) -> np.ndarray:
    """`(n,)` rank that a layer's gene says, infinite where it is full."""
    counts = layout.view_all(genomes, f"rank/{layer.path}").sum(axis=1)
    return np.array([*layer.ranks, np.inf])[counts]


def _worth(layout: GenomeLayout, genomes: np.ndarray, name: str) -> np.ndarray:
    """`(n,)` share of a group's importance that is kept."""
    group = layout.groups[name]
    total = float(group.importance.sum())
    if f"mask/{name}" not in layout.slices or not total:
        return np.ones(len(genomes))
    return np.asarray(layout.view_all(genomes, f"mask/{name}") @ group.importance / total)


class Surrogate:
    """Learns from every scored student and puts offspring in order.

    Attributes:
        correlation: Spearman's, of the accuracy that was predicted for the last generation and the
            measured one; None before there is any.
    """

    def __init__(self, layout: GenomeLayout) -> None:
        self.layout = layout
        self.correlation: float | None = None
        self._known: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._allowed: list[bool] = []
        # Of all that is known; computed when it is asked.
        self._model: Pipeline | None = None
        self._front: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def trusted(self) -> bool:
        """Whether it is enabled; it goes on learning where it is not."""
        return self.correlation is None or self.correlation >= TRUSTED

    def predict(self, genomes: np.ndarray) -> np.ndarray | None:
        """Objectives `(n, m)` [error, costs...] of genomes `(n, length)`; None before it can.

        Rounded, so that another machine's last digits do not breed other students.
        """
        if len(self._known) < LEAST:
            return None
        values = np.array(self._values)
        odds = _odds(values[:, 0])
        if self._model is None:
            targets = np.column_stack([odds, _logarithmic(values)[:, 1:]])
            self._model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, alpha_per_target=True))
            self._model.fit(np.array(self._known), targets)
        found = self._model.predict(features(self.layout, genomes))
        # No better than the best so far, the teacher: beyond is where the model is least to be
        # trusted, and where more counts for nothing.
        errors = 1.0 / (1.0 + np.exp(np.minimum(found[:, 0], odds.max())))
        return np.column_stack([errors, np.exp2(found[:, 1:])]).round(6)

    def learn(
        self,
        genomes: np.ndarray,
        values: np.ndarray,
        usable: np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> None:
        """Take in a generation.

        Args:
            genomes: `(n, length)`.
            values: `(n, m)` objectives.
            usable: `(n,)` which of them worked.
            allowed: `(n,)` which of them are within all limits, those of what is no objective
                included; None for all.
        """
        allowed = np.ones(len(usable), dtype=bool) if allowed is None else allowed
        genomes, values, allowed = genomes[usable], values[usable], allowed[usable]
        predicted = self.predict(genomes) if len(genomes) > 2 else None
        # Among students that are all alike there are no ranks.
        if predicted is not None and np.ptp(predicted[:, 0]) and np.ptp(values[:, 0]):
            self.correlation = float(spearmanr(predicted[:, 0], values[:, 0]).statistic)
        if len(genomes):
            self._known += list(features(self.layout, genomes))
            self._values += list(values)
            self._allowed += list(allowed)
            self._model = self._front = None

    def order(
        self, genomes: np.ndarray, reference: np.ndarray, most: np.ndarray, count: int
    ) -> np.ndarray | None:
        """Offspring that are worth scoring, the best first; None where it is disabled.

        Args:
            genomes: `(n, length)` offspring.
            reference: `(m,)` objectives of the teacher.
            most: `(m,)` limits of the objectives; what is predicted beyond one comes last.
            count: how many are to be put in order, at least.

        Returns:
            `(count or more,)` indices.
        """
        predicted = self.predict(genomes) if self.trusted else None
        if predicted is None:
            return None
        if self._front is None:
            known = np.array(self._values)
            # A student beyond a limit is in nobody's way, unless there are no others yet.
            known = known[self._allowed] if any(self._allowed) else known
            known = known[non_dominated(known)]
            self._front = known, _undominated_points(known, most, reference)
        known, points = self._front
        first = most_volume(predicted, points, most, reference)
        if len(first) >= min(count, len(genomes)):
            return first
        known = np.vstack([known, predicted[first]])
        others = np.setdiff1d(np.arange(len(genomes)), first)
        rest = others[_best_first(predicted[others], known, most, count - len(first))]
        return np.concatenate([first, rest])


def _odds(errors: np.ndarray) -> np.ndarray:
    accuracy = np.clip(1.0 - errors, 0.01, 0.999)
    return np.asarray(np.log(accuracy / (1.0 - accuracy)))


def _logarithmic(values: np.ndarray) -> np.ndarray:
    """Objectives `(n, m)` with their costs as log2."""
    return np.column_stack([values[:, :1], np.log2(np.maximum(values[:, 1:], 1e-9))])


def _undominated_points(known: np.ndarray, most: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Random points `(p, m)` of the unit cube that no student of the front `(n, m)` dominates."""
    points = np.random.default_rng(0).random((POINTS, known.shape[1]))
    # Who is just accurate enough adds nothing, or half of the chosen would turn out not to be; and
    # the points lie closer where errors are small, which is where students are chosen.
    points[:, 0] = min(1.0, most[0]) * points[:, 0] ** 2
    for corner in shrunk(known, reference):
        points = points[(points < corner).any(axis=1)]
    return points


def most_volume(
    predicted: np.ndarray, points: np.ndarray, most: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Offspring that add to the front's hypervolume, each time the one that adds most.

    Beyond what those before it add; by how many of the same random points of the unit cube it
    covers (Bader and Zitzler 2011 estimate hypervolume so).
    """
    inside = np.ones((len(predicted), len(points)), dtype=bool)
    for column, values in enumerate(shrunk(predicted, reference).T):
        inside &= values[:, None] <= points[None, :, column]
    inside[(predicted > most).any(axis=1)] = False
    # A gain only shrinks as others are chosen: who leads by what is still true is the next, and
    # few have to be counted again (Minoux 1978, lazy greedy).
    queue = [(-int(gain), index) for index, gain in enumerate(inside.sum(axis=1)) if gain]
    heapq.heapify(queue)
    free = np.ones(len(points), dtype=bool)
    order: list[int] = []
    while queue:
        gain, index = heapq.heappop(queue)
        now = -int(np.count_nonzero(inside[index] & free))
        if now == gain:
            order.append(index)
            free &= ~inside[index]
        elif now:
            heapq.heappush(queue, (now, index))
    return np.array(order, dtype=int)


def _best_first(
    predicted: np.ndarray, known: np.ndarray, most: np.ndarray, count: int
) -> np.ndarray:
    """At most `count` offspring in the order in which they are worth scoring.

    By their rank among themselves and the front, and within a rank those first that lie
    farthest from whatever is chosen already (costs on a logarithmic scale).
    """
    everybody = np.vstack([known, predicted])
    _, ranks = NonDominatedSorting().do(everybody, return_rank=True)
    ranks = ranks[len(known) :] + np.where((predicted > most).any(axis=1), len(everybody), 0)
    points, taken = _logarithmic(predicted), _logarithmic(known)
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    gaps = np.linalg.norm((points[:, None] - taken[None]) / span, axis=2).min(axis=1)
    order = np.empty(min(count, len(points)), dtype=int)
    for place in range(len(order)):
        order[place] = np.lexsort((-gaps, ranks))[0]
        gaps = np.minimum(gaps, np.linalg.norm((points - points[order[place]]) / span, axis=1))
        ranks[order[place]] = 2 * len(everybody)  # taken
    return order
