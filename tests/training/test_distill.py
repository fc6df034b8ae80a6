"""Distillation: where it was interrupted it is carried on, and a longer one stands."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import random_genome
from torch import nn

from moodistill.finalists.distil import RESULT_FILE, Finalist, finished_before
from moodistill.io.atomic import write_json_atomic
from moodistill.pareto.evaluation import Evaluation
from moodistill.student.evaluator import Recipe, make_student
from moodistill.training import distill as distillation
from moodistill.training.distill import DistillConfig, SoftTargets, distill

CONFIG = DistillConfig(steps=6, batch_size=8, views=4)


@pytest.fixture(scope="module")
def students(digits):
    rng = np.random.default_rng(0)
    genomes = [random_genome(digits.layout, rng) for _ in range(2)]
    return [make_student(digits, genome, Recipe()).module for genome in genomes]


def run(digits, student, checkpoint=None, report=None, config=CONFIG):
    """The state of a distilled student."""
    targets = SoftTargets(digits.graph.module, digits.data, config, None, "")
    return distill(student, targets, config, 3, report, checkpoint).state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def interrupted(digits, student, checkpoint):
    """Leave the checkpoint of four steps."""

    def report(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(digits, student, checkpoint, report)


def test_an_interrupted_distillation_ends_with_the_same_weights(
    digits, students, tmp_path, monkeypatch
):
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1.0)
    path, steps = tmp_path / "checkpoint", []
    expected = run(digits, students[0])
    interrupted(digits, students[0], path)
    found = run(digits, students[0], path, lambda step, loss: steps.append(step))
    assert steps == [5, 6] and same(found, expected)
    assert not same(found, students[0].state_dict())


def test_a_checkpoint_of_another_distillation_is_left_alone(
    digits, students, tmp_path, monkeypatch
):
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "checkpoint"
    interrupted(digits, students[0], path)
    other, warmer = run(digits, students[1]), replace(CONFIG, temperature=2.0)
    assert same(run(digits, students[1], path), other)
    interrupted(digits, students[0], path)
    expected = run(digits, students[0], config=warmer)
    assert same(run(digits, students[0], path, config=warmer), expected)
    path.write_bytes(b"damaged")
    assert same(run(digits, students[1], path), other)


def test_dropout_is_carried_on_too(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1.0)
    genome = digits.layout.teacher()
    student = make_student(digits, genome, Recipe()).module
    target = next(node.target for node in student.graph.nodes if node.op == "call_module")
    student.add_submodule(target, nn.Sequential(student.get_submodule(target), nn.Dropout(0.5)))
    expected = run(digits, student)
    assert same(run(digits, student), expected)
    interrupted(digits, student, tmp_path / "checkpoint")
    assert same(run(digits, student, tmp_path / "checkpoint"), expected)


def test_a_shorter_distillation_does_not_replace_a_longer_one(tmp_path):
    one = Evaluation("abc", b"", 0.5, 1, 1, 1, None)
    result = Finalist("s0001", "abc", asdict(CONFIG), 0.5, 0.6, 0.6, 1, 1, 0.0, 1.0)
    write_json_atomic(tmp_path / RESULT_FILE, asdict(result))
    assert finished_before(tmp_path, one, CONFIG) == result
    assert finished_before(tmp_path, one, replace(CONFIG, steps=5)) == result
    assert finished_before(tmp_path, one, replace(CONFIG, steps=7)) is None
    assert finished_before(tmp_path, one, replace(CONFIG, steps=5, lr=0.1)) is None
    assert finished_before(tmp_path, replace(one, genome_hash="abd"), CONFIG) is None


def test_longer_distillations_are_warmer():
    rates = [DistillConfig(steps=steps).peak_lr for steps in (100, 1000, 8000)]
    assert rates == pytest.approx([0.01, 0.01, 0.02])
    assert [DistillConfig(steps=steps).view_count for steps in (100, 8000)] == [1000, 4000]


def test_fewer_pictures_than_a_batch_are_enough(digits, students):
    data = replace(digits.data, train=digits.data.train.head(5))
    images, labels = SoftTargets(digits.graph.module, data, CONFIG, None, "").batch(0)
    assert len(images) == len(labels["logits"]) == 8


def test_pictures_are_mirrored_only_where_it_is_wanted(digits):
    def views(flip):
        config = replace(CONFIG, batch_size=64, pad=0, flip=flip)
        targets = SoftTargets(digits.graph.module, digits.data, config, None, "")
        return {tuple(image.flatten().tolist()) for image in targets.batch(0)[0]}

    train = digits.data.train
    known = {tuple(image.flatten().tolist()) for image in digits.data.normalise(train.images)}
    assert views(False) <= known and not views(True) <= known
