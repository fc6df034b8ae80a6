"""Whole runs of networks that are no classifiers of images, from Python and from the shell."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.dense import TwoHeads, UNet, block, rectangles, signals, taught, with_statistics
from PIL import Image
from torch import nn
from torch.nn import functional as F

import moodistill
from moodistill.bundle.verify import verify_package
from moodistill.cli import main
from moodistill.errors import UserError
from moodistill.io.tensorfile import save_atomic
from moodistill.pareto.table import read_front

BUDGET = {"population": 6, "generations": 2, "finalists": 1, "distill_steps": 8, "simd_step": 8,
          "progress": "quiet"}  # fmt: skip
SIGNALS = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv1d(2, 16, 5, 2, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 3, 1, 1), nn.BatchNorm1d(32), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 3),
    )
"""


def run_script(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, arguments)], capture_output=True,
        text=True,
    )  # fmt: skip


def test_signals_from_the_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SIGNALS)
    places = {}
    exec(SIGNALS, places)
    (x, y), held, test = (signals(n, seed) for n, seed in ((250, 0), (80, 1), (40, 2)))
    network = taught(places["build"](), torch.from_numpy(x), torch.from_numpy(y))
    save_atomic(network.state_dict(), tmp_path / "mine.safetensors")
    np.savez(tmp_path / "waves.npz", x_train=x, y_train=y, x_val=held[0], y_val=held[1],
             x_test=test[0], y_test=test[1])  # fmt: skip
    code = main(
        ["run", "--teacher", "mine.py:build", "--weights", "mine.safetensors", "--data", "waves.npz",
         "--out", "run", "--population", "6", "--generations", "2", "--finalists", "1",
         "--distill-steps", "8", "--simd-step", "8", "--progress", "plain"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0 and "the teacher's accuracy is" in said
    rows = read_front(tmp_path / "run")
    student = next(row for row in rows if row.stage == "distilled")
    assert student.parameters < rows[0].parameters and student.accuracy > 0.6
    assert main(["export", "run", student.student, "--out", "shipped"]) == 0
    verify_package(tmp_path / "shipped")
    manifest = json.loads((tmp_path / "shipped" / "manifest.json").read_text())
    assert manifest["input"]["shape"] == [2, 64] and manifest["input"]["layout"] == "NCL"
    np.save(tmp_path / "one.npy", test[0][0])
    done = run_script(tmp_path / "shipped", "--json", tmp_path / "one.npy")
    answer = json.loads(done.stdout)
    assert answer["label"] in "012" and len(answer["logits"]) == 3
    np.save(tmp_path / "short.npy", test[0][0, :, :50])
    done = run_script(tmp_path / "shipped", tmp_path / "short.npy")
    assert done.returncode == 1 and "(2, 50)" in done.stderr and "(2, 64)" in done.stderr


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    torch.manual_seed(0)
    images, masks = rectangles(200, 0)
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.25
    network = taught(UNet(), inputs, torch.from_numpy(masks))
    out = tmp_path_factory.mktemp("segmented") / "run"
    run = moodistill.search(
        network, (images, masks), rectangles(60, 1), rectangles(40, 2), out=out,
        heads=moodistill.Head("segmentation", labels=("ground", "red", "green")), mean=[0.3] * 3,
        std=[0.25] * 3, **BUDGET,
    )  # fmt: skip
    return run


def test_a_segmentation_by_its_masks(segmented, tmp_path, capsys):
    rows = segmented.front
    teacher = next(row for row in rows if row.stage == "teacher")
    assert {row.metric for row in rows} == {"mean IoU"} and teacher.accuracy > 0.8
    chosen = segmented.choose(min_accuracy=0.1)
    assert "mean IoU >= 0.1" in chosen.reason and "mean IoU points" in chosen.reason
    assert chosen.row.parameters < teacher.parameters
    assert main(["choose", str(segmented.folder), "--max-params", "1"]) == 2
    assert "the smallest has" in capsys.readouterr().err
    page = (segmented.folder / "report.html").read_text()
    assert '"metric": "mean IoU"' in page
    with torch.no_grad():
        assert chosen.to_torch()(torch.zeros(2, 3, 16, 16)).shape == (2, 3, 16, 16)
    chosen.export(tmp_path / "shipped")
    verify_package(tmp_path / "shipped")
    assert "mean IoU, test images" in (tmp_path / "shipped" / "README.md").read_text()
    images, masks = rectangles(1, 7)
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    done = run_script(tmp_path / "shipped", "--out", tmp_path / "maps", tmp_path / "one.png")
    assert done.returncode == 0 and "ground" in done.stdout and "%" in done.stdout
    drawn = np.asarray(Image.open(tmp_path / "maps" / "one.png"))
    with np.load(tmp_path / "maps" / "one.npz") as found:
        assert np.array_equal(drawn, found["logits"].argmax(0))
    assert (drawn == masks[0]).mean() > 0.5
    assert run_script(tmp_path / "shipped").returncode == 0


def test_two_heads_from_inputs_alone(tmp_path):
    torch.manual_seed(0)
    images = [rectangles(n, seed)[0] for n, seed in ((80, 0), (40, 1))]
    inputs = torch.from_numpy(images[0]).permute(0, 3, 1, 2).float() / 255
    network = with_statistics(TwoHeads(), inputs)
    run = moodistill.search(network, *images, out=tmp_path / "run", mean=[0] * 3, std=[1] * 3,
                            **BUDGET)  # fmt: skip
    teacher = next(row for row in run.front if row.stage == "teacher")
    assert teacher.metric == "mean fidelity" and teacher.accuracy > 0.9999
    chosen = next(row for row in run.front if row.stage != "teacher")
    assert 0 < chosen.validation_accuracy <= 1
    run.student(chosen.student).export(tmp_path / "shipped")
    verify_package(tmp_path / "shipped")
    np.save(tmp_path / "one.npy", images[1][0])
    done = run_script(tmp_path / "shipped", "--json", tmp_path / "one.npy")
    answer = json.loads(done.stdout)
    assert np.shape(answer["map"]) == (2, 8, 8) and np.shape(answer["vector"]) == (4,)


def small(last, *more):
    torch.manual_seed(0)
    return nn.Sequential(
        block(2, 16, 1), block(16, 32, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), last, *more
    ).eval()


def test_a_regression_of_signals(tmp_path):
    """One value a signal, how fast it is."""
    splits = [signals(n, seed) for n, seed in ((250, 0), (60, 1), (40, 2))]
    splits = [(x, (y - 1.0).astype(np.float32)) for x, y in splits]
    inputs, targets = (torch.from_numpy(part) for part in splits[0])
    network = taught(small(nn.Linear(32, 1)), inputs, targets[:, None], F.mse_loss, epochs=12)
    run = moodistill.search(network, *splits, out=tmp_path / "run", heads="regression", **BUDGET)
    teacher = next(row for row in run.front if row.stage == "teacher")
    assert teacher.metric == "R2" and teacher.accuracy > 0.2
    with pytest.raises(UserError, match="'r2' is no|expected one of r2, mae"):
        moodistill.Head("regression", "mean_iou")


@pytest.mark.parametrize(
    ("labels", "heads", "match"),
    [
        (np.full(60, np.nan), "regression", "hold nan at .*expected finite numbers"),
        (np.zeros((60, 5)), "regression", r"shape \(3,\) .* targets have \(5,\)"),
        (np.full(60, 7), "classification", "gives 3 logits, the data have 8 classes"),
        (np.full((60, 3), 2), "multilabel", "range from 2 to 2; expected 0 or 1"),
        (np.zeros((60, 64), int), "segmentation", r"shape \(3,\) .* needs \(classes, \*size\)"),
        (np.linspace(0, 1, 60), None, "expected one whole number"),
        (np.zeros(60), "detection", "expected one of classification"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_one_line(labels, heads, match, tmp_path):
    x = signals(60, 0)[0]
    with pytest.raises(UserError, match=match) as caught:
        moodistill.search(small(nn.Linear(32, 3)), (x, labels), (x, labels), out=tmp_path / "run",
                          heads=heads, **BUDGET)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_masks_of_another_size_name_both_shapes(tmp_path):
    images, masks = rectangles(20, 0)
    given = (images, masks[:, :8, :8])
    with pytest.raises(UserError, match=r"shape \(3, 16, 16\) .* targets have \(8, 8\)"):
        moodistill.search(UNet().eval(), given, given, out=tmp_path / "a", heads="segmentation",
                          **BUDGET)  # fmt: skip
    given = (images, masks + 3)
    with pytest.raises(UserError, match=r"has 3 classes .* range from 3 to 5; expected 0 to 2"):
        moodistill.search(UNet().eval(), given, given, out=tmp_path / "b", heads="segmentation",
                          **BUDGET)  # fmt: skip
    with pytest.raises(UserError, match="map .*vector .*say by heads"):
        moodistill.search(TwoHeads().eval(), (images, np.zeros(20)), (images, np.zeros(20)),
                          out=tmp_path / "c", **BUDGET)  # fmt: skip
