"""Teachers: training resumes exactly, weights are checked key by key."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moodistill.data.digits import load_digits
from moodistill.data.images import Split
from moodistill.errors import UserError
from moodistill.io.tensorfile import read_safetensors, save_atomic
from moodistill.teacher.task import Task, TrainConfig, load_task
from moodistill.teacher.weights import half_precision, load_weights
from moodistill.training import teacher as training
from moodistill.training.augment import augment
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


def test_interrupted_training_ends_with_the_same_weights(small, tmp_path, monkeypatch):
    task, data = small
    train_teacher(task, data, tmp_path / "whole.safetensors")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    calls = iter(range(100))
    normalise = type(data).normalise

    def dies(self, images):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return normalise(self, images)

    monkeypatch.setattr(type(data), "normalise", dies)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(task, data, tmp_path / "part.safetensors")
    monkeypatch.setattr(type(data), "normalise", normalise)
    assert (tmp_path / "part.checkpoint").exists()
    report = train_teacher(task, data, tmp_path / "part.safetensors")
    one, _ = read_safetensors(tmp_path / "whole.safetensors")
    two, _ = read_safetensors(tmp_path / "part.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "part.checkpoint").exists()
    assert 0 <= report["test_accuracy"] <= 1 and (tmp_path / "part.json").exists()


def test_fewer_pictures_than_a_batch_train_too(small, tmp_path):
    task, data = small
    task = replace(task, train=replace(task.train, batch_size=500))
    report = train_teacher(task, data, tmp_path / "t.safetensors")
    trained, _ = read_safetensors(tmp_path / "t.safetensors")
    torch.manual_seed(task.train.seed)
    fresh = half_precision(task.build().state_dict())
    assert not torch.equal(trained["output.weight"], fresh["output.weight"])
    assert report["recipe"]["batch_size"] == 500


@pytest.mark.parametrize("device", ["gpu", "meta:3x", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(small, tmp_path, device):
    with pytest.raises(UserError, match=f"--device {device} cannot be used"):
        train_teacher(*small, tmp_path / "t.safetensors", device)


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


@pytest.mark.parametrize("name", ["vgg16", "digits"])
def test_shipped_teachers_load(name):
    task = load_task(name)
    model = load_weights(task.build(), task.weights)
    assert not model.training


def test_shipped_digits_teacher_reads_digits():
    task = load_task("digits")
    model = load_weights(task.build(), task.weights)
    data = task.load_data(None)
    assert training.accuracy(model, data, data.test) > 0.98


def test_weights_of_another_architecture_are_refused(tmp_path):
    digits, vgg = load_task("digits"), load_task("vgg16")
    with pytest.raises(UserError, match="keys missing.*unknown keys"):
        load_weights(vgg.build(), digits.weights)
    state = half_precision(digits.build().state_dict())
    state["output.weight"] = torch.zeros(11, 64)
    save_atomic(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"output.weight is \(11, 64\), expected \(10, 64\)"):
        load_weights(digits.build(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_truncated_weights_are_refused(tmp_path, size):
    path = tmp_path / "w.safetensors"
    path.write_bytes(load_task("digits").weights.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated"):
        load_weights(load_task("digits").build(), path)


def test_nan_weights_are_refused(tmp_path):
    state = load_task("digits").build().state_dict()
    state["output.bias"][0] = float("nan")
    save_atomic(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"output.bias holds NaN"):
        load_weights(load_task("digits").build(), tmp_path / "w.safetensors")


def test_orthogonalise_flattens_singular_values():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    # Muon's coefficients drive singular values to about 0.7..1.2, not to 1.
    assert values.min() > 0.5 and values.max() < 1.4
    tall = torch.linalg.svdvals(orthogonalise(matrix.T.contiguous()))
    assert torch.allclose(values, tall, atol=1e-3)


def test_augment_shifts_and_flips_whole_images():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    moved = augment(images, 2, True, np.random.default_rng(1))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    for image, big in zip(moved, padded, strict=True):
        crops = [big[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)
    assert not np.array_equal(moved, images)
    assert np.array_equal(augment(images, 0, False, np.random.default_rng(1)), images)


def test_unknown_task_and_bad_problem_files(tmp_path):
    with pytest.raises(UserError, match="unknown model 'vgg17'; expected one of .*vgg16"):
        load_task("vgg17")
    with pytest.raises(UserError, match="does not exist"):
        load_task(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no TASK"):
        load_task(str(tmp_path / "mine.py"))
    (tmp_path / "own.py").write_text(
        "from problems.digits import TASK as OTHER\nfrom dataclasses import replace\n"
        "TASK = replace(OTHER, name='own')\n"
    )
    assert isinstance(load_task(str(tmp_path / "own.py")), Task)


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
