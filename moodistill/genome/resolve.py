"""What a genome means: its repair, and the structure that it describes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moodistill.genome.kernels import read_kernel
from moodistill.genome.layout import GenomeLayout, Group, Node
from moodistill.genome.ranks import read_rank, saves
from moodistill.genome.structure import Alive, Structure, alive_blocks


@dataclass(frozen=True)
class _Wiring:
    """Merges and bypasses resolved: what depends on what, before any channel is cut."""

    merges: dict[str, tuple[bool, ...]]
    bypassed: frozenset[str]
    live: frozenset[str]
    of: dict[str, Node]  # whose channels every node's value has: an earlier one's past a bypass
    repeat: dict[str, int]  # features per channel of every node's value
    past: dict[str, bool]  # whether a node's value comes past a bypassed layer

    def groups(self, name: str) -> tuple[str, ...]:
        """The groups of a node's value in the student."""
        return self.of[name].groups


def _wire(layout: GenomeLayout, genome: np.ndarray) -> _Wiring:
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
    of: dict[str, Node] = {}
    repeat: dict[str, int] = {}
    past: dict[str, bool] = {}
    for node in layout.nodes:
        out = node.name in bypassed
        behind = len(node.inputs) == 1 and past[node.inputs[0]]
        past[node.name] = out or (behind and node.kind != "layer")
        of[node.name] = of[node.inputs[0]] if past[node.name] else node
        # Norms and activations are left out with their layer, what changes the form is not.
        same = out or (past[node.name] and node.kind in ("norm", "activation"))
        repeat[node.name] = repeat[node.inputs[0]] if same else node.repeat
    live: set[str] = set()
    for node in reversed(layout.nodes):
        if node.kind == "output":
            live.add(node.name)
        if node.name in live:
            live.update(_chosen(node, merges))
    return _Wiring(merges, frozenset(bypassed & live), frozenset(live), of, repeat, past)


def _chosen(node: Node, merges: dict[str, tuple[bool, ...]]) -> list[str]:
    """The inputs of a node that stay."""
    chosen = merges.get(node.name, (True,) * len(node.inputs))
    return [name for name, on in zip(node.inputs, chosen, strict=True) if on]


def resolve(layout: GenomeLayout, genome: np.ndarray, step: int = 1) -> Structure:
    """Repair a genome and resolve it.

    Every Add keeps an input, every layer and every output block reads something, what nobody reads
    is dropped with what feeds only that (blocks, whole groups, layers), and widths are whole
    multiples of `step` channels (or the full width): per block in groups with missing connections,
    else per group. A rank is a whole multiple of `step` too; it is full where a lower one saves
    nothing and where the layer is cut into several modules. The teacher's own genome is resolved
    without bounds of widths: it is what students are compared with.
    """
    if genome.all():
        layout = layout.unbounded
    wiring = _wire(layout, genome)
    active = [n for n in layout.layers if n.name in wiring.live and n.name not in wiring.bypassed]
    source = {n.name: wiring.groups(n.inputs[0]) for n in active}
    through = frozenset(n.name for n in active if wiring.past[n.inputs[0]])
    kept: dict[str, np.ndarray] = {}
    for name in [*layout.given, *(g for n in active for g in n.groups)]:
        group = layout.groups[name]
        if name in kept:
            continue
        if group.frozen:
            kept[name] = np.ones(group.size, dtype=bool)
            continue
        kept[name] = layout.view(genome, f"mask/{name}").copy()
        if group.least is not None and kept[name].sum() < group.least:
            order = np.lexsort((-group.importance, ~kept[name]))
            kept[name][order[: group.least]] = True
    connected: dict[str, np.ndarray] = {}
    for layer in active:
        own = f"block/{layer.name}" in layout.slices and layer.name not in through
        shape = (layout.blocks(layer.groups), layout.blocks(source[layer.name]))
        connected[layer.name] = (
            layout.view(genome, f"block/{layer.name}").copy() if own else np.ones(shape, bool)
        )
    repair = _Repair(layout, active, source, kept, connected, step)
    alive = repair.alive()
    while repair.reconnect(alive) or repair.drop(alive) or repair.round(alive):
        alive = repair.alive()
    active = [n for n in active if repair.lines(alive, n.groups).any()]
    for layer in active:
        rows, columns = (repair.lines(alive, g) for g in (layer.groups, source[layer.name]))
        connected[layer.name] &= rows[:, None] & columns[None, :]
    present = {name: mask for name, mask in kept.items() if mask.any()}
    live = _still_live(layout, wiring, present)
    names = {n.name for n in active}
    kernels = _kernels(layout, genome, live - wiring.bypassed)
    ranks, full_ranks = {}, {}
    wanted = list(_ranks(layout, genome, names, step))
    split = repair.split(alive) if wanted else set()
    for layer, rank in wanted:
        inputs, outputs = _size(layout, wiring, layer, present, kernels)
        if saves(rank, inputs, outputs) and split.isdisjoint(layer.groups):
            ranks[layer.path], full_ranks[layer.path] = rank, min(inputs, outputs)
    return Structure(
        kept=present,
        connected={name: connected[name] for name in connected if name in names},
        source={name: source[name] for name in source if name in names},
        through=through & names,
        bypassed=wiring.bypassed & live,
        merges={k: v for k, v in wiring.merges.items() if k in live},
        live=live,
        dropped=frozenset(kept) - frozenset(present),
        kernels=kernels,
        ranks=ranks,
        full_ranks=full_ranks,
    )


