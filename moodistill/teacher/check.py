"""How good a teacher is, said before anything else is computed, and why it may be bad.

A teacher that is fed otherwise than in its training (channels, scale, mean, classes in another
order) still answers, only badly. So one that looks wrong is tried with other preparations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import nn

from moodistill.data.images import ImageData, Split
from moodistill.data.targets import one_of
from moodistill.errors import UserError
from moodistill.heads.outputs import OUTPUT
from moodistill.teacher.answers import answers_of, logits_of
from moodistill.teacher.preparations import Preparation, other_preparations

MOST = 2000  # validation images, spread evenly: enough for the first word
TRIED = 200  # images for each other preparation
JUDGED = 10  # images of a class, at least, before it is judged
WORST = 3  # classes that are named
SHORT = 0.02  # how far below the expected accuracy is still accepted
LIFT = 0.05  # gain that is worth a word, at least


@dataclass(frozen=True)
class Remedy:
    """Something that makes a teacher better.

    Attributes:
        name: what is done otherwise, in words.
        advice: how a user does it.
        before, after: accuracy on the same `count` images.
    """

    name: str
    advice: str
    before: float
    after: float
    count: int


@dataclass(frozen=True)
class TeacherCheck:
    """What was found of a teacher.

    Attributes:
        accuracy: the data's metric on `count` validation images.
        count: of them, at most `MOST`.
        by_class: recall of each class by its name, NaN without images; empty for another metric
            than accuracy.
        training: the metric on some training images.
        never: classes with images that are never answered.
        doubts: why it looks wrong, in words; empty if it does not.
        remedy: what makes it better, None if nothing was looked for or found.
        or_else: what explains it as well: where colours are classes, BGR is another order of them.
        tried: how many other preparations were looked at.
        metric: its name.
        by_output: of several outputs the metric of each, by its name and the output's.
        unlabelled: whether all targets are the teacher's own outputs.
    """

    accuracy: float
    count: int
    by_class: dict[str, float]
    training: float
    never: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    remedy: Remedy | None = None
    or_else: Remedy | None = None
    tried: int = 0
    metric: str = "accuracy"
    by_output: dict[str, float] = field(default_factory=dict)
    unlabelled: bool = False

    def lines(self) -> list[str]:
        """What is said of it, the accuracy first."""
        if self.unlabelled:
            return [
                f"students are compared with the teacher's own outputs on {self.count:,} "
                f"validation images ({self.metric}): the data give no targets"
            ]
        if not self.by_class:
            parts = ", ".join(f"{name} {found:.4f}" for name, found in self.by_output.items())
            return [
                f"the teacher's {self.metric} is {self.accuracy:.4f} on {self.count:,} "
                f"validation images{f' ({parts})' if parts else ''}"
            ]
        below = {name: recall for name, recall in self.by_class.items() if recall < 1}
        worst = sorted(below, key=lambda name: below[name])[:WORST]
        named = ", ".join(f"{name} {below[name]:.2f}" for name in worst)
        said = [
            f"the teacher is right on {self.accuracy:.4f} of {self.count:,} validation images"
            + (f"; its worst classes: {named}" if named else "")
        ]
        if self.doubts:
            said.append(f"the teacher looks wrong: {'; '.join(self.doubts)}; {self.finding}")
        return said

    @property
    def finding(self) -> str:
        """What makes it better, or that nothing did."""
        if self.remedy is None:
            return (
                f"{self.tried} other preparations and another order of the classes do no better: "
                "look at the weights, and at the labels of the images"
            )
        one = self.remedy
        said = (
            f"with {one.name} it is right on {one.after:.2f} instead of {one.before:.2f} of "
            f"{one.count} images: {one.advice}"
        )
        if self.or_else is not None:
            said += f"; or, as likely, {self.or_else.name}: {self.or_else.advice}"
        return said


def check_teacher(
    teacher: nn.Module, data: ImageData, expected: float | None = None
) -> TeacherCheck:
    """Measure a teacher (in eval mode), and look for what is wrong if it looks so.

    Args:
        teacher: the network.
        data: of which validation and training images are used.
        expected: the accuracy that it should have, in (0, 1].

    Raises:
        UserError: if it falls short of `expected` by more than two points, or has another number of
            classes than the data.
    """
    if expected is not None and not 0 < expected <= 1:
        raise UserError(
            f"the expected accuracy is {expected:g}; give a fraction of at most 1, such as 0.93"
        )
    split = _spread(data.validation, MOST)
    if not data.by_accuracy or not data.pictures:
        found = _measured(teacher, data, split)
        short = expected is not None and found.accuracy < expected - SHORT
    else:
        found, short = _looked_into(teacher, data, split, expected)
    if short:
        why = f": {found.finding}" if found.tried else ""
        raise UserError(
            f"the teacher reaches {found.metric} {found.accuracy:.4f} on the validation images, "
            f"more than {SHORT:g} below the expected {expected:g}{why}"
        )
    return found


def _measured(teacher: nn.Module, data: ImageData, split: Split) -> TeacherCheck:
    """The metric alone: what else may be wrong is known of classifiers of images only."""
    heads = data.meaning
    answers = answers_of(teacher, data, split.images)
    by_output = heads.each(answers, split.targets)
    total = sum(head.weight for head in heads.scored.values())
    reached = sum(by_output[name] * head.weight for name, head in heads.scored.items()) / total
    unlabelled = heads.of_teacher == tuple(heads.by_output)
    several = {f"{heads.by_output[name].metric_name} of {name}": found
               for name, found in by_output.items()} if len(by_output) > 1 else {}  # fmt: skip
    return TeacherCheck(
        reached, len(split), {}, float("nan"), metric=data.metric_label, by_output=several,
        unlabelled=unlabelled,
    )  # fmt: skip


def _looked_into(
    teacher: nn.Module, data: ImageData, split: Split, expected: float | None
) -> tuple[TeacherCheck, bool]:
    """A classifier of images, and what is wrong if it looks so; whether it falls short."""
    logits = logits_of(teacher, data, split.images)
    if logits.ndim != 2 or logits.shape[1] != len(data.labels):
        given = f"{logits.shape[1]} logits" if logits.ndim == 2 else f"shape {logits.shape[1:]}"
        raise UserError(
            f"{type(teacher).__name__} gives {given}, the data have {len(data.labels)} classes "
            f"({', '.join(data.labels)[:80]}): expected one for each"
        )
    labels = one_of(split.targets)
    some = _spread(data.train, TRIED)
    training = data.score(answers_of(teacher, data, some.images), some)
    reached = data.score([{OUTPUT: logits}], split)
    found = TeacherCheck(reached, len(split), {}, training)
    short = expected is not None and found.accuracy < expected - SHORT
    found = _with_classes(found, data, logits, labels)
    order = _better_order(logits, labels)
    doubts = _doubts(found, data, order is not None)
    if _better_as_bgr(teacher, data):
        doubts = (*doubts, "it is better on images in BGR")
    if doubts or short:
        found = replace(found, doubts=doubts)
        remedy = _order_remedy(order, logits, labels, data.labels)
        found = _with_remedy(found, teacher, data, remedy)
    return found, short


def _spread(split: Split, count: int) -> Split:
    """Some images of a split, evenly from all of it."""
    index = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)
    return split.ordered(index)


def _with_classes(
    found: TeacherCheck, data: ImageData, logits: np.ndarray, labels: np.ndarray
) -> TeacherCheck:
    answers = logits.argmax(1)
    counts = np.bincount(labels, minlength=len(data.labels))
    right = np.bincount(labels[answers == labels], minlength=len(data.labels))
    recall = [float(r) / int(c) if c else float("nan") for r, c in zip(right, counts, strict=True)]
    never = [
        name
        for number, name in enumerate(data.labels)
        if counts[number] >= JUDGED and not (answers == number).any()
    ]
    by_class = dict(zip(data.labels, recall, strict=True))
    return replace(found, by_class=by_class, never=tuple(never))


def _doubts(found: TeacherCheck, data: ImageData, swapped: bool) -> tuple[str, ...]:
    doubts = []
    if found.accuracy < 0.5 * found.training:
        doubts.append(
            f"it is right on {found.training:.2f} of the training images, on less than half as "
            "many of the validation images"
        )
    chance = 1 / len(data.labels)
    # Half of what any useful teacher of these classes has: of the way from chance to all.
    if found.accuracy < chance + 0.5 * (1 - chance):
        doubts.append(f"{found.accuracy:.2f} is little, chance is {chance:.2g}")
    if found.never:
        doubts.append(f"it never answers {', '.join(found.never[:5])}")
    if swapped:
        doubts.append("it takes classes for one another")
    return tuple(doubts)


def _better_order(logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Which class each logit `(classes,)` stands for, if that lifts accuracy; None if as it is.

    The assignment with most right answers on one half of the images must hold on the other.
    """
    answers, classes = logits.argmax(1), logits.shape[1]
    half = np.arange(len(labels)) % 2 == 0
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (answers[half], labels[half]), 1)
    # Of equally good ones the order as it is.
    order = linear_sum_assignment(2 * confusion + np.eye(classes, dtype=int), maximize=True)[1]
    rest = ~half
    lifted = _lifts(answers[rest] == labels[rest], order[answers[rest]] == labels[rest])
    return order if lifted else None


