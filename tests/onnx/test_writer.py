import copy
import operator
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import helper, numpy_helper
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.onnx.graph import OnnxGraph
from moodistill.onnx.ops import UnsupportedOperation
from moodistill.onnx.writer import structure_hash, to_onnx


def traced(model, seed=0):
    """The traced model in eval mode, its batch normalisation far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.6, 1.4),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return fx.symbolic_trace(model.eval())


def run(data, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": x.numpy()})[0]


def check(student, shape, tolerance=1e-4, opset=17):
    """Export, compare with torch at batch 1 and 3, and return the parsed model."""
    state = {k: v.clone() for k, v in student.state_dict().items()}
    data = to_onnx(student, shape, opset)
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    for batch in (1, 3):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = student(x.clone()).numpy()
        np.testing.assert_allclose(run(data, x), expected, atol=tolerance, rtol=1e-4)
    model = onnx.load_from_string(data)
    assert model.ir_version == helper.find_min_ir_version_for(model.opset_import)
    assert model.opset_import[0].version == opset
    assert not any(n.doc_string or n.metadata_props for n in model.graph.node)
    assert [
        d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim
    ] == [
        "batch",
        *shape,
    ]
    output = model.graph.output[0]
    assert (model.graph.input[0].name, output.name) == ("input", "logits")
    assert output.type.tensor_type.shape.dim[0].dim_param == "batch"
    return model


def kinds(model):
    return [node.op_type for node in model.graph.node]


def vgg16(half=False):
    model = torchvision.models.vgg16_bn(weights=None, init_weights=False)
    if half:
        plan = [32, 32, "M", 64, 64, "M", *[128] * 3, "M", *[256] * 3, "M", *[256] * 3, "M"]
        model.features = torchvision.models.vgg.make_layers(plan, batch_norm=True)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(256 if half else 512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)
    )
    return model


def resnet18():
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Sample(nn.Module):
    """A body of one's own between a stem and a linear head."""

    def __init__(self, body, channels=4, forward=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = body if isinstance(body, nn.Module) else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 5)
        self.function = None if isinstance(body, nn.Module) else body

    def forward(self, x):
        x = self.body(self.stem(x))
        if self.function is not None:
            x = self.function(x)
        return self.head(torch.flatten(self.pool(x), 1))


class Kitchen(nn.Module):
    """Every supported kind of node in one graph."""

    def __init__(self):
        super().__init__()
        self.start = nn.BatchNorm2d(3)  # nothing in front: stays
        self.stem = nn.Conv2d(3, 8, (3, 5), padding="same", dilation=(1, 2), bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, padding=(1, 1), groups=8)
        self.depth_bn = nn.BatchNorm2d(8, affine=False)
        self.shared = nn.Conv2d(8, 8, 1)  # two readers: its BN stays
        self.shared_bn = nn.BatchNorm2d(8)
        self.activations = nn.ModuleList(
            [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(),
             nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.ELU(0.7)]
        )  # fmt: skip
        self.pools = nn.ModuleList(
            [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2)]
        )
        self.drop, self.same = nn.Dropout(), nn.Identity()
        self.wide, self.wide_bn = nn.Linear(32, 24), nn.BatchNorm1d(24)
        self.flatten = nn.Flatten()
        self.last_bn, self.head = nn.BatchNorm1d(24), nn.Linear(24, 7)
        self.gap, self.gmp = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((1, 1))

    def forward(self, x):
        x = self.stem_bn(self.stem(self.start(x)))
        x = F.relu(self.depth_bn(self.depth(x)).relu())
        y = self.shared(x)
        x = operator.iadd(self.shared_bn(y), y)
        for activation in self.activations:
            x = torch.add(x, activation(x))
            x = F.dropout(x, 0.5, self.training)
        a, b = self.pools[0](x), F.max_pool2d(x, 2, padding=0, ceil_mode=True)
        c = self.pools[2](torch.cat([a, b.add(self.pools[1](x))], dim=1))
        c = self.same(self.drop(c))
        c = torch.cat((self.gap(c), F.adaptive_avg_pool2d(self.gmp(c), 1)), 1)
        c = F.avg_pool2d(c, 1)
        z = self.flatten(c) + c.view(c.size(0), -1) + c.flatten(1)
        z = self.wide_bn(self.wide(z))
        z = self.last_bn(torch.relu(z).reshape(z.shape[0], -1))
        return self.head(z)


def kitchen():
    return traced(Kitchen())