def _kernels(
    layout: GenomeLayout, genome: np.ndarray, there: frozenset[str]
) -> dict[str, tuple[int, ...]]:
    """Kernels that lost taps, of the modules that the student has."""
    found = {}
    for path, node in layout.kernels.items():
        bits = genome[layout.slices[f"kernel/{path}"]]
        if not bits.all() and not there.isdisjoint(layout.calls[path]):
            found[path] = read_kernel(bits, node.kernel, node.rings)
    return found


def _ranks(
    layout: GenomeLayout, genome: np.ndarray, names: set[str], step: int
) -> Iterator[tuple[Node, int]]:
    """Layers of the student with the rank that their gene asks for; without those of full rank."""
    for path, node in layout.ranked.items():
        bits = genome[layout.slices[f"rank/{path}"]]
        if bits.all():
            continue
        called = [name for name in layout.calls[path] if name in names]
        rank = read_rank(bits, node.ranks, step)
        if called and rank is not None:
            yield layout.by_name[called[0]], rank


def _size(
    layout: GenomeLayout,
    wiring: _Wiring,
    layer: Node,
    kept: dict[str, np.ndarray],
    kernels: dict[str, tuple[int, ...]],
) -> tuple[int, int]:
    """Values that an output of a layer is summed of, taps included, and outputs."""
    inputs, outputs = (
        sum(
            int(np.count_nonzero(kept[group])) * lanes
            for group, lanes in zip(node.groups, node.lanes, strict=True)
            if group in kept
        )
        for node in (wiring.of[layer.inputs[0]], layer)
    )
    taps = math.prod(kernels.get(layer.path, layer.kernel))
    return inputs * wiring.repeat[layer.inputs[0]] * taps, outputs


def _still_live(layout: GenomeLayout, wiring: _Wiring, kept: Alive) -> frozenset[str]:
    """Nodes that the output depends on once groups without channels are gone."""
    live: set[str] = set()
    for node in reversed(layout.nodes):
        if node.kind == "output":
            live.add(node.name)
        if node.name in live:
            for name in _chosen(node, wiring.merges):
                if any(group in kept for group in wiring.groups(name)):
                    live.add(name)
    return frozenset(live)


