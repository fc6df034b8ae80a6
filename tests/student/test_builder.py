"""Students against an independently masked teacher: same genome, same logits."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import random_genome
from torch import nn
from torch.nn import functional as F

from moodistill.genome.canonical import canonical
from moodistill.genome.resolve import resolve
from moodistill.student.builder import build_student
from moodistill.student.evaluator import count_macs
from moodistill.teacher.graph import trace

PARAMETERS = {"vgg16": 14_991_946, "resnet18": 11_173_962}
STEPS = (1, 8, 16)


@pytest.fixture(scope="module", params=["vgg16", "resnet18"])
def prepared(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def masked_logits(prepared, genome, images):
    """What the teacher says if it sees only what the genome lets each layer read.

    All modules keep their full size: weights of missing channels and connections are set to zero,
    dropped inputs of an Add are left out. Nothing works in place, so that no value that several
    nodes read can change.
    """
    graph, layout = prepared.graph, prepared.layout
    structure = resolve(layout, genome)
    assert not structure.bypassed
    values = {}
    for step in graph.steps:
        if step.name not in structure.live:
            continue
        inputs = [values[name] for name in step.inputs if name in values]
        if step.kind == "input":
            values[step.name] = images
        elif step.kind == "output":
            return inputs[0]
        elif step.kind == "merge":
            kept = structure.merges[step.name]
            chosen = [values[n] for n, on in zip(step.inputs, kept, strict=True) if on]
            values[step.name] = sum(chosen[1:], chosen[0])
        elif step.kind == "layer":
            layer = graph.layer_module(step.name)
            rows, columns = layout.groups[step.groups[0]].block, layout.groups[step.reads[0]].block
            mask = structure.connected[step.name][np.ix_(rows, columns)]
            mask = torch.from_numpy(mask & structure.kept[step.reads[0]][None, :])
            if isinstance(layer, nn.Linear):
                weight = layer.weight * mask.repeat_interleave(
                    layer.in_features // len(columns), dim=1
                )
            else:
                weight = layer.weight * mask[:, :, None, None]
                for axis, left in enumerate(structure.kernels.get(step.name, ())):
                    for place in range((weight.shape[2 + axis] - left) // 2):
                        weight.select(2 + axis, place).zero_()
                        weight.select(2 + axis, -1 - place).zero_()
            if step.name in structure.ranks:
                own = structure.kept[step.groups[0]]
                flat = weight[own].flatten(1).double().numpy()
                u, s, vt = np.linalg.svd(flat, full_matrices=False)
                rank = structure.ranks[step.name]
                flat = torch.from_numpy(u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]).float()
                weight[own] = flat.reshape(weight[own].shape)
            if isinstance(layer, nn.Linear):
                values[step.name] = F.linear(inputs[0], weight, layer.bias)
            else:
                values[step.name] = F.conv2d(
                    inputs[0], weight, layer.bias, layer.stride, layer.padding, layer.dilation
                )
        elif step.node.op == "call_module":
            module = graph.module.get_submodule(step.node.target)
            values[step.name] = module(inputs[0].clone())
        else:
            assert step.node.target is torch.flatten
            values[step.name] = inputs[0].flatten(1)
    raise AssertionError("the teacher has no output")


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed, channels=3, size=16):
    """Two images, each four times, 1 to 10^10 times as bright.

    Masked layers fade an image until the biases decide alone; bright ones are still seen. Both
    large teachers end in an adaptive pooling: smaller images make the same check cheaper.
    """
    brightness = torch.tensor([1.0, 1e3, 1e6, 1e10]).repeat_interleave(2)
    return noise(seed, 2, channels, size, size).repeat(4, 1, 1, 1) * brightness[:, None, None, None]


def worst(found, expected):
    """Largest difference, relative to an image's largest logit where that is above 1."""
    scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1.0)
    return float(((found - expected).abs() / scale).max())


