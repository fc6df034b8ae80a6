"""A model of the objectives over cheap features of a genome: which offspring are worth scoring.

Ridge regression of the log-odds of accuracy and of the logarithms of all costs. Screening offspring
by a model is pre-selection in surrogate-assisted evolution (Jin 2011, "Surrogate-assisted
evolutionary computation: recent advances and future challenges").
"""

from __future__ import annotations

import heapq

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from moodistill.evolution.sizes import full_taps, kernel_taps, layer_sizes, live_nodes
from moodistill.evolution.tables import Tables
from moodistill.genome.layout import GenomeLayout
from moodistill.pareto.geometry import non_dominated, shrunk

LEAST = 16  # students before the model says anything
TRUSTED = 0.5  # rank correlation below which it is disabled for a generation
LEAST_ERROR = 0.01  # of the tables, below which the accuracy hardly changes
POINTS = 10_000  # that estimate a hypervolume
STRENGTHS = np.logspace(-2, 3, 12)  # of the ridge, the best by leave-one-out


def features(layout: GenomeLayout, genomes: np.ndarray) -> np.ndarray:
    """`(n, k)` of genomes `(n, length)`: widths, importance, weights, connections of each kind.

    Computed for all genomes at once and before their repair, which changes little of it and costs
    a hundred times as much.
    """
    found: list[np.ndarray] = []
    total = np.zeros(len(genomes))
    for one in layer_sizes(layout, genomes):
        layer, there = one.layer, one.live & one.kept
        if layer.bypassable:
            found.append((one.live & ~one.kept).astype(float))
        total += there * one.weights
        pairs = np.maximum(one.inputs * one.outputs, 1)
        found += [there * np.log2(1 + one.weights), there * one.connected / pairs]
        if layer.path in layout.kernels:
            found.append(there * one.taps / full_taps(layer))
        if layer.path in layout.ranked:
            full = np.maximum(np.minimum(one.inputs * one.taps, one.outputs), 1)
            found.append(there * np.minimum(1.0, one.rank / full))
        found += [there * np.log2(1 + one.outputs)]
        found += [there * _worth(layout, genomes, group) for group in layer.groups]
    live = live_nodes(layout, genomes)
    for node in layout.nodes:
        if node.kind == "channelwise" and node.path in layout.kernels:
            share = kernel_taps(layout, genomes, node) / full_taps(node)
            found.append(live[node.name] * share)
    for merge in layout.merges:
        bits = layout.view_all(genomes, f"merge/{merge.name}") & live[merge.name][:, None]
        found += list(bits.T.astype(float))
    found += [np.log2(1 + total)]
    return np.column_stack(found)


def _worth(layout: GenomeLayout, genomes: np.ndarray, name: str) -> np.ndarray:
    """`(n,)` share of a group's importance that is kept."""
    group = layout.groups[name]
    total = float(group.importance.sum())
    if f"mask/{name}" not in layout.slices or not total:
        return np.ones(len(genomes))
    return np.asarray(layout.view_all(genomes, f"mask/{name}") @ group.importance / total)


class _Ridge:
    """Ridge regression of what lines in single columns do not explain.

    Args:
        known: `(n, k)` features.
        targets: `(n, m)`.
        estimates: by target, `(n,)` an estimate of it; a line in it is fitted first, without any
            ridge.
    """

    def __init__(
        self, known: np.ndarray, targets: np.ndarray, estimates: dict[int, np.ndarray]
    ) -> None:
        self.lines = {
            target: np.polyfit(estimate, targets[:, target], 1)
            for target, estimate in estimates.items()
        }
        self.ridge = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, alpha_per_target=True))
        self.ridge.fit(known, targets - self._offset(len(known), targets.shape[1], estimates))

    def _offset(self, rows: int, count: int, estimates: dict[int, np.ndarray]) -> np.ndarray:
        result = np.zeros((rows, count))
        for target, line in self.lines.items():
            result[:, target] = np.polyval(line, estimates[target])
        return result

    def predict(self, features: np.ndarray, estimates: dict[int, np.ndarray]) -> np.ndarray:
        """Targets `(n, m)`."""
        found = np.asarray(self.ridge.predict(features))
        return found + self._offset(len(features), found.shape[1], estimates)


