"""Sets of weights in a checkpoint: found under any name, and one of them chosen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moodistill.errors import UserError
from moodistill.teacher.weights_file import StandIn, network_refusal

Shapes = Mapping[str, tuple[int, ...]]

DEPTH = 4  # of dicts within dicts
# What DataParallel, torch.compile, FSDP and activation checkpoints put into names.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGES = {"ema", "swa", "averaged", "avg", "average", "shadow"}
# What optimizers keep for each tensor of a network.
OPTIMIZER = {
    "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg",
    "grad_avg", "acc_delta", "sum",
}  # fmt: skip
# Beside weights: batches counted by BatchNorm, operations counted by the package thop.
IGNORED = ("num_batches_tracked", "total_ops", "total_params")


@dataclass(frozen=True)
class Misfit:
    """How a set differs from what a network wants; names in order."""

    missing: list[str]
    extra: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.shapes)


@dataclass(frozen=True)
class WeightSet:
    """Tensors by name, and where in the file they are.

    Attributes:
        label: keys of the file and a prefix of names, joined by points; empty for the whole file.
        tensors: by name.
    """

    label: str
    tensors: dict[str, torch.Tensor]

    @property
    def averaged(self) -> bool:
        """Whether its name says that it is an average over training."""
        return bool(AVERAGES & set(re.split(r"[^a-z]+", self.label.lower())))

    @property
    def name(self) -> str:
        """The label, in a sentence."""
        return self.label or "the top level"

    def misfit(self, wanted: Shapes) -> Misfit:
        """How it differs from the names and shapes of a network."""
        found = {n: v for n, v in self.tensors.items() if n in wanted or not n.endswith(IGNORED)}
        return Misfit(
            sorted(set(wanted) - set(found)),
            sorted(set(found) - set(wanted)),
            sorted(n for n in set(wanted) & set(found) if tuple(found[n].shape) != wanted[n]),
        )

    def under_prefixes(self, wanted: Shapes) -> list[WeightSet]:
        """The parts of it that stand under one prefix and have names of a network."""
        found: list[WeightSet] = []
        for tensors in (self.tensors, _unwrapped(self.tensors, wanted)):
            prefixes: Counter[str] = Counter()
            for name in tensors:
                for start in _starts(name):
                    if name[start:] in wanted:
                        prefixes[name[:start]] += 1
            for prefix in prefixes:
                inner = {n[len(prefix) :]: v for n, v in tensors.items() if n.startswith(prefix)}
                words = [w for w in prefix.split(".") if w and w not in WRAPPERS]
                label = ".".join([*filter(None, [self.label]), *words])
                found.append(WeightSet(label, inner))
            if any(not one.misfit(wanted) for one in found):
                break  # names need not be unwrapped
        return found

    def same(self, other: WeightSet) -> bool:
        """Whether the other one has the same tensors."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(value, other.tensors[name]) for name, value in self.tensors.items()
        )


def _starts(name: str) -> Iterator[int]:
    """Where a name begins, without the first words of it."""
    yield 0
    for match in re.finditer(r"\.", name):
        yield match.end()


def _unwrapped(tensors: dict[str, torch.Tensor], wanted: Shapes) -> dict[str, torch.Tensor]:
    """Without the names of wrappers, wherever they stand in a name."""
    words = WRAPPERS - {word for name in wanted for word in name.split(".")}
    bare = {".".join(w for w in n.split(".") if w not in words): v for n, v in tensors.items()}
    return bare if len(bare) == len(tensors) else tensors


def find_sets(path: Path, tree: Any) -> list[WeightSet]:
    """All dicts of tensors in what was read of the file `path`.

    Raises:
        UserError: if there are none.
    """
    walked = list(_walk(tree, ()))
    found = [one for one in walked if not OPTIMIZER.issuperset(one.tensors)]
    if walked and not found:
        raise UserError(
            f"{path} cannot be read as weights: it holds the state of an optimizer alone; expected "
            "what torch.save(model.state_dict(), path) writes"
        )
    if not found:
        raise _no_weights(path, tree)
    return found