def _lifts(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether more of the same images are right: five points more, and no matter of chance."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    net = gained - lost
    return net > LIFT * len(before) and net > 3 * np.sqrt(gained + lost)


def _better_as_bgr(teacher: nn.Module, data: ImageData) -> bool:
    """Tried of every teacher: BGR for RGB costs some points only, which nobody would notice."""
    some = _spread(data.validation, TRIED).held()
    ways = [way for way in other_preparations(data) if way.bgr][:1]
    return any(_lifts(_right(teacher, data, some), _right(teacher, data, some, w)) for w in ways)


def _right(
    teacher: nn.Module, data: ImageData, split: Split, way: Preparation | None = None
) -> np.ndarray:
    """Which images `(n,)` are answered rightly, prepared as the data have it or otherwise."""
    images = split.images
    if way is not None:
        data, images = way.data(data), way.pictures(images[:])
    return logits_of(teacher, data, images).argmax(1) == one_of(split.targets)


def _order_remedy(
    order: np.ndarray | None, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Remedy | None:
    if order is None:
        return None
    answers = logits.argmax(1)
    moved = [f"{names[new]} for {names[old]}" for old, new in enumerate(order) if old != new]
    more = f" and {len(moved) - 4} more" if len(moved) > 4 else ""
    return Remedy(
        f"the classes in another order ({', '.join(moved[:4])}{more})",
        "give the classes in the order of the teacher's logits (folders are read in the order of "
        "their names)",
        float((answers == labels).mean()),
        float((order[answers] == labels).mean()),
        len(labels),
    )


def _with_remedy(
    found: TeacherCheck, teacher: nn.Module, data: ImageData, order: Remedy | None
) -> TeacherCheck:
    """Try the other preparations on some images, and keep what lifts most."""
    some = _spread(data.validation, TRIED).held()
    before = _right(teacher, data, some)
    tried, best = 0, None
    for one in other_preparations(data):
        after = _right(teacher, data, some, one)
        tried += 1
        share = float(after.mean())
        if _lifts(before, after) and (best is None or share > best.after):
            best = Remedy(one.name, one.advice, float(before.mean()), share, len(some))
    if best is None or order is None:
        return replace(found, remedy=best or order, tried=tried)
    if best.after < order.after - SHORT:
        return replace(found, remedy=order, tried=tried)
    equal = order if order.after > best.after - SHORT else None
    return replace(found, remedy=best, or_else=equal, tried=tried)