def features(student, graph, structure):
    """Which special cases a student holds."""
    convs = [student.module.get_submodule(u.target) for u in student.units]
    units = Counter(unit.layer for unit in student.units)
    found = set()
    if any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in convs):
        found.add("grouped")
    if max(units.values()) > 1:
        found.add("split")
    if any(not all(kept) for kept in structure.merges.values()):
        found.add("dropped edge")
    if any(layer.name not in structure.live for layer in graph.layers):
        found.add("dead layer")
    if structure.kernels:
        found.add("taps")
    if structure.ranks:
        found.add("ranks")
        found.add("both" if structure.kernels else "ranks alone")
    return found


@torch.no_grad()
def check_genomes(prepared, count, first_seed, size=16):
    """Compare `count` random students with their masked teachers; returns the cases seen."""
    seen, failures = Counter(), []
    for seed in range(first_seed, first_seed + count):
        genome = random_genome(prepared.layout, np.random.default_rng(seed))
        genome = canonical(prepared.layout, genome, STEPS[seed % 3])
        images = pictures(seed, prepared.graph.input_shape[0], size)
        expected = masked_logits(prepared, genome, images)
        # Otherwise constants would be compared.
        seen["sensitive"] += worst(expected[0::2], expected[1::2]) > 1e-2
        try:
            student = build_student(prepared.graph, prepared.layout, genome)
            error = worst(student.module(images), expected)
        except RuntimeError as problem:
            failures.append(f"seed {seed}: {problem}")
            continue
        seen.update(features(student, prepared.graph, resolve(prepared.layout, genome)))
        if not error < 1e-4:
            failures.append(f"seed {seed}: off by {error:.2e}")
    assert not failures, f"{len(failures)} of {count} differ: {failures[:5]}"
    assert seen["sensitive"] >= 0.9 * count, seen
    assert seen["grouped"] and seen["split"] and seen["taps"] and seen["both"], seen
    if prepared.layout.merges:
        assert seen["dropped edge"] and seen["dead layer"], seen


def test_random_students_equal_the_masked_teacher(prepared):
    check_genomes(prepared, 24, first_seed=1000)


@pytest.mark.slow
def test_hundreds_of_random_students_equal_the_masked_teacher(prepared):
    check_genomes(prepared, 150, first_seed=5000)


def test_digits_students_equal_the_masked_teacher(digits):
    """A flatten with several positions per channel, and two residual blocks."""
    check_genomes(digits, 30, first_seed=0, size=32)


@torch.no_grad()
def test_the_comparison_tells_neighbours_apart(vgg16):
    """A masked teacher with one connection or one channel more is no match."""
    layout = vgg16.layout
    genome = layout.teacher()
    layout.view(genome, "mask/features.7")[:13] = False
    layout.view(genome, "block/features.24")[0, 1:3] = False
    images = pictures(0)
    student = build_student(vgg16.graph, layout, genome).module(images)
    assert worst(student, masked_logits(vgg16, genome, images)) < 1e-4
    for name, place in (("mask/features.7", 0), ("block/features.24", (0, 1))):
        other = genome.copy()
        layout.view(other, name)[place] = True
        assert worst(student, masked_logits(vgg16, other, images)) > 1e-3


@torch.no_grad()
def test_a_block_diagonal_linear_layer(digits):
    """There is no grouped Linear: the blocks must become units of their own."""
    genome = digits.layout.teacher()
    digits.layout.view(genome, "block/hidden")[:] = np.eye(4, dtype=bool)
    images = noise(0, 4, 1, 32, 32)
    student = build_student(digits.graph, digits.layout, genome)
    assert student.module(images).shape == (4, 10)
    assert worst(student.module(images), masked_logits(digits, genome, images)) < 1e-4


