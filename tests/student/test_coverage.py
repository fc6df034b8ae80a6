"""Many kinds of network through the same rules: each student against its masked teacher."""

import numpy as np
import pytest
import torch
from helpers import random_genome
from helpers.networks import SIZE, Prepared, check, conv, worst
from torch import nn
from torch.nn import functional as F

from moodistill.errors import UserError
from moodistill.genome.canonical import canonical
from moodistill.genome.resolve import resolve
from moodistill.onnx.graph import OnnxGraph
from moodistill.onnx.writer import to_onnx
from moodistill.student import inherit as inheritance
from moodistill.student.builder import build_student
from moodistill.student.context import check_graph
from moodistill.student.evaluator import count_macs
from moodistill.student.inherit import inherit
from moodistill.teacher.graph import trace
from moodistill.testing.masked import masked_logits


class Net(nn.Module):
    """A stem of 32 channels, something in the middle, a head of 5 classes."""

    width = 32

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 32, stride=2)
        self.head = nn.Linear(self.width, 5)

    def forward(self, x):
        x = self.middle(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Dense(Net):
    """Each layer reads everything before it; a norm over the concatenation."""

    width = 64

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(32 + 16 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(32 + 16 * i, 16, 3, padding=1) for i in range(2)])

    def middle(self, x):
        values = [x]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            values.append(layer(F.relu(norm(torch.cat(values, 1)))))
        return F.relu(self.norms[2](torch.cat(values, dim=1)))


class Branches(Net):
    """Four branches side by side, one of them a pooling."""

    width = 80

    def __init__(self):
        super().__init__()
        self.one, self.three, self.five = conv(32, 16, 1), conv(32, 24), conv(32, 16, 5)
        self.pooled = conv(32, 24, 1)

    def middle(self, x):
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return F.relu(torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1))


class Shuffle(Net):
    """Half of the channels pass by; a channel shuffle mixes the halves, twice."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(
            [nn.Sequential(conv(16, 24, 1), nn.ReLU(), conv(24, 24, 3, 24), conv(24, 16, 1))
             for _ in range(2)]
        )  # fmt: skip

    def middle(self, x):
        for unit in self.units:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, unit(right)), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return x


class Ghost(Net):
    """Cheap twins of half of the channels, and a residual over both."""

    def __init__(self):
        super().__init__()
        self.main, self.cheap = conv(32, 16, 1), conv(16, 16, 3, 16)
        self.last = conv(32, 32)

    def middle(self, x):
        y = F.relu(self.main(x))
        return self.last(x + torch.cat([y, self.cheap(y)], 1))


class Ladder(Net):
    """Splits that read one another, as in Res2Net."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(8, 8) for _ in range(3)])
        self.last = conv(32, 32, 1)

    def middle(self, x):
        parts = torch.split(x, 8, 1)
        y = parts[0]
        outs = []
        for index, layer in enumerate(self.convs):
            y = F.relu(layer(y if index == 0 else y + parts[index]))
            outs.append(y)
        return F.relu(self.last(torch.cat([*outs, parts[3]], 1)) + x)


class Gates(Net):
    """Squeeze-and-excite, and a gate with one value per pixel."""

    def __init__(self):
        super().__init__()
        self.expand, self.deep = conv(32, 48, 1), conv(48, 48, 5, 48)
        self.fc1, self.fc2 = nn.Conv2d(48, 16, 1), nn.Conv2d(16, 48, 1)
        self.where = nn.Conv2d(48, 1, 3, padding=1)
        self.project = conv(48, 32, 1)

    def middle(self, x):
        y = F.hardswish(self.deep(F.silu(self.expand(x))))
        y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
        y = torch.sigmoid(self.where(y)) * y
        return x + self.project(y)


class Grouped(Net):
    """A grouped convolution between dense ones, and a depthwise one that doubles the channels."""

    width = 96

    def __init__(self):
        super().__init__()
        self.first, self.grouped, self.third = conv(32, 48, 1), conv(48, 96, 3, 12), conv(96, 32, 1)
        self.deepen, self.mix = conv(32, 64, 3, 32), conv(64, 96, 1)

    def middle(self, x):
        x = x + self.third(F.relu(self.grouped(F.relu(self.first(x)))))
        return F.relu(self.mix(self.deepen(F.relu(x))))


