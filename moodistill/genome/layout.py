"""The genome: one flat boolean vector with named slices.

Slices, all True for the teacher itself:

* `mask/<group>`: one bit per channel of a channel group (True: the channel stays; channels that a
  grouped convolution keeps together share a bit),
* `block/<layer>`: one bit per (output block, input block) of a conv or linear layer (True: this
  block of neurons reads that one),
* `merge/<add>`: one bit per input of an Add (True: the input stays),
* `bypass/<layer>`: one bit (True: the layer stays; False: it is left out and its consumers read
  what it read),
* `kernel/<layer>`: one bit per ring of a convolution's taps that may go, see `kernels`,
* `rank/<layer>`: one bit per rank below the full one that a layer may have, see `ranks`.

The last two kinds came later and stand last: what was packed without them is read with their bits
True.

This module knows numpy alone: operators and the search work on it without a network at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moodistill.errors import UserError

INPUT = "<input>"  # the group of the input channels; no module path looks like that
# Kinds of connections, with what the names of their slices begin with.
CONNECTIONS = {
    "kernels": "kernel/", "ranks": "rank/", "merges": "merge/", "bypasses": "bypass/",
    "blocks": "block/",
}  # fmt: skip
FORMER_CONNECTIONS = ("blocks", "merges", "bypasses")  # before there were kernels and ranks
# Searched by default. Without blocks a search finds better students (docs/comparison.md).
SEARCHED = ("kernels", "ranks", "merges", "bypasses")


@dataclass(frozen=True)
class Group:
    """Channels that are kept or dropped together.

    Attributes:
        name: the first layer that writes it, numbered where a layer writes several.
        block: `(size,)` block index of every channel, from 0.
        importance: `(size,)`, higher is more worth keeping.
        frozen: never cut and without a mask (network input and output, layers to leave alone).
        least, most: bounds of the number of kept channels; None is none.
        width: real channels per channel of the mask (grouped convolutions keep some together).
    """

    name: str
    block: np.ndarray
    importance: np.ndarray
    frozen: bool = False
    least: int | None = None
    most: int | None = None
    width: int = 1

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.block)

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.block.max()) + 1

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """`(blocks,)` channels of each block."""
        return np.bincount(self.block)

    @cached_property
    def standardised_importance(self) -> np.ndarray:
        """`(size,)` log-importance, of mean 0 and standard deviation 1."""
        logs = np.log(self.importance + 1e-12)
        return np.asarray((logs - logs.mean()) / (logs.std() + 1e-12))

    def step(self, step: int) -> int:
        """A SIMD step of `step` real channels in channels of the mask."""
        return max(1, -(-step // self.width))


@dataclass(frozen=True)
class Node:
    """One step of the teacher; `kind` as in `graph.Step`.

    Attributes:
        name: the node's name; for a layer its module path.
        inputs: names of the nodes that it reads.
        groups: the channel groups of its output.
        reads: for a layer, the groups of its input.
        bypassable: for a layer, whether it may be left out.
        energy: for a layer, `(blocks of groups, blocks of reads)` weight energy between blocks.
        fixed: for a layer, whether its connections stay, so that it has no connection genes.
        shared: for a layer, whether its module is called more than once.
        module: its module path, where that is not the name.
        lanes: real channels of its output per channel of each group's mask.
        repeat: features per real channel of its output (behind a flatten).
        kernel: for a convolution, taps by axis.
        rings: for a convolution, rings of taps by axis that may go.
        ranks: for a layer, the ranks below the full one that it may have, ascending.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    groups: tuple[str, ...]
    reads: tuple[str, ...] = ()
    bypassable: bool = False
    energy: np.ndarray | None = None
    fixed: bool = False
    shared: bool = False
    module: str = ""
    lanes: tuple[int, ...] = ()
    repeat: int = 1
    kernel: tuple[int, ...] = ()
    rings: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """The module path, which names kernel and rank genes: all calls of a module share them."""
        return self.module or self.name


