"""Layer-wise crossover: whole layers change hands, sometimes blocks within a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.crossover import Crossover

from moodistill.genome.layout import GenomeLayout, Group


class LayerCrossover(Crossover):
    """Two parents, two children.

    The genes of one channel group (its mask, the connections, bypasses, kernels and ranks of the
    layers that write it) travel together; merge edges travel one Add at a time. Half of the
    matings exchange one run of layers (so that what fits together stays together), half every
    group by a coin. In `within` of the exchanged groups only some blocks of channels change hands.
    """

    def __init__(self, layout: GenomeLayout, within: float = 0.2) -> None:
        super().__init__(2, 2, prob=1.0)
        self.layout = layout
        self.within = within
        # What travels with each of them. Of a frozen group (the output) there may be no genes.
        genes = {
            group.name: [layout.slices[n] for n in self._genes(group) if n in layout.slices]
            for group in layout.groups.values()
        }
        self.heritable = [group for group in layout.groups.values() if genes[group.name]]
        self.genes = [genes[group.name] for group in self.heritable]
        self.merge_genes = [layout.slices[f"merge/{merge.name}"] for merge in layout.merges]

    def _genes(self, group: Group) -> list[str]:
        nodes = [n for n in self.layout.nodes if n.groups[:1] == (group.name,)]
        edges = [f"{k}/{n.name}" for n in nodes for k in ("block", "bypass") if n.kind == "layer"]
        shapes = [
            f"{k}/{path}" for path in {n.path: None for n in nodes} for k in ("kernel", "rank")
        ]
        return [f"mask/{group.name}", *edges, *shapes]

    def _do(
        self,
        problem: Any,
        X: np.ndarray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(2, matings, n_var)` parents to as many children (copies)."""
        children = X.copy()
        for mating in range(X.shape[1]):
            swap = self._swap(random_state)
            children[0, mating, swap] = X[1, mating, swap]
            children[1, mating, swap] = X[0, mating, swap]
        return children

    def _swap(self, rng: np.random.Generator) -> np.ndarray:
        """`(n_var,)` bool: the bits that change hands."""
        layout = self.layout
        swap = np.zeros(layout.length, dtype=bool)
        count = len(self.heritable)
        if rng.random() < 0.5:
            low, high = sorted(rng.integers(0, count + 1, size=2))
            chosen = np.zeros(count, dtype=bool)
            chosen[low:high] = True
        else:
            chosen = rng.random(count) < 0.5
        for group, genes, taken in zip(self.heritable, self.genes, chosen, strict=True):
            if not taken:
                continue
            if group.blocks > 1 and not group.frozen and rng.random() < self.within:
                blocks = rng.random(group.blocks) < 0.5
                layout.view(swap, f"mask/{group.name}")[:] = blocks[group.block]
                continue
            for place in genes:
                swap[place] = True
        for place in self.merge_genes:
            swap[place] = rng.random() < 0.5
        return swap