class ChannelsLast(Net):
    """A block with a norm over channels, linear layers on the last axis and a layer scale."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(32, 32, 7, padding=3, groups=32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.scale = nn.Parameter(torch.rand(32, 1, 1))
        self.outer = nn.Parameter(torch.rand(32))

    def middle(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return (y * self.scale + x).mul(self.outer.reshape(1, -1, 1, 1))


class Norms(Net):
    """GroupNorm, PReLU with a slope per channel, arithmetic with numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.slopes = nn.GroupNorm(4, 32), nn.PReLU(32)
        self.inner, self.last = conv(32, 24), conv(24, 32)

    def middle(self, x):
        y = 2.0 * self.slopes(self.norm(x)) - 0.5
        return self.last(torch.relu(self.inner(y / 3)) + 1)


class Shared(Net):
    """One convolution, with its norm, called twice."""

    def __init__(self):
        super().__init__()
        self.twice, self.last = conv(32, 32), conv(32, 32)

    def middle(self, x):
        return self.last(F.relu(self.twice(F.relu(self.twice(x)))))


class GatedLinear(Net):
    """One half of a layer's channels gates the other."""

    def __init__(self):
        super().__init__()
        self.both, self.last = conv(32, 96), conv(48, 32)

    def middle(self, x):
        one, other = self.both(x).chunk(2, 1)
        return self.last(one * torch.sigmoid(other))


class Functional(Net):
    """Functional layers: a norm, and a convolution with standardised weights."""

    def __init__(self):
        super().__init__()
        self.norm, self.plain, self.last = nn.BatchNorm2d(48), nn.Conv2d(32, 48, 3), conv(48, 32)

    def middle(self, x):
        weight = self.plain.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.plain.bias)
        norm = self.norm
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1)
        return self.last(F.relu(y, inplace=True))


class PickedInput(nn.Module):
    """Scales the image's channels one by one, as GoogLeNet does; overwrites its tensors."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 24, stride=2), conv(24, 24), conv(24, 24)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(24 * 16, 5)

    def forward(self, x):
        channels = [torch.unsqueeze(x[:, i], 1) * (0.5 + i) - 0.1 for i in range(3)]
        x = self.one(torch.cat(channels, 1))
        y = self.two(self.relu(x))  # x is read again below, after it was overwritten
        y += x
        z = self.three(self.relu(y))
        z += y
        z = F.max_pool2d(z, 2)
        return self.head(z.view(z.size(0), -1))


NETS = [
    Dense, Branches, Shuffle, Ghost, Ladder, Gates, Grouped, ChannelsLast, Norms, Shared,
    GatedLinear, Functional, PickedInput,
]  # fmt: skip


@pytest.fixture(scope="module", params=NETS, ids=lambda net: net.__name__)
def prepared(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Prepared(request.param())


def counted(network, images):
    """Multiply-accumulates of one image by hooks on the network itself."""
    total = []

    def hook(module, inputs, output):
        weights = sum(p.numel() for p in module.parameters())
        outputs = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        total.append(weights * output[0].numel() // outputs)

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    network(images[:1])
    for handle in handles:
        handle.remove()
    return sum(total)


@torch.no_grad()
def test_the_teachers_genome_is_the_teacher(prepared):
    student = build_student(prepared.graph, prepared.layout, prepared.layout.teacher())
    expected = prepared.network(prepared.images)
    assert worst(prepared.graph.module(prepared.images), expected) < 1e-4
    assert worst(student.module(prepared.images), expected) < 1e-4
    assert student.parameters == sum(p.numel() for p in prepared.network.parameters())
    if not isinstance(prepared.network, Functional):  # its convolution is no module
        macs = count_macs(student)
        assert macs == counted(prepared.network, prepared.images)


def test_students_are_their_masked_teachers(prepared):
    assert len(check(prepared, range(12))) > 6


@torch.no_grad()
def test_inherited_and_exported(prepared):
    """Closed-form weights are finite, bring the logits closer, and the file says the same."""
    import onnxruntime

    layout, graph = prepared.layout, prepared.graph
    genome = layout.teacher()
    rng = np.random.default_rng(2)
    for name in layout.shapes:
        if name.startswith("mask/"):
            view = layout.view(genome, name)
            view[:] = rng.random(view.shape) < 0.7
    genome = canonical(layout, genome, 1)
    expected = prepared.network(prepared.images)
    errors = []
    for mode in ("slice", "student"):
        student = build_student(graph, layout, genome)
        if mode == "student":
            inherit(student, graph, prepared.samples)
        found = student.module(prepared.images)
        assert torch.isfinite(found).all()
        errors.append(float((found - expected).pow(2).mean()))
    assert errors[1] < errors[0]
    OnnxGraph(student.module, graph.input_shape)  # raises where torch's exporter would step in
    data = to_onnx(student.module, graph.input_shape)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: prepared.images.numpy()})
    assert worst(torch.from_numpy(logits), found) < 1e-4


def test_what_moves_channels_leaves_no_trace():
    """A channel shuffle vanishes; whole groups and their layers may go."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        shuffle, branches = Prepared(Shuffle()), Prepared(Branches())
    student = build_student(shuffle.graph, shuffle.layout, shuffle.layout.teacher())
    called = {str(n.target) for n in student.module.graph.nodes}
    assert not called & {"view", "transpose", "contiguous", "size"}
    layout = branches.layout
    assert "three.0" in layout.droppable
    genome = layout.teacher()
    layout.view(genome, "mask/three.0")[:] = False
    structure = resolve(layout, genome)
    assert "three.0" not in structure.live and structure.dropped == {"three.0"}
    assert (canonical(layout, genome) == genome).all()
    student = build_student(branches.graph, layout, genome)
    assert not any(unit.layer == "three.0" for unit in student.units)
    expected = masked_logits(branches.graph, layout, genome, branches.images)
    assert worst(student.module(branches.images), expected) < 1e-4


