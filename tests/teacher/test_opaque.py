"""What is not understood stays whole: the rest is cut, and every student means what it says."""

import dataclasses
import json
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import SIZE, Prepared, check, conv, worst
from torch import nn
from torch.nn import functional as F

from moodistill.api import _copies_of
from moodistill.config import RunConfig, new_config, refuse_older
from moodistill.errors import UserError
from moodistill.heads.outputs import outputs_of
from moodistill.io.tensorfile import save_atomic
from moodistill.onnx.writer import to_onnx
from moodistill.settings import Settings
from moodistill.student.builder import build_student
from moodistill.student.context import check_graph
from moodistill.student.file import load_student, save_student
from moodistill.student.inherit import inherit
from moodistill.teacher.blocks import LayerRules, build_layout
from moodistill.teacher.graph import trace
from moodistill.teacher.plain import copied
from moodistill.teacher.samples import CalibrationConfig, collect_samples
from moodistill.teacher.weights import load_weights

SHAPE = (3, SIZE, SIZE)


class Net(nn.Module):
    """A stem of 32 channels, something in the middle, a layer of 24 channels, a head."""

    def __init__(self, middle, width=32, **layers):
        super().__init__()
        self.stem = conv(3, 32, stride=2)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.behind = conv(width, 24)
        self.head = nn.Linear(24, 5)
        self.middle = middle

    def forward(self, x):
        x = self.middle(self, F.relu(self.stem(x)))
        return self.head(F.relu(self.behind(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two, self.add = conv(width, width), conv(width, width), True

    def forward(self, x):
        y = F.silu(self.two(F.silu(self.one(x))))
        return x + y if self.add else y


class C2f(nn.Module):
    """Chunks in a list that grows, all concatenated."""

    def __init__(self, inputs, outputs, count=2):
        super().__init__()
        self.width = outputs // 2
        self.first = conv(inputs, 2 * self.width, 1)
        self.last = conv((2 + count) * self.width, outputs, 1)
        self.inner = nn.ModuleList(Bottleneck(self.width) for _ in range(count))

    def forward(self, x):
        y = list(self.first(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.inner)
        return self.last(torch.cat(y, 1))


class Classify(nn.Module):
    """A head that joins what it is given in a list."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.conv, self.pool = conv(inputs, 48, 1), nn.AdaptiveAvgPool2d(1)
        self.drop, self.linear = nn.Dropout(0.0), nn.Linear(48, classes)

    def forward(self, x):
        if isinstance(x, list):
            x = torch.cat(x, 1)
        x = self.linear(self.drop(self.pool(F.silu(self.conv(x))).flatten(1)))
        return x if self.training else (x.float(), x)[1]


class YoloClassifier(nn.Module):
    """Layers that say where their inputs come from, called in a loop over a list."""

    def __init__(self):
        super().__init__()
        layers = [conv(3, 16, stride=2), C2f(16, 32), conv(32, 32, stride=2), C2f(32, 48)]
        layers.append(Classify(80, 5))
        for layer, source in zip(layers, (-1, -1, -1, -1, (-1, 2)), strict=True):
            layer.source = source
        self.model = nn.ModuleList(layers)

    def forward(self, x, augment=False, profile=None):
        kept = []
        for layer in self.model:
            if layer.source != -1:
                x = [x if j == -1 else kept[j] for j in layer.source]
            x = layer(x)
            kept.append(x)
        return x


@dataclasses.dataclass
class Answer:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Wrapped(nn.Module):
    """A model of a library: optional arguments, checks of its input, an object as output."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 32, stride=2), C2f(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, pixels=None, labels=None, return_dict=True):
        if pixels is None:
            raise ValueError("no pixels")
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise ValueError("pixels are no images")
        batch, channels, height, width = pixels.shape
        if channels != 3 or (height, width) != (SIZE, SIZE):
            raise ValueError(f"{batch} images of {channels} channels")
        pooled = self.body(F.relu(self.stem(pixels))).mean([2, 3])
        logits = self.head(pooled.view(batch, -1))
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return Answer(loss, logits) if return_dict else (logits,)


class Squeeze(nn.Module):
    """Squeeze-and-excite that checks the sizes of what it is given."""

    def __init__(self, width):
        super().__init__()
        self.width, self.down, self.up = width, nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)

    def forward(self, x):
        assert x.dim() == 4 and x.shape[1] == self.width, x.shape
        torch._assert(x.shape[2] == x.shape[3], "not square")
        n, c, h, w = x.shape
        y = F.avg_pool2d(x, (h, w)) if h * w > 1 and n > 0 else x
        return x * self.up(F.relu(self.down(y))).sigmoid()


class SamePad(nn.Conv2d):
    """Padding as TensorFlow does it, computed from the size."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            both = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [both // 2, both - both // 2]
        if sum(pads) > 0:
            x = F.pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Blur(nn.Module):
    """Fixed filters in a buffer."""

    def __init__(self, width):
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        taps = (taps[:, None] * taps / 16).expand(width, 1, 3, 3).contiguous()
        self.register_buffer("filt", taps)
        self.register_buffer("other", 2 * taps)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        y = F.conv2d(x, self.filt, stride=2, groups=x.shape[1])
        return y + F.conv2d(x, self.other, stride=2, groups=x.shape[1])


class DataDependent(nn.Module):
    """Looks at values of the images."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x):
        return self.conv(x) if x.abs().sum() >= 0 else x


class Recurrent(nn.Module):
    """Reads a map row by row with an LSTM; a layer in front, one behind."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv(3, 32, stride=2), conv(32, 16)
        self.wide, self.lstm = conv(16, 24), nn.LSTM(24 * 8, 20, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.wide(F.relu(self.last(F.relu(self.stem(x))))))
        rows = x.permute(0, 2, 1, 3).flatten(2)
        out, (hidden, _) = self.lstm(rows)
        return self.head(out[:, -1] + hidden[-1])


class Attention(nn.Module):
    """Self-attention over the pixels of a map, by hand."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, 4, c // 4, h * w).unbind(1)
        scores = (q.transpose(-2, -1) @ k).softmax(-1)
        y = (v @ scores.transpose(-2, -1)).reshape(n, c, h, w)
        return x + self.out(y)


def selective(net, x):
    """Two branches, stacked and weighted by a softmax over them."""
    y = torch.stack([F.relu(net.a(x)), F.relu(net.b(x))], 1)
    gates = net.up(net.down(y.sum(1).mean((2, 3), keepdim=True)))
    n, c, h, w = gates.shape
    return (y * torch.softmax(gates.view(n, 2, c // 2, h, w), 1)).sum(1)


FOLLOWED = {
    "C2f": lambda: Net(lambda n, x: n.c(x), c=C2f(32, 32)),
    "YOLO-style classifier": YoloClassifier,
    "wrapped": Wrapped,
    "shape asserts": lambda: Net(lambda n, x: n.s(x), s=Squeeze(32)),
    "same padding": lambda: Net(lambda n, x: n.s(x), s=SamePad(32, 32, 3, 2)),
    "filters in buffers": lambda: Net(lambda n, x: n.s(x), s=Blur(32)),
    "padding mode": lambda: Net(
        lambda n, x: n.s(x), s=nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
    ),
    "instance norm": lambda: Net(lambda n, x: n.s(x), s=nn.InstanceNorm2d(32, affine=True)),
    "GLU": lambda: Net(lambda n, x: F.glu(n.s(n.a(x)), 1), a=conv(32, 128), s=nn.GLU(1)),
    "element-wise": lambda: Net(
        lambda n, x: torch.maximum(-x, (x**2).clamp_min(0.1)) + x.pow(3).neg().exp().minimum(x)
    ),
    "pads and pools": lambda: Net(
        lambda n, x: n.p(n.r(n.c(x))).flip(-1).roll(1, 2),
        c=nn.CircularPad2d(1), r=nn.ReplicationPad2d(1), p=nn.LPPool2d(2, 2),
    ),
    "dropouts": lambda: Net(
        lambda n, x: F.alpha_dropout(F.dropout3d(n.d(x), 0.5, False), 0.5, False),
        d=nn.FeatureAlphaDropout(),
    ),
    "constants of map size": lambda: Net(
        lambda n, x: (x + n.table.weight) * n.grid.weight - n.one.weight,
        table=nn.LayerNorm((32, 8, 8), bias=False), grid=nn.LayerNorm((8, 8), bias=False),
        one=nn.LayerNorm((32, 1, 8), bias=False),
    ),
    "chunks reversed": lambda: Net(
        lambda n, x: n.b(torch.cat(n.a(x).chunk(3, 1)[::-1], 1)), a=conv(32, 48), b=conv(48, 32)
    ),
    "weight norm": lambda: Net(
        lambda n, x: n.b(n.a(x)), a=nn.utils.weight_norm(nn.Conv2d(32, 48, 1)),
        b=nn.utils.parametrizations.weight_norm(nn.Conv2d(48, 32, 1)),
    ),
}  # fmt: skip
LEFT = {
    "matmul": lambda: Net(lambda n, x: n.a(x) + torch.matmul(x, x), a=conv(32, 32)),
    "normalize": lambda: Net(lambda n, x: F.normalize(n.b(n.a(x))), a=conv(32, 16), b=conv(16, 32)),
    "LocalResponseNorm": lambda: Net(lambda n, x: n.a(x), a=nn.LocalResponseNorm(2)),
    "ConvTranspose2d": lambda: Net(
        lambda n, x: n.b(x), b=nn.ConvTranspose2d(32, 32, 2, 2, groups=4)
    ),
    "DataDependent": lambda: Net(lambda n, x: n.b(n.a(x)), a=conv(32, 32), b=DataDependent(32)),
    "takes apart": lambda: Net(
        lambda n, x: n.g(torch.cat([n.a(x), n.b(x)], 1)),
        a=conv(32, 3), b=conv(32, 5), g=nn.Conv2d(8, 32, 3, padding=1, groups=2),
    ),
    "takes apart a group": lambda: Net(
        lambda n, x: n.d(torch.cat([n.a(x), n.g(n.a(x))], 1)),
        a=conv(32, 8), g=nn.Conv2d(8, 16, 3, padding=1, groups=8), d=conv(24, 32),
    ),
    "LSTM": Recurrent,
    "matmul of raw": lambda: Net(lambda n, x: n.a(x), a=Attention(32)),
    "MultiheadAttention": lambda: Net(
        lambda n, x: n.m(*[x.flatten(2).transpose(1, 2)] * 3)[0].transpose(1, 2).unflatten(
            2, (8, 8)
        ),
        m=nn.MultiheadAttention(32, 4, batch_first=True),
    ),
    "softmax": lambda: Net(selective, a=conv(32, 32), b=conv(32, 32, 5),
                           down=nn.Conv2d(32, 8, 1), up=nn.Conv2d(8, 64, 1)),
}  # fmt: skip


def prepared(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Prepared(make())


@torch.no_grad()
def proven(ready):
    """Teacher, masked teacher, inherited weights and the file: all say the same."""
    import onnxruntime

    check_graph(ready.network, ready.graph, ready.layout, ready.images)
    assert len(check(ready, range(5))) > 2
    student = build_student(ready.graph, ready.layout, ready.genome(1, 4))
    inherit(student, ready.graph, ready.samples)
    found = student.module(ready.images)
    assert torch.isfinite(found).all()
    data = to_onnx(student.module, ready.graph.input_shape)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for images in (ready.images, ready.images[:1]):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert worst(torch.from_numpy(logits), student.module(images)) < 1e-4


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_by_value(name):
    ready = prepared(FOLLOWED[name])
    assert not ready.graph.whole
    proven(ready)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_whole(name):
    ready = prepared(LEFT[name])
    assert ready.graph.whole
    said = " ".join(ready.graph.uncut().values())
    assert name.split()[0] in said and "test_opaque.py:" in said
    proven(ready)


def test_values_of_two_batches_fold_what_does_not_depend_on_them():
    """No size, assertion or unpacking is left in the graph of the wrapped network."""
    graph = trace(Wrapped(), SHAPE)
    called = {str(n.target) for n in graph.module.graph.nodes if n.op != "call_module"}
    assert not any(word in name for name in called for word in ("assert", "dim", "eq"))
    assert outputs_of(Wrapped()(torch.zeros(1, *SHAPE)))["logits"].shape == (1, 5)


def test_what_touches_what_is_left_whole_is_frozen_and_the_rest_is_not():
    ready = prepared(LEFT["LSTM"])
    slices = ready.layout.slices
    assert "mask/stem.0" in slices and "mask/last.0" in slices and "mask/wide.0" not in slices
    assert set(ready.graph.uncut()) >= {"wide.0"}


def test_a_module_named_as_opaque_stays_whole():
    network = FOLLOWED["C2f"]().eval()
    graph = trace(network, SHAPE, opaque=("c",))
    assert graph.uncut() == {"stem.0": "C2f c: it is named as opaque"}
    assert not [step for step in graph.layers if step.name.startswith("c.")]
    with pytest.raises(UserError, match="no module 'd' that could be left whole"):
        trace(network, SHAPE, opaque=("d",))


@pytest.mark.parametrize("name", ["LSTM", "DataDependent", "C2f"])
def test_a_student_with_parts_left_whole_from_its_file(name, tmp_path):
    """What was left whole, by itself or by name, is left whole again."""
    rules = LayerRules(opaque=("c.first",) if name == "C2f" else ())
    ready = prepared({**FOLLOWED, **LEFT}[name])
    if rules.opaque:
        ready.graph = trace(ready.network, SHAPE, rules.opaque)
        ready.samples = collect_samples(ready.graph, ready, CalibrationConfig(6, 600), None, "")
        ready.layout = build_layout(ready.graph, ready.samples, rules)
    genome = ready.genome(2)
    student = build_student(ready.graph, ready.layout, genome)
    save_student(student, ready.layout, genome, tmp_path / "s.safetensors", "own")
    again, found = load_student(tmp_path / "s.safetensors", copied(ready.network), SHAPE)
    assert (found == genome).all()
    assert torch.equal(again.module(ready.images), student.module(ready.images))


def test_what_is_opaque_is_in_the_configuration_and_earlier_runs_have_none():
    config = new_config("digits", Settings(opaque=("c.first", "d")))
    stored = json.loads(json.dumps(asdict(config)))
    assert RunConfig.from_dict(stored) == config and config.rules.opaque == ("c.first", "d")
    del stored["rules"]["opaque"]
    assert RunConfig.from_dict(stored).rules == LayerRules()
    refuse_older(stored, Path("run"))


def test_a_network_is_not_changed_by_folding():
    """Parametrised weights are folded in a copy; the teacher keeps its own."""
    network = FOLLOWED["weight norm"]()
    names, images = set(network.state_dict()), torch.randn(2, *SHAPE)
    before = network.eval()(images)
    graph = trace(network, SHAPE)
    assert set(network.state_dict()) == names and torch.equal(network(images), before)
    assert worst(graph.module(images), before) < 1e-5
    assert {type(graph.layer_module(name)) for name in ("a", "b")} == {nn.Conv2d}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_widened(dtype):
    network = Net(lambda n, x: n.b(x), b=conv(32, 32)).to(dtype)
    module = trace(network, SHAPE).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.dtype for p in network.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_full_precision_are_kept_in_a_network_built_in_another(dtype, tmp_path):
    network = Net(lambda n, x: n.b(x), b=conv(32, 32))
    save_atomic({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = load_weights(copied(network).to(dtype), tmp_path / "w.safetensors")
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("pass_on", "words"),
    [
        (lambda n, x: n.b(x / (x - x)), "layer b.0 reads NaN or infinity .*: check its weights"),
        (lambda n, x: n.b(x * 1e30) * 1e-30, "layer b.0 gives NaN or infinity"),
    ],
    ids=["reads", "gives"],
)
def test_samples_that_are_not_finite_name_the_layer(pass_on, words):
    network = Net(pass_on, b=conv(32, 32)).eval()
    nn.init.constant_(network.b[0].weight, 1e10)
    images = torch.rand(6, *SHAPE)
    data = SimpleNamespace(calibration=lambda count: images, digest="")
    graph = trace(network, SHAPE)
    with pytest.raises(UserError, match=words):
        collect_samples(graph, data, CalibrationConfig(6, 600), None, "")


@pytest.mark.parametrize("name", ["half", "weight norm"])
def test_teachers_as_people_have_them(name, tmp_path):
    """What `search` does first: keep the weights, build copies, load them and trace."""
    network = FOLLOWED["weight norm"]() if name == "weight norm" else FOLLOWED["C2f"]().half()
    images = torch.randn(2, *SHAPE)
    expected = network.eval()(images.to(network.head.weight.dtype)).float()
    save_atomic({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    teacher = load_weights(_copies_of(network)(), tmp_path / "w.safetensors")
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert worst(teacher(images), expected) < 0.02 and not trace(teacher, SHAPE).whole


def test_what_mixes_pictures_is_found_though_it_is_left_whole():
    """The student of the teacher's genome does the same in the same batch, so that is not enough."""
    ready = prepared(lambda: Net(lambda n, x: n.a(x - x.mean(0)), a=conv(32, 32)))
    with pytest.raises(UserError, match="Net mixes images: .*left whole .*mean"):
        check_graph(ready.network, ready.graph, ready.layout, ready.images)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("lazy layers that were never called .*: b.weight, b.bias; call the network on one image",
         lambda: Net(lambda n, x: n.b(x), b=nn.LazyConv2d(32, 1))),
        (r"prepared for quantisation: b \(Conv2d\)",
         lambda: Net(lambda n, x: n.b(x), b=torch.ao.nn.qat.Conv2d(
             32, 32, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig()))),
        ("cannot be copied .*expected a network that copy.deepcopy takes",
         lambda: Net(lambda n, x: x, lock=Locked()).half()),
    ],
)  # fmt: skip
def test_what_is_not_ready_is_one_line(words, make):
    with pytest.raises(UserError, match=words) as caught:
        trace(make(), SHAPE)
    assert "\n" not in str(caught.value)


class Locked(nn.Module):
    """Holds what Python does not copy."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_all_obstacles_are_listed_with_their_place():
    network = Net(
        lambda n, x: F.normalize(n.a(n.b(x))), a=nn.LocalResponseNorm(2), b=nn.Softmax2d()
    )
    network.behind = nn.Identity()
    network.head = nn.Linear(32, 5)
    with pytest.raises(UserError, match="nothing of this network could be cut") as caught:
        trace(network, SHAPE)
    for words in (
        "LocalResponseNorm (at a, test_opaque.py",
        "Softmax2d (at b",
        "normalize (at normal",
    ):
        assert words in str(caught.value)


def test_probabilities_are_known_as_such():
    graph = trace(nn.Sequential(Net(lambda n, x: x), nn.Softmax(1)), SHAPE)
    assert graph.gives() == {"logits": "probabilities"} and not graph.whole


class Signal(nn.Module):
    """A residual network over signals, with squeeze-and-excite and a depthwise layer."""

    def __init__(self, axes=1):
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d))[axes == 3]
        self.stem, self.norm = conv(2, 32, 5, 2, 2, bias=False), norm(32)
        self.one, self.inner = conv(32, 48, 3, padding=1), norm(48)
        self.deep, self.two = conv(48, 48, 3, padding=1, groups=48), conv(48, 32, 1)
        self.down, self.up = conv(32, 16, 1), conv(16, 32, 1)
        self.last, self.head = conv(64, 24, 3, 2), nn.Linear(24, 5)
        self.pool = (nn.MaxPool1d, nn.MaxPool3d)[axes == 3](2)
        self.axes = tuple(range(2, 2 + axes))

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(F.silu(self.deep(F.relu(self.inner(self.one(x))))))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean(self.axes, keepdim=True)))))
        x = self.pool(torch.cat([x, x.flip(2)], 1))
        return self.head(F.relu(self.last(x)).mean(self.axes))


class Tokens(nn.Module):
    """Patches as tokens, a class token, attention by hand, an MLP."""

    def __init__(self, width=32):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 17, width))
        self.norm, self.other, self.final = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        x = x + self.project(y)
        x = x + self.down(F.gelu(self.up(self.other(x))))
        return self.head(self.final(x)[:, 0])


@pytest.mark.parametrize("shape", [(2, 64), (2, 16, 14, 12)], ids=["signals", "volumes"])
def test_inputs_of_other_ranks(shape):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ready = Prepared(Signal(len(shape) - 1), shape=shape)
    assert not ready.graph.whole and not ready.graph.uncut()
    assert {"mask/one", "mask/down", "mask/last", "mask/stem"} <= set(ready.layout.slices)
    axes = len(shape) - 1
    assert ready.layout.shapes["kernel/stem"] == (2 * axes,)
    assert ready.layout.shapes["kernel/deep"] == (axes,) and "rank/one" in ready.layout.slices
    proven(ready)


def test_the_hidden_units_of_a_transformers_block():
    """The stream of the tokens stays, with what reads it in attention; the MLP may be cut."""
    ready = prepared(Tokens)
    assert ready.layout.shapes["mask/up"] == (64,)
    assert "permute (at permute, test_opaque.py:" in ready.graph.uncut()["qkv"]
    assert "mask/project" not in ready.layout.slices
    proven(ready)


def test_code_that_cannot_be_followed_at_the_top_is_said_with_its_line():
    """There is no submodule that could be left whole."""

    def overwrite(net, x):
        x = x.clone()
        x[:, :4] = 0
        return x

    with pytest.raises(UserError, match="item assignment .test_opaque.py:.*into a submodule"):
        trace(Net(overwrite), SHAPE)


def test_a_file_that_cannot_be_written_prints_nothing(capfd):
    ready = prepared(lambda: Net(lambda n, x: n.a(torch.fft.fft2(x).real), a=conv(32, 32)))
    student = build_student(ready.graph, ready.layout, ready.genome(0)).module
    with pytest.raises(UserError, match="fft2.*cannot be written as ONNX") as caught:
        to_onnx(student, SHAPE)
    printed = capfd.readouterr()
    assert "\n" not in str(caught.value) and "graph" not in printed.out + printed.err
