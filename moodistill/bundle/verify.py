"""Whether a bundle is whole, and an ONNX file safe to open."""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from moodistill.bundle.folder import EXPECTED, FORMAT, MANIFEST, MODEL, read_manifest
from moodistill.errors import UserError
from moodistill.onnx.runtime import pixels, session
from moodistill.onnx.writer import model_tensors

TOLERANCE = 1e-3
REQUIRED = (MODEL, "README.md", "run.py", "sample.npy")


@dataclass(frozen=True)
class Verified:
    """What was checked of a good folder.

    Attributes:
        files: that have the digest of the manifest.
        difference: largest, between the sample's answer here and the expected one.
    """

    student: str
    files: int
    difference: float


def checked_onnx(path: Path) -> bytes:
    """The bytes of an ONNX file that keeps its weights inside and passes onnx's checker.

    Raises:
        UserError: if it is missing, truncated, no ONNX file, or points to external data, which
            could be any file of this machine.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected an ONNX file"
        ) from error
    try:
        model = onnx.load_model_from_string(data)
        external = [
            tensor.name
            for tensor in model_tensors(model)
            if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data
        ]
        if not external:
            onnx.checker.check_model(data)
    except Exception as error:  # protobuf and the checker have their own classes
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} is no whole ONNX file ({reason}); export the student again"
        ) from error
    if external:
        raise UserError(
            f"{path} keeps tensor {external[0]!r} in another file; expected all weights inside: "
            "such a file is not opened"
        )
    return data


def verify_package(folder: Path) -> Verified:
    """Check a bundle against its manifest, and its sample against the expected answer.

    Raises:
        UserError: names the first file that disagrees.
    """
    manifest = _manifest(folder)
    try:
        for name, digest in manifest["files"].items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise UserError(f"{folder / MANIFEST} lists {name!r}; expected plain file names")
            _check_digest(folder / name, digest)
        model = checked_onnx(folder / MODEL)
        difference = _run_sample(folder, model, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{folder / MANIFEST} is not as this version writes it "
            f"({type(error).__name__}: {str(error)[:120]}); export the student again"
        ) from error
    return Verified(str(manifest["student"]), len(manifest["files"]), difference)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is no bundle: expected {MANIFEST} in it; name one that export wrote"
        )
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}); export the student again"
        ) from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')!r}, expected {FORMAT}; "
            "use the version of moodistill that wrote it"
        )
    files = manifest.get("files")
    missing = [name for name in REQUIRED if not isinstance(files, dict) or name not in files]
    if missing:
        raise UserError(f"{path} lists no digest of {missing[0]}; export the student again")
    return manifest


def _check_digest(path: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), but {MANIFEST} lists it; "
            "export the student again"
        ) from error
    if found != digest:
        raise UserError(
            f"{path} has SHA-256 {found[:12]}..., {MANIFEST} says {str(digest)[:12]}...; "
            "one of them was changed: export the student again"
        )


def _run_sample(folder: Path, model: bytes, manifest: dict[str, Any]) -> float:
    """Largest difference between the sample's answer here and the expected one."""
    entry, sample = manifest["input"], manifest["sample"]
    try:
        picture = np.load(folder / "sample.npy", allow_pickle=False, max_header_size=1000)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder / 'sample.npy'} is no readable array ({error}); export the student again"
        ) from error
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{folder / 'sample.npy'} is an archive, expected one array")
    try:
        run = session(model, threads=1)
        given = run.run(None, {entry["name"]: _feed(picture, entry)})
    except Exception as error:  # ONNX Runtime has an exception class for every status
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder / MODEL} does not run ({reason}); export the student again"
        ) from error
    # Bundles of earlier versions have one output, of classes.
    earlier = [{"name": manifest["output"], "kind": "classification"}]
    shipped = manifest.get("outputs", earlier)
    wanted = _expected(folder, sample, shipped)
    worst, exact = 0.0, manifest["precision"] == "fp32"  # INT8 kernels differ between processors
    for output, found in zip(shipped, given, strict=True):
        answer, expected = np.asarray(found)[0], wanted[output["name"]]
        if expected.shape != answer.shape:
            raise UserError(
                f"{folder / MODEL} answers with values {answer.shape}, {MANIFEST} expects "
                f"{expected.shape}; export the student again"
            )
        classes = output["kind"] == "classification"
        scale = 1.0 if classes else max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(answer - expected).max()) / scale
        worst = max(worst, difference)
        if classes and len(shipped) == 1:
            _check_class(folder, manifest, answer, difference)
        if exact and not difference <= TOLERANCE:
            raise UserError(
                f"{folder / MODEL} gives another {output['name']} for the sample than {MANIFEST} "
                f"expects (largest difference {difference:.1e}); do not use it here"
            )
    return worst


def _feed(array: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    """A batch for the model from the sample."""
    images = pixels(array[None]) if entry.get("pictures", True) else array[None]
    images = images.repeat(entry.get("batch") or 1, 0)
    if entry["kind"] != "uint8":
        images = images.astype(np.float32)
    if entry["kind"] == "normalised":
        shape = (1, -1, *[1] * (images.ndim - 2))
        mean, std = (np.float32(entry[name]).reshape(shape) for name in ("mean", "std"))
        images = (images / np.float32(255 if entry.get("pictures", True) else 1) - mean) / std
    return images


def _expected(
    folder: Path, sample: dict[str, Any], shipped: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """The expected outputs of the sample by name."""
    stored = sample.get("expected_file")
    if stored is None:
        return {shipped[0]["name"]: np.array(sample["expected"], dtype=float)}
    if stored != EXPECTED:
        raise UserError(f"{folder / MANIFEST} names {stored!r}; expected {EXPECTED}")
    try:
        with np.load(folder / EXPECTED, allow_pickle=False, max_header_size=1000) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder / EXPECTED} is no readable archive ({error}); export the student again"
        ) from error


def _check_class(
    folder: Path, manifest: dict[str, Any], answer: np.ndarray, difference: float
) -> None:
    """Refuse another class than the sample's, or other labels than classes."""
    sample, labels = manifest["sample"], manifest["labels"]
    if len(labels) != len(answer):
        raise UserError(
            f"{folder / MODEL} answers with {answer.shape[0]} values, {MANIFEST} expects "
            f"{len(sample['expected'])} and {len(labels)} labels; export the student again"
        )
    exact = manifest["precision"] == "fp32"
    if int(answer.argmax()) != sample["answer"] or (exact and not difference <= TOLERANCE):
        raise UserError(
            f"{folder / MODEL} answers class {int(answer.argmax())} to the sample, {MANIFEST} "
            f"expects {sample['answer']} (largest difference {difference:.1e}); do not use it here"
        )
