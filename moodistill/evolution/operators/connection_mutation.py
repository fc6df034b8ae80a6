"""Connection mutation: block connections, merge and bypass edges, kernels and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.mutation import Mutation

from moodistill.evolution.operators.widths import kept_taps, useful_ranks
from moodistill.genome.kernels import write_kernel
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.ranks import read_rank, write_rank


class ConnectionMutation(Mutation):
    """Flips connection genes, tilted by what they cost.

    A block connection is the likelier to go, and the less likely to come back, the smaller its
    share of its layer's weight energy. Bypass and merge edges flip at their own rates: a bypass is
    where connection genes beat masks, so each child has a fair chance of one. Kernels and ranks
    move by small steps in one layer or a few: one ring of taps on one axis, one rank up or down of
    those that make the layer smaller at its width. A full rank falls to one of the upper half.
    """

    def __init__(
        self,
        layout: GenomeLayout,
        blocks: float = 0.35,
        bypass: float = 0.5,
        merge: float = 0.3,
        kernel: float = 0.4,
        rank: float = 0.5,
        step: int = 8,
    ) -> None:
        super().__init__(prob=1.0)
        self.layout = layout
        self.blocks = blocks
        self.bypass = bypass
        self.merge = merge
        self.kernel = kernel
        self.rank = rank
        self.step = step
        self.kernels, self.ranked = list(layout.kernels), list(layout.ranked)
        self.sited = [n for n in layout.layers if f"block/{n.name}" in layout.slices]
        self.passable = [n for n in layout.layers if n.bypassable]

    def _do(
        self,
        problem: Any,
        X: np.ndarray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(n, n_var)` genomes to mutated copies."""
        mutated = X.copy()
        for genome in mutated:
            if self.sited and random_state.random() < self.blocks:
                self._mutate_blocks(genome, random_state)
            if self.passable and random_state.random() < self.bypass:
                layer = self.passable[random_state.integers(len(self.passable))]
                view = self.layout.view(genome, f"bypass/{layer.name}")
                view[0] = not view[0]
            if self.layout.merges and random_state.random() < self.merge:
                merge = self.layout.merges[random_state.integers(len(self.layout.merges))]
                view = self.layout.view(genome, f"merge/{merge.name}")
                place = random_state.integers(len(view))
                view[place] = not view[place]
            if self.kernels and random_state.random() < self.kernel:
                for path in self._few(self.kernels, random_state):
                    self._mutate_kernel(genome, path, random_state)
            if self.ranked and random_state.random() < self.rank:
                for path in self._few(self.ranked, random_state):
                    self._mutate_rank(genome, path, random_state)
        return mutated

    @staticmethod
    def _few(paths: list[str], rng: np.random.Generator) -> list[str]:
        """One of them, now and then a few."""
        count = min(len(paths), rng.geometric(0.6))
        return [paths[place] for place in rng.choice(len(paths), count, replace=False)]

    def _mutate_kernel(self, genome: np.ndarray, path: str, rng: np.random.Generator) -> None:
        node = self.layout.kernels[path]
        taps = list(kept_taps(self.layout, genome, node))
        axis = rng.choice([axis for axis, rings in enumerate(node.rings) if rings])
        full = node.kernel[axis]
        least = full - 2 * node.rings[axis]
        down = taps[axis] == full or (taps[axis] > least and rng.random() < 0.5)
        taps[axis] += -2 if down else 2
        view = self.layout.view(genome, f"kernel/{path}")
        write_kernel(view, node.kernel, node.rings, tuple(taps))

    def _mutate_rank(self, genome: np.ndarray, path: str, rng: np.random.Generator) -> None:
        layer = self.layout.ranked[path]
        useful = useful_ranks(self.layout, genome, layer, self.step)
        if not useful:
            return
        view = self.layout.view(genome, f"rank/{path}")
        rank = read_rank(view, layer.ranks)
        place = len(useful) if rank is None else int(np.searchsorted(useful, rank))
        if place == len(useful):
            place -= int(rng.integers(1, (len(useful) + 1) // 2 + 1))
        else:
            place += 1 if place == 0 or rng.random() < 0.5 else -1
        write_rank(view, layer.ranks, useful[place] if place < len(useful) else None)

    def _mutate_blocks(self, genome: np.ndarray, rng: np.random.Generator) -> None:
        layer = self.sited[rng.integers(len(self.sited))]
        view = self.layout.view(genome, f"block/{layer.name}")
        if rng.random() < 0.2:
            view[:] = True
            return
        energy = np.ones(view.shape) if layer.energy is None else layer.energy
        # 1 for the connection of least energy in its layer, 0 for the one of most.
        cheapness = 1.0 - np.argsort(np.argsort(energy, axis=None)) / max(1, energy.size - 1)
        chance = np.where(view, cheapness.reshape(view.shape), 1.0 - cheapness.reshape(view.shape))
        flips = rng.random(view.shape) < chance * rng.uniform(0.1, 0.5)
        view ^= flips