class GenomeLayout:
    """Names the slices of the genome and holds the teacher's skeleton that gives them meaning."""

    def __init__(self, groups: dict[str, Group], nodes: tuple[Node, ...]) -> None:
        self.groups = groups
        self.nodes = nodes
        self.by_name = {node.name: node for node in nodes}
        self.inputs = nodes[0].groups
        # Groups that no layer writes: the input's, and those of what is left whole.
        self.given = (*self.inputs, *(g for n in nodes if n.kind == "opaque" for g in n.groups))
        self.layers = [node for node in nodes if node.kind == "layer"]
        self.merges = [node for node in nodes if node.kind == "merge"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for group in groups.values():
            if not group.frozen:
                self.shapes[f"mask/{group.name}"] = (group.size,)
        for layer in self.layers:
            shape = (self.blocks(layer.groups), self.blocks(layer.reads))
            behind_input = set(layer.reads) <= set(self.inputs)
            if not behind_input and shape != (1, 1) and not layer.fixed and not layer.shared:
                self.shapes[f"block/{layer.name}"] = shape
        for merge in self.merges:
            self.shapes[f"merge/{merge.name}"] = (len(merge.inputs),)
        for layer in self.layers:
            if layer.bypassable:
                self.shapes[f"bypass/{layer.name}"] = (1,)
        former = len(self.shapes)
        # By module path: the first call of what has a kernel or rank gene, and the names of all.
        self.kernels: dict[str, Node] = {}
        self.ranked: dict[str, Node] = {}
        self.calls: dict[str, list[str]] = {}
        for node in nodes:
            if sum(node.rings):
                self.kernels.setdefault(node.path, node)
            if node.ranks:
                self.ranked.setdefault(node.path, node)
            self.calls.setdefault(node.path, []).append(node.name)
        for path, node in self.kernels.items():
            self.shapes[f"kernel/{path}"] = (sum(node.rings),)
        for path, node in self.ranked.items():
            self.shapes[f"rank/{path}"] = (len(node.ranks),)
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        self.slices = {
            name: slice(int(end) - int(np.prod(shape)), int(end))
            for (name, shape), end in zip(self.shapes.items(), ends, strict=True)
        }
        self.length = int(ends[-1]) if len(ends) else 0
        # Of genomes that were packed when there were no kernel and rank genes.
        self.former_length = int(ends[former - 1]) if former else 0

    def blocks(self, groups: tuple[str, ...]) -> int:
        """Number of blocks of some groups, one after another."""
        return sum(self.groups[name].blocks for name in groups)

    @cached_property
    def droppable(self) -> frozenset[str]:
        """Groups that may go as a whole: whoever reads them reads something else beside."""
        needed = {g.name for g in self.groups.values() if g.frozen or g.least is not None}
        needed |= {layer.reads[0] for layer in self.layers if len(layer.reads) == 1}
        read = {name for layer in self.layers for name in layer.reads}
        return frozenset(read - needed)

    @cached_property
    def unbounded(self) -> GenomeLayout:
        """The same layout without bounds of widths."""
        bounded = any(g.least is not None or g.most is not None for g in self.groups.values())
        if not bounded:
            return self
        free = {n: replace(g, least=None, most=None) for n, g in self.groups.items()}
        return GenomeLayout(free, self.nodes)

    def teacher(self) -> np.ndarray:
        """The genome of the teacher: all True, `(length,)`."""
        return np.ones(self.length, dtype=bool)

    def unsearched(self, connections: Sequence[str]) -> np.ndarray:
        """`(length,)`: the bits of other kinds of connections than these; no student loses one."""
        bits = np.zeros(self.length, dtype=bool)
        for kind in CONNECTIONS.keys() - set(connections):
            for name, place in self.slices.items():
                bits[place] |= name.startswith(CONNECTIONS[kind])
        return bits

    def view(self, genome: np.ndarray, name: str) -> np.ndarray:
        """A writable view of one slice in its own shape."""
        return genome[self.slices[name]].reshape(self.shapes[name])

    def view_all(self, genomes: np.ndarray, name: str) -> np.ndarray:
        """One slice of many genomes `(n, length)`: `(n, *shape)`."""
        return genomes[:, self.slices[name]].reshape(len(genomes), *self.shapes[name])

    def pack(self, genome: np.ndarray) -> bytes:
        """The genome as bytes, eight bits a byte; kernel and rank bits with True as 0."""
        bits = genome.copy()
        bits[self.former_length :] ^= True
        return np.packbits(bits).tobytes()

    def unpack(self, packed: bytes) -> np.ndarray:
        """The inverse of `pack`; bytes without kernel and rank bits are read with these True.

        Raises:
            UserError: if the bytes have another length than this layout's genomes.
        """
        expected, former = ((n + 7) // 8 for n in (self.length, self.former_length))
        if len(packed) not in (former, expected):
            raise UserError(
                f"genome has {len(packed)} bytes, expected {expected} for this teacher; "
                "it was written for another teacher or layout"
            )
        bits = np.frombuffer(packed.ljust(expected, b"\0"), dtype=np.uint8)
        genome = np.unpackbits(bits, count=self.length).astype(bool)
        genome[self.former_length :] ^= True
        return genome

    def digest(self, genome: np.ndarray) -> str:
        """Hex digest of a genome (take it of the canonical form)."""
        return hashlib.sha256(self.pack(genome)).hexdigest()[:16]
