"""Errors of single changes of the teacher."""

import numpy as np
import pytest
import torch

from moodistill.evolution.tables import single_changes
from moodistill.heads.head import Head
from moodistill.heads.heads import Heads
from moodistill.heads.outputs import OUTPUT, outputs_of
from moodistill.student.builder import build_student
from moodistill.student.changes import ChangeErrors
from moodistill.student.inherit import InheritConfig, Walk
from moodistill.teacher.divergence import divergence

STEP = 8


@pytest.fixture(scope="module")
def errors(digits):
    images = digits.data.normalise(digits.data.validation.head(64).images)
    return ChangeErrors(digits.graph, digits.layout, digits.samples, images, digits.data.meaning)


@pytest.fixture(scope="module")
def changes(digits):
    kept = np.zeros(digits.layout.length, dtype=bool)
    return list(single_changes(digits.layout, STEP, kept))


def test_the_teacher_has_no_error(digits, errors):
    assert errors.error(digits.layout.teacher()) == pytest.approx(0.0, abs=1e-6)


def test_what_lies_before_a_change_need_not_be_computed_again(digits, errors, changes):
    for change in changes[::7]:
        student = build_student(digits.graph, digits.layout, change.genome)
        touched = errors._touched(student)
        assert touched.solved, change.gene
        assert touched.same and len(touched.same) < len(student.module.graph.nodes)
        # The same with everything computed: solved units, and the statistics up to the last.
        with torch.no_grad():
            Walk(student, digits.graph, digits.samples, InheritConfig()).run(
                {name: errors.calibrated[name] for name in touched.same},
                touched.solved,
                touched.last,
            )
            found = student.module(errors.images)
        expected = divergence(digits.data.meaning, outputs_of(found), errors.answers)
        assert errors.error(change.genome) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_more_is_lost_the_larger_the_error(errors, changes):
    found = {}
    for change in changes:
        if change.gene.startswith("mask/"):
            found.setdefault(change.gene, []).append(errors.error(change.genome))
    assert found
    for gene, values in found.items():
        assert values[-1] > 0.0, gene
        assert values == sorted(values) or max(values) < 1.5 * values[-1], gene


CLASSES = Heads.of("classification")


def test_an_output_that_is_no_number_is_an_infinite_error():
    logits = {OUTPUT: torch.tensor([[0.0, 1.0], [2.0, 0.0]])}
    nothing = {OUTPUT: torch.full((2, 2), torch.nan)}
    assert divergence(CLASSES, nothing, logits) == float("inf")


def test_the_divergence_is_that_of_the_probabilities():
    teacher, student = torch.tensor([[0.0, np.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    found = divergence(CLASSES, {OUTPUT: student}, {OUTPUT: teacher})
    assert found == pytest.approx(expected, rel=1e-5)
    shifted = divergence(CLASSES, {OUTPUT: teacher + 5.0}, {OUTPUT: teacher})
    assert shifted == pytest.approx(0.0, abs=1e-6)


def test_a_loss_that_needs_targets_is_not_asked():
    head = Head("regression", loss=lambda found, soft, targets: targets.sum())
    teacher = {OUTPUT: torch.tensor([[0.0], [2.0]])}
    found = divergence(Heads({OUTPUT: head}), {OUTPUT: torch.ones(2, 1)}, teacher)
    assert found == pytest.approx(1.0)