@torch.no_grad()
def test_the_teachers_genome_is_the_teacher(request, prepared):
    student = build_student(prepared.graph, prepared.layout, prepared.layout.teacher())
    images = noise(1, 3, 3, 32, 32)
    name = "vgg16" if "classifier.0" in prepared.layout.by_name else "resnet18"
    assert worst(student.module(images), prepared.teacher(images)) < 1e-5
    assert student.parameters == PARAMETERS[name]
    assert student.parameters == sum(p.numel() for p in prepared.teacher.parameters())
    wanted = prepared.teacher.state_dict()
    found = student.module.state_dict()
    assert set(found) == set(wanted)
    # Channels of one block lie side by side in a student: the same numbers in another order.
    for key in (k for k in wanted if "num_batches" not in k):
        assert torch.equal(found[key].flatten().sort()[0], wanted[key].flatten().sort()[0]), key


def test_macs_of_vgg16(vgg16):
    student = build_student(vgg16.graph, vgg16.layout, vgg16.layout.teacher())
    assert abs(count_macs(student) - 313.7e6) < 0.1e6


def test_parameters_and_macs_follow_the_widths(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    layout.view(genome, "mask/features.3")[:24] = False  # 64 -> 40 between features.3 and .7
    teacher = build_student(vgg16.graph, layout, layout.teacher())
    student = build_student(vgg16.graph, layout, genome)
    kernel = 24 * 64 * 9 + 24  # of features.3; features.7 loses 128 * 24 * 9
    assert teacher.parameters - student.parameters == kernel + 128 * 24 * 9 + 2 * 24
    saved = count_macs(teacher) - count_macs(student)
    assert saved == kernel * 32 * 32 + 128 * 24 * 9 * 16 * 16


def test_nothing_of_a_dropped_channel_is_stored(prepared):
    layout, graph = prepared.layout, prepared.graph
    norm_groups = {str(s.node.target): s.groups[0] for s in graph.steps if s.kind == "norm"}
    for seed in range(6):
        genome = canonical(
            layout, random_genome(layout, np.random.default_rng(seed)), STEPS[seed % 3]
        )
        structure = resolve(layout, genome)
        student = build_student(graph, layout, genome)
        weights = Counter()
        written: dict[str, list[int]] = {}
        for unit in student.units:
            module = student.module.get_submodule(unit.target)
            area = int(np.prod(graph.layer_module(unit.layer).weight.shape[2:]))
            area = int(np.prod(structure.kernels.get(unit.layer, [area])))
            inputs = module.weight.numel() // area // len(module.weight)
            outputs = len(module.weight)
            if unit.expand is not None:
                last = student.module.get_submodule(unit.expand).weight
                assert outputs == last.shape[1] == unit.rank == structure.ranks[unit.layer]
                assert last.numel() == len(last) * unit.rank and module.bias is None
                outputs = len(last)
                assert module.weight.numel() + last.numel() < inputs * area * outputs
            weights[unit.layer] += inputs * outputs
            for outs in unit.outputs:
                written.setdefault(unit.layer, []).extend(outs.tolist())
        assert set(written) == set(structure.source)
        for name, (source,) in structure.source.items():
            group = layout.by_name[name].groups[0]
            assert sorted(written[name]) == np.flatnonzero(structure.kept[group]).tolist()
            rows, columns = layout.groups[group].block, layout.groups[source].block
            pairs = structure.connected[name][np.ix_(rows, columns)]
            pairs = pairs & structure.kept[group][:, None] & structure.kept[source][None, :]
            assert weights[name] == pairs.sum(), name
        widths = Counter()
        for norm in student.norms:
            widths[norm.norm] += len(norm.channels)
            module = student.module.get_submodule(norm.target)
            assert all(v.shape == (len(norm.channels),) for v in module.parameters())
        for norm, width in widths.items():
            assert width == structure.kept[norm_groups[norm]].sum()
        parameters = {id(p) for p in student.module.parameters()}
        known = [u.target for u in student.units] + [n.target for n in student.norms]
        known += [u.expand for u in student.units if u.expand is not None]
        assert parameters == {
            id(p) for t in known for p in student.module.get_submodule(t).parameters()
        }


def test_every_target_exists_and_names_are_the_teachers(prepared):
    layout, graph = prepared.layout, prepared.graph
    teacher_keys = {k.rpartition(".")[0] for k in prepared.teacher.state_dict()}
    for seed in range(6):
        genome = canonical(
            layout, random_genome(layout, np.random.default_rng(seed)), STEPS[seed % 3]
        )
        student = build_student(graph, layout, genome)
        student.module.graph.lint()
        called = {n.target for n in student.module.graph.nodes if n.op == "call_module"}
        for target in called:
            assert isinstance(student.module.get_submodule(target), nn.Module)
        stored = {k.rpartition(".")[0] for k in student.module.state_dict()}
        assert stored <= called
        units = Counter(unit.layer for unit in student.units)
        for unit in student.units:
            own = units[unit.layer] == 1 and unit.expand is None
            expected = unit.target if own else unit.target.rpartition(".")[0]
            assert expected == unit.layer and unit.layer in teacher_keys
            assert unit.target in stored and unit.expand in {None, *stored}
        assert not [n for n in student.module.graph.nodes if n.op == "get_attr"]


def test_a_student_shares_nothing_with_the_teacher(digits):
    before = {k: v.clone() for k, v in digits.graph.module.state_dict().items()}
    student = build_student(digits.graph, digits.layout, digits.layout.teacher())
    with torch.no_grad():
        for tensor in student.module.state_dict().values():
            tensor.zero_()
    after = digits.graph.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Tiny(nn.Module):
    """Two convolutions of 32 channels, an Add of both, 4 logits."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.one = nn.Conv2d(32, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.act = activation(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.act(self.one(x) + x)
        y = self.two(y) + x
        return self.last(torch.flatten(self.pool(y), 1))


class Scaled(Tiny):
    """Adds with a factor."""

    def forward(self, x):
        x = self.stem(x)
        y = torch.add(self.one(x), x, alpha=0.25)
        return self.last(torch.flatten(self.pool(self.act(y)), 1))


class Call(Tiny):
    """The activation as a function, in place by a positional argument."""

    def forward(self, x):
        x = self.stem(x)
        y = nn.functional.relu(self.one(x) + x, True)
        y = self.two(y) + x
        return self.last(torch.flatten(self.pool(y), 1))


def one_block_layout(graph):
    """A layout without statistics: one block a group."""
    from moodistill.genome.layout import GenomeLayout, Group
    from moodistill.teacher.blocks import skeleton

    blocks = {name: np.zeros(size, dtype=int) for name, size in graph.groups.items()}
    frozen = set(graph.grouping.frozen)
    groups = {n: Group(n, b, np.ones(len(b)), n in frozen) for n, b in blocks.items()}
    return GenomeLayout(groups, skeleton(graph, blocks))


@pytest.mark.parametrize("network", [Tiny, Call])
@torch.no_grad()
def test_an_activation_in_place_does_not_reach_past_a_dropped_edge(network):
    """Where only the identity is left of an Add, its reader must not change what others read."""
    torch.manual_seed(0)
    teacher = network().eval()
    graph = trace(teacher, (3, 8, 8))
    layout = one_block_layout(graph)
    images = noise(1, 2, 3, 8, 8)
    genome = layout.teacher()
    layout.view(genome, "merge/add")[0] = False
    x = teacher.stem(images)
    y = teacher.two(torch.relu(x)) + x
    expected = teacher.last(teacher.pool(y).flatten(1))
    student = build_student(graph, layout, genome)
    assert worst(student.module(images), expected) < 1e-5


@torch.no_grad()
def test_an_add_with_a_factor_is_refused_or_right():
    from moodistill.errors import UserError

    torch.manual_seed(0)
    teacher = Scaled().eval()
    try:
        graph = trace(teacher, (3, 8, 8))
    except UserError:
        return
    layout = one_block_layout(graph)
    student = build_student(graph, layout, layout.teacher())
    images = noise(1, 2, 3, 8, 8)
    assert worst(student.module(images), teacher(images)) < 1e-5
