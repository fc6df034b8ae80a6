"""Initial genomes, stratified from the teacher down to a few per cent of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.sampling import Sampling

from moodistill.evolution.operators.widths import noisy_top, snap, useful_ranks
from moodistill.genome.kernels import write_kernel
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.ranks import write_rank


class SeededSampling(Sampling):
    """The teacher, then seeds, then what another sampling draws.

    Args:
        seeds: `(n, n_var)` canonical genomes, at most `share` of the population of which are taken,
            evenly by their order.
        others: draws the rest, beginning with the teacher.
        share: of the population.
    """

    def __init__(self, seeds: np.ndarray, others: Sampling, share: float) -> None:
        super().__init__()
        self.seeds, self.others, self.share = seeds, others, share

    def _do(
        self,
        problem: Any,
        n_samples: int,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(n_samples, n_var)` bool."""
        count = min(len(self.seeds), round(self.share * (n_samples - 1)))
        taken = np.linspace(0, len(self.seeds) - 1, count).round().astype(int)
        drawn = self.others._do(problem, n_samples - count, random_state=random_state)
        return np.vstack([drawn[:1], self.seeds[taken], drawn[1:]])


class DensitySampling(Sampling):
    """The teacher, then students whose mean width falls geometrically, `largest` to `smallest`.

    Between the teacher and `largest` little is to be won and each student costs most.

    Half of them have one width share in every group, half a width share per group. Half lose
    block connections, half bypass layers, a third lose merge edges; which ones is drawn with
    probabilities that follow what the loss costs. Half lose taps of some kernels, half have some
    layers of a lower rank. `BinaryRandomSampling` would put every student
    at half width.
    """

    def __init__(
        self, layout: GenomeLayout, step: int, largest: float = 0.8, smallest: float = 0.12
    ) -> None:
        super().__init__()
        self.layout = layout
        self.step = step
        self.largest = largest
        self.smallest = smallest

    def _do(
        self,
        problem: Any,
        n_samples: int,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(n_samples, n_var)` bool."""
        genomes = np.tile(self.layout.teacher(), (n_samples, 1))
        shares = np.geomspace(self.largest, self.smallest, n_samples - 1)
        for genome, share in zip(genomes[1:], shares, strict=True):
            self.draw(genome, float(share), random_state)
        return genomes

    def draw(self, genome: np.ndarray, share: float, rng: np.random.Generator) -> None:
        """Thin an all-True genome in place to about `share` of every width."""
        layout = self.layout
        spread = rng.choice([0.0, 0.5])
        for group in layout.groups.values():
            if group.frozen:
                continue
            width = group.size * min(1.0, share * float(np.exp(spread * rng.normal())))
            mask = noisy_top(group, snap(width, group.size, group.step(self.step)), 0.3, rng)
            layout.view(genome, f"mask/{group.name}")[:] = mask
        if rng.random() < 0.5:
            density = rng.uniform(0.75, 1.0)
            for layer in layout.layers:
                if f"block/{layer.name}" in layout.slices and rng.random() < 0.5:
                    view = layout.view(genome, f"block/{layer.name}")
                    energy = np.ones(view.shape) if layer.energy is None else layer.energy
                    score = np.log(energy + 1e-12) + rng.gumbel(size=view.shape)
                    count = max(1, round(density * view.size))
                    view[:] = score >= np.sort(score, axis=None)[-count]
        if rng.random() < 0.5:
            rate = rng.uniform(0.0, 0.5)
            for layer in layout.layers:
                if layer.bypassable:
                    layout.view(genome, f"bypass/{layer.name}")[0] = rng.random() >= rate
        if rng.random() < 1 / 3:
            rate = rng.uniform(0.0, 0.4)
            for merge in layout.merges:
                view = layout.view(genome, f"merge/{merge.name}")
                if rng.random() < rate:
                    view[rng.integers(len(view))] = False
        if layout.kernels and rng.random() < 0.5:
            rate = rng.uniform(0.0, 0.5)
            for path, node in layout.kernels.items():
                gone = [
                    int(rng.integers(1, rings + 1)) if rings and rng.random() < rate else 0
                    for rings in node.rings
                ]
                taps = tuple(full - 2 * g for full, g in zip(node.kernel, gone, strict=True))
                view = layout.view(genome, f"kernel/{path}")
                write_kernel(view, node.kernel, node.rings, taps)
        if layout.ranked and rng.random() < 0.5:
            rate = rng.uniform(0.0, 0.7)
            for path, layer in layout.ranked.items():
                useful = useful_ranks(layout, genome, layer, self.step)
                if useful and rng.random() < rate:
                    view = layout.view(genome, f"rank/{path}")
                    write_rank(view, layer.ranks, int(rng.choice(useful)))