class _Repair:
    """The parts of the repair; each changes masks and connections in place, and says whether."""

    def __init__(
        self,
        layout: GenomeLayout,
        active: list[Node],
        source: dict[str, tuple[str, ...]],
        kept: dict[str, np.ndarray],
        connected: dict[str, np.ndarray],
        step: int,
    ) -> None:
        self.layout = layout
        self.active = active
        self.source = source
        self.kept = kept
        self.connected = connected
        self.step = step

    def alive(self) -> Alive:
        """The live blocks of every group."""
        return {name: alive_blocks(self.layout.groups[name], k) for name, k in self.kept.items()}

    def lines(self, alive: Alive, groups: tuple[str, ...]) -> np.ndarray:
        """`(blocks,)` live blocks of several groups, one after another."""
        return alive[groups[0]] if len(groups) == 1 else np.concatenate([alive[g] for g in groups])

    def reconnect(self, alive: Alive) -> bool:
        """Give every live output block without a live input block the one of highest energy.

        Says that something changed only where that makes a block live.
        """
        for layer in self.active:
            rows, columns = (self.lines(alive, g) for g in (layer.groups, self.source[layer.name]))
            if not rows.any():
                continue
            if not columns.any():
                self._revive(self.source[layer.name])
                return True
            matrix = self.connected[layer.name]
            for row in np.flatnonzero(rows & ~(matrix & columns[None, :]).any(axis=1)):
                same = layer.energy is not None and layer.energy.shape == matrix.shape
                energy = layer.energy[row] if same else np.ones(matrix.shape[1])  # type: ignore
                matrix[row, int(np.where(columns, energy, -1.0).argmax())] = True
        return False

    def _revive(self, groups: tuple[str, ...]) -> None:
        """Keep a SIMD step of the most important block of the most important group."""
        group = max((self.layout.groups[g] for g in groups), key=lambda g: g.importance.sum())
        totals = np.bincount(group.block, weights=group.importance, minlength=group.blocks)
        members = np.flatnonzero(group.block == int(totals.argmax()))
        order = members[np.argsort(-group.importance[members], kind="stable")]
        self.kept[group.name][order[: group.step(self.step)]] = True

    def drop(self, alive: Alive) -> bool:
        """Drop blocks that nobody reads."""
        read = {name: np.zeros(len(blocks), dtype=bool) for name, blocks in alive.items()}
        for layer in self.active:
            rows = self.lines(alive, layer.groups)
            used = self.connected[layer.name][rows].any(axis=0)
            start = 0
            for name in self.source[layer.name]:
                end = start + len(read[name])
                read[name] |= used[start:end]
                start = end
        changed = False
        for name, blocks in alive.items():
            group = self.layout.groups[name]
            dead = blocks & ~read[name]
            if group.frozen or not dead.any():
                continue
            changed = True
            left = int((blocks & read[name])[group.block].sum())
            short = group.least is not None and left < group.least
            if not (short and self._read(name, dead, alive)):
                self.kept[name] &= ~dead[group.block]
        return changed

    def _read(self, name: str, blocks: np.ndarray, alive: Alive) -> bool:
        """Let the first live reader of a group read some blocks of it, if there is a reader."""
        for reader in self.active:
            rows = self.lines(alive, reader.groups)
            if name in self.source[reader.name] and rows.any():
                groups = self.source[reader.name]
                start = self.layout.blocks(groups[: groups.index(name)])
                columns = start + np.flatnonzero(blocks)
                self.connected[reader.name][int(np.argmax(rows)), columns] = True
                return True
        return False

    def round(self, alive: Alive) -> bool:
        """Round widths to whole SIMD steps."""
        split = self.split(alive)
        changed = False
        for name, blocks in alive.items():
            group = self.layout.groups[name]
            if not group.frozen and blocks.any():
                step = group.step(self.step)
                changed |= _round_widths(group, self.kept[name], step, name in split)
        return changed

    def split(self, alive: Alive) -> set[str]:
        """Groups of which a layer that writes or reads them misses a connection of live blocks."""
        found: set[str] = set()
        for layer in self.active:
            source = self.source[layer.name]
            rows, columns = self.lines(alive, layer.groups), self.lines(alive, source)
            missing = ~self.connected[layer.name] & rows[:, None] & columns[None, :]
            if not missing.any():
                continue
            # Where a layer writes or reads several groups, each one's part counts for itself.
            for groups, lacking in ((layer.groups, missing.any(1)), (source, missing.any(0))):
                start = 0
                for name in groups:
                    end = start + len(alive[name])
                    if lacking[start:end].any():
                        found.add(name)
                    start = end
        return found


def _round_widths(group: Group, kept: np.ndarray, step: int, split: bool) -> bool:
    """Round kept widths in place to whole steps; returns whether anything changed."""
    if group.least is None and group.most is None and _is_round(group, kept, step, split):
        return False
    alive = alive_blocks(group, kept)
    parts = [group.block == b for b in np.flatnonzero(alive)] if split else [alive[group.block]]
    members = [np.flatnonzero(part) for part in parts]
    counts = [int(np.count_nonzero(kept[m])) for m in members]
    targets = []
    for member, count in zip(members, counts, strict=True):
        full = count == len(member)
        targets.append(count if full else min(len(member), int(count / step + 0.5) * step))
    targets = _bounded(group, targets, counts, [len(m) for m in members], step)
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


def _is_round(group: Group, kept: np.ndarray, step: int, split: bool) -> bool:
    """Whether nothing is to be rounded, as most often."""
    counts = np.bincount(group.block[kept], minlength=group.blocks)
    if split:
        return bool(((counts % step == 0) | (counts == group.block_sizes)).all())
    total = counts.sum()
    return bool(total % step == 0 or total == group.block_sizes[counts > 0].sum())


def _bounded(
    group: Group, targets: list[int], counts: list[int], sizes: list[int], step: int
) -> list[int]:
    """Widths of a group's parts with their sum within the group's bounds.

    In whole steps where whole steps can meet the bounds.
    """
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
    while group.most is not None and sum(targets) > group.most:
        # From the part that rounding has widened most, so that the same comes out once more.
        there = [i for i, target in enumerate(targets) if target]
        place = max(there, key=lambda i: (targets[i] - counts[i], targets[i]))
        targets[place] -= min(targets[place], sum(targets) - group.most)
    return targets
