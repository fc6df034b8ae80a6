"""Tensors in the cache, each file with the digest of what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from moodistill.errors import UserError
from moodistill.io.cache_dir import default_cache_dir as default_cache_dir
from moodistill.io.cache_dir import writing
from moodistill.io.tensorfile import read_safetensors, save_atomic


def content_digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Hex SHA-256 over all tensors and metadata but the digest itself."""
    content = hashlib.sha256()
    for key in sorted(metadata):
        if key != "digest":
            content.update(repr((key, metadata[key])).encode())
    for key in sorted(tensors):
        array = tensors[key].detach().contiguous().numpy()
        content.update(repr((key, array.shape, str(array.dtype))).encode())
        content.update(array.tobytes())
    return content.hexdigest()


def save_cached(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file of the cache.

    Raises:
        UserError: if the cache cannot be written.
    """
    with writing(path):
        save_atomic(tensors, path, {"digest": content_digest(tensors, {})})


def read_cached(path: Path) -> dict[str, torch.Tensor]:
    """What `save_cached` wrote.

    Raises:
        UserError: if the file is damaged; whoever reads the cache makes it again.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("digest") != content_digest(tensors, {}):
        raise UserError(f"{path} does not have the digest it states; delete it")
    return tensors
