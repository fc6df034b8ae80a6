"""Which channels must be kept or dropped together, and which of them share a mask.

Every layer's outputs are channels of their own; operations tie them (Add ties what it adds, a
grouped convolution its groups' inputs and outputs). Tied channels are one *class*, kept or dropped
as one; classes that occur in the same values in the same way form a channel group with one mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Grouping:
    """Every channel's place: `group[c]` indexes `names`, `index[c]` is its place in the group.

    Attributes:
        names: of the groups, in order of their first channel.
        sizes: number of classes of each group.
        widths: most channels that one class has in one value.
        together: groups whose classes lie side by side wherever they occur (grouped convolutions).
        frozen: groups that cannot be cut, and why.
    """

    names: tuple[str, ...]
    sizes: dict[str, int]
    widths: dict[str, int]
    together: frozenset[str]
    frozen: dict[str, str]
    group: np.ndarray
    index: np.ndarray


class Channels:
    """Collects channels and what ties them; `group` then sorts them into groups."""

    def __init__(self) -> None:
        self.owners: list[tuple[str, int]] = []  # (writer, number of channels)
        self.count = 0
        self.ties: list[np.ndarray] = []
        self.together: list[np.ndarray] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        # Values in order: their channels, and for a rearranged one its sources and the origin.
        self.values: list[tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]] = []

    def new(self, owner: str, size: int) -> np.ndarray:
        """Fresh channels `(size,)` of a layer."""
        made = np.arange(self.count, self.count + size)
        self.owners.append((owner, size))
        self.count += size
        self.occurs(made)
        return made

    def occurs(
        self,
        channels: np.ndarray,
        sources: tuple[np.ndarray, ...] = (),
        origin: np.ndarray | None = None,
    ) -> None:
        """A value holds these channels; it took them from `sources`, as `origin` `(n, 2)` says."""
        self.values.append((channels, sources, np.empty((0, 2), int) if origin is None else origin))

    def tie(self, one: np.ndarray, other: np.ndarray) -> None:
        """Keep or drop `one[i]` and `other[i]` together."""
        self.ties.append(np.stack([one, other]))

    def bind(self, channels: np.ndarray) -> None:
        """Rows of channels `(rows, n)` that stay side by side, each row one."""
        self.tie(channels[:, :-1].reshape(-1), channels[:, 1:].reshape(-1))
        self.together.append(channels.reshape(-1))

    def freeze(self, channels: np.ndarray, why: str) -> None:
        """Never cut these channels."""
        self.frozen.append((channels, why))

    def group(self) -> Grouping:
        """Sort all channels into classes and groups."""
        pairs = np.concatenate([np.empty((2, 0), int), *self.ties], axis=1)
        edges = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), (self.count,) * 2)
        total, of = connected_components(edges, directed=False)
        kind = np.zeros(total, dtype=int)  # equal numbers: the same group so far
        fresh = 1
        widths = np.zeros(total, dtype=int)

        def refine(classes: np.ndarray, marks: np.ndarray) -> None:
            nonlocal fresh
            _, new = np.unique(np.stack([kind[classes], marks]), axis=1, return_inverse=True)
            kind[classes] = fresh + new.reshape(-1)
            fresh += int(new.max(initial=-1)) + 1

        for channels, sources, origin in self.values:
            classes, count = np.unique(of[channels], return_counts=True)
            np.maximum.at(widths, classes, count)
            if sources:
                refine(classes, _origin_marks(of, channels, sources, origin, classes))
            else:
                refine(classes, count)
        beside = np.unique(of[np.concatenate([np.empty(0, int), *self.together])])
        refine(beside, np.zeros(len(beside), int))
        reasons: dict[int, str] = {}
        for channels, _ in self.frozen:
            classes = np.unique(of[channels])
            refine(classes, np.zeros(len(classes), int))
        for channels, why in self.frozen:
            for number in np.unique(kind[of[channels]]):
                reasons.setdefault(int(number), why)
        # Groups in order of their first channel, classes within a group likewise.
        _, first = np.unique(of, return_index=True)
        by_first = np.argsort(first)
        order: dict[int, int] = {}
        index = np.zeros(total, dtype=int)
        sizes: list[int] = []
        for one in by_first:
            place = order.setdefault(int(kind[one]), len(order))
            if place == len(sizes):
                sizes.append(0)
            index[one] = sizes[place]
            sizes[place] += 1
        names = self._names([int(first[kind == number].min()) for number in order])
        group = np.array([order[int(k)] for k in kind], dtype=int)
        group_widths = [int(widths[group == g].max()) for g in range(len(names))]
        return Grouping(
            names=names,
            sizes=dict(zip(names, sizes, strict=True)),
            widths=dict(zip(names, group_widths, strict=True)),
            together=frozenset(names[g] for g in np.unique(group[beside])),
            frozen={names[order[number]]: why for number, why in reasons.items()},
            group=group[of],
            index=index[of],
        )

    def _names(self, firsts: list[int]) -> tuple[str, ...]:
        """A group is called after the layer that writes its first channel, later ones numbered."""
        ends = np.cumsum([size for _, size in self.owners])
        names: list[str] = []
        seen: dict[str, int] = {}
        for first in firsts:
            owner = self.owners[int(np.searchsorted(ends, first, side="right"))][0]
            seen[owner] = seen.get(owner, 0) + 1
            names.append(owner if seen[owner] == 1 else f"{owner}:{seen[owner]}")
        return tuple(names)


def ranks(classes: np.ndarray) -> np.ndarray:
    """For every place of `(n,)` classes, how many places before it hold the same class."""
    order = np.argsort(classes, kind="stable")
    sorted_classes = classes[order]
    starts = np.flatnonzero(np.r_[True, sorted_classes[1:] != sorted_classes[:-1]])
    lengths = np.diff(np.r_[starts, len(classes)])
    result = np.empty(len(classes), dtype=int)
    result[order] = np.arange(len(classes)) - np.repeat(starts, lengths)
    return result


def _origin_marks(
    of: np.ndarray,
    channels: np.ndarray,
    sources: tuple[np.ndarray, ...],
    origin: np.ndarray,
    classes: np.ndarray,
) -> np.ndarray:
    """A number per class: equal for classes that were taken from the same sources alike."""
    lanes = [ranks(of[source]) for source in sources]
    code = [source * (1 << 32) + lanes[source][channel] + 1 for source, channel in origin]
    rank = ranks(of[channels])
    marks = np.zeros((len(classes), int(rank.max(initial=0)) + 1), dtype=np.int64)
    marks[np.searchsorted(classes, of[channels]), rank] = code
    _, number = np.unique(marks, axis=0, return_inverse=True)
    return number.reshape(-1)
