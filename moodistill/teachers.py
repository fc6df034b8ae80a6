"""Teacher weights on disk: half-precision safetensors, checked key by key when loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from moodistill.errors import UserError
from moodistill.files import write_atomic


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_atomic(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file so that a kill leaves the old file or the new one."""
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_atomic(path, save(contiguous, metadata))


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: if the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated: "
            "fetch or train it again"
        ) from error


def half_precision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of two and more dimensions in float16, the rest as they are, no batch counters."""
    return {
        key: value.half() if value.ndim > 1 and value.is_floating_point() else value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a teacher's weights into `model` (returned in eval mode, float32).

    Raises:
        UserError: if the file is unreadable or belongs to another architecture.
    """
    stored, _ = read_safetensors(path)
    stored = {k: v for k, v in stored.items() if not k.endswith("num_batches_tracked")}
    wanted = {
        k: tuple(v.shape)
        for k, v in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
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
    return model.eval()
