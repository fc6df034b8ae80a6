"""A resolved genome: which channels, connections and edges a student really has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from moodistill.genome.layout import GenomeLayout, Group

Alive = dict[str, np.ndarray]


@dataclass(frozen=True)
class Structure:
    """What a genome means, every dependency resolved.

    Attributes:
        kept: for every live group, `(size,)` bool.
        connected: for every live layer, `(blocks of its groups, blocks of its source)` bool; False
            where one of the two blocks is gone.
        source: for every live layer, the groups it reads in the student.
        through: live layers whose input comes past a bypassed layer.
        bypassed: layers that are left out.
        merges: for every live Add, the inputs that stay.
        live: names of all nodes that the output depends on.
        dropped: groups that nobody reads in this student, though their layers could be there.
        kernels: by module path, the taps by axis of convolutions that lost some.
        ranks: by module path, the rank of layers that are not of full rank.
        full_ranks: by module path, the rank that each of these would have at most.
    """

    kept: dict[str, np.ndarray]
    connected: dict[str, np.ndarray]
    source: dict[str, tuple[str, ...]]
    through: frozenset[str]
    bypassed: frozenset[str]
    merges: dict[str, tuple[bool, ...]]
    live: frozenset[str]
    dropped: frozenset[str] = frozenset()
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    full_ranks: dict[str, int] = field(default_factory=dict)


def alive_blocks(group: Group, kept: np.ndarray) -> np.ndarray:
    """`(blocks,)` bool: blocks with at least one kept channel."""
    alive = np.zeros(group.blocks, dtype=bool)
    alive[group.block[kept]] = True
    return alive


def alive_in(layout: GenomeLayout, structure: Structure, groups: Iterable[str]) -> np.ndarray:
    """`(blocks,)` bool over several groups, one after another."""
    parts = []
    for name in groups:
        group = layout.groups[name]
        kept = structure.kept.get(name, np.zeros(group.size, dtype=bool))
        parts.append(alive_blocks(group, kept))
    return np.concatenate(parts)


def thinned(structure: Structure, path: str) -> str:
    """The taps and the rank of a module that lost some, in words; empty if it lost none."""
    words = []
    if path in structure.kernels:
        words.append("x".join(map(str, structure.kernels[path])))
    if path in structure.ranks:
        words.append(f"rank {structure.ranks[path]}/{structure.full_ranks[path]}")
    return " ".join(words)
