"""Kernels and ranks in a built student: what is left of a layer, and what it computes."""

import itertools
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import prepare, random_genome
from torch import nn
from torch.nn import functional as F

from moodistill.genome.canonical import canonical
from moodistill.genome.ranks import write_rank
from moodistill.genome.resolve import resolve
from moodistill.onnx.graph import OnnxGraph
from moodistill.onnx.quantise import Int8Scheme, quantise
from moodistill.onnx.writer import structure_hash, to_onnx
from moodistill.student.builder import build_student
from moodistill.student.evaluator import count_macs
from moodistill.student.file import load_student, save_student
from moodistill.student.inherit import inherit
from moodistill.student.slicing import Unit, centred, low_rank, slice_layer
from moodistill.teacher.kernels import padding_of, ranks_of, rings_of
from moodistill.testing.masked import masked_logits


@pytest.fixture(scope="module", params=["vgg16", "resnet18"])
def prepared(request):
    return request.getfixturevalue(request.param)


def set_rank(layout, genome, path, rank):
    write_rank(layout.view(genome, f"rank/{path}"), layout.ranked[path].ranks, rank)


def worst(found, expected):
    scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(1.0)
    return float(((found - expected).abs() / scale).max())


CONVS = [
    # Kernel, settings and the rings that may go by axis.
    (3, {"padding": 1}, (1, 1)),
    (3, {}, (0, 0)),
    (3, {"padding": "valid"}, (0, 0)),
    (3, {"padding": (1, 0)}, (1, 0)),
    (3, {"padding": 1, "stride": 2}, (1, 1)),
    (3, {"padding": 2, "dilation": 2}, (1, 1)),
    (3, {"padding": 1, "dilation": 2}, (0, 0)),
    (3, {"padding": "same", "dilation": 3}, (1, 1)),
    (5, {"padding": 1}, (1, 1)),
    (5, {"padding": 7}, (2, 2)),
    (7, {"padding": 3, "stride": 2}, (3, 3)),
    (7, {"padding": (3, 2), "stride": (1, 3)}, (3, 2)),
    (7, {"padding": 6, "dilation": 2, "bias": False}, (3, 3)),
    (11, {"padding": "same"}, (5, 5)),
    ((1, 7), {"padding": (0, 3)}, (0, 3)),
    ((5, 3), {"padding": "same", "dilation": (1, 2)}, (2, 1)),
    ((4, 3), {"padding": (1, 1)}, (0, 1)),
    ((4, 3), {"padding": "same"}, (0, 0)),
    ((2, 2), {"padding": 1}, (0, 0)),
    (1, {"padding": 1}, (0, 0)),
]


@pytest.mark.parametrize(("kernel", "settings", "rings"), CONVS)
@torch.no_grad()
def test_a_smaller_kernel_is_the_whole_one_with_zeros(kernel, settings, rings):
    """Every size that the gene offers: the map keeps its size, and the padding stays at least 0."""
    conv = nn.Conv2d(4, 6, kernel, **settings)
    assert rings_of(conv) == rings
    images = torch.randn(2, 4, 15, 17)
    whole = conv(images)
    for gone in itertools.product(*(range(count + 1) for count in rings)):
        taps = tuple(size - 2 * g for size, g in zip(conv.kernel_size, gone, strict=True))
        places = centred(conv.kernel_size, taps)
        everything = np.arange(6), np.arange(4)
        unit = Unit("c", "c", *((one,) for one in everything), False, 1, places)
        made = slice_layer(conv, unit)["c"]
        assert made.kernel_size == taps and made.weight.shape == (6, 4, *taps)
        assert min(padding_of(made)) >= 0
        zeroed = nn.Conv2d(4, 6, kernel, **settings)
        zeroed.load_state_dict(conv.state_dict())
        mask = torch.zeros(conv.kernel_size)
        mask[places] = 1.0
        zeroed.weight.mul_(mask)
        found = made(images)
        assert found.shape == whole.shape
        assert torch.allclose(found, zeroed(images), atol=1e-5)
        if any(gone):
            assert not torch.allclose(found, whole, atol=1e-3)
        else:
            assert made.padding == conv.padding


@pytest.mark.parametrize("shape", [(64, 576), (512, 64), (10, 512), (48, 48)])
def test_low_rank_is_numpys_svd(shape):
    matrix = torch.randn(shape)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    for rank in (1, 8, min(shape)):
        reduce, expand = low_rank(matrix, rank)
        assert reduce.shape == (rank, shape[1]) and expand.shape == (shape[0], rank)
        nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.allclose((expand @ reduce).numpy(), nearest, atol=1e-4)
    assert torch.allclose(expand @ reduce, matrix, atol=1e-4)  # full rank is no rank


