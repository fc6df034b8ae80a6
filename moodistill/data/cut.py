"""Which image is in which split: a fair cut of each class, and the cut that a run keeps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moodistill.errors import UserError
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import parse_json

SPLITS = ("train", "validation", "test")
CUT_FILE = "cut.json"  # of a run
SHARE = 10  # a tenth of each class is for validation, another for the test


@dataclass(frozen=True)
class Cut:
    """Files of the splits, as paths relative to the folder of the data, with slashes.

    A run keeps its own: images that come later neither join it nor move others.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def places(self) -> dict[str, str]:
        """Split by file."""
        return {file: split for split in SPLITS for file in getattr(self, split)}

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json_atomic(path, {split: list(getattr(self, split)) for split in SPLITS})

    @staticmethod
    def read(path: Path) -> Cut:
        """The inverse of `write`.

        Raises:
            UserError: if the file holds no cut.
        """
        try:
            stored = parse_json(path.read_bytes())
            parts = {split: tuple(stored[split]) for split in SPLITS}
            if not all(isinstance(file, str) for files in parts.values() for file in files):
                raise ValueError("a file's name is no text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not say which image is in which split ({error}); restore it from "
                "a copy"
            ) from error
        return Cut(**parts)


def cut_class(files: Sequence[str], wanted: Sequence[str] = SPLITS[1:]) -> dict[str, list[str]]:
    """Cut the images of one class by the rank of their names' digests.

    A tenth, at least one image, goes to each split of `wanted`, the rest to `train`. Which is
    which depends on the names alone; an image that is added may move one across each border.

    Args:
        files: paths relative to the folder of the data, class first.
        wanted: of `validation` and `test`, those that are to be cut off.

    Returns:
        files by split, sorted; without enough of them `train` is left empty.
    """
    ranked = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
    count = max(1, round(len(ranked) / SHARE))
    parts: dict[str, list[str]] = {"train": []}
    if "validation" in wanted:  # from one end of the ranks, the test's from the other
        parts["validation"], ranked = ranked[:count], ranked[count:]
    if "test" in wanted:
        parts["test"], ranked = ranked[-count:], ranked[:-count]
    parts["train"] = ranked
    return {split: sorted(chosen, key=PurePosixPath) for split, chosen in parts.items()}


def least_pictures(wanted: Sequence[str]) -> int:
    """Images that a class must have so that each split gets one."""
    return 1 + len(wanted)


def merge(parts: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Files by split of several classes, in order."""
    return {split: [file for part in parts for file in part.get(split, ())] for split in SPLITS}
