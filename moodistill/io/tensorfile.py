"""Tensors in safetensors files, written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic


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