def test_low_rank_of_nothing_is_nothing():
    """Past a bypass a slice is zero until it is solved."""
    reduce, expand = low_rank(torch.zeros(16, 36), 8)
    assert not (expand @ reduce).any() and torch.isfinite(expand).all()


@torch.no_grad()
def test_a_rank_is_two_layers(prepared):
    """Sizes, places, weights and multiply-accumulates of one layer of a lower rank."""
    layout, graph = prepared.layout, prepared.graph
    path = "features.7" if "features.7" in layout.ranked else "layer2.0.conv1"
    genome = layout.teacher()
    set_rank(layout, genome, path, 48)
    whole = build_student(graph, layout, layout.teacher())
    student = build_student(graph, layout, genome)
    (unit,) = [unit for unit in student.units if unit.layer == path]
    assert (unit.target, unit.expand, unit.rank) == (f"{path}.reduce", f"{path}.expand", 48)
    layer = graph.layer_module(path)
    first, last = (student.module.get_submodule(p) for p in (unit.target, unit.expand))
    assert first.stride == layer.stride and first.padding == layer.padding
    assert first.weight.shape == (48, 64, 3, 3) and first.bias is None
    assert last.weight.shape == (128, 48, 1, 1)
    assert (last.bias is None) == (layer.bias is None)
    product = torch.einsum("orij,rchw->ochw", last.weight, first.weight)
    weight = layer.weight[unit.outputs[0]][:, unit.inputs[0]]
    left, values, right = np.linalg.svd(weight.flatten(1).double().numpy(), full_matrices=False)
    nearest = (left[:, :48] * values[:48]) @ right[:48]
    assert np.allclose(product.flatten(1).numpy(), nearest, atol=1e-5)
    saved = 128 * 576 - 48 * (128 + 576)
    assert whole.parameters - student.parameters == saved
    assert count_macs(whole) - count_macs(student) == saved * 16 * 16


@torch.no_grad()
def test_all_bits_true_is_no_rank_and_all_taps(prepared):
    layout = prepared.layout
    rng = np.random.default_rng(3)
    genome = canonical(layout, random_genome(layout, rng), 8)
    for name, place in layout.slices.items():
        if name.startswith(("kernel/", "rank/")):
            genome[place] = True
    student = build_student(prepared.graph, layout, genome)
    assert not any(unit.expand or unit.rank for unit in student.units)
    for unit in student.units:
        kernel = student.module.get_submodule(unit.target).weight.shape[2:]
        assert kernel == prepared.graph.layer_module(unit.layer).weight.shape[2:]


def exported(module, shape, images):
    OnnxGraph(module, shape)  # raises where torch's exporter would step in
    data = to_onnx(module, shape)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


@torch.no_grad()
def test_students_of_all_kinds_are_written_as_they_are(prepared):
    """Bypasses, merges, blocks, kernels and ranks mixed, with inherited weights."""
    layout, graph = prepared.layout, prepared.graph
    images = prepared.samples.images[:4]
    seen, hashes = Counter(), set()
    for seed in range(12):
        genome = random_genome(layout, np.random.default_rng(700 + seed), bypass=True)
        genome = canonical(layout, genome, (1, 8, 16)[seed % 3])
        student = build_student(graph, layout, genome)
        inherit(student, graph, prepared.samples)
        structure = resolve(layout, genome)
        seen["kernels"] += len(structure.kernels)
        seen["ranks"] += len(structure.ranks)
        seen["past a bypass"] += len({*structure.ranks} & structure.through)
        expected = student.module(images)
        assert torch.isfinite(expected).all()
        _, found = exported(student.module, graph.input_shape, images)
        assert worst(found, expected) < 1e-4, seed
        hashes.add(structure_hash(student.module))
    assert seen["kernels"] > 10 and seen["ranks"] > 10 and seen["past a bypass"], seen
    assert len(hashes) == 12


def test_structures_are_told_apart(vgg16):
    """By whatever a latency may depend on."""
    layout = vgg16.layout
    hashes = set()
    for rows, columns, rank in itertools.product((True, False), (True, False), (None, 32, 48)):
        genome = layout.teacher()
        layout.view(genome, "kernel/features.7")[:] = rows, columns
        set_rank(layout, genome, "features.7", rank)
        hashes.add(structure_hash(build_student(vgg16.graph, layout, genome).module))
    # A 1x1 of 64 inputs and 128 outputs saves nothing at rank 48.
    assert len(hashes) == 11


