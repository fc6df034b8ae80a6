"""How a student's channel groups are cut into tensors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moodistill.genome import GenomeLayout, Node
from moodistill.resolve import Structure, alive_in


class Parts:
    """How each live group's kept channels are cut into tensors, and which layers are grouped.

    Attributes:
        cut: for every live group its parts, `(blocks,)` block indices in channel order.
        grouped: layers that become one grouped convolution, with its number of groups.
    """

    def __init__(self, layout: GenomeLayout, structure: Structure, convs: set[str]) -> None:
        self.layout = layout
        self.structure = structure
        self.active = [layout.by_name[name] for name in structure.source]
        self.alive = {
            name: np.unique(layout.groups[name].block[kept])
            for name, kept in structure.kept.items()
        }
        self.grouped: dict[str, int] = {}
        self.cut = self._cut()
        for layer in self.active:
            # Linear layers have no grouped form: theirs stay one dense layer per pattern.
            classes = self._classes(layer.name) if layer.name in convs else 0
            if classes > 1:
                # Taken only if the layer then reads one tensor and writes one, in class order.
                self.grouped[layer.name] = classes
                trial = self._cut()
                ends = {end for name in self.grouped for end in self._ends(name)}
                whole = all(len(trial[group]) == 1 for group in ends)
                if whole and all(self._in_order(g, trial) for g in self.grouped):
                    self.cut = trial
                else:
                    del self.grouped[layer.name]

    def _ends(self, name: str) -> tuple[str, str]:
        """The one group that a grouped layer reads and the one it writes."""
        return self.structure.source[name][0], self.layout.by_name[name].groups[0]

    def _matrix(self, name: str) -> np.ndarray:
        """Live part of a layer's block matrix, `(live out blocks, live in blocks)`."""
        rows = alive_in(self.layout, self.structure, self.layout.by_name[name].groups)
        columns = alive_in(self.layout, self.structure, self.structure.source[name])
        return self.structure.connected[name][np.ix_(rows, columns)]

    def _classes(self, name: str) -> int:
        """Number of equal diagonal blocks of the layer's connections, 0 if not block-diagonal."""
        layer = self.layout.by_name[name]
        both = (*self.structure.source[name], *layer.groups)
        if len(both) != 2 or any(self.layout.groups[g].width > 1 for g in both):
            return 0
        matrix = self._matrix(name)
        patterns = np.unique(matrix, axis=0)
        if len(patterns) < 2 or (patterns.sum(axis=0) != 1).any():
            return 0
        source, target = both
        sizes = set()
        for pattern in patterns:
            rows = (matrix == pattern).all(axis=1)
            outputs = self._count(target, self.alive[target][rows])
            sizes.add((outputs, self._count(source, self.alive[source][pattern])))
        return len(patterns) if len(sizes) == 1 else 0

    def _count(self, group: str, blocks: np.ndarray) -> int:
        kept = self.structure.kept[group]
        return int(np.isin(self.layout.groups[group].block[kept], blocks).sum())

    def _sides(self, layer: Node, group: str) -> Iterator[tuple[str, np.ndarray]]:
        """Each side ("in", "out") of a layer that holds the group, and where: live lines."""
        for side, groups in (("in", self.structure.source[layer.name]), ("out", layer.groups)):
            if group in groups:
                live = [np.full(len(self.alive.get(g, ())), g == group) for g in groups]
                yield side, np.concatenate(live)

    def _label(self, name: str, side: str) -> np.ndarray:
        """A number per live block of one side of a layer: equal rows or columns, equal number."""
        matrix = self._matrix(name)
        lines = matrix if side == "out" else matrix.T
        _, label = np.unique(lines, axis=0, return_inverse=True)
        return np.asarray(label).reshape(-1)

    def _cut(self) -> dict[str, list[np.ndarray]]:
        """For every live group, its tensors: lists of block indices in channel order."""
        result = {}
        for name, blocks in self.alive.items():
            split: list[np.ndarray] = []
            order: list[np.ndarray] = []
            for layer in self.active:
                for side, here in self._sides(layer, name):
                    if layer.name in self.grouped:
                        order.append(self._class_rank(layer.name, side))
                    else:
                        split.append(self._label(layer.name, side)[here])
            keys = np.array([*split, *order, np.arange(len(blocks))]).reshape(-1, len(blocks))
            sequence = np.lexsort(keys[::-1])
            parts: list[list[int]] = []
            previous = None
            for place in sequence:
                key = tuple(label[place] for label in split)
                if key != previous:
                    parts.append([])
                parts[-1].append(int(blocks[place]))
                previous = key
            result[name] = [np.array(part) for part in parts]
        return result

    def _class_rank(self, name: str, side: str) -> np.ndarray:
        """The diagonal block that each live block of one side belongs to."""
        matrix = self._matrix(name)
        patterns = np.unique(matrix, axis=0)
        if side == "in":
            return patterns.argmax(axis=0)
        return np.array([int((patterns == row).all(axis=1).argmax()) for row in matrix])

    def _in_order(self, name: str, cut: dict[str, list[np.ndarray]]) -> bool:
        """Whether both sides of a grouped layer run through its classes one after another."""
        for side, group in zip(("in", "out"), self._ends(name), strict=True):
            rank = dict(zip(self.alive[group], self._class_rank(name, side), strict=True))
            ranks = [rank[block] for block in cut[group][0]]
            if ranks != sorted(ranks):
                return False
        return True

    def members(self, group: str, part: int) -> np.ndarray:
        """Kept channels (of the mask) of one part of a group, block by block."""
        return self._channels(group, self.cut[group][part])

    def _channels(self, group: str, blocks: np.ndarray) -> np.ndarray:
        kept = self.structure.kept[group]
        block = self.layout.groups[group].block
        return np.concatenate([np.flatnonzero(kept & (block == b)) for b in blocks])

    def diagonal(self, name: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """For a grouped layer, outputs and inputs of each of its groups (channels of the masks)."""
        sides = []
        for side, group in zip(("in", "out"), self._ends(name), strict=True):
            rank = dict(zip(self.alive[group], self._class_rank(name, side), strict=True))
            blocks = self.cut[group][0]
            sides.append(
                tuple(
                    self._channels(group, blocks[[rank[b] == c for b in blocks]])
                    for c in range(self.grouped[name])
                )
            )
        return sides[1], sides[0]

    def reads(self, name: str, row: tuple[str, int], column: tuple[str, int]) -> bool:
        """Whether a layer's output part reads an input part; parts are (group, index)."""
        places = []
        groups = (self.layout.by_name[name].groups, self.structure.source[name])
        for (group, part), side in zip((row, column), groups, strict=True):
            start = self.layout.blocks(side[: side.index(group)])
            places.append(start + int(self.cut[group][part][0]))
        return bool(self.structure.connected[name][places[0], places[1]])

    def reads_all(self, name: str, groups: tuple[str, ...]) -> bool:
        """Whether every live output of a layer reads every live block of some groups."""
        rows = alive_in(self.layout, self.structure, self.layout.by_name[name].groups)
        source = self.structure.source[name]
        wanted = [np.full(self.layout.groups[g].blocks, g in groups) for g in source]
        columns = alive_in(self.layout, self.structure, source) & np.concatenate(wanted)
        return bool(self.structure.connected[name][np.ix_(rows, columns)].all())
