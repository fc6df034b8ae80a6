"""How long a folder of images takes to be indexed, and how much memory streaming it takes.

Makes a folder of JPEG files, starts from it twice (the second time nothing has changed) and goes
through one epoch of views as a distillation does. With `--pretend` the files hold nothing and their
index is made up: what a later start from very many files costs, without decoding them first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from moodistill.data import kept_index
from moodistill.data.folders import load_image_folder
from moodistill.data.index import ImageIndex
from moodistill.data.streamed import batches

KINDS = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def make_folder(folder: Path, count: int, side: int) -> None:
    """Smooth noise in ten classes, as JPEG files of `side` x `side` pixels."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 10}"
        place.mkdir(exist_ok=True, parents=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(place / f"{number}.jpg")


def seconds_of(folder: Path, size: int) -> float:
    began = time.perf_counter()
    load_image_folder(folder, (size, size), in_memory=False)
    return time.perf_counter() - began


def peak_mib() -> float:
    """Of this process and of the largest of its workers."""
    return sum(resource.getrusage(kind).ru_maxrss for kind in KINDS) / 1024


def pretended(_: object, parts: Iterable[np.ndarray]) -> Iterator[list[ImageIndex]]:
    """In place of `read_ahead`: rows of images that nobody has looked at."""
    rng = np.random.default_rng(0)
    for places in parts:
        yield [
            ImageIndex(
                rng.integers(0, 256, 32, dtype=np.uint8),
                np.full((2, 3), 9_000_000),
                np.array([224, 224, 0, 1, 0]),
            )
            for _ in places
        ]


def later_start(count: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.environ["MOODISTILL_CACHE"] = f"{place}/cache"
        folder = Path(place) / "images"
        for number in range(count):
            (folder / f"class{number % 100}").mkdir(parents=True, exist_ok=True)
            (folder / f"class{number % 100}" / f"{number}.jpg").write_bytes(b"x")
        real, kept_index.read_ahead = kept_index.read_ahead, pretended
        seconds_of(folder, size)
        kept_index.read_ahead = real
        used = cpu_seconds()
        later = seconds_of(folder, size)
        used = cpu_seconds() - used
    found = {"images": count, "later_start_s": round(later, 2), "later_start_cpu_s": round(used, 2)}
    print(json.dumps(found | {"peak_mib": round(peak_mib())}))


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended, so that a busy machine does not count."""
    used = [resource.getrusage(kind) for kind in KINDS]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=256, help="of the files")
    parser.add_argument("--size", type=int, default=224, help="that they are brought to")
    parser.add_argument("--pretend", action="store_true", help="a later start alone")
    arguments = parser.parse_args()
    if arguments.pretend:
        later_start(arguments.images, arguments.size)
        return
    with tempfile.TemporaryDirectory() as place:
        os.environ["MOODISTILL_CACHE"] = f"{place}/cache"
        folder = Path(place) / "images"
        make_folder(folder, arguments.images, arguments.side)
        used = cpu_seconds()
        first = seconds_of(folder, arguments.size)
        used = cpu_seconds() - used
        again = cpu_seconds()
        later = seconds_of(folder, arguments.size)
        again = cpu_seconds() - again
        data = load_image_folder(folder, (arguments.size,) * 2, in_memory=False)
        began = time.perf_counter()
        seen = sum(len(pixels) for pixels in batches(data.train.images, 64))
        streamed = seen / (time.perf_counter() - began)
    print(
        json.dumps(
            {
                "images": arguments.images,
                "first_start_s": round(first, 2),
                "indexed_per_s": round(arguments.images / first),
                "index_cpu_ms_each": round(1000 * used / arguments.images, 2),
                "later_start_s": round(later, 2),
                "later_start_cpu_s": round(again, 2),
                "streamed_per_s": round(streamed),
                "peak_mib": round(peak_mib()),
            }
        )
    )


if __name__ == "__main__":
    main()
