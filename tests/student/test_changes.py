"""Errors of single changes of the teacher."""

import numpy as np
import pytest
import torch

from moodistill.evolution.tables import single_changes
from moodistill.student.builder import build_student
from moodistill.student.changes import ChangeErrors
from moodistill.student.inherit import InheritConfig, Walk

STEP = 8


@pytest.fixture(scope="module")
def errors(digits):
    return ChangeErrors(digits.graph, digits.layout, digits.samples)


@pytest.fixture(scope="module")
def changes(digits):
    kept = np.zeros(digits.layout.length, dtype=bool)
    return list(single_changes(digits.layout, STEP, kept))


def test_the_teacher_has_no_error(digits, errors):
    assert errors.error(digits.layout.teacher()) == 0.0


def test_what_lies_before_a_change_need_not_be_computed_again(digits, errors, changes):
    for change in changes[::7]:
        student = build_student(digits.graph, digits.layout, change.genome)
        known, solved = errors._untouched(student)
        walk = Walk(student, digits.graph, digits.samples, InheritConfig())
        with torch.no_grad():
            outputs = walk.run(solved=solved)  # everything computed
        expected = float((outputs - errors.outputs).square().mean()) / errors.variance
        assert solved or "merge" in change.gene, change.gene
        assert errors.error(change.genome) == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert len(known) < len(student.module.graph.nodes)


def test_the_more_is_lost_the_larger_the_error(errors, changes):
    found = {}
    for change in changes:
        if change.gene.startswith("mask/"):
            found.setdefault(change.gene, []).append(errors.error(change.genome))
    assert found
    for gene, values in found.items():
        assert values[-1] > 0.0, gene
        assert values == sorted(values) or max(values) < 1.5 * values[-1], gene


def test_an_output_without_a_number_is_an_infinite_error(digits, errors, changes, monkeypatch):
    monkeypatch.setattr(Walk, "run", lambda *_, **__: torch.full_like(errors.outputs, torch.nan))
    assert errors.error(changes[0].genome) == float("inf")