def _no_weights(path: Path, tree: Any) -> UserError:
    """Of a file in which no tensor has a name of the network, or none at all."""
    network = _pickled_network(tree)
    if network is not None:
        return network_refusal(path, network)
    held = tree.origin if isinstance(tree, StandIn) else type(tree).__name__
    return UserError(
        f"{path} cannot be read as weights: it holds no state dict (a {held}); expected what "
        "torch.save(model.state_dict(), path) writes"
    )


def _pickled_network(tree: Any) -> StandIn | None:
    values = tree.values() if isinstance(tree, dict) else [tree]
    return next((one for one in values if isinstance(one, StandIn) and one.is_network), None)


def _walk(tree: Any, place: tuple[str, ...]) -> Iterator[WeightSet]:
    if isinstance(tree, dict):
        tensors = {
            k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, torch.Tensor)
        }
        if tensors:
            yield WeightSet(".".join(place), tensors)
        inner = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        inner = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return
    if len(place) < DEPTH:
        for key, value in inner:
            yield from _walk(value, (*place, key))


def choose_set(
    path: Path, tree: Any, wanted: Shapes, key: str | None = None
) -> tuple[WeightSet, str]:
    """The set that a network is to have, and a word on it if there was a choice.

    One that does not fit is given only if none does: the one with most of the network's names.

    Args:
        path: of the file.
        tree: what was read of it.
        wanted: names and shapes of the network.
        key: the label of the set to take, or the first words of it.

    Raises:
        UserError: if there is no set `key` or none at all, or several differ and none or more than
            one is an average.
    """
    found = find_sets(path, tree)
    candidates = [part for one in found for part in one.under_prefixes(wanted)]
    if not candidates and _pickled_network(tree) is not None:
        raise _no_weights(path, tree)
    known = candidates or found
    if key is not None:
        known = [one for one in known if one.label == key or one.label.startswith(f"{key}.")]
        if not known:
            labels = dict.fromkeys(one.label for one in candidates or found if one.label)
            raise UserError(
                f"{path} has no weights called {key!r}; expected one of "
                f"{', '.join(labels) or 'none: leave out `weights_key`'}"
            )
    fitting = _distinct([one for one in known if not one.misfit(wanted)])
    if not fitting:
        return max(known, key=lambda one: len(set(wanted) & set(one.tensors))), ""
    averages = [one for one in fitting if one.averaged]
    if len(fitting) == 1:
        return fitting[0], _passed_over(path, fitting[0], candidates, wanted, key)
    names = ", ".join(one.name for one in fitting)
    if len(averages) != 1:
        raise UserError(
            f"{path} holds {len(fitting)} different sets of weights that fit ({names}); choose one "
            f"by its key as `weights_key`, such as {fitting[-1].label}"
        )
    others = [one.label for one in fitting if one is not averages[0] and one.label]
    other = f" (the key {others[0]} names the other)" if others else ""
    return averages[0], (
        f"{path} holds {names}: {averages[0].name} is taken, the average over training{other}"
    )


def _passed_over(
    path: Path, taken: WeightSet, known: Sequence[WeightSet], wanted: Shapes, key: str | None
) -> str:
    """A word on an average that is in the file but does not fit; empty if there is none."""
    if key is not None or taken.averaged:
        return ""
    for one in known:
        misfit = one.misfit(wanted)
        if one.averaged and misfit and len(set(wanted) & set(one.tensors)) > len(wanted) / 2:
            first = (misfit.missing or misfit.extra or misfit.shapes)[0]
            return (
                f"{path} holds {one.name} too, but it does not fit ({first}): {taken.name} is taken"
            )
    return ""


def _distinct(sets: Sequence[WeightSet]) -> list[WeightSet]:
    """Those with tensors of their own, the first of each."""
    kept: list[WeightSet] = []
    for one in sets:
        if not any(one.same(other) for other in kept):
            kept.append(one)
    return kept