def test_vgg16_bn():
    model = check(traced(vgg16()), (3, 32, 32))
    # The pool in front of the classifier has nothing to do at 1x1 pixels.
    assert set(kinds(model)) == {"Conv", "Relu", "MaxPool", "Flatten", "Gemm"}
    assert all(t.raw_data for t in model.graph.initializer)


def test_resnet18_cifar():
    model = check(traced(resnet18()), (3, 32, 32))
    assert "BatchNormalization" not in kinds(model)
    assert kinds(model).count("Conv") == 20
    assert kinds(model).count("Add") == 8


def test_mobilenet_v2():
    model = check(traced(torchvision.models.mobilenet_v2(num_classes=10)), (3, 64, 64), 1e-3)
    assert "BatchNormalization" not in kinds(model)


def test_every_operation():
    model = check(kitchen(), (3, 21, 18))
    found = kinds(model)
    # start (nothing to fold into), shared_bn (two readers), last_bn (behind a ReLU)
    assert found.count("BatchNormalization") == 3
    for kind in ("Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Erf", "Elu"):
        assert kind in found, kind
    assert not {"Dropout", "Identity"} & set(found)
    # One of the two ReLUs in a row is dropped; the graph did not go through torch's exporter.
    assert found.count("Relu") == 3
    assert model.producer_name == "moodistill" and "Shape" not in found


@pytest.fixture
def no_fallback(monkeypatch):
    """Only the writer itself may write the file."""
    monkeypatch.setattr("torch.onnx.export", None)


class Whole(nn.Module):
    """A body on a map of 4 channels or on their means; every number it gives is compared.

    A body that is a function may take the network itself too, for its tensors.
    """

    def __init__(self, body, vector=False, own=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = body if isinstance(body, nn.Module) else nn.Identity()
        self.function = None if isinstance(body, nn.Module) else body
        self.vector, self.own = vector, own
        generator = torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.randn(4, 1, 1, generator=generator))
        self.flat = nn.Parameter(torch.rand(4, generator=generator) + 0.5)
        self.register_buffer("shift", torch.randn(1, 4, 1, 1, generator=generator))
        for parameter in self.body.parameters():  # norms and PReLU start the same for all
            nn.init.uniform_(parameter, 0.1, 0.9, generator=generator)

    def forward(self, x):
        x = self.stem(x)
        x = self.body(x.mean((2, 3)) if self.vector else x)
        if self.function is not None:
            x = self.function(x, self) if self.own else self.function(x)
        return x.flatten(1)


def last(x):
    return x.permute(0, 2, 3, 1)


def written(body, shape=(3, 11, 14), opset=17, **settings):
    return check(traced(Whole(body, **settings)), shape, opset=opset)


