"""The genome: one flat boolean vector with named slices, its repair and its canonical form.

Slices, all True for the teacher itself:

* `mask/<group>`: one bit per channel of a channel group (True: the channel stays),
* `block/<layer>`: one bit per (output block, input block) of a conv or linear layer (True: this
  block of neurons reads that one),
* `merge/<add>`: one bit per input of an Add (True: the input stays),
* `bypass/<layer>`: one bit (True: the layer stays; False: it is left out and its consumers read
  what it read).

This module knows numpy alone: operators and the search work on it without a network at hand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moodistill.errors import UserError

INPUT = "<input>"  # the group of the input channels; no module path looks like that


@dataclass(frozen=True)
class Group:
    """Channels that are kept or dropped together.

    Attributes:
        name: the first layer that writes it.
        block: `(size,)` block index of every channel, from 0.
        importance: `(size,)`, higher is more worth keeping.
        frozen: never cut and without a mask (network input and output, layers to leave alone).
        least, most: bounds of the number of kept channels; None is none.
    """

    name: str
    block: np.ndarray
    importance: np.ndarray
    frozen: bool = False
    least: int | None = None
    most: int | None = None

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.block)

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.block.max()) + 1


@dataclass(frozen=True)
class Node:
    """One step of the teacher: `kind` is input, layer, merge, norm, activation, spatial or output.

    Attributes:
        name: the node's name; for a layer its module path.
        inputs: names of the nodes that it reads.
        group: the channel group of its output.
        reads: for a layer, the group of its input.
        bypassable: for a layer, whether it may be left out.
        energy: for a layer, `(blocks of group, blocks of reads)` weight energy between blocks.
        fixed: for a layer, whether its connections stay, so that it has no connection genes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    group: str
    reads: str = ""
    bypassable: bool = False
    energy: np.ndarray | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Structure:
    """What a genome means, every dependency resolved.

    Attributes:
        kept: for every live group, `(size,)` bool.
        connected: for every live layer, `(blocks of group, blocks of source)` bool; False where
            one of the two blocks is gone.
        source: for every live layer, the group it reads in the student.
        through: live layers whose input comes past a bypassed layer.
        bypassed: layers that are left out.
        merges: for every live Add, the inputs that stay.
        live: names of all nodes that the output depends on.
    """

    kept: dict[str, np.ndarray]
    connected: dict[str, np.ndarray]
    source: dict[str, str]
    through: frozenset[str]
    bypassed: frozenset[str]
    merges: dict[str, tuple[bool, ...]]
    live: frozenset[str]


