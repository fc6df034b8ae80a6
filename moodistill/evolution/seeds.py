"""Genomes that are best by the tables: what a search begins with.

For a price `p` of cost, the widths, kernels and ranks of all layers minimise the sum of

    errors of all changes + p * cost relative to the teacher's

A layer's term depends on the widths that it reads and writes, so that the sum is minimised exactly
by dynamic programming over the graph of layers (eliminating one width after another, as for any
sum of small terms: Dechter 1999, "Bucket elimination"). Bypasses and merge edges are chosen around
it, one at a time while the sum falls. Falling prices give a spread of genomes from small to large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moodistill.evolution.elimination import Places, Term, minimise, total
from moodistill.evolution.operators.widths import snap
from moodistill.evolution.tables import Tables, full_rank, kernel_shapes, most_important
from moodistill.genome.canonical import canonical
from moodistill.genome.kernels import write_kernel
from moodistill.genome.layout import GenomeLayout, Node
from moodistill.genome.ranks import write_rank
from moodistill.genome.resolve import resolve

LEVELS = 20  # of a width
PARAMETER_SHARES = (0.0, 0.5)  # of the cost; the rest is latency
MOST_TIMES_FASTER = 32.0  # smaller students do little more than guess before they are trained
PRICES = np.geomspace(300.0, 0.003, 40)


def find_seeds(layout: GenomeLayout, tables: Tables, step: int, kept: np.ndarray) -> np.ndarray:
    """`(n, length)` different canonical genomes, from the slowest to the fastest.

    For every price, those whose cost is latency alone and those in which parameters count as much.
    """
    seeding = Seeding(layout, tables, step, kept)
    found: dict[bytes, np.ndarray] = {}
    for parameters in PARAMETER_SHARES:
        for genome in seeding.genomes(parameters):
            if not genome.all():
                found.setdefault(np.packbits(genome).tobytes(), genome)
    genomes = np.array(list(found.values()), dtype=bool).reshape(-1, layout.length)
    times = tables.estimate(layout, genomes)[1]
    fast = times >= seeding.teacher_ms / MOST_TIMES_FASTER
    return genomes[fast][np.argsort(-times[fast], kind="stable")]


@dataclass(frozen=True)
class _Choice:
    """A kernel and a rank of one layer with its error."""

    taps: tuple[int, ...]
    rank: int | None
    error: float


class Seeding:
    """Solves for the best genomes of a layout by its tables.

    Args:
        layout: of the teacher.
        tables: its own.
        step: SIMD step.
        kept: `(length,)` bits that are never changed.
    """

    def __init__(self, layout: GenomeLayout, tables: Tables, step: int, kept: np.ndarray) -> None:
        self.layout, self.tables, self.step, self.kept = layout, tables, step, kept
        self.domains = {
            name: self._domain(name) for name in layout.groups if f"mask/{name}" in layout.slices
        }
        self.choices = {
            node.name: self._choices(node) for node in layout.nodes if self._has_taps(node)
        }
        errors, times = tables.estimate(layout, layout.teacher()[None])
        self.teacher_ms = float(times[0])
        self.teacher_weights = sum(
            math.prod(node.kernel) * self.outputs(node) * self.inputs(node)
            for node in layout.layers
        )
        self._wirings: dict[bytes, _Wired] = {}
        self._parts: dict[tuple[str, tuple[str, ...]], _Part] = {}

    @staticmethod
    def _has_taps(node: Node) -> bool:
        return node.kind == "layer" or (node.kind == "channelwise" and bool(node.kernel))

    def outputs(self, node: Node) -> int:
        """Channels that a node of the teacher gives."""
        pairs = zip(node.groups, node.lanes, strict=True)
        return sum(self.layout.groups[name].size * lanes for name, lanes in pairs)

    def inputs(self, node: Node) -> int:
        """Values that a place of a layer's output is summed of in the teacher, without taps."""
        source = self.layout.by_name[node.inputs[0]]
        return self.outputs(source) * source.repeat

    def _domain(self, name: str) -> np.ndarray:
        """Widths of a group that are tried, ascending, about evenly on a logarithmic axis."""
        group = self.layout.groups[name]
        if self.kept[self.layout.slices[f"mask/{name}"]].any():
            return np.array([group.size])
        step = group.step(self.step)
        least, most = max(group.least or 1, min(step, group.size)), group.most or group.size
        shares = np.geomspace(min(step, group.size), group.size, LEVELS)
        widths = {snap(float(share), group.size, step) for share in shares}
        return np.array(sorted(w for w in widths if least <= w <= most) or [group.size])

    def _choices(self, node: Node) -> list[_Choice]:
        """Kernels and ranks that a layer may have, with what they cost by themselves."""
        shapes: list[tuple[tuple[int, ...], float]] = [(node.kernel, 0.0)]
        tables = self.tables
        if node.path in self.layout.kernels and not self._fixed(f"kernel/{node.path}"):
            tried = tables.errors.get(f"kernel/{node.path}", {})
            shapes += [(s, tried[s]) for s in kernel_shapes(node) if s in tried]
        ranks: list[tuple[int | None, float]] = [(None, 0.0)]
        gene = f"rank/{node.path}"
        if node.path in self.layout.ranked and not self._fixed(gene):
            whole = np.array([rank for rank in node.ranks if rank % self.step == 0])
            lost = tables.size_error(gene, whole, full_rank(node))
            ranks += list(zip(whole.tolist(), lost.tolist(), strict=True))
        return [_Choice(t, r, e + f) for t, e in shapes for r, f in ranks]

    def _fixed(self, name: str) -> bool:
        return bool(self.kept[self.layout.slices[name]].all())

    def genomes(
        self, parameters: float, prices: Sequence[float] = tuple(PRICES)
    ) -> Iterator[np.ndarray]:
        """Canonical genomes `(length,)` for falling prices, from small to large.

        `parameters` is their share of the cost; the rest is latency.
        """
        wiring = self.layout.teacher()
        for price in prices:
            wiring = self._rewired(wiring, price, parameters)
            wired = self._wired(wiring)
            yield canonical(self.layout, wired.genome(wired.solve(price, parameters)), self.step)

    def _wired(self, wiring: np.ndarray) -> _Wired:
        key = np.packbits(wiring).tobytes()
        if key not in self._wirings:
            self._wirings[key] = _Wired(self, wiring)
        return self._wirings[key]

    @cached_property
    def switches(self) -> list[tuple[str, int]]:
        """Bypasses and merge edges that may go, by gene and place."""
        found = []
        for gene, levels in self.tables.errors.items():
            if gene.startswith(("bypass/", "merge/")):
                found += [(gene, level[0]) for level in levels]
        return found

    def _rewired(self, wiring: np.ndarray, price: float, parameters: float) -> np.ndarray:
        """`(length,)` wiring with those bypasses and merge edges switched that lower the sum."""
        best = self._wired(wiring).solve(price, parameters).total
        gains = []
        for gene, place in self.switches:
            tried = self._switched(wiring, gene, place)
            if tried is not None:
                gains.append((self._wired(tried).solve(price, parameters).total, gene, place))
        # The best first, each tried once more beside those before it.
        for alone, gene, place in sorted(gains):
            tried = self._switched(wiring, gene, place) if alone < best + price else None
            if tried is None:
                continue
            found = self._wired(tried).solve(price, parameters).total
            if found < best - 1e-9:
                best, wiring = found, tried
        return wiring

    def _switched(self, wiring: np.ndarray, gene: str, place: int) -> np.ndarray | None:
        """A wiring with one bit switched; None where an Add would lose its last input."""
        tried = wiring.copy()
        view = self.layout.view(tried, gene)
        view[place] = not view[place]
        return tried if view.any() or gene.startswith("bypass/") else None

    def part(self, node: Node, reads: tuple[str, ...]) -> _Part:
        """A layer that reads these groups; made once."""
        key = node.name, reads
        if key not in self._parts:
            self._parts[key] = _Part(self, node, reads)
        return self._parts[key]