ACTIVATIONS = [
    nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Softplus(), nn.Softplus(2, 30), nn.PReLU(),
    nn.PReLU(4), nn.SELU(), nn.CELU(0.7), nn.Hardtanh(-0.3, 0.4), nn.Softsign(), nn.ReLU6(),
    nn.LeakyReLU(0.3), nn.ELU(0.4), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(),
]  # fmt: skip
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 3.0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, alpha=0.4),
    "celu": F.celu,
    "selu": F.selu,
    "silu": lambda x: F.silu(F.relu6(x)),
    "sigmoid": lambda x: x * F.sigmoid(x) + x.sigmoid() + torch.sigmoid(x),
    "tanh": lambda x: F.tanh(x) + x.tanh(),
    "softsign": F.softsign,
    "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.6),
    "hardsigmoid": lambda x: F.hardsigmoid(x) + F.hardswish(x),
}
ARITHMETIC = {
    "numbers": lambda x: (2 - x * 3.5 + 1) / 4 - 0.5,
    "divided": lambda x: 1 / (x * x + 2) + x.div(3).sub(1).mul(2).add(0.25),
    "functions": lambda x: torch.mul(torch.sub(torch.add(x, 1), 0.5), torch.div(x, 2)),
    "difference": lambda x: (x - x.relu()) / (x.relu() + 1),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + F.adaptive_avg_pool2d(x, 1),
    "gate in front": lambda x: F.adaptive_max_pool2d(x, 1) * x,
    "in place": lambda x: operator.isub(operator.itruediv(x.clone(), 2), 1) + x,
    "view in place": lambda x: last(x).mul_(2).flatten(1).add_(1),
    "method in place": lambda x: x.add(0).mul_(2).sub_(0.5).relu_().div_(3),
}
SHAPES = {
    "cat": lambda x: torch.cat([x, x.relu(), x], 1),
    "concat": lambda x: torch.concat((x, x.tanh()), dim=-3),
    "cat axis": lambda x: torch.cat([x, x.tanh()], axis=1),
    "cat rows": lambda x: torch.cat([x, x.tanh()], 2),
    "cat last": lambda x: torch.cat([last(x), last(x).relu()], -1),
    "cat last by number": lambda x: torch.cat((last(x), last(x).relu()), dim=3),
    "narrow": lambda x: torch.narrow(x, 1, 1, 2) + x.narrow(-3, -2, 2),
    "narrow last": lambda x: torch.narrow(last(x), 3, start=1, length=3),
    "narrow all": lambda x: torch.narrow(x, 1, 0, 4),
    "permute": lambda x: last(x).permute((0, 3, 1, 2)) + x,
    "permute function": lambda x: torch.permute(x, (0, -1, 1, -2)).contiguous(),
    "transpose": lambda x: x.transpose(1, -1) + torch.transpose(x, 1, 3),
    "means": lambda x: torch.mean(x, (2, 3)) + x.mean([-1, -2]) + x.mean(dim=(3, 2)),
    "means kept": lambda x: torch.mean(x, (2, 3), True) + x.mean([-2, -1], keepdim=True),
    "unflatten": lambda x: torch.unflatten(x.mean((2, 3)), 1, (-1, 1, 1)) * x,
    "unflatten groups": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "unsqueeze": lambda x: x.mean((2, 3)).unsqueeze(-1).unsqueeze(2) + x,
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(2),
    "view": lambda x: x.mean((2, 3)).view(x.size(0), x.shape[1], 1, 1) * x,
    "views": lambda x: x.view(x.shape[0], 2, -1).reshape(-1, 4, 11, 14),
    "pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "pad columns": lambda x: F.pad(F.pad(x, (1, -2)), (1, 0), value=0.5),
    "copies": lambda x: last(x).contiguous().clone(),
}
POOLS = [
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d((2, 3), (3, 2), (1, 0), ceil_mode=True),
    nn.AvgPool2d((4, 5), 3, (1, 2), ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.MaxPool2d(2, 3, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True),
    nn.MaxPool2d(2, (3, 1), dilation=(3, 1), ceil_mode=True),
    nn.AdaptiveAvgPool2d((3, 4)),
    nn.AdaptiveAvgPool2d((20, None)),
    nn.AdaptiveAvgPool2d((11, 14)),
    nn.AdaptiveAvgPool2d((11, 7)),
    nn.AdaptiveMaxPool2d((1, 2)),
    nn.AdaptiveMaxPool2d(1),
    nn.Sequential(nn.ZeroPad2d((0, 0, 2, -1)), nn.AdaptiveAvgPool2d((4, 7))),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2),
]
OWN_TENSORS = {
    "scale": lambda x, m: m.scale * x + x * m.scale + m.shift,
    "scale in front": lambda x, m: m.scale - x + m.shift / (x * x + 1),
    "scale last": lambda x, m: m.flat * last(x) - m.flat,
    "reshaped": lambda x, m: x * m.flat.view(1, m.flat.size(0), 1, 1) - m.flat[:, None, None],
    "larger": lambda x, m: x.mean((2, 3), keepdim=True) + m.shift.flatten(1).unflatten(0, (1, -1)),
    "prelu": lambda x, m: F.prelu(x, m.flat),
    "conv": lambda x, m: F.conv2d(x, m.scale[:, None], m.flat, padding=1, groups=4),
    "linear": lambda x, m: F.linear(last(x), m.flat.unsqueeze(0)),
    "batch_norm": lambda x, m: F.batch_norm(x, m.shift.flatten(), m.flat, m.scale.flatten()),
    "layer_norm": lambda x, m: F.layer_norm(last(x), (4,), m.flat, m.flat, 1e-6),
    "group_norm": lambda x, m: F.group_norm(x, 2, m.flat, m.flat),
}
LAYERS = [
    nn.Conv2d(4, 4, 4, padding="same", groups=2),
    nn.Conv2d(4, 4, (3, 1), padding="valid", stride=(2, 1)),
    nn.GroupNorm(2, 4),
    nn.GroupNorm(4, 4, affine=False),
]


@pytest.mark.parametrize("body", ACTIVATIONS, ids=str)
def test_activations(body, no_fallback):
    written(body)
    written(body, vector=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_activations(name, no_fallback):
    written(FUNCTIONS[name])


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, no_fallback):
    written(ARITHMETIC[name])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, no_fallback):
    written(SHAPES[name])


@pytest.mark.parametrize("name", OWN_TENSORS)
def test_tensors_of_the_student_itself(name, no_fallback):
    written(OWN_TENSORS[name], own=True)


