"""A bundle's `run.py` on original files: it prepares them as the search did, or does not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bundles import DEVICE, ORIGIN, front_row
from PIL import Image
from torch import nn

from moodistill.bundle import trial
from moodistill.bundle.folder import write_package
from moodistill.bundle.model import ShipOptions
from moodistill.bundle.parity import export_onnx
from moodistill.bundle.trial import script_text
from moodistill.data.datasets import from_splits
from moodistill.data.folders import load_image_folder
from moodistill.errors import UserError
from moodistill.teacher.graph import trace

SHAPES = [(32, 96), (96, 32), (40, 40), (33, 47)]
PREPARATIONS = [
    {}, {"resize": "crop"}, {"resize": "letterbox", "fill": 114},
    {"resize": "crop", "shorter_side": 30, "interpolation": "bicubic"},
    {"channel_order": "BGR", "resize": "letterbox"}, {"exif": False, "interpolation": "lanczos"},
    {"size": (20, 28), "resize": "crop"}, {"channels": 1, "interpolation": "nearest"},
    {"channels": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of many shapes, a third of them turned by EXIF, some of other formats."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("left", "right"):
        (root / name).mkdir()
        for i in range(60):
            height, width = SHAPES[i % len(SHAPES)]
            noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((width, height))
            exif = Image.Exif()
            if i % 3 == 0:
                exif[0x0112] = 2 + i % 7
            suffix = ("png", "jpg", "gif")[i % 3]
            picture.save(root / name / f"{i}.{suffix}", exif=exif)
    return root


def network(channels):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 2),
    ).eval()  # fmt: skip


def ship(data, folder, options=None):
    module = trace(network(data.input_shape[0]), data.input_shape).module
    export_onnx(module, data, ORIGIN, folder / "model.onnx", options, 20)
    teacher = front_row(student="teacher", stage="teacher")
    write_package(folder, front_row(), teacher, data, ORIGIN, DEVICE, options)
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def run_script(folder, *arguments, env=None):
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, arguments)], capture_output=True,
        text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def answers(data, split):
    with torch.no_grad():
        return network(data.input_shape[0])(data.normalise(split.images)).numpy()


@pytest.mark.parametrize("settings", PREPARATIONS)
def test_run_py_answers_as_the_search(pictures, tmp_path, settings):
    settings = {"size": (24, 24), **settings}
    data = load_image_folder(pictures, **settings)
    manifest = ship(data, tmp_path)
    assert manifest["tried"] == 12  # of 12 validation images
    assert manifest["input"]["preparation"] == data.preparation.settings()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert data.preparation.describe(data.input_shape[0]) in card
    assert "12 of the original files" in " ".join(card.split())
    done = run_script(tmp_path, "--json", *data.test.files)
    found = np.array([json.loads(line)["logits"] for line in done.stdout.splitlines()])
    assert len(found) == 12 and np.abs(found - answers(data, data.test)).max() < 1e-4


def test_run_py_that_prepares_otherwise_is_not_shipped(pictures, tmp_path, monkeypatch):
    spoiled = script_text().replace('resize == "squash"', 'resize != "squash"')
    assert spoiled != script_text()
    monkeypatch.setattr("moodistill.bundle.folder.script_text", lambda: spoiled)
    data = load_image_folder(pictures, (24, 24), resize="crop")
    with pytest.raises(UserError, match=r"its run\.py answers .*the search with"):
        ship(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    monkeypatch.setattr("moodistill.bundle.folder.script_text", lambda: "import nothing_there")
    with pytest.raises(UserError, match=r"its run\.py fails .*nothing_there"):
        ship(data, tmp_path)


def test_files_that_changed_since_are_not_compared(pictures, tmp_path):
    data = load_image_folder(pictures, (24, 24))
    paths = data.validation.files[:5]
    kept = {path: Path(path).read_bytes() for path in paths}
    try:
        for path in paths[:3]:
            os.unlink(path)
        for path in paths[3:]:
            Image.new("RGB", (9, 9)).save(path, "PNG")
        assert ship(data, tmp_path)["tried"] == 7
    finally:
        for path, content in kept.items():
            Path(path).write_bytes(content)


def test_of_an_unknown_preparation_only_the_exact_size_is_taken(pictures, tmp_path):
    whole = load_image_folder(pictures, (24, 20))
    splits = {"train": whole.train, "validation": whole.validation, "test": whole.test}
    data = from_splits("own", splits, None, whole.mean, whole.std)
    manifest = ship(data, tmp_path)
    assert manifest["input"]["preparation"] is None and manifest["tried"] == 0
    assert "exactly the input's size" in (tmp_path / "README.md").read_text(encoding="utf-8")
    done = run_script(tmp_path, whole.test.files[0])
    assert done.returncode == 1 and "expected exactly 24 x 20" in done.stderr
    Image.fromarray(data.test.images[0]).save(tmp_path / "exact.png")
    done = run_script(tmp_path, "--json", tmp_path / "exact.png")
    found = np.array(json.loads(done.stdout)["logits"])
    assert np.abs(found - answers(data, data.test.head(1))[0]).max() < 1e-4
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(data.test.images[0]).save(tmp_path / "tagged.png", exif=exif)
    done = run_script(tmp_path, tmp_path / "tagged.png")
    assert done.returncode == 0 and "EXIF orientation, which is ignored" in done.stderr


def test_run_py_names_what_it_cannot_read(pictures, tmp_path):
    ship(load_image_folder(pictures, (24, 24)), tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for name in ("bad.png", "bad.npy", "none.png"):
        done = run_script(tmp_path, tmp_path / name)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert f"error: {tmp_path / name} is no readable" in done.stderr


def test_labels_that_a_terminal_lacks_do_not_end_run_py(pictures, tmp_path):
    whole = load_image_folder(pictures, (24, 24))
    splits = {"train": whole.train, "validation": whole.validation, "test": whole.test}
    data = from_splits("own", splits, ["猫", "übergroß"], whole.mean, whole.std)
    ship(data, tmp_path)
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = run_script(tmp_path, env=plain)
    assert done.returncode == 0 and "expected answer: yes" in done.stdout


def test_run_py_is_one_file_that_imports_nothing_of_ours():
    text = script_text()
    assert "import moodistill" not in text and "from moodistill" not in text
    compile(text, "run.py", "exec")
    assert "def read_picture" in text and text.startswith('"""Run the model.onnx')
    assert trial.IMPORT not in text


@pytest.mark.parametrize("kind", ["uint8", "normalised"])
def test_a_fixed_batch_is_run_and_verified(pictures, tmp_path, kind):
    import onnxruntime

    from moodistill.bundle.verify import verify_package

    data = load_image_folder(pictures, (24, 24))
    manifest = ship(data, tmp_path, ShipOptions(kind, batch=3))
    assert manifest["input"]["batch"] == 3 and manifest["tried"] == 12
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == [3, 3, 24, 24]
    assert session.get_outputs()[0].shape == [3, 2]
    assert verify_package(tmp_path).difference < 1e-4
    assert "(3, 3, 24, 24)" in (tmp_path / "README.md").read_text(encoding="utf-8")
