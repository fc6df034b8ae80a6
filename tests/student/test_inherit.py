"""Closed-form inheritance: it solves what it says, and it helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_genome
from torch import nn

from moodistill.genome.canonical import canonical
from moodistill.genome.layout import GenomeLayout, Group
from moodistill.student import solve as inheritance
from moodistill.student.builder import build_student
from moodistill.student.inherit import InheritConfig, inherit
from moodistill.student.solve import estimate_inputs
from moodistill.teacher import samples as statistics
from moodistill.teacher.blocks import build_layout, skeleton
from moodistill.teacher.graph import trace
from moodistill.teacher.samples import CalibrationConfig, collect_samples, sample_pixels
from moodistill.teacher.weights import load_weights
from moodistill.training.distill import DistillConfig, SoftTargets
from moodistill.training.teacher import accuracy

MODES = ("slice", "student", "patches")


def inherited(context, genome, **config):
    student = build_student(context.graph, context.layout, genome)
    inherit(student, context.graph, context.samples, InheritConfig(**config))
    return student


def narrow(layout, share, step=8):
    """Every group at a share of its width, the most important channels."""
    genome = layout.teacher()
    for group in layout.groups.values():
        if not group.frozen:
            order = np.argsort(-group.importance)
            layout.view(genome, f"mask/{group.name}")[order[int(share * group.size) :]] = False
    return canonical(layout, genome, step)


def diagonal(layout):
    """Block-diagonal connections in one convolution, at full width."""
    genome = layout.teacher()
    layout.view(genome, "block/conv4.0")[:] = np.eye(4, dtype=bool)
    return genome


@pytest.fixture(scope="module")
def reached(digits):
    def measure(student):
        return accuracy(student.module, digits.data, digits.data.validation)

    return measure


def test_closed_form_beats_slicing_at_half_width(digits, reached):
    genome = narrow(digits.layout, 0.5)
    found = {mode: reached(inherited(digits, genome, mode=mode)) for mode in MODES}
    assert found["student"] > found["slice"] + 0.1, found
    assert found["patches"] > 0.97, found


def test_whole_patches_beat_single_pixels_at_an_eighth_of_the_width(digits, reached):
    genome = narrow(digits.layout, 0.125)
    found = {mode: reached(inherited(digits, genome, mode=mode)) for mode in MODES}
    assert found["patches"] > found["student"] + 0.05, found


def test_a_solve_that_is_not_finite_leaves_the_sliced_weights(digits, monkeypatch):
    monkeypatch.setattr(
        inheritance, "regress", lambda p, y, anchor, *_: (anchor * torch.nan, torch.zeros(len(y.T)))
    )
    genome = narrow(digits.layout, 0.5)
    student = build_student(digits.graph, digits.layout, genome)
    before = {k: v.clone() for k, v in student.module.state_dict().items()}
    unsolved = inherit(student, digits.graph, digits.samples)
    assert "conv3.0" in unsolved and "output" not in unsolved
    for path in unsolved:
        assert torch.equal(student.module.get_submodule(path).weight, before[f"{path}.weight"])


@pytest.mark.parametrize("mode", ["student", "patches"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
@torch.no_grad()
def test_inputs_of_no_use_give_no_weights_of_no_use(digits, mode, broken):
    """Where what a layer reads is not finite, or its squares are not, it stays sliced."""
    genome = np.ones(digits.layout.length, bool)
    for name, place in digits.layout.slices.items():
        if name.startswith("rank/"):
            genome[place] = False
    genome = canonical(digits.layout, genome & narrow(digits.layout, 0.5), 1)
    student = build_student(digits.graph, digits.layout, genome)
    assert any(unit.rank is not None for unit in student.units)
    before = {k: v.clone() for k, v in student.module.state_dict().items()}
    samples = replace(digits.samples, images=digits.samples.images * broken)
    unsolved = inherit(student, digits.graph, samples, InheritConfig(mode))
    for unit in student.units:
        for path in filter(None, (unit.target, unit.expand)):
            weight = student.module.get_submodule(path).weight
            assert torch.isfinite(weight).all(), path
            if unit.target in unsolved:
                assert torch.equal(weight, before[f"{path}.weight"])
    assert unsolved


def test_recalibration_alone_helps_at_three_quarters(digits, reached):
    genome = narrow(digits.layout, 0.75)
    plain = build_student(digits.graph, digits.layout, genome)
    assert reached(inherited(digits, genome, mode="slice")) > reached(plain)
    assert reached(inherited(digits, genome)) > 0.93


@pytest.mark.parametrize("layer", ["block1a.0", "conv3.0", "conv4.0", "hidden"])
def test_one_bypassed_layer_costs_a_few_points(digits, reached, layer):
    teacher = reached(build_student(digits.graph, digits.layout, digits.layout.teacher()))
    genome = digits.layout.teacher()
    digits.layout.view(genome, f"bypass/{layer}")[0] = False
    student = inherited(digits, genome)
    assert reached(student) > teacher - 0.05
    assert layer not in dict(student.module.named_modules())


@pytest.mark.parametrize("mode", MODES)
def test_the_teachers_genome_stays_the_teacher(digits, reached, mode):
    images = digits.data.normalise(digits.data.validation.images[:64])
    student = inherited(digits, digits.layout.teacher(), mode=mode)
    teacher = digits.graph.module
    with torch.no_grad():
        expected, found = teacher(images), student.module(images)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    assert abs(reached(student) - accuracy(teacher, digits.data, digits.data.validation)) <= 0.01
    # Sliced from the teacher at full width, up to the order of channels within a layer.
    if mode == "slice":
        for layer in digits.graph.layers:
            weight = digits.graph.layer_module(layer.name).weight
            got = student.module.get_submodule(layer.name).weight
            assert torch.equal(got.flatten().sort()[0], weight.flatten().sort()[0])


def problem(seed=0, samples=400, width=6, channels=10):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(samples, channels)) @ rng.normal(size=(channels, channels))
    target = target + rng.normal(size=channels)
    chosen = np.sort(rng.permutation(channels)[:width])
    return torch.from_numpy(target).float(), chosen


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_estimate_is_least_squares(centred, named):
    target, chosen = problem()
    offered = target[:, torch.from_numpy(chosen)] + 0.1 * torch.randn(
        len(target), len(chosen), generator=torch.Generator().manual_seed(0)
    )
    config = InheritConfig(ridge=1e-9, scarce=0.0)
    estimate, constant = estimate_inputs(
        target, offered, chosen if named else None, centred, config
    )
    design = offered.double().numpy()
    if centred:
        design = np.column_stack([design, np.ones(len(design))])
    solution = np.linalg.lstsq(design, target.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(estimate.numpy(), solution[: len(chosen)].T, atol=1e-4)
    offset = solution[-1] if centred else np.zeros(target.shape[1])
    np.testing.assert_allclose(constant.numpy(), offset, atol=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_a_large_ridge_picks_the_kept_channels(named):
    target, chosen = problem()
    offered = target[:, torch.from_numpy(chosen)]
    config = InheritConfig(ridge=1e7, scarce=0.0)
    estimate, _ = estimate_inputs(target, offered, chosen if named else None, False, config)
    expected = np.zeros((target.shape[1], len(chosen)))
    if named:
        expected[chosen, np.arange(len(chosen))] = 1.0
    np.testing.assert_allclose(estimate.numpy(), expected, atol=1e-4)


def test_the_ridge_is_that_of_the_formula():
    """Against the normal equations, written out, with both terms of the ridge."""
    target, chosen = problem(samples=20)
    offered = target[:, torch.from_numpy(chosen)] * 1.5
    config = InheritConfig(ridge=0.05, scarce=0.3)
    estimate, _ = estimate_inputs(target, offered, chosen, False, config)
    u, a = offered.double().numpy(), target.double().numpy()
    gram = u.T @ u / len(u)
    ridge = np.diag(gram).mean() * (0.05 + 0.3 * (len(chosen) / len(u)) ** 2)
    start = np.zeros((a.shape[1], len(chosen)))
    start[chosen, np.arange(len(chosen))] = 1.0
    left = gram + ridge * np.eye(len(chosen))
    right = u.T @ a / len(u) + ridge * start.T
    np.testing.assert_allclose(estimate.numpy(), np.linalg.solve(left, right).T, atol=1e-4)


def test_dead_channels_and_scarce_samples_are_no_trouble():
    target, chosen = problem(samples=3)
    offered = target[:, torch.from_numpy(chosen)]
    for values in (offered, torch.zeros_like(offered)):
        for centred in (False, True):
            estimate, constant = estimate_inputs(target, values, chosen, centred, InheritConfig())
            assert torch.isfinite(estimate).all() and torch.isfinite(constant).all()


class OneByOne(nn.Module):
    """A stem, two 1x1 convolutions with biases, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.act = nn.ReLU()
        self.first = nn.Conv2d(12, 10, 1)
        self.second = nn.Conv2d(10, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.act(self.first(self.act(self.stem(x))))
        return self.head(torch.flatten(self.pool(self.act(self.second(x))), 1))


def test_hand_made_layers_equal_lstsq(random_images):
    """All pixels sampled: masked 1x1 convolutions and a masked flatten against numpy."""
    torch.manual_seed(3)
    teacher = OneByOne().eval()
    graph = trace(teacher, (3, 32, 32))
    samples = collect_samples(graph, random_images, CalibrationConfig(4, 10_000), None, "")
    layout = build_layout(graph, samples)
    genome = layout.teacher()
    layout.view(genome, "mask/stem")[[1, 4, 5, 9]] = False
    layout.view(genome, "mask/second")[[0, 3, 7]] = False
    student = build_student(graph, layout, genome)
    inherit(student, graph, samples, InheritConfig(ridge=1e-9, scarce=0.0))

    def lstsq(module, offered, target, weight, bias):
        """Weights and bias by least squares, positions of a flatten sharing one estimate."""
        design = np.column_stack([offered, np.ones(len(offered))])
        solution = np.linalg.lstsq(design, target, rcond=None)[0].T  # (C, k + 1)
        estimate, constant = solution[:, :-1], solution[:, -1]
        taps = weight.reshape(len(weight), target.shape[1], -1)
        expected = np.einsum("ocp,ck->okp", taps, estimate).reshape(module.weight.shape)
        # A channel that is never active says nothing about its weight.
        seen = np.repeat(offered.std(0) > 1e-6, expected[0].size // offered.shape[1])
        found = module.weight.detach().numpy().reshape(len(weight), -1)[:, seen]
        expected = expected.reshape(len(weight), -1)[:, seen]
        assert seen.sum() > seen.size / 2
        np.testing.assert_allclose(found, expected, atol=1e-2)
        offset = bias + taps.sum(2) @ constant
        np.testing.assert_allclose(module.bias.detach().numpy(), offset, atol=1e-2)

    with torch.no_grad():
        images = samples.images
        inner = torch.relu(teacher.stem(images))
        wide = inner.permute(0, 2, 3, 1).reshape(-1, 12).double().numpy()
        kept = np.setdiff1d(np.arange(12), [1, 4, 5, 9])
        first = student.module.get_submodule("first")
        lstsq(
            first, wide[:, kept], wide,
            teacher.first.weight[:, :, 0, 0].double().numpy(), teacher.first.bias.numpy(),
        )  # fmt: skip
        assert not torch.equal(first.weight, teacher.first.weight[:, torch.from_numpy(kept)])
        masked = torch.relu(teacher.stem(images))[:, torch.from_numpy(kept)]
        given = teacher.pool(
            torch.relu(student.module.get_submodule("second")(torch.relu(first(masked))))
        )
        target = teacher.pool(torch.relu(teacher.second(torch.relu(teacher.first(inner)))))
        lstsq(
            student.module.get_submodule("head"),
            given.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy(),
            target.permute(0, 2, 3, 1).reshape(-1, 8).double().numpy(),
            teacher.head.weight.double().numpy(), teacher.head.bias.numpy(),
        )  # fmt: skip


def test_a_bypassed_layer_is_the_closed_form(digits):
    """The convolution behind a bypassed one: W' = W A, computed once more in numpy."""
    genome = digits.layout.teacher()
    digits.layout.view(genome, "bypass/conv3.0")[0] = False
    config = InheritConfig(mode="student")
    student = inherited(digits, genome, mode="student")
    # Nothing in front of conv4 is cut: what the student offers is the input of conv3.
    with torch.no_grad():
        for node in student.module.graph.nodes:
            if node.target == "conv4.0":
                wanted = node.args[0]
        interpreter = torch.fx.Interpreter(student.module)
        interpreter.garbage_collect_values = False
        interpreter.run(digits.samples.images)
        source = interpreter.env[wanted]
    u = sample_pixels(source, 1, digits.samples.config).double().numpy()
    a = digits.samples.inputs["conv4.0"].double().numpy()
    assert len(u) == len(a)
    gram = u.T @ u / len(u)
    ridge = np.diag(gram).mean() * (config.ridge + config.scarce * (u.shape[1] / len(u)) ** 2)
    estimate = np.linalg.solve(gram + ridge * np.eye(u.shape[1]), u.T @ a / len(u)).T
    (unit,) = [unit for unit in student.units if unit.layer == "conv4.0"]
    assert unit.through
    weight = digits.graph.layer_module("conv4.0").weight.detach().double().numpy()
    expected = np.einsum("ocij,ck->okij", weight[unit.outputs[0]], estimate)
    found = student.module.get_submodule("conv4.0").weight.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_two_calls_give_equal_weights(digits):
    rng = np.random.default_rng(4)
    for _ in range(2):
        genome = canonical(digits.layout, random_genome(digits.layout, rng, bypass=True), 8)
        states = [inherited(digits, genome).module.state_dict() for _ in range(2)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_teacher_and_the_samples_stay_as_they_are(digits):
    before = {k: v.clone() for k, v in digits.graph.module.state_dict().items()}
    images = digits.samples.images.clone()
    inputs = {k: v.clone() for k, v in digits.samples.inputs.items()}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        inherited(digits, canonical(digits.layout, random_genome(digits.layout, rng, bypass=True)))
    after = digits.graph.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(images, digits.samples.images)
    assert all(torch.equal(inputs[k], v) for k, v in digits.samples.inputs.items())


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_student_inherits(digits, mode):
    images = digits.data.normalise(digits.data.validation.images[:8])
    seen = set()
    for seed in range(40, 50):
        genome = random_genome(digits.layout, np.random.default_rng(seed), bypass=True)
        genome = canonical(digits.layout, genome, 8)
        student = inherited(digits, genome, mode=mode)
        modules = [student.module.get_submodule(unit.target) for unit in student.units]
        seen |= {"grouped"} if any(getattr(m, "groups", 1) > 1 for m in modules) else set()
        seen |= {"split"} if len(modules) > len({u.layer for u in student.units}) else set()
        seen |= {"bypassed"} if any(unit.through for unit in student.units) else set()
        with torch.no_grad():
            logits = student.module(images)
        assert logits.shape == (8, 10) and torch.isfinite(logits).all()
    assert seen == {"grouped", "split", "bypassed"}


@pytest.mark.parametrize("mode", ["student", "patches"])
def test_grouped_convolutions_are_solved(digits, mode):
    """At full width too: each class reads a part of the channels only."""
    genome = diagonal(digits.layout)
    plain = build_student(digits.graph, digits.layout, genome)
    sliced = plain.module.get_submodule("conv4.0")
    assert sliced.groups == 4
    solved = inherited(digits, genome, mode=mode).module.get_submodule("conv4.0")
    assert (solved.weight - sliced.weight).abs().max() > 1e-3


def test_a_large_network_gets_fewer_pixels_but_never_too_few(digits, monkeypatch):
    """The limit counts what is stored: pixels of every layer's input, times its channels."""
    wanted = CalibrationConfig(images=64, pixels=4096)
    full = collect_samples(digits.graph, digits.data, wanted, None, "")
    stored = [*full.inputs.values(), *full.outputs.values()]
    size = sum(values.numel() * values.element_size() for values in stored)
    monkeypatch.setattr(statistics, "FEW_PIXELS", 1500)
    for limit, pixels in ((size, 4096), (size - 1, 2048), (0, 1500)):
        monkeypatch.setattr(statistics, "MOST_BYTES", limit)
        samples = collect_samples(digits.graph, digits.data, wanted, None, "")
        assert samples.config.pixels == pixels
        assert max(len(values) for values in samples.inputs.values()) == pixels
    few = replace(wanted, pixels=1000)
    assert statistics.affordable(digits.graph, few) == few
    largest = 4 * 32 * 16 * 16  # the stem's map
    for limit, images in ((64 * largest, 64), (64 * largest - 1, 32), (0, 8)):
        monkeypatch.setattr(statistics, "FEW_IMAGES", 8)
        monkeypatch.setattr(statistics, "MOST_MAP_BYTES", limit)
        samples = collect_samples(digits.graph, digits.data, few, None, "")
        assert samples.config.images == len(samples.images) == images


def test_a_corrected_forward_does_not_get_what_was_cached_of_the_other(digits, tmp_path):
    """With the same weights, and so the same digest of their file."""
    config = CalibrationConfig(images=8, pixels=500)

    class Corrected(type(digits.task.build())):
        def forward(self, x):
            return super().forward(torch.relu(x))

    network = Corrected()
    network.load_state_dict(load_weights(digits.task.build(), digits.task.weights).state_dict())
    other = trace(network.eval(), (1, 32, 32))
    for graph in (digits.graph, other):
        found = collect_samples(graph, digits.data, config, tmp_path, "same").inputs
        fresh = collect_samples(graph, digits.data, config, None, "same").inputs
        assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    keys = {SoftTargets(g.module, digits.data, DistillConfig(), None, "same").key
            for g in (digits.graph, other)}  # fmt: skip
    assert len(keys) == 2


def test_batch_statistics_are_those_of_the_calibration_images(digits):
    """Eval mode and train mode agree on the calibration images."""
    student = inherited(digits, narrow(digits.layout, 0.5))
    with torch.no_grad():
        expected = student.module.train()(digits.samples.images)
        inherited_again = inherited(digits, narrow(digits.layout, 0.5))
        found = inherited_again.module(digits.samples.images)
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def test_a_bypassed_linear_layer_with_fewer_samples_than_images(random_images):
    """Rows of what is offered and of what is wanted must belong together, however few there are."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 4, 1)
            self.act = nn.ReLU()
            self.hidden = nn.Linear(4 * 8 * 8, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            x = torch.flatten(self.act(self.conv(x)), 1)
            return self.last(self.act(self.hidden(x)))

    torch.manual_seed(0)
    graph = trace(Flat().eval(), (3, 32, 32))
    blocks = {name: np.zeros(size, dtype=int) for name, size in graph.groups.items()}
    frozen = set(graph.grouping.frozen)
    groups = {n: Group(n, b, np.ones(len(b)), n in frozen) for n, b in blocks.items()}
    layout = GenomeLayout(groups, skeleton(graph, blocks))
    genome = layout.teacher()
    layout.view(genome, "bypass/hidden")[0] = False
    weights = []
    for pixels in (10_000, 40):
        samples = collect_samples(graph, random_images, CalibrationConfig(64, pixels), None, "")
        student = build_student(graph, layout, genome)
        inherit(student, graph, samples, InheritConfig(ridge=1e-2))
        weights.append(student.module.get_submodule("last").weight.detach())
    similarity = torch.cosine_similarity(weights[0].flatten(), weights[1].flatten(), dim=0)
    assert similarity > 0.5
