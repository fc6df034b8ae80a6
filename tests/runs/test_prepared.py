"""A preparation from the command line to the bundle, and what is said of the files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import train_on
from PIL import Image
from torch import nn

from moodistill.data.folders import load_image_folder

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )
"""
TINY = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
        "--no-int8", "--simd-step", "8"]  # fmt: skip
PREPARED = ["--resize", "crop", "--shorter-side", "20", "--interpolation", "bicubic",
            "--channel-order", "BGR"]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """16 x 48 images whose class is in the middle; a third lie on their side, with EXIF."""
    root, rng = tmp_path_factory.mktemp("project"), np.random.default_rng(0)
    for label, name in enumerate(("red", "blue")):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (20, 60, 3), dtype=np.uint8)
            pixels[:, 20:40] //= 4
            pixels[:, 20:40, 2 * label] += np.uint8(150)
            picture, exif = Image.fromarray(pixels), Image.Exif()
            if i % 3 == 0:
                picture = picture.transpose(Image.Transpose.ROTATE_90)
                exif[0x0112] = 6
            picture.save(root / "pictures" / name / f"{i}.png", exif=exif)
    (root / "mine.py").write_text(NETWORK)
    scope: dict = {}
    exec(NETWORK, scope)
    network: nn.Module = scope["build"]()
    data = load_image_folder(
        root / "pictures", (16, 16), resize="crop", shorter_side=20, interpolation="bicubic",
        channel_order="BGR",
    )  # fmt: skip
    train_on(network, data.normalise(data.train.images), torch.from_numpy(data.train.labels))
    torch.save(network.state_dict(), root / "best.pt")
    return root


@pytest.fixture(scope="module")
def run(project, call):
    arguments = ["--teacher", f"{project / 'mine.py'}:build", "--weights", project / "best.pt",
                 "--data", project / "pictures", "--size", "16", *PREPARED]  # fmt: skip
    done = call("run", *arguments, "--out", project / "run", *TINY)
    return project / "run", done.stdout


def test_the_table_is_said_before_the_search(run):
    text = run[1]
    table, _, rest = text.partition("about ")
    for words in ("80 images of 2 classes", "centre-cropped", "bicubic, BGR",
                  "80 of another aspect ratio: cut", "28 with an EXIF orientation: turned"):  # fmt: skip
        assert words in table, text
    assert "results in" in rest


def test_run_py_has_the_accuracy_of_the_manifest(run, project):
    (shipped,) = (path.parent for path in run[0].glob("students/*/manifest.json"))
    manifest = json.loads((shipped / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["input"]
    assert entry["colour"] == "BGR" and entry["preparation"]["shorter_side"] == 20
    assert manifest["tried"] == 8 == manifest["accuracy"]["validation"]["images"]
    cut = json.loads((run[0] / "cut.json").read_text(encoding="utf-8"))
    files = [str(project / "pictures" / file) for file in cut["test"]]
    done = subprocess.run(
        [sys.executable, str(shipped / "run.py"), *files], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    right = sum(f": {file.split('/')[-2]} (" in line
                for file, line in zip(files, lines, strict=True))  # fmt: skip
    assert right / len(files) == manifest["accuracy"]["test"]["fraction"] >= 0.9


def test_a_resume_keeps_preparation_and_cut(run, project, call):
    extra = project / "pictures" / "red" / "later.png"
    Image.new("RGB", (60, 20), (150, 0, 0)).save(extra)
    try:
        done = call("run", "--resume", run[0], "--generations", "2")
        assert "not there when the run began: 1" in done.stdout and "centre-cropped" in done.stdout
        said = call("run", "--resume", run[0], "--resize", "squash", code=2).stderr
        assert "takes --resize from its run" in said
        name = next(path.name for path in (run[0] / "students").glob("s*"))
        options = ["--opset", "15", "--fixed-batch", "2"]
        call("export", run[0], name, "--out", project / "fixed", *options)
        manifest = json.loads((project / "fixed" / "manifest.json").read_text(encoding="utf-8"))
        assert (manifest["opset"], manifest["ir_version"], manifest["input"]["batch"]) == (15, 8, 2)
        assert "as expected" in call("verify", project / "fixed").stdout
        said = call("export", run[0], name, "--out", project / "x", "--opset", "9", code=2).stderr
        assert "opset is 9; expected 11 to 21" in said
    finally:
        extra.unlink()


def test_preparations_that_cannot_be_are_refused_at_once(project, call):
    own = ["--teacher", f"{project / 'mine.py'}:build", "--weights", project / "best.pt",
           "--data", project / "pictures", "--out", project / "other"]  # fmt: skip
    for more, words in (
        (["--resize", "stretch"], "squash, crop, letterbox"),
        (["--shorter-side", "40"], "of resize 'crop' alone"),
        (["--channel-order", "BGR", "--channels", "1"], "it needs 3"),
    ):
        assert words in call("run", *own, *more, code=2).stderr
    assert not (project / "other").exists()
    assert (
        "is for a network of your own"
        in call("run", "--model", "digits", "--resize", "crop", code=2).stderr
    )
