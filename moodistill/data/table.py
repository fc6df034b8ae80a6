"""What a data set consists of: images by class and split, and what became of every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ROWS = 24  # classes that are shown one by one
SHOWN = 3  # examples of a kind


@dataclass(frozen=True)
class DataTable:
    """Everything that is worth a look before a search; a data set carries it.

    Attributes:
        source: folder or name of the data.
        classes: names, in the order of the logits.
        pictures: of each split, how many of each class.
        prepared: how images were prepared, in words; empty if it is not known.
        passed_over: files that were not read, by the reason why.
        turned: images whose EXIF tag says that they are to be turned.
        exif: whether they were turned.
        reshaped: images of another aspect ratio than the network's input.
        resize: what was done to them.
        more_frames: files of several frames or pages, of which the first was taken.
        transparent: images whose alpha channel was dropped.
        between_splits: groups of equal images in more than one split.
        between_classes: groups of equal images in more than one class.
    """

    source: str
    classes: tuple[str, ...]
    pictures: Mapping[str, tuple[int, ...]]
    prepared: str = ""
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: int = 0
    exif: bool = True
    reshaped: int = 0
    resize: str = ""
    more_frames: int = 0
    transparent: int = 0
    between_splits: tuple[tuple[str, ...], ...] = ()
    between_classes: tuple[tuple[str, ...], ...] = ()

    @property
    def total(self) -> int:
        """Images of all splits."""
        return sum(sum(counts) for counts in self.pictures.values())

    @property
    def files(self) -> int:
        """Files that were found: those read and those passed over."""
        return self.total + sum(len(files) for files in self.passed_over.values())

    def lines(self) -> list[str]:
        """The table as text."""
        lines = [
            f"{self.source}: {self.total:,} images of {len(self.classes)} classes",
            *self._counts(),
        ]
        lines.append(f"prepared: {self.prepared or 'not known; taken as they were given'}")
        if self.reshaped:
            done = {
                "squash": "squashed, so things in them change their shape (resize crop or "
                "letterbox keeps it)",
                "crop": "cut at two sides",
                "letterbox": "given borders",
            }[self.resize]
            lines.append(f"{self.reshaped:,} of another aspect ratio: {done}")
        if self.turned:
            done = "turned" if self.exif else "NOT turned, as asked for"
            lines.append(f"{self.turned:,} with an EXIF orientation: {done}")
        if self.more_frames:
            lines.append(f"{self.more_frames:,} of several frames: the first of each is taken")
        if self.transparent:
            lines.append(f"{self.transparent:,} with transparency: it is dropped")
        for reason, files in self.passed_over.items():
            lines.append(f"passed over, {reason}: {len(files):,} ({_examples(files)})")
        for groups, where in (
            (self.between_splits, "splits: accuracy on them is no evidence"),
            (self.between_classes, "classes: one of the labels is wrong"),
        ):
            if groups:
                lines.append(
                    f"{len(groups):,} equal images in several {where} "
                    f"({'; '.join(' = '.join(group[:3]) for group in groups[:SHOWN])}"
                    f"{'; ...' if len(groups) > SHOWN else ''})"
                )
        return lines

    def _counts(self) -> list[str]:
        rows = [("class", *self.pictures)]
        order = list(range(len(self.classes)))
        if len(order) > ROWS:  # the smallest are those that may be wrong
            order = sorted(order, key=lambda i: sum(c[i] for c in self.pictures.values()))[:ROWS]
        rows += [
            (self.classes[i], *(f"{counts[i]:,}" for counts in self.pictures.values()))
            for i in order
        ]
        if len(order) < len(self.classes):
            rows.append(
                (f"({len(self.classes) - len(order)} larger)", *("" for _ in self.pictures))
            )
        rows.append(("all", *(f"{sum(counts):,}" for counts in self.pictures.values())))
        width = max(len(row[0]) for row in rows)
        return [
            "  " + row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows
        ]


def _examples(files: Sequence[str]) -> str:
    # A name may hold bytes that are no text.
    shown = [file.encode("utf-8", "backslashreplace").decode() for file in files[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(files) > SHOWN else "")


def count_classes(labels: np.ndarray, classes: int) -> tuple[int, ...]:
    """Images of each class, of labels `(n,)`."""
    return tuple(int(n) for n in np.bincount(labels, minlength=classes))


def equal_pictures(
    splits: Mapping[str, tuple[Sequence[bytes], np.ndarray, Sequence[str]]],
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Groups of equal images that are in several splits, and in several classes.

    Equal is what has the same SHA-256 as the network sees it, whatever the files' formats.

    Args:
        splits: digests of the images, labels `(N,)` and the files' names (or none), by split.
    """
    found: dict[bytes, list[tuple[str, int, str]]] = {}
    for split, (digests, labels, files) in splits.items():
        for place, (digest, label) in enumerate(zip(digests, labels, strict=True)):
            name = files[place] if files else f"{split}[{place}]"
            found.setdefault(digest, []).append((split, int(label), name))
    groups = [group for group in found.values() if len(group) > 1]

    def named(key: int) -> tuple[tuple[str, ...], ...]:
        chosen = (group for group in groups if len({one[key] for one in group}) > 1)
        return tuple(sorted(tuple(sorted(one[2] for one in group)) for group in chosen))

    return named(0), named(1)
