"""Inputs that are no pictures: from arrays, data sets, archives, folders and tables."""

import numpy as np
import pytest
import torch

from moodistill.api import _image_data
from moodistill.cli import main
from moodistill.data.array_files import holds_arrays, load_arrays
from moodistill.data.arrays import ArrayData, arrays_of, from_arrays
from moodistill.data.images import ImageData, Split, fraction_right
from moodistill.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 2, 16)).astype(np.float32)
Y = np.arange(40) % 4


def given(*splits, heads=None, inputs=None):
    return _image_data(*splits, None, None, None, fraction_right, None, heads, inputs)


def test_arrays_go_in_as_they_are():
    data = given((X, Y), (X[:10], Y[:10]), None)
    assert (
        isinstance(data, ArrayData) and data.input_shape == (2, 16) and data.labels == tuple("0123")
    )
    assert torch.equal(data.normalise(data.train.images), torch.from_numpy(data.train.images))
    order = np.random.default_rng(0).permutation(40)  # mixed, inputs and labels alike
    assert np.array_equal(data.train.images, X[order]) and np.array_equal(
        data.train.labels, Y[order]
    )
    scaled = from_arrays(
        "own", {"train": Split(X, Y), "validation": Split(X, Y)}, mean=[1, 2], std=[2, 4]
    )
    expected = (scaled.train.images - np.array([[1], [2]])) / np.array([[2], [4]])
    assert np.allclose(scaled.normalise(scaled.train.images), expected, atol=1e-6)
    assert scaled.digest != data.digest and len(scaled.test) == 20


def test_inputs_alone_have_no_targets():
    data = given(X, X[:10], None)
    assert data.train.targets == {} and data.meaning.by_output == {}
    pictures = RNG.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    data = given(pictures, pictures, None)
    assert data.pictures and not isinstance(data, ArrayData) and data.train.targets == {}
    with pytest.raises(UserError, match="the validation data have no labels"):
        given((X, Y), X, None)


class Items:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_any_data_set():
    items = Items([(torch.from_numpy(x), {"a": y, "b": x[0]}) for x, y in zip(X, Y, strict=True)])
    split = arrays_of(items, "train")
    assert split.images.shape == X.shape and split.labels["b"].shape == (40, 16)
    data = given(
        items, items, None, heads={"a": "classification", "b": "regression"}, inputs="arrays"
    )
    assert data.train.targets["a"].dtype == np.int64 and data.meaning.only is None
    with pytest.raises(UserError, match="output 'c', heads are given for a"):
        given(
            (X, {"a": Y, "c": Y}),
            (X, {"a": Y, "c": Y}),
            None,
            heads={"a": "classification", "z": "fidelity"},
        )
    with pytest.raises(UserError, match="no targets for output 'b'"):
        given((X, {"a": Y, "d": Y}), (X, {"a": Y, "d": Y}), None,
              heads={"a": "classification", "b": "regression", "d": "regression"})  # fmt: skip
    with pytest.raises(UserError, match=r"input 1 is \(3,\), the first \(2,\)"):
        arrays_of(Items([np.zeros(2), np.zeros(3)]), "train")


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.full((10, 2, 16), np.nan), "hold NaN or infinity"),
        (np.zeros((10, 16)), r"float64 \(10, 16\); expected numbers"),
        (np.zeros((9, 2, 16)), r"\(9, 2, 16\) with labels"),
    ],
)
def test_bad_arrays_are_one_line(x, match):
    with pytest.raises(UserError, match=match) as caught:
        given((x, np.arange(10) % 2), (x, np.arange(10) % 2), None)
    assert "\n" not in str(caught.value)


def test_an_archive(tmp_path):
    path = tmp_path / "waves.npz"
    np.savez(path, x=X, y=Y)
    data = load_arrays(path)
    assert holds_arrays(path) and [len(s) for s in (data.train, data.validation, data.test)] == [
        32,
        4,
        4,
    ]
    found = np.concatenate([data.train.images, data.validation.images, data.test.images])
    assert {x.tobytes() for x in found} == {x.tobytes() for x in X}
    np.savez(path, x_train=X, y_a_train=Y, y_b_train=X[:, 0], x_val=X, y_a_val=Y, y_b_val=X[:, 0])
    data = load_arrays(path, heads={"a": "classification", "b": "regression"})
    assert data.validation.targets["b"].shape[1:] == (16,)
    pictures = RNG.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x=pictures, y=np.zeros((20, 8, 8), int))
    data = load_arrays(path, heads="segmentation")
    assert (
        data.pictures
        and type(data) is ImageData
        and data.train.targets["logits"].shape == (16, 8, 8)
    )
    np.savez(path, x=X, labels=Y)
    with pytest.raises(UserError, match="holds 'labels'; expected x and y"):
        load_arrays(path)
    np.savez(path, x_train=X)
    with pytest.raises(UserError, match="expected x_train and x_validation"):
        load_arrays(path)


def test_a_folder_and_a_table(tmp_path):
    lines = ["file,label,split"]
    for number, (x, y) in enumerate(zip(X, Y, strict=True)):
        place = tmp_path / "waves" / "abcd"[y] / f"{number}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, x)
        split = "train" if number < 30 else "val"
        lines.append(f"{place.relative_to(tmp_path)},{'abcd'[y]},{split}")
    data = load_arrays(tmp_path / "waves")
    assert holds_arrays(tmp_path / "waves") and data.labels == tuple("abcd")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [32, 4, 4]
    (tmp_path / "waves.csv").write_text("\n".join(lines))
    data = load_arrays(tmp_path / "waves.csv")
    assert data.labels == tuple("abcd") and len(data.train) == 30 and len(data.validation) == 5
    (tmp_path / "waves.csv").write_text("\n".join(lines[:2]).replace(",a,", ",a,dev2"))
    with pytest.raises(UserError, match="has split 'dev2train'"):
        load_arrays(tmp_path / "waves.csv")
    np.save(tmp_path / "waves" / "a" / "0.npy", X[0, :, :3])
    with pytest.raises(UserError, match="expected arrays of one shape"):
        load_arrays(tmp_path / "waves")


def test_options_of_images_are_refused_beside_arrays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("waves.npz", x=X, y=Y)
    code = main(["run", "--teacher", "mine:build", "--weights", "w.pt", "--data", "waves.npz",
                 "--size", "32"])  # fmt: skip
    assert code == 2 and "--size is for images" in capsys.readouterr().err