@dataclass(frozen=True)
class _Solution:
    """The least sum, and the place in its domain of every variable."""

    total: float
    places: Places


class _Wired:
    """The sum for one choice of bypasses and merge edges."""

    def __init__(self, seeding: Seeding, wiring: np.ndarray) -> None:
        self.seeding, self.wiring = seeding, wiring
        layout, tables = seeding.layout, seeding.tables
        structure = resolve(layout, wiring, seeding.step) if not wiring.all() else None
        self.error = 0.0
        for gene, place in seeding.switches:
            if not layout.view(wiring, gene)[place]:
                self.error += tables.errors[gene][(place,)]
        self.parts: list[_Part] = []
        read: set[str] = set()
        for node in layout.nodes:
            if node.name not in seeding.choices:
                continue
            if structure is not None and node.name not in structure.live - structure.bypassed:
                continue
            reads: tuple[str, ...] = ()
            if node.kind == "layer":
                reads = node.reads if structure is None else structure.source[node.name]
            self.parts.append(seeding.part(node, reads))
            read |= {*node.groups, *reads}
        self.unary = [
            Term((name,), tables.size_error(f"mask/{name}", domain, layout.groups[name].size))
            for name, domain in seeding.domains.items()
            if name in read
        ]

    def solve(self, price: float, parameters: float) -> _Solution:
        """The best widths, kernels and ranks for this wiring."""
        terms = [*self.unary]
        for part in self.parts:
            terms += part.terms(price, parameters)
        places = minimise(terms)
        return _Solution(self.error + total(terms, places), places)

    def genome(self, solution: _Solution) -> np.ndarray:
        """`(length,)` of a solution."""
        seeding, layout, places = self.seeding, self.seeding.layout, solution.places
        genome = self.wiring.copy()
        for name, domain in seeding.domains.items():
            if name in places:
                mask = most_important(layout.groups[name], int(domain[places[name]]))
                layout.view(genome, f"mask/{name}")[:] = mask
        for part in self.parts:
            node, choice = part.node, part.chosen(places)
            if choice.taps != node.kernel:
                view = layout.view(genome, f"kernel/{node.path}")
                write_kernel(view, node.kernel, node.rings, choice.taps)
            if choice.rank is not None:
                write_rank(layout.view(genome, f"rank/{node.path}"), node.ranks, choice.rank)
        return genome


