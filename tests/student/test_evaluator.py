"""Scoring one genome: whatever goes wrong is a row with a reason."""

import signal
import time

import numpy as np
import pytest
from helpers import random_genome

from moodistill.latency.meter import LatencyError
from moodistill.pareto.evaluation import Latency
from moodistill.student.accuracy import inherited_accuracy, student_accuracy
from moodistill.student.evaluator import Evaluator, Recipe, make_student

TIME = Latency(1.0, 0.9, 1.1, 0.5)


def test_a_teacher_scores_as_torch_says(digits):
    from moodistill.training.teacher import accuracy

    one = Evaluator(digits, Recipe(), lambda model, key: TIME, 8).evaluate(digits.layout.teacher())
    assert one.failure is None and one.latency == TIME
    split = digits.data.validation.head(1000)
    assert one.accuracy == accuracy(digits.graph.module, digits.data, split)
    assert one.accuracy == student_accuracy(digits.graph.module, digits.data, split)
    assert one.parameters == sum(p.numel() for p in digits.graph.module.parameters())
    assert list(one.seconds) == ["build", "inherit", "export", "latency", "accuracy"]


def test_images_that_the_search_has_counted_are_not_counted_again(digits):
    recipe = Recipe(validation_images=70)
    genome = random_genome(digits.layout, np.random.default_rng(1))
    one = Evaluator(digits, recipe, lambda model, key: TIME, 8).evaluate(genome)
    module = make_student(digits, genome, recipe).module
    whole = student_accuracy(module, digits.data, digits.data.validation)
    assert inherited_accuracy(module, digits.data, recipe, one.accuracy) == whole
    # It is the search's word that counts for the first ones.
    other = inherited_accuracy(module, digits.data, recipe, one.accuracy - 7 / 70)
    assert other == pytest.approx(whole - 7 / len(digits.data.validation))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LatencyError("the worker died"), "LatencyError: the worker died"),
        (MemoryError("out of memory"), "MemoryError: out of memory"),
        (RuntimeError("two\nlines"), "RuntimeError: two"),
        (ValueError(), "ValueError: "),
    ],
)
def test_errors_become_failures(digits, error, words):
    def measure(model, key):
        raise error

    genome = random_genome(digits.layout, np.random.default_rng(0))
    one = Evaluator(digits, Recipe(), measure, 8).evaluate(genome)
    assert one.failure == words and one.latency is None
    assert one.accuracy == 0 and one.parameters > 0 and one.summary


def test_a_student_that_takes_too_long_is_a_failed_one(digits):
    def measure(model, key):
        time.sleep(20)

    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    recipe = Recipe(time_limit_s=1.0)
    one = Evaluator(digits, recipe, measure, 8).evaluate(digits.layout.teacher())
    assert one.failure == "TimeoutError: scoring took longer than 1 s"
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_ctrl_c_is_not_a_failure(digits):
    def measure(model, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluator(digits, Recipe(), measure, 8).evaluate(digits.layout.teacher())
