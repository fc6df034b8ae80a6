"""A bundle's `run.py`: its text, and its answers to original files before a folder ships."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.bundle import run_script
from moodistill.bundle.outputs import ShippedOutput
from moodistill.data import pixels
from moodistill.data.images import ImageData, Split
from moodistill.data.pixels import read_picture
from moodistill.errors import UserError
from moodistill.onnx.runtime import outputs

TRIED = 12  # original files
TOLERANCE = 1e-3
IMPORT = "    from moodistill.data.pixels import read_picture\n\n"
LAST = "import onnxruntime\n"


def script_text() -> str:
    """`run.py`: `run_script` with the text of `data.pixels` in place of importing it."""
    script = Path(run_script.__file__).read_text(encoding="utf-8")
    _, _, code = Path(pixels.__file__).read_text(encoding="utf-8").partition("import numpy as np\n")
    assert script.count(IMPORT) == script.count(LAST) == 1 and code
    whole = f"{LAST}\n# How the search reads images.\n{code}\n# What this script does with them."
    return script.replace(IMPORT, "").replace(LAST, whole)


def try_run_script(
    folder: Path, data: ImageData, model: bytes, shipped: Sequence[ShippedOutput]
) -> int:
    """Run the `run.py` of a complete folder on some of the validation split's files.

    Files that have changed since they were read, or are gone, are left out; without any the sample
    alone is run.

    Args:
        folder: with `run.py`, `model.onnx`, `manifest.json` and the sample.
        data: images, and their files where those are known.
        model: the folder's.
        shipped: its outputs.

    Returns:
        how many files were tried.

    Raises:
        UserError: if `run.py` fails or gives another answer than the search has.
    """
    split = _unchanged(data)
    files = [str(folder / "sample.npy"), *split.files]
    first = data.validation.head(1)
    expected = [
        {name: values[place] for name, values in batch.items()}
        for part in (first, split)
        for batch in outputs(model, data, part, threads=1, batch=1)
        for place in range(len(next(iter(batch.values()))))  # a fixed batch holds several
    ]
    with tempfile.TemporaryDirectory() as made:
        done = subprocess.run(
            [sys.executable, str(folder / "run.py"), "--json", "--out", made, *files],
            capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip
        if done.returncode != 0:
            raise UserError(
                f"the folder was not written: its run.py fails on the data's own inputs "
                f"({' '.join(done.stderr.split())[-300:]})"
            )
        seen: Counter[str] = Counter()
        for file, answer in zip(files, expected, strict=True):
            stem = Path(file).stem
            seen[stem] += 1
            name = stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
            with np.load(Path(made) / f"{name}.npz", allow_pickle=False) as found:
                _compare(file, found, answer, shipped)
    return len(split)


def _compare(
    file: str, found: Any, answer: Mapping[str, np.ndarray], shipped: Sequence[ShippedOutput]
) -> None:
    """Refuse answers of run.py to one file, by the outputs' names, that are not the search's."""
    for output, wanted in zip(shipped, answer.values(), strict=True):
        values = found[output.name]
        classes = output.kind == "classification"
        scale = 1.0 if classes else max(1.0, float(np.abs(wanted).max()))
        apart = float(np.abs(values - wanted).max()) / scale
        if apart <= TOLERANCE and not (classes and values.argmax() != wanted.argmax()):
            continue
        said = (
            f"class {int(values.argmax())}, the search with {int(wanted.argmax())}"
            if classes
            else f"other values of {output.name} than the search"
        )
        raise UserError(
            f"the folder was not written: its run.py answers {file} with {said} (largest "
            f"difference {apart:.1e})"
        )


def _unchanged(data: ImageData) -> Split:
    """Some validation images whose files still give the same pixels."""
    split = data.validation
    chosen: list[int] = []
    if split.files and data.preparation is not None:
        settings, channels = data.preparation.settings(), data.input_shape[0]
        for index in np.linspace(0, len(split) - 1, min(TRIED, len(split))).astype(int):
            try:
                now, _ = read_picture(split.files[index], channels, settings)
            except Exception:  # gone or damaged since
                continue
            if np.array_equal(now, split.images[index]):
                chosen.append(int(index))
    return split.ordered(np.array(chosen, np.int64))
