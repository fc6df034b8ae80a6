"""Digests of data: the same whether images are held or streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from moodistill.data.images import ImageData, Split, sha256_array
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, batches, digest_each


def content(splits: Mapping[str, Split]) -> str:
    """Digests of the inputs (made of those of each one) and of the targets, split by split."""
    return _content(splits, digest_each)


def pictures_digest(
    splits: Mapping[str, Split],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    preparation: Preparation | None,
) -> str:
    """Of pictures with their normalisation, on which all that is cached of a teacher depends."""
    return _digest(content(splits), splits["train"], mean, std, preparation)


def former_digest(data: ImageData) -> str:
    """What an earlier version had for the digest: of all pixels at once, which must be read."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    pixels = _content(splits, lambda images: (one.tobytes() for one in batches(images, 256)))
    return _digest(pixels, data.train, data.mean, data.std, data.preparation)


def _content(splits: Mapping[str, Split], parts_of: Callable[[Images], Iterable[bytes]]) -> str:
    found = []
    for split in splits.values():
        inputs = hashlib.sha256()
        for part in parts_of(split.images):
            inputs.update(part)
        found.append(inputs.hexdigest())
        if isinstance(split.labels, dict):
            found += [f"{name}{sha256_array(a)}" for name, a in sorted(split.labels.items())]
        else:
            found.append(sha256_array(split.labels))
    return "".join(found)


def _digest(
    content: str,
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    preparation: Preparation | None,
) -> str:
    made_of = f"{content} {mean} {std}"
    _, height, width, _ = split.images.shape
    if preparation not in (None, Preparation(size=(height, width))):
        made_of += f" {preparation}"
    return hashlib.sha256(made_of.encode()).hexdigest()