@pytest.mark.parametrize("body", [*POOLS, *LAYERS], ids=str)
def test_pools_and_layers(body, no_fallback):
    written(body)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [2, 4])
def test_norms_fold_into_grouped_convolutions(groups, dilation, no_fallback):
    conv = nn.Conv2d(4, 8, 3, padding="same", dilation=dilation, groups=groups, bias=False)
    found = kinds(written(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())))
    assert found == ["Conv", "Conv", "Relu", "Flatten"]


@pytest.mark.parametrize(
    "use",
    [
        lambda x, m: m.norm(x) + x.clone(),
        lambda x, m: m.norm(x) + torch.narrow(x, 1, 0, 1),
        lambda x, m: m.norm(m.scale * x),
        lambda x, m: m.norm(x.relu()),
    ],
    ids=["copy", "part", "scaled", "activated"],
)
def test_norms_stay_where_others_read_or_change_the_convolution(use, no_fallback):
    model = Whole(use, own=True)
    model.norm = nn.BatchNorm2d(4)
    assert kinds(check(traced(model), (3, 6, 6))).count("BatchNormalization") == 1


def test_channel_last_block(no_fallback):
    """As in ConvNeXt: norm and linear layers behind a permutation, then a layer scale."""

    def use(x, m):
        y = m.narrow(m.act(m.wide(m.norm(last(x)))))
        return m.scale * y.permute(0, 3, 1, 2) + x

    model = Whole(use, own=True)
    model.norm, model.act = nn.LayerNorm(4, 1e-6), nn.GELU()
    model.wide, model.narrow = nn.Linear(4, 16), nn.Linear(16, 4, bias=False)
    found = kinds(check(traced(model), (3, 9, 8), opset=18))
    assert (found.count("LayerNormalization"), found.count("MatMul")) == (1, 2)


@pytest.mark.parametrize("opset", [14, 21])
def test_norms_in_other_opsets(opset):
    written(nn.Sequential(nn.GroupNorm(2, 4), nn.Mish(), nn.GELU()), opset=opset)
    written(nn.LayerNorm(14), opset=opset)  # the fallback's before opset 17
    written(nn.LayerNorm((11, 14), elementwise_affine=False), opset=opset)


def convnext():
    blocks = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([blocks(8, 16, 1), blocks(16, None, 2)], 0.2, 0.5)


@pytest.mark.parametrize(
    "build",
    [
        convnext,
        lambda: torchvision.models.DenseNet(4, (2, 2), 8),
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
        lambda: torchvision.models.squeezenet1_1(weights=None),
    ],
    ids=["convnext", "densenet", "mobilenet_v3", "squeezenet"],
)
def test_networks_of_torchvision(build, no_fallback):
    check(traced(build()), (3, 64, 64))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: last(x).mul_(2) + last(x),
        lambda x: x.view(x.size(0), -1).relu_() + x.flatten(1),
        lambda x: F.relu(torch.narrow(x, 1, 0, 1), inplace=True) + x,
    ],
    ids=["permutation", "view", "part"],
)
def test_in_place_operations_on_shared_memory_are_not_written(function):
    with pytest.raises(UnsupportedOperation, match="in-place"):
        OnnxGraph(traced(Whole(function)), (3, 6, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, x], 0),
        lambda x: x.permute(1, 0, 2, 3),
        lambda x: x.mean((0, 2, 3), keepdim=True) + x,
        lambda x: x.mean((2, 3)).squeeze(),
        lambda x: x.reshape(-1, 2, 6, 6),
        lambda x: F.pad(x, (0,) * 6 + (1, 1)),
        lambda x: x + torch.ones(2, 1, 1, 1),
    ],
    ids=["cat", "permute", "mean", "squeeze", "reshape", "pad", "constant"],
)
def test_nothing_touches_the_batch(function):
    with pytest.raises(UnsupportedOperation):
        OnnxGraph(traced(Whole(function)), (3, 6, 6))


@pytest.mark.parametrize(
    "function",
    [lambda x: x + x.narrow(1, 0, 3), lambda x: torch.cat([x, F.max_pool2d(x, 2)], 1)],
    ids=["sum", "cat"],
)
def test_shapes_that_do_not_fit(function):
    with pytest.raises(ValueError, match="joins"):
        to_onnx(traced(Whole(function)), (3, 6, 6))


