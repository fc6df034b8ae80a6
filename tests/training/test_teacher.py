"""Teachers: training resumes exactly and says how far it is."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moodistill.data.digits import load_digits
from moodistill.data.images import Split
from moodistill.errors import UserError
from moodistill.io.tensorfile import read_safetensors, save_atomic
from moodistill.progress import Reporter
from moodistill.teacher.task import TrainConfig, load_task
from moodistill.teacher.weights import half_precision
from moodistill.training import teacher as training
from moodistill.training.checkpoint import Checkpoint
from moodistill.training.muon import orthogonalise
from moodistill.training.teacher import train_teacher


@pytest.fixture(scope="module")
def small():
    digits = load_digits()
    data = replace(digits, train=digits.train.head(192), validation=digits.validation.head(50))
    data = replace(data, test=digits.test.head(50))
    task = load_task("digits")
    config = TrainConfig(phases=((2, 32),), batch_size=64, pad=2, flip=False)
    return replace(task, train=config), data


class Dropping(torch.nn.Module):
    """Reads digits, with dropout."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, bias=False)
        self.second = torch.nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.drop = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.conv(x)))))
        return self.last(self.drop(x.mean((2, 3))))


class Stops(Reporter):
    """Interrupts a training after some steps."""

    def __init__(self, after=None):
        super().__init__(io.StringIO())
        self.left, self.loss = after, []

    def update(self, stage, done, facts):
        self.loss.append(facts["loss"])
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_interrupted_training_ends_with_the_same_weights(small, tmp_path, monkeypatch, after):
    task, data = small
    recipe = replace(task.train, flip=True, cutout=6, smoothing=0.1, phases=((1, 24), (1, 32)))
    task = replace(task, train=recipe, build=Dropping)
    whole = Stops()
    expected = train_teacher(task, data, tmp_path / "whole.safetensors", reporter=whole)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(task, data, tmp_path / "part.safetensors", reporter=Stops(after))
    assert Checkpoint.read(tmp_path / "part.checkpoint").step == after
    rest = Stops()
    torch.rand(3)  # what the caller draws makes no difference
    report = train_teacher(task, data, tmp_path / "part.safetensors", reporter=rest)
    assert rest.loss == whole.loss[after:] and len(whole.loss) == 6
    one, _ = read_safetensors(tmp_path / "whole.safetensors")
    two, _ = read_safetensors(tmp_path / "part.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "part.checkpoint").exists()
    written = json.loads((tmp_path / "part.json").read_text())
    assert written["validation_curve"] == expected["validation_curve"]
    assert len(report["validation_curve"]) == 2
    assert report["validation_curve"][-1] == pytest.approx(report["validation_accuracy"], abs=0.05)


def test_every_epoch_says_how_long_it_will_take(small, tmp_path):
    task, data = small
    lines = io.StringIO()
    train_teacher(task, data, tmp_path / "t.safetensors", reporter=Reporter(lines))
    first, second = lines.getvalue().splitlines()
    assert first.startswith("epoch 1 of 2: loss ") and "validation accuracy 0." in first
    assert first.endswith(" min to go") and second.endswith("about 0 min to go")


def test_a_loss_that_is_no_number_ends_the_training(small, tmp_path):
    task, data = small
    task = replace(task, train=replace(task.train, lr=float("inf")))
    with pytest.raises(UserError, match="loss became nan in step 2 of 6"):
        train_teacher(task, data, tmp_path / "t.safetensors")


def test_fewer_pictures_than_a_batch_train_too(small, tmp_path):
    task, data = small
    task = replace(task, train=replace(task.train, batch_size=500))
    report = train_teacher(task, data, tmp_path / "t.safetensors")
    trained, _ = read_safetensors(tmp_path / "t.safetensors")
    torch.manual_seed(task.train.seed)
    fresh = half_precision(task.build().state_dict())
    assert not torch.equal(trained["output.weight"], fresh["output.weight"])
    assert report["recipe"]["batch_size"] == 500


def test_pictures_that_are_not_square_keep_their_shape(small, tmp_path, monkeypatch):
    task, data = small
    task = replace(task, train=replace(task.train, phases=((1, 16), (1, 32))))
    task = replace(task, build=lambda: Wide(seen))
    wide = {
        part: replace(split, images=np.concatenate([split.images, split.images], 2))
        for part, split in (("train", data.train), ("validation", data.validation),
                            ("test", data.test))
    }  # fmt: skip
    seen = set()
    train_teacher(task, replace(data, **wide), tmp_path / "t.safetensors")
    assert seen == {(16, 32), (32, 64)}


class Wide(torch.nn.Module):
    """Notes the size of what it reads."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.last = torch.nn.Linear(4, 10)

    def forward(self, x):
        self.seen.add(tuple(x.shape[2:]))
        return self.last(self.conv(x).mean((2, 3)))


def test_checkpoint_of_another_configuration_is_refused(small, tmp_path):
    task, data = small
    Checkpoint("other", 1, {"x": torch.zeros(1)}, {}).save(tmp_path / "t.checkpoint")
    with pytest.raises(UserError, match="another configuration"):
        train_teacher(task, data, tmp_path / "t.safetensors")
    save_atomic({"x": torch.zeros(1)}, tmp_path / "t.checkpoint", {"signature": "other"})
    with pytest.raises(UserError, match="no checkpoint"):
        train_teacher(task, data, tmp_path / "t.safetensors")


def test_orthogonalise_flattens_singular_values():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    rough = torch.linalg.svdvals(orthogonalise(matrix, mixed=True).float())
    # Muon's coefficients drive singular values to about 0.7..1.2, not to 1.
    for found in (values, rough):
        assert found.min() > 0.5 and found.max() < 1.4
    assert torch.linalg.svdvals(matrix).max() > 4 * torch.linalg.svdvals(matrix).min()
    tall = torch.linalg.svdvals(orthogonalise(matrix.T.contiguous()))
    assert torch.allclose(values, tall, atol=1e-3)


def test_accuracy_counts_right_answers(monkeypatch):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    data = load_digits()
    split = Split(data.test.images[:40], np.array([3] * 30 + [1] * 10))
    monkeypatch.setattr("moodistill.data.images.AT_ONCE", 7 * 32 * 32)  # in several batches
    assert training.accuracy(Constant(), data, split) == 0.75