def test_what_cannot_be_cut_is_frozen_and_said():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        last, norms = Prepared(ChannelsLast()), Prepared(Norms())
    assert last.graph.grouping.frozen["stem.0"] == "LayerNorm norm mixes its channels"
    assert norms.graph.grouping.frozen["stem.0"] == "GroupNorm norm mixes its channels"
    assert last.graph.uncut() == {"stem.0": "LayerNorm norm mixes its channels"}
    # What lies between may be cut.
    assert "mask/up" in last.layout.slices and "mask/inner.0" in norms.layout.slices


class Odd(nn.Module):
    """A stem, an odd middle and a head of 5 classes; `make` adds layers by name."""

    def __init__(self, middle, width=32, **layers):
        super().__init__()
        self.stem = conv(3, 32, stride=2)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(width, 5)
        self.middle = middle

    def forward(self, x):
        return self.head(self.middle(self, F.relu(self.stem(x))).mean((2, 3)))


def overwritten(net, x):
    """Relies on an in-place operation whose result nobody takes."""
    y = net.a(x)
    F.relu(y, inplace=True)
    return net.b(y)


def reordered(net, x):
    """Calls one layer on the same channels in two orders."""
    y = net.c(torch.cat([net.p(x), net.q(x)], 1))
    d = net.q(F.relu(y))
    k = net.z(torch.cat([d, d], 1))
    w = net.c(torch.cat([net.p(F.relu(y)), d], 1))
    return y + w + torch.cat([k, k], 1)


def taken_apart(net, x):
    """Channels last, then places, then features: only the order of axes changes."""
    y = net.a(x).permute(0, 2, 3, 1)
    y = y.flatten(1, 2).transpose(1, 2).flatten(1)
    return net.b(y)[:, :, None, None]


def own_norm(net, x):
    """A frozen norm written as a function, behind a layer that gives vectors."""
    y = net.a(x).mean((2, 3))
    y = F.batch_norm(net.v(y), net.n.running_mean, net.n.running_var, net.n.weight, net.n.bias)
    return net.b(F.relu(y))[:, :, None, None]


