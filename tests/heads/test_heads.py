"""Metrics by hand and as scikit-learn has them; names of outputs; losses; targets that fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.heads import Head, Heads, metrics
from moodistill.heads.fit import as_targets, check_targets
from moodistill.heads.losses import distillation_loss
from moodistill.heads.outputs import outputs_of

RNG = np.random.default_rng(0)


def test_metrics_are_those_of_scikit_learn():
    classes, wanted = RNG.integers(0, 4, 500), RNG.integers(0, 4, 500)
    f1 = sklearn.metrics.f1_score(wanted, classes, average="macro")
    assert metrics.macro_f1(classes, wanted) == pytest.approx(f1)
    overlap = sklearn.metrics.jaccard_score(wanted, classes, average="macro")
    maps = classes.reshape(5, 10, 10), wanted.reshape(5, 10, 10)
    assert metrics.mean_iou(*maps) == pytest.approx(overlap)
    labels, found = RNG.integers(0, 2, (2, 200, 3))
    several = sklearn.metrics.f1_score(labels, found, average="macro")
    assert metrics.multilabel_f1(found, labels) == pytest.approx(several)
    values = RNG.standard_normal((300, 3))
    close = values + 0.5 * RNG.standard_normal((300, 3))
    assert metrics.r2(close, values) == pytest.approx(sklearn.metrics.r2_score(values, close))
    assert metrics.r2(-values, values) == 0.0 and metrics.r2(values, values) == 1.0
    assert metrics.relative_mae(close, values) == pytest.approx(
        1 - np.mean(np.abs(close - values).sum(0) / np.abs(values - np.median(values, 0)).sum(0))
    )


def test_fidelity_is_one_less_the_relative_squared_error():
    teacher = RNG.standard_normal((40, 3, 6, 6)) + np.array([0, 5, -5])[:, None, None]
    student = teacher + 0.1 * RNG.standard_normal(teacher.shape)
    spread = sum(teacher[:, c].var() for c in range(3)) / 3
    error = ((student - teacher) ** 2).mean()
    assert metrics.fidelity(student, teacher) == pytest.approx(1 - error / spread)
    assert metrics.fidelity(teacher * 0, teacher) == 0
    agreeing = Head("fidelity", "agreement")
    assert agreeing.score(agreeing.compact(student), teacher) == pytest.approx(
        (student.argmax(1) == teacher.argmax(1)).mean()
    )


def test_places_that_are_ignored_do_not_count():
    head = Head("segmentation", "accuracy", ignore=9)
    logits = np.zeros((1, 2, 2, 2))
    logits[:, 1] = [[1, -1], [1, -1]]  # classes 1 0 / 1 0
    assert head.score(head.compact(logits), np.array([[[1, 9], [9, 1]]])) == 0.5


def test_outputs_have_names():
    one, two = torch.zeros(1), torch.ones(1)
    assert list(outputs_of(one)) == ["logits"] == list(outputs_of([one])) == list(
        outputs_of({"out": one, "nothing": None})
    )  # fmt: skip
    assert list(outputs_of((one, [two, one]))) == ["output_0", "output_1.output_0",
                                                   "output_1.output_1"]  # fmt: skip
    assert list(outputs_of({"logits": one, "boxes": two})) == ["logits", "boxes"]
    answer = SimpleNamespace(logits=two, hidden=one)  # as a library's output object
    assert outputs_of(answer)["logits"] is two and len(outputs_of(answer)) == 1


def test_outputs_that_nobody_describes_are_compared_with_the_teacher():
    heads = Heads.of({"a": "classification"}).fitted(
        {"a": (3,), "b": (2, 4, 4)}, {"a": "probabilities"}
    )
    assert [h.kind for h in heads.by_output.values()] == ["classification", "fidelity"]
    assert heads.by_output["a"].gives == "probabilities" and heads.of_teacher == ("b",)
    assert heads.metric_name == "mean of metrics (a: accuracy, b: fidelity)"
    answers = [{"a": np.eye(3)[[0, 1]], "b": np.arange(64.0).reshape(2, 2, 4, 4)}]
    targets = {"a": np.array([0, 2]), "b": answers[0]["b"]}
    assert heads.score(answers, targets) == pytest.approx(0.75)
    with pytest.raises(UserError, match="output 'c'; the network has a, b"):
        Heads.of({"c": "regression"}).fitted({"a": (3,), "b": (2,)}, {})
    weighted = Heads.of({"a": Head(weight=3.0), "b": Head("fidelity")})
    assert weighted.score(answers, targets) == pytest.approx((3 * 0.5 + 1) / 4)


def test_heads_in_words():
    heads = Heads.parse(["digit=classification:macro_f1", "angle=regression"])
    assert heads.by_output["digit"].metric_name == "macro F1"
    assert heads.by_output["angle"].metric_name == "R2"
    assert Heads.parse(["segmentation"]).only.metric_name == "mean IoU"
    with pytest.raises(UserError, match="two heads for output"):
        Heads.parse(["regression", "fidelity"])


def halves(answers, targets):
    return 0.5


def test_a_metric_of_ones_own():
    head = Head("regression", halves)
    assert head.metric_name == "halves" and head.score(np.zeros(3), np.zeros(3)) == 0.5
    with pytest.raises(UserError, match="<lambda> gives 2; expected a number from 0 to 1"):
        Head("regression", lambda a, b: 2).score(np.zeros(3), np.zeros(3))


def loss_of(head, student, teacher, targets=None, hard=0.1):
    given = {} if targets is None else {"logits": targets}
    heads = Heads({"logits": head})
    return distillation_loss(heads, {"logits": student}, {"logits": teacher}, given, 4.0, hard)


def test_the_loss_of_a_map_is_that_of_all_its_places():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    masks = torch.randint(0, 3, (2, 4, 5))
    places = [t.permute(0, 2, 3, 1).reshape(-1, 3) for t in (student, teacher)]
    expected = loss_of(Head(), *places, masks.reshape(-1))
    assert torch.allclose(loss_of(Head("segmentation"), student, teacher, masks), expected)
    soft = F.kl_div(
        F.log_softmax(places[0] / 4, 1), F.softmax(places[1] / 4, 1), reduction="batchmean"
    )
    by_hand = 0.9 * 16 * soft + 0.1 * F.cross_entropy(places[0], masks.reshape(-1))
    assert torch.allclose(expected, by_hand, atol=1e-5)


@pytest.mark.parametrize("gives", ["probabilities", "log_probabilities"])
def test_a_softmax_at_the_end_is_taken_back(gives):
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    make = {"probabilities": F.softmax, "log_probabilities": F.log_softmax}[gives]
    found = loss_of(Head(gives=gives), make(student, 1), make(teacher, 1), labels)
    assert torch.allclose(found, loss_of(Head(), student, teacher, labels), atol=1e-4)
    found = loss_of(Head("multilabel", gives="probabilities"), student.sigmoid(), teacher.sigmoid())
    assert torch.allclose(found, loss_of(Head("multilabel"), student, teacher), atol=1e-4)


def test_values_are_taught_in_units_of_their_spread():
    teacher = torch.randn(50, 2)
    student = teacher + 0.3
    found = loss_of(Head("regression"), student, teacher, teacher)
    assert torch.allclose(
        found, loss_of(Head("regression"), 100 * student, 100 * teacher, 100 * teacher)
    )
    spread = teacher.var(0, unbiased=False).mean()
    assert torch.allclose(found, 0.09 / spread)
    own = Head("regression", loss=lambda s, t, y: (s - t).abs().max() + (y is None))
    assert torch.allclose(loss_of(own, student, teacher), torch.tensor(1.3))


def test_targets_are_what_their_head_wants():
    assert as_targets(Head(), np.array([[1.0], [2.0]]), "labels").tolist() == [1, 2]
    assert as_targets(Head("regression"), np.array([1, 2]), "labels").dtype == np.float32
    for head, given, match in (
        (Head("regression"), [1.0, np.inf], r"hold inf at \(1,\)"),
        (Head("segmentation"), [[0.5]], "hold 0.5; expected whole numbers"),
        (Head("multilabel"), [[0, 2]], "range from 0 to 2"),
        (Head(), ["cat"], "expected numbers"),
    ):
        with pytest.raises(UserError, match=match):
            as_targets(head, np.array(given), "labels")
    check_targets(Head("regression"), "y", (1,), np.zeros(4), "train")
    check_targets(Head("segmentation"), "y", (2, 3, 3), np.full((4, 3, 3), 255), "train")
    with pytest.raises(UserError, match=r"shape \(2, 3, 3\) .* have \(3, 4\)"):
        check_targets(Head("segmentation"), "y", (2, 3, 3), np.zeros((4, 3, 4), int), "train")