class _Part:
    """One layer of the sum.

    A layer that reads several groups (a concatenation) is a sum over them, each with as many of
    the inputs as it has channels: exact where the cost is proportional to inputs times outputs.
    """

    def __init__(self, seeding: Seeding, node: Node, reads: tuple[str, ...]) -> None:
        self.node, self.choices = node, seeding.choices[node.name]
        sizes = [seeding.layout.groups[g].size for g in reads]
        # With several terms the choice of kernel and rank is a variable of its own.
        self.shared = len(reads) > 1 and len(self.choices) > 1
        self.tables = [
            self._table(seeding, (group,), size / sum(sizes))
            for group, size in zip(reads, sizes, strict=True)
        ] or [self._table(seeding, (), 1.0)]
        self._best: np.ndarray | None = None
        self._made: tuple[tuple[float, float], list[Term]] | None = None

    def _table(
        self, seeding: Seeding, reads: tuple[str, ...], share: float
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
        """Variables; error, latency and parameters `(choices, widths...)`, relative."""
        layout, times, node = seeding.layout, seeding.tables.times, self.node
        used = dict.fromkeys((*node.groups, *reads))
        variables = tuple(name for name in used if name in seeding.domains)
        axes = np.meshgrid(*(seeding.domains[name] for name in variables), indexing="ij")
        shape = axes[0].shape if axes else ()
        widths = {name: np.full(shape, layout.groups[name].size) for name in used}
        widths |= dict(zip(variables, axes, strict=True))
        pairs = zip(node.groups, node.lanes, strict=True)
        outputs = sum((widths[name] * lanes for name, lanes in pairs), np.zeros(shape))
        inputs = np.ones(shape)
        if node.kind == "layer":
            inputs = seeding.inputs(node) * widths[reads[0]] / layout.groups[reads[0]].size
        pixels = seeding.tables.pixels[node.name]
        errors, costs, weights = [], [], []
        for choice in self.choices:
            taps = float(math.prod(choice.taps))
            cost, weight = times.layer(inputs, outputs, taps, pixels), inputs * outputs * taps
            error = np.full(shape, choice.error)
            if choice.rank is not None:
                rank = np.full(shape, choice.rank)
                thin = choice.rank * (inputs * taps + outputs)
                error[thin >= weight] = np.inf  # a rank that saves nothing
                cost = times.layer(inputs, rank, taps, pixels)
                cost = cost + times.layer(rank, outputs, 1.0, pixels)
                weight = thin
            errors.append(error)
            costs.append(cost / seeding.teacher_ms)
            weights.append(weight / seeding.teacher_weights)
        return (
            variables,
            share * np.array(errors),
            share * np.array(costs),
            share * np.array(weights),
        )

    def terms(self, price: float, parameters: float) -> list[Term]:
        """Its part of the sum, with the best kernel and rank for all widths."""
        if self._made is None or self._made[0] != (price, parameters):
            made = []
            for variables, errors, costs, weights in self.tables:
                total = errors + price * ((1.0 - parameters) * costs + parameters * weights)
                if self.shared:
                    made.append(Term((f"choice/{self.node.name}", *variables), total))
                else:
                    self._best = total.argmin(axis=0)
                    made.append(Term(variables, total.min(axis=0)))
            self._made = (price, parameters), made
        return self._made[1]

    def chosen(self, places: Places) -> _Choice:
        """Kernel and rank for the widths of a solution for the last price."""
        if self.shared:
            return self.choices[places[f"choice/{self.node.name}"]]
        if len(self.choices) == 1:
            return self.choices[0]
        assert self._best is not None
        return self.choices[int(self._best[tuple(places[n] for n in self.tables[0][0])])]
