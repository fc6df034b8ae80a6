"""How a student's channel groups are cut into tensors."""

from __future__ import annotations

import numpy as np

from moodistill.genome.layout import GenomeLayout
from moodistill.genome.structure import Structure, alive_in


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
        self.matrix = {layer.name: self._matrix(layer.name) for layer in self.active}
        self.label = {
            (layer.name, side): self._label(layer.name, side)
            for layer in self.active for side in ("in", "out")
        }  # fmt: skip
        self.sides = self._sides()
        self.cut = {name: self._cut(name) for name in self.alive}
        for layer in self.active:
            # Linear layers have no grouped form: theirs stay one dense layer per pattern.
            classes = self._classes(layer.name) if layer.name in convs else 0
            if classes > 1:
                # Taken only if the layer then reads one tensor and writes one, in class order.
                self.grouped[layer.name] = classes
                trial = self.cut | {name: self._cut(name) for name in self._ends(layer.name)}
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
        matrix = self.matrix[name]
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

    def _sides(self) -> dict[str, list[tuple[str, str, slice]]]:
        """For every group the layers that read ("in") or write it ("out"), and its live lines."""
        result: dict[str, list[tuple[str, str, slice]]] = {name: [] for name in self.alive}
        for layer in self.active:
            for side, groups in (("in", self.structure.source[layer.name]), ("out", layer.groups)):
                start = 0
                for group in groups:
                    end = start + len(self.alive.get(group, ()))
                    if end > start:
                        result[group].append((layer.name, side, slice(start, end)))
                    start = end
        return result

    def _label(self, name: str, side: str) -> np.ndarray:
        """A number per live block of one side of a layer: equal rows or columns, equal number."""
        lines = self.matrix[name] if side == "out" else self.matrix[name].T
        if lines.all():
            return np.zeros(len(lines), dtype=int)
        _, label = np.unique(lines, axis=0, return_inverse=True)
        return np.asarray(label).reshape(-1)

    def _cut(self, group: str) -> list[np.ndarray]:
        """A live group's tensors: lists of block indices in channel order."""
        blocks = self.alive[group]
        split: list[np.ndarray] = []
        order: list[np.ndarray] = []
        for layer, side, here in self.sides[group]:
            if layer in self.grouped:
                order.append(self._class_rank(layer, side))
            else:
                split.append(self.label[layer, side][here])
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
        return [np.array(part) for part in parts]

    def _class_rank(self, name: str, side: str) -> np.ndarray:
        """The diagonal block that each live block of one side belongs to."""
        matrix = self.matrix[name]
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
        source = self.structure.source[name]
        here = [np.full(len(self.alive.get(g, ())), g in groups) for g in source]
        return bool(self.matrix[name][:, np.concatenate(here)].all())
