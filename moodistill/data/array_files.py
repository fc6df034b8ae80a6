"""Arrays from files: one `.npz` of all splits, or a folder with one folder of `.npy` a class."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.arrangement import NAMES, class_of, cut_anew, split_folders
from moodistill.data.arrays import from_arrays
from moodistill.data.datasets import from_splits
from moodistill.data.images import ImageData, Metric, Split, fraction_right
from moodistill.data.pixels import MODES
from moodistill.data.targets import stacked
from moodistill.data.walk import files_below
from moodistill.errors import UserError

SUFFIX = ".npy"
TABLE = ("file", "label")  # the columns of a table that are read


def holds_arrays(path: Path) -> bool:
    """Whether data are arrays: a `.npz` or `.csv` file, or a folder that holds `.npy` mostly."""
    if path.is_file():
        return path.suffix in (".npz", ".csv")
    if not path.is_dir():
        return False
    suffixes = [found.suffix for found in files_below(path)]
    return 2 * suffixes.count(SUFFIX) > len(suffixes)


def load_arrays(
    path: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: Metric = fraction_right,
    heads: Any = None,
) -> ImageData:
    """Arrays of a file or folder.

    A `.npz` holds `x_train`, `y_train`, `x_validation`, `y_validation` and perhaps `x_test` and
    `y_test`, or `x` and `y`, which are cut; without a `y` inputs have no labels. `y_<output>` (and
    `y_<output>_train`) are the targets of several outputs. A folder is arranged like one of images
    (`load_image_folder`), with one `.npy` an input. A `.csv` table has the columns `file`, `label`
    (a name or a number) and perhaps `split`, its files beside it. uint8 arrays `(N, H, W, C)` with
    1, 3 or 4 channels are pictures.

    Raises:
        UserError: names the file and what was expected.
    """
    path = Path(path)
    if path.suffix == ".npz":
        splits, names = _of_archive(path), None
    elif path.suffix == ".csv":
        splits, names = _of_table(path, heads)
    else:
        splits, names = _of_folder(path)
    if all(_are_pictures(split.images[:]) for split in splits.values()):
        return from_splits(path.stem, splits, names, mean, std, metric, heads=heads)
    return from_arrays(path.resolve().name, splits, names, mean, std, metric, heads)


def _are_pictures(inputs: np.ndarray) -> bool:
    return inputs.dtype == np.uint8 and inputs.ndim == 4 and inputs.shape[-1] in MODES


def _of_archive(path: Path) -> dict[str, Split]:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz archive ({error})") from error
    known = {word: split for split, words in NAMES.items() for word in words}
    splits: dict[str, tuple[list[np.ndarray], dict[str, np.ndarray]]] = {}
    for name, array in held.items():
        kind, *words = name.split("_")
        split = known.get(words[-1].casefold(), "") if words else ""
        output = "_".join(words[:-1] if split else words)
        if kind not in ("x", "y") or (kind == "x" and output):
            raise UserError(
                f"{path} holds {name!r}; expected x and y, or x_train, y_train, x_validation, ..."
            )
        inputs, targets = splits.setdefault(split, ([], {}))
        if kind == "x":
            inputs.append(array)
        else:
            targets[output] = array
    missing = [name or "all" for name, (inputs, _) in splits.items() if not inputs]
    if missing or not splits:
        raise UserError(f"{path} holds no x of {', '.join(missing) or 'anything'}; expected inputs")
    found = {
        split: Split(inputs[0], targets[""] if list(targets) == [""] else targets)
        for split, (inputs, targets) in splits.items()
    }
    return _cut(found.pop("")) if list(found) == [""] else _complete(found, path)


def _complete(splits: dict[str, Split], path: Path) -> dict[str, Split]:
    for part in ("train", "validation"):
        if part not in splits:
            raise UserError(
                f"{path} has {', '.join(name or 'x' for name in splits)}; expected x_train and "
                "x_validation (and perhaps x_test), or x alone"
            )
    return splits


def _cut(whole: Split) -> dict[str, Split]:
    """80, 10 and 10% in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(whole))
    held = len(whole) // 10
    if held < 1:
        raise UserError(f"there are {len(whole)} inputs; expected at least 10 to cut them")
    places = np.split(order, [len(whole) - 2 * held, len(whole) - held])
    return dict(zip(("train", "validation", "test"), map(whole.ordered, places), strict=True))


def _of_folder(folder: Path) -> tuple[dict[str, Split], list[str]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected arrays in {folder}/<class>/*.npy")
    places = split_folders(folder)
    names = {name: split for split, name in places.items()}
    by_class: dict[tuple[str, str], list[str]] = {}
    for file in files_below(folder):
        inside = file.parts[1:] if places else file.parts
        if file.suffix == SUFFIX and len(inside) > 1:
            split = names.get(file.parts[0], "") if places else ""
            by_class.setdefault((split, inside[0]), []).append(str(file))
    classes, parts = cut_anew(folder, places, by_class)
    splits = {}
    for split, files in parts.items():
        labels = np.array([classes.index(class_of(file, places)) for file in files], np.int64)
        inputs = _stack([folder / file for file in files])
        splits[split] = Split(inputs, labels)
    return splits, classes


def _of_table(path: Path, heads: Any) -> tuple[dict[str, Split], list[str] | None]:
    """Inputs and labels of a table: numbers where heads are given, else names of classes."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable table ({error})") from error
    if not rows or not {"file"} <= rows[0].keys():
        raise UserError(f"{path} has no column 'file'; expected file, label and perhaps split")
    known = {word: split for split, words in NAMES.items() for word in words}
    by_split: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        word = (row.get("split") or "").casefold()
        if word and word not in known:
            raise UserError(f"{path} has split {row['split']!r}; expected train, validation, test")
        by_split.setdefault(known.get(word, ""), []).append(row)
    labelled = "label" in rows[0]
    names = None
    if labelled and heads is None:
        names = sorted({row["label"] for row in rows})
    splits = {}
    for split, part in by_split.items():
        values: list[Any] = [None] * len(part)
        if names is not None:
            values = [names.index(row["label"]) for row in part]
        elif labelled:
            values = [_number(row["label"], path) for row in part]
        inputs = _stack([path.parent / row["file"] for row in part])
        splits[split] = Split(inputs, stacked(values, split or "whole"))
    whole = list(splits) == [""]
    return (_cut(splits[""]) if whole else _complete(splits, path)), names


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path} has label {text!r}; expected a number for its head") from None


def _stack(files: Sequence[Path]) -> np.ndarray:
    arrays: list[np.ndarray] = []
    for file in files:
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file} is no readable array ({error}); mend or delete it") from error
        if not isinstance(array, np.ndarray) or (arrays and array.shape != arrays[0].shape):
            found = getattr(array, "shape", "an archive")
            raise UserError(
                f"{file} holds {found}, {files[0]} {arrays[0].shape if arrays else 'an array'}; "
                "expected arrays of one shape"
            )
        arrays.append(array)
    return np.stack(arrays)
