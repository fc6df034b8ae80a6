"""A model of the objectives over cheap features of a genome: which offspring are worth scoring.

Ridge regression of the log-odds of accuracy and of the logarithms of all costs. Screening offspring
by a model is pre-selection in surrogate-assisted evolution (Jin 2011, "Surrogate-assisted
evolutionary computation: recent advances and future challenges").
"""

from __future__ import annotations

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from moodistill.genome import GenomeLayout
from moodistill.resolve import Structure, resolve

LEAST = 16  # students before the model says anything
TRUSTED = 0.5  # rank correlation below which it is not listened to
EXPLORED = 1 / 8  # of a generation is drawn blindly, or the model would only see what it likes
STRENGTHS = np.logspace(-2, 3, 12)  # of the ridge, the best by leave-one-out


def features(layout: GenomeLayout, genome: np.ndarray) -> np.ndarray:
    """`(k,)`: widths, importance kept, connected pairs of channels, bypasses and merge edges."""
    structure = resolve(layout, genome)
    kept = {}
    found: list[float] = []
    for name, group in layout.groups.items():
        mask = structure.kept.get(name, np.zeros(group.size, dtype=bool))
        kept[name] = np.bincount(group.block[mask], minlength=group.blocks)
        if not group.frozen:
            total = float(group.importance.sum())
            found += [np.log2(1 + mask.sum()), float(group.importance[mask].sum()) / (total or 1.0)]
    pairs = []
    for layer in layout.layers:
        count, density = _pairs(structure, kept, layer.name, layer.groups)
        pairs.append(count)
        found += [np.log2(1 + count), density]
        if layer.bypassable:
            found.append(float(layer.name in structure.bypassed))
    for merge in layout.merges:
        inputs = structure.merges.get(merge.name, (False,) * len(merge.inputs))
        found += [float(kept_input) for kept_input in inputs]
    found += [np.log2(1 + sum(pairs)), float(len(structure.bypassed))]
    return np.array(found)


def _pairs(
    structure: Structure, kept: dict[str, np.ndarray], layer: str, groups: tuple[str, ...]
) -> tuple[float, float]:
    """Connected pairs of channels of a layer, and their share of the pairs that there could be."""
    connected = structure.connected.get(layer)
    if connected is None:
        return 0.0, 0.0
    outputs = np.concatenate([kept[name] for name in groups])
    inputs = np.concatenate([kept[name] for name in structure.source[layer]])
    count = float(outputs @ connected @ inputs)
    return count, count / max(1.0, float(outputs.sum() * inputs.sum()))


class Surrogate:
    """Learns from every scored student and chooses among offspring.

    Attributes:
        correlation: Spearman's, of the accuracy that was predicted for the last generation and the
            measured one; None before there is any.
    """

    def __init__(self, layout: GenomeLayout, seed: int) -> None:
        self.layout = layout
        self.seed = seed
        self.correlation: float | None = None
        self._known: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    @property
    def trusted(self) -> bool:
        """Whether it is listened to; it goes on learning where it is not."""
        return self.correlation is None or self.correlation >= TRUSTED

    def predict(self, rows: np.ndarray) -> np.ndarray | None:
        """Objectives `(n, m)` [error, costs...] of features `(n, k)`; None before it knows enough.

        Rounded, so that another machine's last digits do not breed other students.
        """
        if len(self._known) < LEAST:
            return None
        values = np.array(self._values)
        odds = _odds(values[:, 0])
        targets = np.column_stack([odds, _logarithmic(values)[:, 1:]])
        model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, alpha_per_target=True))
        found = model.fit(np.array(self._known), targets).predict(rows)
        # No better than the best so far, the teacher: beyond is where the model is least to be
        # trusted, and where more counts for nothing.
        errors = 1.0 / (1.0 + np.exp(np.minimum(found[:, 0], odds.max())))
        return np.column_stack([errors, np.exp2(found[:, 1:])]).round(6)

    def learn(self, genomes: np.ndarray, values: np.ndarray, usable: np.ndarray) -> None:
        """Take in a generation: genomes `(n, length)`, objectives `(n, m)`, `(n,)` which worked."""
        rows = np.array([features(self.layout, genome) for genome in genomes])[usable]
        predicted = self.predict(rows) if len(rows) > 2 else None
        if predicted is not None:
            found = spearmanr(predicted[:, 0], values[usable, 0]).statistic
            self.correlation = float(found) if np.isfinite(found) else 0.0
        self._known += list(rows)
        self._values += list(values[usable])

    def choose(
        self, genomes: np.ndarray, count: int, known: np.ndarray, most: np.ndarray, generation: int
    ) -> np.ndarray:
        """`(count,)` indices, ascending, of the offspring worth scoring.

        Args:
            genomes: `(n, length)` offspring.
            count: how many to choose.
            known: `(p, m)` objectives of the population that they compete with.
            most: `(m,)` limits of the objectives; what is predicted beyond one comes last.
            generation: seeds the blind draw.
        """
        if len(genomes) <= count:
            return np.arange(len(genomes))
        rows = np.array([features(self.layout, genome) for genome in genomes])
        predicted = self.predict(rows) if self.trusted else None
        if predicted is None:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, generation])
        blind = rng.choice(len(genomes), max(1, round(EXPLORED * count)), replace=False)
        order = _best_first(predicted, known, most)
        ordered = [index for index in order if index not in set(blind)]
        return np.sort(np.concatenate([blind, ordered[: count - len(blind)]]))


def _odds(errors: np.ndarray) -> np.ndarray:
    accuracy = np.clip(1.0 - errors, 0.01, 0.999)
    return np.log(accuracy / (1.0 - accuracy))


def _logarithmic(values: np.ndarray) -> np.ndarray:
    """Objectives `(n, m)` with their costs as log2."""
    return np.column_stack([values[:, :1], np.log2(np.maximum(values[:, 1:], 1e-9))])


def _best_first(predicted: np.ndarray, known: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Offspring in the order in which they are worth scoring.

    By their rank among themselves and the population, and within a rank those first that lie
    farthest from whatever is chosen already (costs on a logarithmic scale).
    """
    everybody = np.vstack([known, predicted])
    _, ranks = NonDominatedSorting().do(everybody, return_rank=True)
    ranks = ranks[len(known) :] + np.where((predicted > most).any(axis=1), len(everybody), 0)
    points, taken = _logarithmic(predicted), _logarithmic(known)
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    gaps = np.linalg.norm((points[:, None] - taken[None]) / span, axis=2).min(axis=1)
    order: list[int] = []
    left = np.ones(len(points), dtype=bool)
    while left.any():
        best = ranks[left].min()
        place = int(np.where(left & (ranks == best), gaps, -1.0).argmax())
        order.append(place)
        left[place] = False
        gaps = np.minimum(gaps, np.linalg.norm((points - points[place]) / span, axis=1))
    return np.array(order)