ODD = {
    "norm of a vector": lambda: Odd(own_norm, a=conv(32, 24), v=nn.Linear(24, 24),
                                    n=nn.BatchNorm1d(24), b=nn.Linear(24, 32)),
    "taken apart": lambda: Odd(taken_apart, a=conv(32, 24, stride=4), b=nn.Linear(24 * 4, 32)),
    "overwritten": lambda: Odd(overwritten, a=conv(32, 24), b=conv(24, 32)),
    "reordered": lambda: Odd(
        reordered, p=conv(32, 16), q=conv(32, 16), c=conv(32, 32), z=conv(32, 16)
    ),
    "parameter twice": lambda: Odd(
        lambda n, x: n.b(n.a(x) * n.s.weight.reshape(-1, 1, 1)) + n.c(x) * n.s.weight.reshape(-1, 1, 1),
        s=nn.PReLU(32), a=conv(32, 32), b=conv(32, 32), c=conv(32, 32),
    ),
    "itself": lambda: Odd(lambda n, x: n.a(x + x) + torch.cat([n.b(x), n.b(x)], 1),
                          a=conv(32, 32), b=conv(32, 16)),
    "scalars": lambda: Odd(lambda n, x: n.a(x) * n.scale.weight, a=conv(32, 32),
                           scale=nn.PReLU(1)),
    "prefix": lambda: Odd(lambda n, x: n.d(F.relu(n.a(x))[:, :10]), a=conv(32, 16), d=conv(10, 32)),
    "every other": lambda: Odd(lambda n, x: n.a(x[:, ::2]), a=conv(16, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prepared = Prepared(ODD[name]())
    check_graph(prepared.network, prepared.graph, prepared.layout, prepared.images)
    check(prepared, range(6))
    before = [p.detach().clone() for p in prepared.network.parameters()]
    student = build_student(prepared.graph, prepared.layout, prepared.layout.teacher())
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(1.0)
    # Nothing that a student learns reaches its teacher.
    after = prepared.network.parameters()
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_canonical_genomes_stay_so_with_bypasses():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prepared = Prepared(
            Odd(
                lambda n, x: torch.cat([x, F.relu(n.e(F.relu(n.d(F.relu(n.z(x))))))], 1),
                width=48, z=conv(32, 32), d=conv(32, 32), e=conv(32, 16),
            )
        )  # fmt: skip
    for seed in range(200):
        genome = random_genome(prepared.layout, np.random.default_rng(seed), bypass=True)
        once = canonical(prepared.layout, genome, 1)
        assert (canonical(prepared.layout, once, 1) == once).all()


def aliased(net, x):
    """Changes a tensor through a slice of it, which tracing cannot follow."""
    y = net.a(x)
    z = y[:, :16].relu_()
    return net.b(y) + torch.cat([z, z], 1)


def test_side_effects_that_are_lost_are_found():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prepared = Prepared(Odd(aliased, a=conv(32, 32), b=conv(32, 32)))
    with pytest.raises(UserError, match="computes something else once it is traced"):
        check_graph(prepared.network, prepared.graph, prepared.layout, prepared.images)


@pytest.mark.parametrize(
    ("match", "middle", "layers"),
    [
        ("batch_norm", lambda n, x: F.batch_norm(x, None, None, training=True), {}),
        ("BatchNorm2d.* without running", lambda n, x: n.n(x),
         {"n": nn.BatchNorm2d(32, track_running_stats=False)}),
        ("dropout .*active in evaluation", lambda n, x: F.dropout(x, 0.5), {}),
        ("BatchNorm2d", lambda n, x: n.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
         {"n": nn.BatchNorm2d(8)}),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_when_traced(match, middle, layers):
    with pytest.raises(UserError, match=match):
        trace(Odd(middle, **layers).eval(), (3, SIZE, SIZE))


class TwoSizes(nn.Module):
    """One convolution, called at two resolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.c = conv(3, 32), conv(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.max_pool2d(x + self.c(x), 2)
        return self.head(F.relu(x + self.c(x)).mean((2, 3)))


def test_a_shared_layer_whose_first_call_is_gone_stays_sliced():
    """The teacher's samples are of the first call's places, which the second does not have."""
    prepared = Prepared(TwoSizes())
    layout, genome = prepared.layout, prepared.layout.teacher()
    first = layout.merges[0]
    place = next(i for i, name in enumerate(first.inputs) if "c" in name)
    layout.view(genome, f"merge/{first.name}")[place] = False
    student = build_student(prepared.graph, layout, canonical(layout, genome))
    assert sum(node.target == "c.0" for node in student.module.graph.nodes) == 1
    before = student.module.get_submodule("c.0").weight.clone()
    inherit(student, prepared.graph, prepared.samples)
    assert torch.equal(student.module.get_submodule("c.0").weight, before)
    whole = build_student(prepared.graph, layout, layout.teacher())
    height, width = prepared.images.shape[2:]
    conv_macs = 32 * 32 * 9 * height * width // 4
    gone = count_macs(whole) - count_macs(student)
    assert gone == pytest.approx(4 * conv_macs, rel=0.05)  # the call at full size


def test_a_shared_layer_is_solved_once(monkeypatch):
    """Solving it again for its second input would spoil what the first one reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prepared = Prepared(Shared())
    solve, solved = inheritance.solve_unit, []

    def counted_solve(unit, *arguments):
        solved.append(unit.target)
        return solve(unit, *arguments)

    monkeypatch.setattr(inheritance, "solve_unit", counted_solve)
    student = build_student(prepared.graph, prepared.layout, prepared.layout.teacher())
    inherit(student, prepared.graph, prepared.samples)
    assert solved == ["stem.0", "twice.0", "last.0", "head"]


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_y_400mf"]
)
def test_torchvision(name):
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prepared = Prepared(torchvision.models.get_model(name, num_classes=10), size=32)
    check(prepared, range(3))
