"""Teacher weights on disk: found in a checkpoint, and checked key by key when loaded."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.teacher.weight_sets import WeightSet, choose_set, find_sets
from moodistill.teacher.weights_file import read_weights_file


def network_digest(network: nn.Module) -> str:
    """Hex digest of what a network computes, as far as code and modules tell; not its weights.

    What is cached of a teacher hangs on it too: a corrected `forward` may have the same weights.
    It begins with torch's version, which describes networks in words of its own.
    """
    described = f"{getattr(network, 'code', '')}{network}"
    return f"{torch.__version__}/{hashlib.sha256(described.encode()).hexdigest()[:16]}"


def is_other_network(known: str, found: str) -> bool:
    """Whether two digests are of different networks; of two versions of torch nobody can tell."""
    return known.partition("/")[0] == found.partition("/")[0] and known != found


def half_precision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of two and more dimensions in float16, the rest as they are, no batch counters."""
    return {
        key: value.half() if value.ndim > 1 and value.is_floating_point() else value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The largest set of tensors in a file, as they are called there.

    Raises:
        UserError: if the file is unreadable or holds no tensors.
    """
    found = find_sets(path, read_weights_file(path))
    return max(found, key=lambda one: len(one.tensors)).tensors


def load_weights(
    model: nn.Module,
    path: Path,
    key: str | None = None,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Load a teacher's weights into `model` (returned in eval mode, float32).

    The file is safetensors, or what `torch.save` wrote: a state dict, or a checkpoint that holds
    one anywhere, under any name. Of several that fit, an average of weights (EMA, SWA) is taken,
    and a word says so. Half precision and double, in the file or of `model`, become float32; what
    wrappers put in front of names (`module.`, `_orig_mod.`, `model.`) is taken off.

    Args:
        model: the network.
        path: of the file.
        key: which set of weights to take, where the file holds several: `model_ema`.
        say: told which of several sets was taken; None writes it to stderr.

    Raises:
        UserError: if the file is unreadable, belongs to another architecture (names the keys), or
            holds several sets of weights between which nothing decides.
    """
    wanted = {name: tuple(v.shape) for name, v in model.state_dict().items() if not _counts(name)}
    chosen, note = choose_set(path, read_weights_file(path), wanted, key)
    _check_fit(model, path, chosen, wanted)
    if note:
        (say or _to_stderr)(note)
    state = {name: value for name, value in chosen.tensors.items() if name in wanted}
    for name, value in model.state_dict().items():
        if name in state and value.is_floating_point():  # not an index or a mask
            state[name] = _plain_float(path, name, state[name])
    model = model.float()
    model.load_state_dict(state, strict=False)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; train the teacher again")
    return model.eval()


def _plain_float(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, if it is one of floating-point numbers."""
    kind = (
        "quantised" if value.is_quantized
        else "on no device, without values" if value.is_meta
        else "sparse" if value.layout != torch.strided
        else "" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    )  # fmt: skip
    if kind:
        raise UserError(
            f"{path}: {name} is {kind}; expected floating-point numbers, as the state dict of the "
            "network has them that was trained"
        )
    return value.float()


def _counts(name: str) -> bool:
    """Whether a tensor only counts batches, so that a network without it is the same."""
    return name.endswith("num_batches_tracked")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_fit(
    model: nn.Module, path: Path, chosen: WeightSet, wanted: dict[str, tuple[int, ...]]
) -> None:
    misfit = chosen.misfit(wanted)
    if not misfit:
        return
    problems = []
    if misfit.missing:
        problems.append(f"{len(misfit.missing)} keys missing (first: {misfit.missing[0]})")
    if misfit.extra:
        problems.append(f"{len(misfit.extra)} unknown keys (first: {misfit.extra[0]})")
    if misfit.shapes:
        name = misfit.shapes[0]
        problems.append(
            f"{len(misfit.shapes)} shapes differ (first: {name} is "
            f"{tuple(chosen.tensors[name].shape)}, expected {wanted[name]})"
        )
    of = f" ({chosen.label})" if chosen.label else ""
    raise UserError(
        f"{path}{of} does not fit {type(model).__name__}: {'; '.join(problems)}; "
        "give the weights of the same architecture"
    )