class GenomeLayout:
    """Names the slices of the genome and holds the teacher's skeleton that gives them meaning."""

    def __init__(self, groups: dict[str, Group], nodes: tuple[Node, ...]) -> None:
        self.groups = groups
        self.nodes = nodes
        self.by_name = {node.name: node for node in nodes}
        self.layers = [node for node in nodes if node.kind == "layer"]
        self.merges = [node for node in nodes if node.kind == "merge"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for group in groups.values():
            if not group.frozen:
                self.shapes[f"mask/{group.name}"] = (group.size,)
        for layer in self.layers:
            shape = (groups[layer.group].blocks, groups[layer.reads].blocks)
            if layer.reads != INPUT and shape != (1, 1) and not layer.fixed:
                self.shapes[f"block/{layer.name}"] = shape
        for merge in self.merges:
            self.shapes[f"merge/{merge.name}"] = (len(merge.inputs),)
        for layer in self.layers:
            if layer.bypassable:
                self.shapes[f"bypass/{layer.name}"] = (1,)
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        self.slices = {
            name: slice(int(end) - int(np.prod(shape)), int(end))
            for (name, shape), end in zip(self.shapes.items(), ends, strict=True)
        }
        self.length = int(ends[-1]) if len(ends) else 0

    def teacher(self) -> np.ndarray:
        """The genome of the teacher: all True, `(length,)`."""
        return np.ones(self.length, dtype=bool)

    def view(self, genome: np.ndarray, name: str) -> np.ndarray:
        """A writable view of one slice in its own shape."""
        return genome[self.slices[name]].reshape(self.shapes[name])

    def pack(self, genome: np.ndarray) -> bytes:
        """The genome as bytes, eight bits a byte."""
        return np.packbits(genome).tobytes()

    def unpack(self, packed: bytes) -> np.ndarray:
        """The inverse of `pack`.

        Raises:
            UserError: if the bytes have another length than this layout's genomes.
        """
        expected = (self.length + 7) // 8
        if len(packed) != expected:
            raise UserError(
                f"genome has {len(packed)} bytes, expected {expected} for this teacher; "
                "it was written for another teacher or layout"
            )
        bits = np.frombuffer(packed, dtype=np.uint8)
        return np.unpackbits(bits, count=self.length).astype(bool)

    def digest(self, genome: np.ndarray) -> str:
        """Hex digest of a genome (take it of the canonical form)."""
        return hashlib.sha256(self.pack(genome)).hexdigest()[:16]

    def summary(self, genome: np.ndarray) -> str:
        """One line: widths, connections, merges and bypasses that are left."""
        structure = resolve(self, genome)
        masked = [g for g in self.groups.values() if not g.frozen]
        live = [g for g in masked if g.name in structure.kept]
        kept = sum(int(structure.kept[g.name].sum()) for g in live)
        channels = f"channels {kept}/{sum(g.size for g in masked)}"
        cut = total = 0
        for name, matrix in structure.connected.items():
            if f"block/{name}" in self.slices and name not in structure.through:
                rows = _alive(self.groups[self.by_name[name].group], structure.kept)
                columns = _alive(self.groups[structure.source[name]], structure.kept)
                total += int(rows.sum() * columns.sum())
                cut += int((~matrix[np.ix_(rows, columns)]).sum())
        parts = [channels, f"connections {total - cut}/{total}"]
        edges = sum(len(kept) for kept in structure.merges.values())
        if edges:
            parts.append(f"merge edges {sum(map(sum, structure.merges.values()))}/{edges}")
        parts.append(f"bypassed {', '.join(sorted(structure.bypassed)) or 'none'}")
        gone = [n.name for n in self.layers if n.name not in structure.live]
        if gone:
            parts.append(f"gone {', '.join(gone)}")
        return "; ".join(parts)


def _alive(group: Group, kept: dict[str, np.ndarray]) -> np.ndarray:
    """`(blocks,)` bool: blocks with at least one kept channel."""
    alive = np.zeros(group.blocks, dtype=bool)
    alive[group.block[kept[group.name]]] = True
    return alive


def _wiring(layout: GenomeLayout, genome: np.ndarray) -> Structure:
    """Resolve merges and bypasses: what is live and which group each layer reads."""
    merges: dict[str, tuple[bool, ...]] = {}
    for merge in layout.merges:
        bits = layout.view(genome, f"merge/{merge.name}")
        # An Add without inputs has no meaning: its first input (the residual branch) stays.
        merges[merge.name] = tuple(bool(b) for b in bits) if bits.any() else (
            (True,) + (False,) * (len(bits) - 1)
        )  # fmt: skip
    bypassed = {
        layer.name
        for layer in layout.layers
        if layer.bypassable and not layout.view(genome, f"bypass/{layer.name}")[0]
    }
    group: dict[str, str] = {}
    past: dict[str, bool] = {}  # whether a node's value comes past a bypassed layer
    for node in layout.nodes:
        own = node.kind in ("input", "merge") or (
            node.kind == "layer" and node.name not in bypassed
        )
        if own:
            group[node.name], past[node.name] = node.group, False
        else:
            group[node.name] = group[node.inputs[0]]
            past[node.name] = past[node.inputs[0]] or node.name in bypassed
    live: set[str] = set()
    for node in reversed(layout.nodes):
        if node.kind == "output":
            live.add(node.name)
        if node.name in live:
            chosen = merges.get(node.name, (True,) * len(node.inputs))
            live.update(name for name, on in zip(node.inputs, chosen, strict=True) if on)
    active = [n for n in layout.layers if n.name in live and n.name not in bypassed]
    return Structure(
        kept={},
        connected={},
        source={n.name: group[n.inputs[0]] for n in active},
        through=frozenset(n.name for n in active if past[n.inputs[0]]),
        bypassed=frozenset(bypassed & live),
        merges={k: v for k, v in merges.items() if k in live},
        live=frozenset(live),
    )


def resolve(layout: GenomeLayout, genome: np.ndarray, step: int = 1) -> Structure:
    """Repair a genome and resolve it.

    Every Add keeps an input, every layer and every output block reads something, blocks that
    nobody reads are dropped with what feeds only them, and widths are whole multiples of `step`
    channels (or the full width): per block in groups with missing connections, else per group.
    """
    wiring = _wiring(layout, genome)
    active = [layout.by_name[name] for name in wiring.source]
    kept: dict[str, np.ndarray] = {}
    for name in [INPUT, *(n.group for n in active)]:
        group = layout.groups[name]
        if group.frozen:
            kept[name] = np.ones(group.size, dtype=bool)
        elif name not in kept:
            kept[name] = layout.view(genome, f"mask/{name}").copy()
            if not kept[name].any():
                _revive(group, kept[name], step)
            if group.least is not None and kept[name].sum() < group.least:
                order = np.lexsort((-group.importance, ~kept[name]))
                kept[name][order[: group.least]] = True
    connected: dict[str, np.ndarray] = {}
    for layer in active:
        shape = (layout.groups[layer.group].blocks, layout.groups[wiring.source[layer.name]].blocks)
        own = f"block/{layer.name}" in layout.slices and layer.name not in wiring.through
        connected[layer.name] = (
            layout.view(genome, f"block/{layer.name}").copy() if own else np.ones(shape, bool)
        )

    while True:
        alive = {name: _alive(layout.groups[name], kept) for name in kept}
        for layer in active:
            _connect_rows(layer, connected[layer.name], alive, wiring.source[layer.name])
        changed = False
        for name in kept:
            group = layout.groups[name]
            if group.frozen:
                continue
            read = np.zeros(group.blocks, dtype=bool)
            for layer in active:
                if wiring.source[layer.name] == name:
                    read |= connected[layer.name][alive[layer.group]].any(axis=0)
            dead = alive[name] & ~read
            if dead.any():
                changed = True
                left = int((alive[name] & read)[group.block].sum())
                if group.least is not None and left < group.least:
                    # Too few would be left: somebody has to read them.
                    reader = next(n for n in active if wiring.source[n.name] == name)
                    row = int(np.argmax(alive[reader.group]))
                    connected[reader.name][row, dead] = True
                    continue
                kept[name] &= ~dead[group.block]
        if changed:
            continue
        for name in kept:
            group = layout.groups[name]
            if not group.frozen:
                split = _is_split(layout, wiring, active, connected, alive, name)
                changed |= _round_widths(group, kept[name], step, split)
        if not changed:
            break
    for layer in active:
        matrix = connected[layer.name]
        matrix &= alive[layer.group][:, None] & alive[wiring.source[layer.name]][None, :]
    return Structure(
        kept, connected, wiring.source, wiring.through, wiring.bypassed, wiring.merges, wiring.live
    )


def _revive(group: Group, kept: np.ndarray, step: int) -> None:
    """Keep `step` channels of the most important block."""
    totals = np.bincount(group.block, weights=group.importance, minlength=group.blocks)
    members = np.flatnonzero(group.block == int(totals.argmax()))
    order = members[np.argsort(-group.importance[members], kind="stable")]
    kept[order[:step]] = True


def _connect_rows(
    layer: Node, matrix: np.ndarray, alive: dict[str, np.ndarray], source: str
) -> None:
    """Give every live output block without a live input block the one of highest energy."""
    rows = alive[layer.group] & ~(matrix & alive[source][None, :]).any(axis=1)
    for row in np.flatnonzero(rows):
        energy = layer.energy[row] if layer.energy is not None else np.ones(matrix.shape[1])
        matrix[row, int(np.where(alive[source], energy, -1.0).argmax())] = True


def _is_split(
    layout: GenomeLayout,
    wiring: Structure,
    active: list[Node],
    connected: dict[str, np.ndarray],
    alive: dict[str, np.ndarray],
    group: str,
) -> bool:
    """Whether any layer that writes or reads `group` misses a connection between live blocks."""
    for layer in active:
        source = wiring.source[layer.name]
        if group in (layer.group, source):
            live = connected[layer.name][np.ix_(alive[layer.group], alive[source])]
            if not live.all():
                return True
    return False


def _round_widths(group: Group, kept: np.ndarray, step: int, split: bool) -> bool:
    """Round kept widths in place to whole steps; returns whether anything changed."""
    alive = np.unique(group.block[kept])
    parts = [alive == b for b in alive] if split else [np.ones(len(alive), bool)]
    members = [np.flatnonzero(np.isin(group.block, alive[part])) for part in parts]
    counts = [int(kept[m].sum()) for m in members]
    targets = []
    for member, count in zip(members, counts, strict=True):
        full = count == len(member)
        targets.append(count if full else min(len(member), int(count / step + 0.5) * step))
    targets = _bounded(group, targets, [len(m) for m in members], step)
    if not any(targets):
        # Something of the group must stay: the part with most channels gets one step.
        first = int(np.argmax(counts))
        targets[first] = min(step, len(members[first]))
    changed = False
    for member, count, target in zip(members, counts, targets, strict=True):
        if target == count:
            continue
        changed = True
        # Kept channels first, then by importance: rounding up adds, rounding down removes.
        order = member[np.lexsort((-group.importance[member], ~kept[member]))]
        kept[member] = False
        kept[order[:target]] = True
    return changed


def _bounded(group: Group, targets: list[int], sizes: list[int], step: int) -> list[int]:
    """Widths of a group's parts with their sum within the group's bounds, in whole steps."""
    targets = list(targets)
    while group.most is not None and sum(targets) > group.most and max(targets) > step:
        place = int(np.argmax(targets))
        targets[place] -= targets[place] % step or step
    while group.least is not None and sum(targets) < group.least:
        room = [size - target for size, target in zip(sizes, targets, strict=True)]
        place = int(np.argmax(room))
        if room[place] == 0:
            break
        targets[place] = min(sizes[place], targets[place] + step)
    return targets


def canonical(layout: GenomeLayout, genome: np.ndarray, step: int = 1) -> np.ndarray:
    """The repaired genome in which every bit that has no effect is True.

    Two genomes of the same student have the same canonical form; it is idempotent.
    """
    structure = resolve(layout, genome, step)
    result = layout.teacher()
    for name, kept in structure.kept.items():
        if f"mask/{name}" in layout.slices:
            layout.view(result, f"mask/{name}")[:] = kept
    for name, matrix in structure.connected.items():
        if f"block/{name}" in layout.slices and name not in structure.through:
            rows = _alive(layout.groups[layout.by_name[name].group], structure.kept)
            columns = _alive(layout.groups[structure.source[name]], structure.kept)
            matters = rows[:, None] & columns[None, :]
            layout.view(result, f"block/{name}")[:] = matrix | ~matters
    for name, inputs in structure.merges.items():
        layout.view(result, f"merge/{name}")[:] = inputs
    for name in structure.bypassed:
        layout.view(result, f"bypass/{name}")[:] = False
    return result
