"""Teacher weights on disk: half-precision safetensors, checked key by key when loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.io.tensorfile import read_safetensors


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
    """A state dict as people keep it: safetensors, or a `.pt`, `.pth`, `.ckpt` of tensors.

    Of a checkpoint that holds more, the entry `state_dict` or `model` is taken (Lightning, timm and
    most training scripts). Nothing is unpickled but tensors and plain containers.

    Raises:
        UserError: if the file is unreadable or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a teacher's weights")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the archive's damage leads to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be read as weights ({reason[0][:160]}); expected safetensors, or what "
            "torch.save(model.state_dict(), path) writes"
        ) from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(
        found, dict
    ) else {}  # fmt: skip
    if not tensors:
        raise UserError(
            f"{path} holds no state dict; expected what torch.save(model.state_dict(), path) writes"
        )
    return tensors


def _without_prefix(
    stored: dict[str, torch.Tensor], wanted: Collection[str]
) -> dict[str, torch.Tensor]:
    """Strip what wrappers put in front of every key (`module.`, `model.`, ...), if it then fits."""
    for _ in range(3):
        if set(wanted) & set(stored):
            break
        firsts = {key.split(".", 1)[0] for key in stored if "." in key}
        # Lightning keeps losses and metrics beside the network: the prefix that fits is the one.
        for first in sorted(firsts):
            inner = {
                key.split(".", 1)[1]: value
                for key, value in stored.items()
                if key.startswith(f"{first}.")
            }
            if set(wanted) & set(inner) or len(firsts) == 1:
                stored = inner
                break
        else:
            break
    return stored


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a teacher's weights into `model` (returned in eval mode, float32).

    Half precision is widened; prefixes of wrappers (`module.`, `model.`) are taken off.

    Raises:
        UserError: if the file is unreadable or belongs to another architecture; names the keys.
    """
    wanted = {
        k: tuple(v.shape)
        for k, v in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    stored = _without_prefix(read_state(path), wanted)
    stored = {k: v for k, v in stored.items() if not k.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(stored))
    extra = sorted(set(stored) - set(wanted))
    shapes = sorted(k for k in set(wanted) & set(stored) if tuple(stored[k].shape) != wanted[k])
    if missing or extra or shapes:
        problems = []
        if missing:
            problems.append(f"{len(missing)} keys missing (first: {missing[0]})")
        if extra:
            problems.append(f"{len(extra)} unknown keys (first: {extra[0]})")
        if shapes:
            key = shapes[0]
            problems.append(
                f"{len(shapes)} shapes differ (first: {key} is {tuple(stored[key].shape)}, "
                f"expected {wanted[key]})"
            )
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}; "
            "give the weights of the same architecture"
        )
    model.load_state_dict({k: v.float() for k, v in stored.items()}, strict=False)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; train the teacher again")
    return model.float().eval()