class _OddsByError:
    """The log-odds of accuracy by how far a student's outputs are from the teacher's.

    The latter is known of every student with far less noise than an accuracy on a thousand images.
    """

    def __init__(self, log_errors: np.ndarray, odds: np.ndarray) -> None:
        self.low, self.high = log_errors.min(), log_errors.max()
        self.curve = np.polyfit(log_errors, odds, 2)
        slopes = np.polyval(np.polyder(self.curve), [self.low, self.high])
        if (slopes > 0).any():
            self.curve = np.polyfit(log_errors, odds, 1)

    def __call__(self, log_errors: np.ndarray) -> np.ndarray:
        return np.asarray(np.polyval(self.curve, np.clip(log_errors, self.low, self.high)))


class Surrogate:
    """Learns from every scored student and puts offspring in order.

    Attributes:
        tables: estimates of errors and times, corrected by what was learned; None for none.
        correlation: Spearman's, of the accuracy that was predicted for the last generation and the
            measured one; None before there is any.
    """

    def __init__(
        self, layout: GenomeLayout, tables: Tables | None = None, latency: int | None = None
    ) -> None:
        """Knows nothing yet but the tables.

        Args:
            layout: of the teacher.
            tables: what it begins with; None for none.
            latency: the place of the latency among the objectives; None if it is none of them.
        """
        self.layout, self.tables, self.latency = layout, tables, latency
        self.correlation: float | None = None
        self._first_tables = tables
        self._genomes: list[np.ndarray] = []
        self._known: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._errors: list[float] = []  # NaN where unknown
        self._allowed: list[bool] = []
        # Of all that is known; computed when it is asked.
        self._model: _Ridge | None = None
        self._odds: _OddsByError | None = None
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
        if self._model is None:
            self._fit()
        assert self._model is not None
        features_ = features(self.layout, genomes)
        found = self._model.predict(features_, self._estimates(genomes))
        odds = found[:, 0] if self._odds is None else self._odds(found[:, 0])
        # No better than the best so far, the teacher: beyond is where the model is least to be
        # trusted, and where more counts for nothing.
        most = _odds(np.array(self._values)[:, 0]).max()
        errors = 1.0 / (1.0 + np.exp(np.minimum(odds, most)))
        return np.column_stack([errors, np.exp2(found[:, 1:])]).round(6)

    def _fit(self) -> None:
        """Correct the tables, then learn what they do not explain."""
        values, errors = np.array(self._values), np.array(self._errors)
        targets = _logarithmic(values)
        targets[:, 0] = _odds(values[:, 0])
        self._odds = None
        if np.isfinite(errors).all():
            log_errors = _log_error(errors)
            self._odds = _OddsByError(log_errors, targets[:, 0])
            targets[:, 0] = log_errors
            if self._first_tables is not None:
                genomes = np.array(self._genomes)
                self.tables = self._first_tables.corrected(self.layout, genomes, errors)
        known = np.array(self._known)
        self._model = _Ridge(known, targets, self._estimates(np.array(self._genomes)))

    def _estimates(self, genomes: np.ndarray) -> dict[int, np.ndarray]:
        """By target, what the tables say of it."""
        if self.tables is None:
            return {}
        errors, times = self.tables.estimate(self.layout, genomes)
        found = {0: _log_error(errors)}
        if self.latency is not None:
            found[self.latency] = np.log2(times)
        return found

    def learn(
        self,
        genomes: np.ndarray,
        values: np.ndarray,
        usable: np.ndarray,
        allowed: np.ndarray | None = None,
        errors: np.ndarray | None = None,
    ) -> None:
        """Take in a generation.

        Args:
            genomes: `(n, length)`.
            values: `(n, m)` objectives.
            usable: `(n,)` which of them worked.
            allowed: `(n,)` which of them are within all limits, those of what is no objective
                included; None for all.
            errors: `(n,)` how far their outputs are from the teacher's (`Evaluation.error`), NaN
                where that is not known; None for nowhere.
        """
        allowed = np.ones(len(usable), dtype=bool) if allowed is None else allowed
        errors = np.full(len(usable), np.nan) if errors is None else errors
        genomes, values, allowed, errors = (
            each[usable] for each in (genomes, values, allowed, errors)
        )
        predicted = self.predict(genomes) if len(genomes) > 2 else None
        # Among students that are all alike there are no ranks.
        if predicted is not None and np.ptp(predicted[:, 0]) and np.ptp(values[:, 0]):
            self.correlation = float(spearmanr(predicted[:, 0], values[:, 0]).statistic)
        if len(genomes):
            self._genomes += list(genomes)
            self._known += list(features(self.layout, genomes))
            self._values += list(values)
            self._errors += list(errors)
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


def _log_error(errors: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(errors, 0.0) + LEAST_ERROR)


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