class Rewired(nn.Module):
    """In-place activations read by somebody else, as rewired students have them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        shortcut = x
        y = self.relu(x)
        return self.head(F.adaptive_avg_pool2d(shortcut + y, 1).flatten(1))


def test_in_place_activation_changes_its_input():
    check(traced(Rewired()), (3, 8, 8))


def test_dead_nodes_are_dropped_even_if_unknown():
    student = traced(Sample(nn.Identity()))
    stem = next(n for n in student.graph.nodes if n.target == "stem")
    with student.graph.inserting_after(stem):
        student.graph.call_function(torch.linalg.norm, (stem,))
        student.graph.call_module("stem", (next(iter(student.graph.nodes)),))
    assert kinds(check(student, (3, 8, 8))) == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.PixelShuffle(2)),
        lambda x: torch.clamp(x, -0.5, 0.25) + x.mean() * 0,
        nn.LogSigmoid(),
    ],
    ids=["PixelShuffle", "function", "LogSigmoid"],
)
def test_unknown_operations_go_through_torch(body):
    student = traced(Sample(body))
    student.head.weight.data[0, 0] = 1e-40
    model = check(student, (3, 8, 8))
    names = [n for node in model.graph.node for n in (node.name, *node.input, *node.output)]
    assert not any(name.startswith("/") for name in names)
    assert_no_denormals(model)
    assert to_onnx(student, (3, 8, 8)) == to_onnx(student, (3, 8, 8))


def test_operation_that_nobody_knows():
    student = traced(Sample(lambda x: torch.linalg.pinv(x)))
    with pytest.raises(UserError, match="pinv"):
        to_onnx(student, (3, 4, 4))


def assert_no_denormals(model):
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            assert not ((values != 0) & (np.abs(values) < 1.2e-38)).any()


def test_denormals_become_zero():
    student = traced(Sample(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    student.head.weight.data[:] = 1e-39
    conv, bn = student.get_submodule("body.0"), student.get_submodule("body.1")
    conv.weight.data[0] = 1e-30  # normal until it meets the scale
    bn.weight.data[0] = 1e-12
    model = check(student, (3, 8, 8))
    assert_no_denormals(model)
    assert (student.head.weight == 1e-39).all()


def test_determinism_and_privacy():
    student = traced(vgg16(half=True))
    data = to_onnx(student, (3, 32, 32))
    assert data == to_onnx(copy.deepcopy(student), (3, 32, 32))
    for needle in (b"/root", b"/home", b"/usr/", b"site-packages", b"moodistill/", b"torch"):
        assert needle not in data
    assert student.train() and data == to_onnx(student, (3, 32, 32))
    assert all(module.training for module in student.modules())


def test_fast_at_half_width():
    student = traced(vgg16(half=True))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        to_onnx(student, (3, 32, 32))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.2, seconds


@pytest.mark.parametrize("opset", [14, 21])
def test_other_opsets(opset):
    check(kitchen(), (3, 21, 18), opset=opset)


def test_bad_arguments():
    student = traced(Sample(nn.Identity()))
    with pytest.raises(UserError, match="opset is 9"):
        to_onnx(student, (3, 8, 8), opset=9)
    with pytest.raises(UserError, match="input_shape"):
        to_onnx(student, (3,))
    with pytest.raises(ValueError, match="stem expects 3"):
        to_onnx(student, (4, 8, 8))


def test_structure_hash():
    def small(width=4, stride=1, activation=None, wiring=False):
        body = nn.Sequential(
            nn.Conv2d(4, width, 3, stride, 1), nn.BatchNorm2d(width), activation or nn.ReLU()
        )
        model = Sample(body, width)
        if wiring:
            model.function = lambda x: x + x
        return structure_hash(traced(model))

    torch.manual_seed(1)
    base = small()
    assert base == small() == small(activation=nn.ReLU(inplace=True))
    others = [
        small(width=5), small(stride=2), small(activation=nn.SiLU()), small(wiring=True),
        small(activation=nn.LeakyReLU(0.1)), small(activation=nn.LeakyReLU(0.2)),
    ]  # fmt: skip
    assert len({base, *others}) == 7


def test_structure_hash_ignores_names_and_no_ops():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    named = nn.Sequential()
    named.add_module("first", nn.Conv2d(3, 4, 3))
    named.add_module("drop", nn.Dropout())
    named.add_module("act", nn.ReLU())
    named.add_module("flat", nn.Flatten())
    named.add_module("last", nn.Linear(4, 2))
    named[0].origin = "features.3"
    assert structure_hash(fx.symbolic_trace(plain)) == structure_hash(fx.symbolic_trace(named))
    assert structure_hash(fx.symbolic_trace(plain)) == structure_hash(
        fx.symbolic_trace(plain).train()
    )
