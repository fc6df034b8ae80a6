"""The index of a folder's files, kept in the cache, and the images that it is of.

A file is known again by its path, size and time of change; only others are read again.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.ahead import read_ahead
from moodistill.data.index import CHUNK, SEEN, ImageIndex, image_row
from moodistill.data.pixels import read_picture
from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic
from moodistill.io.cache_dir import cache_key, default_cache_dir, read_or_none, writing
from moodistill.progress import Percents, Reporter

FORMAT = 1  # of the kept index; raised where an image's row means something else


@dataclass(frozen=True)
class Stamp:
    """By which a file is known again: `(N,)` sizes in bytes and times of change in ns."""

    sizes: np.ndarray
    times: np.ndarray

    @staticmethod
    def of(folder: Path, files: Sequence[str]) -> Stamp:
        """Of files that are there; zeros of those that are not."""
        found = np.zeros((len(files), 2), np.int64)
        for place, file in enumerate(files):
            try:
                stat = os.stat(folder / file)
            except OSError:
                continue
            found[place] = stat.st_size, stat.st_mtime_ns
        return Stamp(found[:, 0], found[:, 1])


class FolderIndex:
    """The index of a folder's files, in the cache.

    Attributes:
        damaged: files that are no readable image, with the reason, once `update` is done.
        read: how many files `update` has read.
    """

    def __init__(
        self, folder: Path, channels: int, settings: dict[str, Any], cache_dir: Path | None = None
    ) -> None:
        self.folder, self.channels, self.settings = folder, channels, settings
        key = cache_key(FORMAT, os.path.abspath(folder), channels, sorted(settings.items()))
        self.path = (cache_dir or default_cache_dir()) / f"images-{key}.npz"
        self.damaged: list[str] = []
        self.read = 0

    def update(self, files: Sequence[str], reporter: Reporter) -> tuple[ImageIndex, Stamp]:
        """The index of `files` (relative to the folder) in order, and what they were known by.

        What is new or has changed is read, and what was read is kept even if it is interrupted.
        Rows of damaged files are zeros.
        """
        stamp = Stamp.of(self.folder, files)
        index = ImageIndex(
            np.zeros((len(files), 32), np.uint8),
            np.zeros((len(files), 2, self.channels), np.int64),
            np.zeros((len(files), len(SEEN)), np.int64),
        )
        known = self._fill_known(files, stamp, index)
        wanted = np.flatnonzero(~known)
        self.read = len(wanted)
        if not len(wanted):
            return index, stamp
        try:
            with reporter.stage("indexing the images", len(files), "images") as stage:
                done, bar = len(files) - len(wanted), Percents(stage, len(files))
                for places, rows in self._read(files, wanted):
                    _put(index, places, rows, known)
                    done += len(places)
                    bar.update(done)
        finally:
            self._save(files, stamp, index, known)
        return index, stamp

    def _read(
        self, files: Sequence[str], wanted: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[ImageIndex | None]]]:
        parts = np.array_split(wanted, max(1, -(-len(wanted) // CHUNK)))

        def read(places: np.ndarray) -> list[ImageIndex | str]:
            return [self._row(files[int(place)]) for place in places]

        for places, rows in zip(parts, read_ahead(read, parts), strict=True):
            self.damaged += [row for row in rows if isinstance(row, str)]
            yield places, [None if isinstance(row, str) else row for row in rows]

    def _row(self, file: str) -> ImageIndex | str:
        with quiet_pillow():
            found = read_or_reason(self.folder, file, self.channels, self.settings)
        if isinstance(found, str):
            return found
        pixels, seen = found
        numbers = (*seen["size"], seen["tagged"], seen["frames"], seen["transparent"])
        return image_row(pixels, [int(number) for number in numbers])

    def _fill_known(self, files: Sequence[str], stamp: Stamp, index: ImageIndex) -> np.ndarray:
        """Take over the rows of files that have not changed; which those are, `(N,)` bool."""
        known = np.zeros(len(files), bool)
        stored = read_or_none(self.path, _load)
        if stored is None:
            return known
        names = stored["names"].tobytes().split(b"\0")
        row_of = {name: row for row, name in enumerate(names)}
        rows = np.array([row_of.get(os.fsencode(file), -1) for file in files])
        known = rows >= 0
        known[known] &= stored["sizes"][rows[known]] == stamp.sizes[known]
        known[known] &= stored["times"][rows[known]] == stamp.times[known]
        rows = rows[known]
        for name in ("digests", "sums", "seen"):
            getattr(index, name)[known] = stored[name][rows]
        return known

    def _save(
        self, files: Sequence[str], stamp: Stamp, index: ImageIndex, known: np.ndarray
    ) -> None:
        content = io.BytesIO()
        names = b"\0".join(os.fsencode(file) for file, one in zip(files, known, strict=True) if one)
        np.savez(
            content, allow_pickle=False, names=np.frombuffer(names, np.uint8),
            sizes=stamp.sizes[known], times=stamp.times[known], digests=index.digests[known],
            sums=index.sums[known], seen=index.seen[known],
        )  # fmt: skip
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, content.getvalue())


def _put(
    index: ImageIndex, places: np.ndarray, rows: Sequence[ImageIndex | None], known: np.ndarray
) -> None:
    for place, row in zip(places, rows, strict=True):
        if row is None:
            continue
        index.digests[place], index.sums[place], index.seen[place] = row.digests, row.sums, row.seen
        known[place] = True


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a kept index; a ValueError says that it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(str(error)) from error
    count = len(arrays["sizes"])
    if any(len(arrays[name]) != count for name in ("times", "digests", "sums", "seen")):
        raise ValueError("its parts are of other files")
    return arrays


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd metadata and of large images; what it cannot read it raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def read_or_reason(
    folder: Path, file: str, channels: int, settings: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]] | str:
    """Pixels of a file and what was seen of it, or the file and why it cannot be read."""
    from PIL import Image

    try:
        return read_picture(folder / file, channels, settings)
    except Exception as error:  # Pillow's plugins raise what they like at damaged files
        reason = " ".join(str(error).replace(str(folder / file), "it").split())
        if isinstance(error, Image.DecompressionBombError):
            reason = "larger than Pillow opens, shrink it; " + reason.split(",")[0]
        return f"{file} ({reason or type(error).__name__})"


class FolderImages:
    """The source of a folder's images; what has changed since it was indexed is refused."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        stamp: Stamp,
        shape: tuple[int, int, int],
        settings: dict[str, Any],
    ) -> None:
        self.folder, self.files, self.stamp = folder, files, stamp
        self.shape, self.settings = shape, settings

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """See `Source`."""
        file = self.files[index]
        try:
            stat = os.stat(self.folder / file)
            before = self.stamp.sizes[index], self.stamp.times[index]
            if (stat.st_size, stat.st_mtime_ns) != before:
                raise ValueError("it has been changed")
            with quiet_pillow():
                return read_picture(self.folder / file, self.shape[-1], self.settings)[0]
        except Exception as error:  # Pillow's plugins raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.folder / file} is not the image any more that it was when this began "
                f"({reason}); put it back, or start anew"
            ) from error
