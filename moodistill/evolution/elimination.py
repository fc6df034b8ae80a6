"""The least value of a sum of small terms, by eliminating one variable after another.

Dynamic programming over any graph of terms (Dechter 1999, "Bucket elimination: a unifying framework
for reasoning"); over a chain it is Viterbi's algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

LARGEST_TABLE = 1_000_000  # entries; beyond that the sum is not minimised exactly
SWEEPS = 20


@dataclass(frozen=True)
class Term:
    """A part of the sum over some variables.

    Attributes:
        variables: names.
        values: one axis for each of them.
    """

    variables: tuple[str, ...]
    values: np.ndarray


Places = dict[str, int]  # of every variable's value


def total(terms: Sequence[Term], places: Mapping[str, int]) -> float:
    """The sum of all terms at some places."""
    return sum(float(t.values[tuple(places[name] for name in t.variables)]) for t in terms)


def minimise(terms: Sequence[Term]) -> Places:
    """The place of every variable's value for which the sum of the terms is least.

    Exact, unless a table of the elimination would be too large (networks in which every layer reads
    many others): then one variable after another is set to its best while the sum falls.
    """
    order = _order(tuple((term.variables, term.values.shape) for term in terms))
    if order is None:
        return _descend(terms)
    left = list(terms)
    steps: list[tuple[str, Term]] = []
    for name in order:
        joined = _joined([term for term in left if name in term.variables], name)
        steps.append((name, joined))
        left = [term for term in left if name not in term.variables]
        left.append(Term(joined.variables[1:], joined.values.min(axis=0)))
    chosen: Places = {}
    for name, term in reversed(steps):
        line: Any = (slice(None), *(chosen[other] for other in term.variables[1:]))
        chosen[name] = int(term.values[line].argmin())
    return chosen


Scopes = tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]  # variables of terms, and their sizes


@lru_cache(maxsize=512)
def _order(scopes: Scopes) -> tuple[str, ...] | None:
    """Variables in the order of their elimination, each time the one of the smallest table.

    None if a table would be too large. The same for all terms over the same variables.
    """
    sizes = {n: size for names, shape in scopes for n, size in zip(names, shape, strict=True)}
    left = [set(names) for names, _ in scopes]
    order = []
    while names := set().union(*left):
        tables = {n: set().union(*(scope for scope in left if n in scope)) for n in names}
        name = min(sorted(names), key=lambda n: math.prod(sizes[m] for m in tables[n]))
        if math.prod(sizes[m] for m in tables[name]) > LARGEST_TABLE:
            return None
        order.append(name)
        left = [scope for scope in left if name not in scope] + [tables[name] - {name}]
    return tuple(order)


def _descend(terms: Sequence[Term]) -> Places:
    """Coordinate descent from the largest widths."""
    sizes: dict[str, int] = {}
    of: dict[str, list[Term]] = {}
    for term in terms:
        sizes |= dict(zip(term.variables, term.values.shape, strict=True))
        for name in term.variables:
            of.setdefault(name, []).append(term)
    # The last place of a width is the full one; the first choice is a layer as it is.
    places = {n: 0 if n.startswith("choice/") else size - 1 for n, size in sizes.items()}
    for _ in range(SWEEPS):
        before = dict(places)
        for name in places:
            line = sum(
                t.values[tuple(slice(None) if n == name else places[n] for n in t.variables)]
                for t in of[name]
            )
            places[name] = int(np.argmin(line))
        if places == before:
            break
    return places


def _joined(terms: Sequence[Term], first: str) -> Term:
    """The sum of some terms, with one of their variables on the first axis."""
    names = [first]
    for term in terms:
        names += [name for name in term.variables if name not in names]
    total: np.ndarray | float = 0.0
    for term in terms:
        order = [term.variables.index(name) for name in names if name in term.variables]
        shape = [
            term.values.shape[term.variables.index(name)] if name in term.variables else 1
            for name in names
        ]
        total = total + term.values.transpose(order).reshape(shape)
    return Term(tuple(names), np.asarray(total))
