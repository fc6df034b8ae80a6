"""A teacher's weights are checked key by key."""

import pytest
import torch

from moodistill.errors import UserError
from moodistill.io.tensorfile import save_atomic
from moodistill.teacher.task import load_task
from moodistill.teacher.weights import half_precision, load_weights
from moodistill.training.teacher import accuracy


@pytest.mark.parametrize("name", ["vgg16", "digits"])
def test_shipped_teachers_load(name):
    task = load_task(name)
    model = load_weights(task.build(), task.weights)
    assert not model.training


def test_shipped_digits_teacher_reads_digits():
    task = load_task("digits")
    model = load_weights(task.build(), task.weights)
    data = task.load_data(None)
    assert accuracy(model, data, data.test) > 0.98


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