@torch.no_grad()
def test_int8_twins_quantise_both_parts(digits):
    layout = digits.layout
    genome = layout.teacher()
    layout.view(genome, "kernel/conv3.0")[0] = False
    set_rank(layout, genome, "conv4.0", 32)
    student = build_student(digits.graph, layout, canonical(layout, genome))
    inherit(student, digits.graph, digits.samples)
    images = digits.samples.images[:32]
    model, found = exported(student.module, digits.graph.input_shape, images)
    twin = quantise(model, images.numpy(), Int8Scheme("uint8", "int8", reduce_range=True))
    session = onnxruntime.InferenceSession(twin, providers=["CPUExecutionProvider"])
    rounded = session.run(None, {"input": images.numpy()})[0]
    assert (rounded.argmax(1) == found.numpy().argmax(1)).mean() > 0.9
    assert len(twin) < 0.5 * len(model)  # every weight is a byte


def test_files_hold_taps_and_ranks(vgg16, tmp_path):
    from problems.vgg16 import build

    layout = vgg16.layout
    genome = layout.teacher()
    layout.view(genome, "mask/features.24")[64:] = False
    layout.view(genome, "kernel/features.24")[1] = False
    set_rank(layout, genome, "features.24", 32)
    set_rank(layout, genome, "classifier.0", 64)
    genome = canonical(layout, genome, 8)
    student = build_student(vgg16.graph, layout, genome)
    path = tmp_path / "s.safetensors"
    save_student(student, layout, genome, path, "vgg16")
    again, found = load_student(path, build(), (3, 32, 32))
    assert (found == genome).all()
    assert {"features.24.reduce", "classifier.0.expand"} <= {
        name.rpartition(".")[0] for name in again.module.state_dict()
    }
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.module(images), student.module(images))


class Depthwise(nn.Module):
    """A stem, a 5x5 depthwise and a 3x3 grouped convolution, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=8, bias=False)
        self.mix = nn.Conv2d(64, 48, 1)
        self.twice = nn.Conv2d(48, 48, 3, padding=1)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = F.relu(self.mix(F.relu(self.grouped(F.relu(self.deep(F.relu(self.stem(x))))))))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def depthwise(random_images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return prepare(Depthwise().eval(), random_images)


@torch.no_grad()
def test_grouped_and_shared_convolutions_have_kernels(depthwise):
    layout, graph = depthwise.layout, depthwise.graph
    assert layout.kernels.keys() == {"stem", "deep", "grouped", "twice"}
    assert layout.shapes["kernel/deep"] == (4,)
    assert layout.ranked.keys() == {"stem", "mix", "twice", "head"}
    assert ranks_of(graph.module.get_submodule("deep")) == ()
    genome = layout.teacher()
    layout.view(genome, "kernel/deep")[:] = False, True, False, False  # 3x1
    layout.view(genome, "kernel/grouped")[0] = False
    layout.view(genome, "kernel/twice")[1] = False
    set_rank(layout, genome, "twice", 16)
    layout.view(genome, "mask/stem")[::4] = False
    layout.view(genome, "mask/mix")[::3] = False
    genome = canonical(layout, genome)
    student = build_student(graph, layout, genome)
    modules = {name: m for name, m in student.module.named_modules() if isinstance(m, nn.Conv2d)}
    assert modules["deep"].kernel_size == (3, 1) and modules["deep"].padding == (1, 0)
    assert modules["grouped"].kernel_size == (1, 3)
    assert modules["twice.reduce"].kernel_size == (3, 1) and "twice" not in modules
    calls = Counter(str(node.target) for node in student.module.graph.nodes)
    assert calls["twice.reduce"] == calls["twice.expand"] == 2
    parts = {part.target: part for part in student.grouped}
    assert parts.keys() == {"deep", "grouped"}
    assert len(parts["deep"].inputs) == modules["deep"].in_channels < 32
    assert parts["deep"].taps == (slice(1, 4), slice(2, 3))
    images = torch.randn(4, 3, 32, 32)
    expected = masked_logits(graph, layout, genome, images)
    assert worst(student.module(images), expected) < 1e-4
    teacher = masked_logits(graph, layout, layout.teacher(), images)
    assert worst(expected, teacher) > 1e-3
    _, found = exported(student.module, graph.input_shape, images)
    assert worst(found, expected) < 1e-4
