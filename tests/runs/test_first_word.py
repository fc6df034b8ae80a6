"""A run says first how good its teacher is, and takes the weights that it was told to take."""

import io
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from moodistill.config import RunConfig, new_config
from moodistill.data.images import Split
from moodistill.errors import UserError
from moodistill.progress import Reporter
from moodistill.runs.backend import Places
from moodistill.runs.run import start_run
from moodistill.settings import Settings
from moodistill.student import context as context_module
from moodistill.student.context import load_context
from moodistill.teacher.task import OwnTask, load_task
from moodistill.teacher.weights import load_weights


class Reached(Exception):
    """What takes long would begin."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Begin a run up to where it takes long; gives what was said and the folder."""

    def long(*_, **__):
        raise Reached

    monkeypatch.setattr(context_module, "collect_samples", long)

    def begin(task, expected=None):
        said, out = io.StringIO(), tmp_path / "run"
        config = new_config("digits", Settings(preset="quick", simd_step=16))
        error = None
        try:
            start_run(config, out, Places(expected_accuracy=expected), Reporter(said), task)
        except (Reached, UserError) as raised:
            error = raised
        assert not out.exists()
        return said.getvalue().splitlines(), error

    return begin


def swapped(task):
    """Digits with 4 and 9 taken for one another in the validation labels."""
    data = task.load_data(None)
    order = np.array([0, 1, 2, 3, 9, 5, 6, 7, 8, 4])
    validation = Split(data.validation.images, order[data.validation.labels])
    return replace(task, load_data=lambda _: replace(data, validation=validation))


def test_the_accuracy_is_said_before_anything_long(start):
    lines, error = start(load_task("digits"), expected=0.99)
    assert lines == ["the teacher is right on 1.0000 of 350 validation images"]
    assert isinstance(error, Reached)


def test_swapped_classes_are_said_before_anything_long(start):
    (first, second), error = start(swapped(load_task("digits")))
    assert "its worst classes: 4 0.00, 9 0.00" in first and "9 for 4, 4 for 9" in second
    assert isinstance(error, Reached)


def test_less_than_is_expected_ends_the_run(start):
    lines, error = start(swapped(load_task("digits")), expected=0.95)
    assert not lines and isinstance(error, UserError)
    assert "below the expected 0.95: with the classes in another order" in str(error)


def test_the_key_of_weights_makes_another_teacher(tmp_path):
    task = load_task("digits")
    good = load_weights(task.build(), task.weights).state_dict()
    torch.manual_seed(0)
    torch.save({"model": task.build().state_dict(), "ema": good}, tmp_path / "two.pt")
    task = replace(task, weights=tmp_path / "two.pt")
    said, digests = [], set()
    for key in (None, "ema", "model"):
        one = replace(task, weights_key=key)
        context = load_context(one, cache_dir=tmp_path / "cache", say=said.append)
        digests.add(context.teacher_digest)
        weights = context.graph.module.state_dict()
        same = all(torch.equal(v, good[k]) for k, v in weights.items() if k in good)
        assert same == (key != "model")
    assert len(digests) == 3 and len(said) == 1


def test_the_key_of_weights_belongs_to_a_run():
    own = OwnTask("best.pt", "pictures", weights_key="model_ema")
    config = new_config("net.py:build", Settings(preset="quick", simd_step=16), own)
    assert RunConfig.from_dict(asdict(config)).own == own
    older = asdict(config)
    del older["own"]["weights_key"]
    assert RunConfig.from_dict(older).own == replace(own, weights_key=None)
