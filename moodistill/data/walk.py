"""Every file below a folder: an image to be read, or a reason why it is passed over."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path, PurePosixPath

from moodistill.errors import UserError

HIDDEN, SYSTEM = "hidden, with a dot in front", "left by a system or tool"
_SYSTEM = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin",
    "system volume information", "lost+found", "__pycache__", "icon\r",
}  # fmt: skip
# Suffixes that Pillow has plugins for, but only to say what the file is, not to read its pixels.
_STUBS = {"MPEG", "HDF5", "GRIB", "BUFR", "IPTC"}
# A file whose suffix says nothing is looked at; some of Pillow's other formats fit anything.
_SNIFFED = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")


def files_below(folder: Path) -> list[PurePosixPath]:
    """Paths relative to `folder` of all files below it, sorted; links are followed.

    Raises:
        UserError: if a folder cannot be opened.
    """
    found: list[PurePosixPath] = []
    _collect(folder, PurePosixPath(), (), found)
    return sorted(found)


def _collect(
    folder: Path, relative: PurePosixPath, above: tuple[str, ...], found: list[PurePosixPath]
) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be opened ({error.strerror}); expected a folder of images"
        ) from error
    for entry in entries:
        if entry.is_dir():
            _collect(Path(entry.path), relative / entry.name, (*above, real), found)
        else:
            found.append(relative / entry.name)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones and those of systems.

    Raises:
        UserError: if it cannot be opened.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be opened ({error.strerror}); expected a folder of images"
        ) from error
    return sorted(name for name in names if not _unwanted(name))


def _unwanted(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    return SYSTEM if name.casefold() in _SYSTEM else ""


def passed_over(folder: Path, path: PurePosixPath) -> str:
    """Why the file `folder / path` is no image to be read; empty if it is one."""
    for part in path.parts:
        if reason := _unwanted(part):
            return reason
    suffix = path.suffix.lower()
    if suffix in picture_suffixes():
        return ""
    if _looks_like_a_picture(folder / path):
        return ""
    return f"no image that Pillow reads: {suffix or 'no suffix'}"


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, lower case, of the formats that Pillow reads here."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(s for s, form in known if form in Image.OPEN and form not in _STUBS)


def _looks_like_a_picture(path: Path) -> bool:
    from PIL import Image

    Image.init()
    try:
        with Image.open(path, formats=[form for form in _SNIFFED if form in Image.OPEN]):
            return True
    except Exception:  # plugins raise what they like at what is none of theirs
        return False
