"""Maps, several outputs, signals and volumes: students are their masked teachers, files are too."""

import numpy as np
import pytest
import torch
from helpers import prepare, random_genome
from helpers.dense import TwoHeads, UNet, block, with_statistics
from torch import nn
from torch.nn import functional as F

from moodistill.data.arrays import from_arrays
from moodistill.data.images import Split
from moodistill.heads.outputs import outputs_of
from moodistill.onnx.graph import OnnxGraph
from moodistill.onnx.ops import UnsupportedOperation
from moodistill.onnx.runtime import outputs
from moodistill.onnx.writer import to_onnx
from moodistill.student.builder import build_student
from moodistill.student.context import check_graph
from moodistill.student.evaluator import count_macs
from moodistill.student.inherit import InheritConfig, inherit
from moodistill.testing.masked import masked_outputs


class Middle(nn.Module):
    """A stem of 16 channels, something between, and a map of 4 classes."""

    def __init__(self, middle, axes=2, width=16, stride=2, **layers):
        super().__init__()
        last = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.stem, self.out = block(3, 32, axes, stride), last(width, 4, 1)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.middle = middle

    def forward(self, x):
        return self.out(self.middle(self, self.stem(x)))


def transposed(kind, *settings, **more):
    return lambda axes: Middle(
        lambda n, x: F.relu(n.up(x)), axes, 16, up=kind(32, 16, *settings, **more)
    )


SHAPES = {1: (3, 24), 2: (3, 12, 16), 3: (3, 4, 8, 8)}
NETWORKS = {
    "U-Net": (2, lambda axes: UNet(width=16, axes=axes)),
    "U-Net of signals": (1, lambda axes: UNet(width=16, axes=axes)),
    "U-Net of volumes": (3, lambda axes: UNet(width=16, axes=axes)),
    "two heads": (2, lambda axes: TwoHeads()),
    "transposed": (2, transposed(nn.ConvTranspose2d, 3, 2, 1, 1)),
    "transposed, dilated": (1, transposed(nn.ConvTranspose1d, 4, 3, 2, dilation=2, bias=False)),
    "transposed and normed": (2, lambda axes: Middle(
        lambda n, x: F.relu(n.norm(n.up(x))), axes, up=nn.ConvTranspose2d(32, 16, 4, 2, 1),
        norm=nn.BatchNorm2d(16))),
    "pixel shuffle": (2, lambda axes: Middle(
        lambda n, x: F.relu(n.shuffle(n.wide(x))), axes, wide=block(32, 64),
        shuffle=nn.PixelShuffle(2))),
    "pixel unshuffle": (2, lambda axes: Middle(
        lambda n, x: n.narrow(F.pixel_unshuffle(x, 2)), axes, narrow=block(128, 16))),
    "instance norm": (1, lambda axes: Middle(
        lambda n, x: F.relu(n.norm(n.inner(x))), axes, inner=nn.Conv1d(32, 16, 3, 1, 1),
        norm=nn.InstanceNorm1d(16, affine=True))),
    "mirrored borders": (2, lambda axes: Middle(
        lambda n, x: n.inner(n.pad(x)), axes, pad=nn.ReflectionPad2d((2, 1, 0, 1)),
        inner=nn.Conv2d(32, 16, 3, padding=1, padding_mode="replicate"))),
    "interpolated": (2, lambda axes: Middle(
        lambda n, x: n.inner(F.interpolate(x, size=(12, 16), mode="bilinear")), axes,
        inner=block(32, 16))),
    "corners aligned": (2, lambda axes: Middle(
        lambda n, x: n.inner(n.up(x)), axes, up=nn.Upsample(scale_factor=2, mode="bilinear",
                                                            align_corners=True),
        inner=block(32, 16))),
    "softmax of a map": (2, lambda axes: nn.Sequential(
        block(3, 32), block(32, 16), nn.Conv2d(16, 4, 1), nn.Softmax(1))),
    "a vector beside what makes it": (1, lambda axes: Deep()),
}  # fmt: skip


class Deep(nn.Module):
    """A tuple; one output is read on."""

    def __init__(self):
        super().__init__()
        self.stem, self.side = block(3, 32, 1), nn.Conv1d(32, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        side = self.side(self.stem(x))
        return self.head(F.relu(side).mean(2)), (side, None)


@pytest.fixture(scope="module", params=NETWORKS)
def prepared(request):
    axes, make = NETWORKS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = make(axes)
    rng = np.random.default_rng(1)
    splits = {
        part: Split(rng.standard_normal((count, *SHAPES[axes])).astype(np.float32), {})
        for part, count in (("train", 24), ("validation", 6), ("test", 2))
    }
    data = from_arrays("noise", splits)
    with_statistics(network, data.normalise(data.train.images))
    return request.param, prepare(network, data), data


def apart(found, wanted):
    assert found.keys() == wanted.keys()
    return max(
        float((found[n] - w).abs().max() / w.abs().max().clamp_min(1)) for n, w in wanted.items()
    )


def test_nothing_is_left_whole_and_the_teacher_is_its_genome(prepared):
    _, ready, data = prepared
    assert not ready.graph.whole
    check_graph(ready.teacher, ready.graph, ready.layout, data.normalise(data.train.images))


def test_students_are_their_masked_teachers(prepared):
    _, ready, data = prepared
    inputs = data.normalise(data.validation.images)
    rng = np.random.default_rng(0)
    for _ in range(6):
        genome = random_genome(ready.layout, rng)
        student = build_student(ready.graph, ready.layout, genome)
        with torch.no_grad():
            found = outputs_of(student.module(inputs))
        assert apart(found, masked_outputs(ready.graph, ready.layout, genome, inputs)) < 1e-4


def test_inherited_students_are_their_files(prepared):
    name, ready, data = prepared
    rng = np.random.default_rng(5)
    genome = random_genome(ready.layout, rng, bypass=True)
    student = build_student(ready.graph, ready.layout, genome)
    inherit(student, ready.graph, ready.samples, InheritConfig())
    try:  # by the writer itself, not torch's exporter
        OnnxGraph(student.module, data.input_shape)
    except UnsupportedOperation as reason:
        pytest.fail(f"{name}: {reason}")
    model = to_onnx(student.module, data.input_shape)
    parts = list(outputs(model, data, data.validation, 1))
    with torch.no_grad():
        expected = outputs_of(student.module(data.normalise(data.validation.images)))
    found = {n: torch.from_numpy(np.concatenate([p[n] for p in parts])) for n in expected}
    assert apart(found, expected) < 1e-4


def test_more_work_for_the_same_weights_where_the_map_is_larger():
    """A transposed convolution multiplies every tap with every input pixel."""
    network = Middle(lambda n, x: n.up(x), 2, 16, up=nn.ConvTranspose2d(32, 16, 2, 2, bias=False))
    data = from_arrays("noise", {p: Split(np.zeros((4, *SHAPES[2]), np.float32), {})
                                 for p in ("train", "validation", "test")})  # fmt: skip
    ready = prepare(network.eval(), data)
    student = build_student(ready.graph, ready.layout, ready.layout.teacher())
    pixels = 12 * 16
    by_hand = 27 * 32 * pixels // 4 + 32 * 16 * 4 * pixels // 4 + (16 * 4 + 4) * pixels
    assert count_macs(student) == by_hand
