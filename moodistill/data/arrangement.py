"""Which images of a folder are of which class and split; what does not fit is named."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from moodistill.data.cut import SPLITS, Cut, cut_class, least_pictures, merge
from moodistill.data.walk import files_below, folders_in, passed_over
from moodistill.errors import UserError

# What folders of the splits are called, whatever the case.
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
OUTSIDE = "in no folder of a class"


def split_folders(folder: Path) -> dict[str, str]:
    """Names of the splits' folders by split; empty if there is one folder a class.

    Raises:
        UserError: if there are held-out images but none to train on, or two folders of a split.
    """
    names = folders_in(folder)
    found = {
        split: [name for name in names if name.casefold() in known]
        for split, known in NAMES.items()
    }
    if not found["train"]:
        held_out = [name for split in SPLITS[1:] for name in found[split]]
        classes = set(names) - set(held_out)
        for name in held_out:  # a class may be called "valid"; a split holds classes
            if not classes or classes & set(folders_in(folder / name)):
                raise UserError(
                    f"{folder} has {name!r} but no folder train; expected train/<class>/ beside it"
                )
        return {}
    for split, several in found.items():
        if len(several) > 1:
            raise UserError(
                f"{folder} has the folders {' and '.join(map(repr, several))}, both for {split}; "
                "leave one of them"
            )
    return {split: several[0] for split, several in found.items() if several}


def sorted_out(
    folder: Path, places: Mapping[str, str]
) -> tuple[dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """Images by split and class (of a flat folder the split is empty), and others by reason."""
    splits = {name: split for split, name in places.items()}
    by_class: dict[tuple[str, str], list[str]] = {}
    passed: dict[str, list[str]] = {}
    for path in files_below(folder):
        reason = passed_over(folder, path)
        inside = path.parts[1:] if places else path.parts
        if not reason and (len(inside) < 2 or (places and path.parts[0] not in splits)):
            reason = OUTSIDE
        if reason:
            passed.setdefault(reason, []).append(str(path))
            continue
        split = splits[path.parts[0]] if places else ""
        by_class.setdefault((split, inside[0]), []).append(str(path))
    return by_class, passed


def cut_anew(
    folder: Path, places: Mapping[str, str], by_class: Mapping[tuple[str, str], list[str]]
) -> tuple[list[str], dict[str, list[str]]]:
    """Classes and files by split, if every class has images in every split.

    Args:
        folder: of the data.
        places: names of the splits' folders.
        by_class: files by split and class, as `sorted_out` gives them.

    Raises:
        UserError: names every class that has not, and how many images it has where.
    """
    for split, name in places.items():
        if not folders_in(folder / name):
            raise UserError(
                f"{folder / name} has no folders of classes; expected {split} images in "
                f"{folder / name}/<class>/"
            )
    homes = [folder / name for name in places.values()] or [folder]
    classes = sorted({name for home in homes for name in folders_in(home)})
    if len(classes) < 2:
        inner = folder / classes[0] if classes and not places else None
        hint = f", or name {inner}" if inner is not None and len(folders_in(inner)) > 1 else ""
        raise UserError(
            f"{homes[0]} holds {len(classes)} class folders, expected at least 2: "
            f"{homes[0]}/<class>/picture.png{hint}"
        )
    wanted = [split for split in SPLITS[1:] if split not in places]
    problems = []
    for name in classes:
        counts = {split: len(by_class.get((split, name), ())) for split in places or ("",)}
        problem = _problem(name, counts, places, classes, wanted)
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(
            f"{folder}: {'; '.join(problems)}: expected images of every class in every split; "
            "add some, rename the folder, or leave it out"
        )
    parts = []
    for name in classes:
        home = "train" if places else ""
        own = {split: by_class[split, name] for split in places if split != "train"}
        parts.append({**own, **cut_class(by_class[home, name], wanted)})
    return classes, merge(parts)


def _problem(
    name: str,
    counts: Mapping[str, int],
    places: Mapping[str, str],
    classes: Sequence[str],
    wanted: Sequence[str],
) -> str:
    """Why a class cannot be used; empty if it can."""
    if not any(counts.values()):
        return f"class {name!r} has no image"
    absent = [split for split, count in counts.items() if not count]
    if absent:
        near = _alike(name, classes)
        there = ", ".join(f"{n} in {places[split]}" for split, n in counts.items() if n)
        return f"class {name!r} has {there} and none in {', '.join(places[s] for s in absent)}" + (
            f" (is it {near}?)" if near else ""
        )
    least = least_pictures(wanted)
    home = counts.get("train", counts.get("", 0))
    if home < least:
        return (
            f"class {name!r} has {home} image(s), and {' and '.join(wanted)} must be cut from "
            f"them: at least {least}"
        )
    return ""


def _alike(name: str, classes: Sequence[str]) -> str:
    """Another class that may be meant by a name; empty if none is like it."""
    others = {_folded(other): other for other in classes if other != name}
    near = difflib.get_close_matches(_folded(name), others, n=1, cutoff=0.8)
    if not near:
        return ""
    other = others[near[0]]
    if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name):
        return f"{ascii(other)}, which looks the same: macOS writes such letters in two parts"
    return repr(other)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def keep_cut(
    folder: Path, places: Mapping[str, str], cut: Cut
) -> tuple[list[str], dict[str, list[str]]]:
    """Classes and files by split of a run's own cut.

    Raises:
        UserError: if files are missing.
    """
    missing = [file for file in cut.places() if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(cut.places())} images that the run was "
            f"started with ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); "
            "expected all of them: put them back, or give the folder that holds them as `data`"
        )
    classes = sorted({class_of(file, places) for file in cut.places()})
    # In the order of `cut_anew`: the images' digest depends on it.
    return classes, {
        split: sorted(
            getattr(cut, split), key=lambda file: (class_of(file, places), PurePosixPath(file))
        )
        for split in SPLITS
    }


def class_of(file: str, places: Mapping[str, str]) -> str:
    """The class of a file: the folder, below its split's, that it lies in."""
    return PurePosixPath(file).parts[1 if places else 0]
