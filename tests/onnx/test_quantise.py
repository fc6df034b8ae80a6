import contextlib
import logging
import subprocess
import sys
import tempfile
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import fx, nn

from moodistill.errors import UserError
from moodistill.onnx.quantise import Int8Scheme, Quantised, int8_scheme, quantise, quantise_measured
from moodistill.onnx.writer import to_onnx

SHAPE = (3, 12, 12)
# 7-bit weights, so that the tests say the same with and without VNNI.
SCHEMES = {"u8": Int8Scheme("uint8", "int8", True), "s8": Int8Scheme("int8", "int8", True)}
U8 = SCHEMES["u8"]


def conv(inputs, outputs, **settings):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **settings), nn.ReLU())


class Branches(nn.Module):
    """Every operation that the integer kernels are for, with an Add and a Concat."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.left, self.right = conv(16, 16), nn.Conv2d(16, 16, 1)
        self.pool = nn.MaxPool2d(2)
        self.first, self.second = conv(16, 8), conv(16, 24, groups=8)
        self.average = nn.AvgPool2d(2)
        self.last = conv(32, 32)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
        )

    def forward(self, x):
        x = self.stem(x)
        x = self.pool(torch.relu(self.left(x) + self.right(x)))
        x = torch.cat([self.first(x), self.second(x)], 1)
        return self.head(self.last(self.average(x)))


def exported(build, shape=SHAPE):
    """The ONNX file of a random network whose predictions vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval()
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        if hasattr(network, "spoil"):
            network.spoil()
        return to_onnx(fx.symbolic_trace(network), shape)


def noise(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape), np.float32)


@pytest.fixture(scope="module")
def branches():
    return exported(Branches)


@pytest.fixture(scope="module")
def images():
    return noise(40)  # more than one batch of the calibration, and an uneven one


@pytest.fixture(scope="module", params=SCHEMES)
def made(request, branches, images):
    return quantise(branches, images, SCHEMES[request.param])


def logits(model, x, optimised=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # What ARM runs anyway; elsewhere ONNX Runtime turns int8 activations into uint8 where it can.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": x})[0]


def error(model, expected, x):
    return np.square(logits(model, x) - expected).mean() / expected.var()


def kernels(model, folder):
    """How many of which operations ONNX Runtime really runs."""
    logits(model, noise(1), folder / "optimised.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def outputs_of(model, kind):
    return [n.output[0] for n in onnx.load_from_string(model).graph.node if n.op_type == kind]


def test_scheme_of_a_device():
    u8, s8 = ("uint8", "int8"), ("int8", "int8")
    table = [
        ("x86_64", ["avx", "avx2", "fma"], (*u8, True)),
        ("AMD64", [], (*u8, True)),  # Windows tells no flags
        ("x86_64", ["avx2", "avx512f", "avx512bw"], (*u8, True)),
        ("x86_64", ["avx2", "avx512f", "avx512_vnni"], (*u8, False)),
        ("x86_64", ["avx2", "avx_vnni"], (*u8, False)),
        ("aarch64", ["asimd", "asimddp"], (*s8, False)),
        ("arm64", [], (*s8, False)),
        ("riscv64", [], (*s8, False)),
    ]
    for machine, simd, expected in table:
        assert int8_scheme({"machine": machine, "simd": simd}) == Int8Scheme(*expected), machine
    assert int8_scheme({}) == Int8Scheme(*s8, False)


def test_predictions_stay(made, branches):
    x = noise(200, seed=1)
    expected = logits(branches, x)
    assert error(made, expected, x) < 5e-3
    assert (logits(made, x).argmax(1) == expected.argmax(1)).mean() > 0.95
    np.testing.assert_allclose(logits(made, x[:1]), logits(made, x)[:1], atol=1e-5)


def test_integer_kernels_run(made, tmp_path):
    found = kernels(made, tmp_path)
    assert found["QLinearConv"] == 6 and found["QGemm"] == 2
    assert found["QLinearAdd"] == found["QLinearConcat"] == 1
    assert found["QLinearAveragePool"] == found["QLinearGlobalAveragePool"] == 1
    assert not set(found) & {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Concat"}
    # The logits of both linear layers come as floats; the second layer's input is rounded.
    assert found["QuantizeLinear"] <= 2 and found["DequantizeLinear"] <= 1


def test_the_file_is_clean(made, branches):
    model, source = onnx.load_from_string(made), onnx.load_from_string(branches)
    onnx.checker.check_model(made, full_check=True)
    assert model.ir_version == source.ir_version == 8
    assert list(model.opset_import) == list(source.opset_import)
    assert (list(model.graph.input), list(model.graph.output)) == (
        list(source.graph.input),
        list(source.graph.output),
    )
    assert (model.producer_name, model.producer_version) == ("moodistill", "")
    assert not model.doc_string and not model.graph.doc_string and not model.metadata_props
    assert not any(n.doc_string or n.metadata_props for n in model.graph.node)
    assert not any(t.external_data or t.doc_string for t in model.graph.initializer)
    assert len(made) < 0.6 * len(branches)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)


def test_biases_have_32_bits_and_reduced_weights_7(made):
    tensors = onnx.load_from_string(made).graph.initializer
    weights = [t for t in tensors if t.name.endswith("weight_quantized")]
    biases = [t for t in tensors if t.name.endswith("bias_quantized")]
    assert len(weights) == len(biases) == 8
    assert {t.data_type for t in biases} == {TensorProto.INT32}
    for tensor in weights:
        assert tensor.data_type == TensorProto.INT8
        assert np.abs(numpy_helper.to_array(tensor).astype(int)).max() == 64


def test_same_bytes_in_any_process(made, branches, images, tmp_path):
    if made != quantise(branches, images, U8):
        pytest.skip("one scheme is enough")
    (tmp_path / "model.onnx").write_bytes(branches)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import pathlib, numpy; from moodistill.onnx.quantise import *\n"
        "model = pathlib.Path('model.onnx').read_bytes()\n"
        "made = quantise(model, numpy.load('images.npy'), Int8Scheme('uint8', 'int8', True))\n"
        "pathlib.Path('made.onnx').write_bytes(made)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "made.onnx").read_bytes() == made


def test_nothing_is_printed_logged_or_left(branches, images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = list(logging.root.handlers), logging.root.manager.disable
    quantise(branches, images, U8)
    assert (list(logging.root.handlers), logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_excluded_nodes_stay_in_float(branches, images, tmp_path):
    convolution, gemm = outputs_of(branches, "Conv")[1], outputs_of(branches, "Gemm")[0]
    made = quantise(branches, images, U8, exclude=[convolution, gemm])
    found = kernels(made, tmp_path)
    assert (found["QLinearConv"], found["QGemm"]) == (5, 1)
    source = {t.name: t for t in onnx.load_from_string(branches).graph.initializer}
    floats = {t.name: t for t in onnx.load_from_string(made).graph.initializer if t.name in source}
    assert set(floats) == {
        f"{n}.{kind}" for n in (convolution, gemm) for kind in ("weight", "bias")
    }
    assert all(floats[name] == source[name] for name in floats)


OPERATIONS = {
    "leaky": lambda: nn.LeakyReLU(0.1),
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "ceil": lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "padded average": lambda: nn.AvgPool2d(3, 2, padding=1),
    "rows and columns": lambda: nn.AdaptiveAvgPool2d(5),
    "largest": lambda: nn.AdaptiveMaxPool2d(1),
    "depthwise": lambda: nn.Conv2d(16, 32, 3, groups=16, bias=False),
    "dead": lambda: nn.Conv2d(16, 16, 1, bias=False),  # its activations have no range at all
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_operations_come_through(name, scheme):
    def build():
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3), OPERATIONS[name](), nn.Flatten(), nn.LazyLinear(10)
        )
        network(torch.zeros(1, *SHAPE))
        network.spoil = lambda: name == "dead" and nn.init.zeros_(network[1].weight)
        return network

    model, x = exported(build), noise(64)
    expected = logits(model, x)
    if name == "dead":
        np.testing.assert_allclose(
            logits(quantise(model, x, SCHEMES[scheme]), x), expected, atol=0.01
        )
    else:
        assert error(quantise(model, x, SCHEMES[scheme]), expected, x) < 5e-3


class Spoiled(nn.Sequential):
    """Its third convolution reads a dead channel with huge weights: all others round to zero."""

    def __init__(self):
        super().__init__(
            conv(3, 16), conv(16, 16), conv(16, 16), conv(16, 16), nn.Flatten(), nn.Linear(2304, 10)
        )

    @torch.no_grad()
    def spoil(self):
        self[1][0].weight[0] = self[1][0].bias[0] = 0
        self[2][0].weight[:, 0] = 50


class Agreement:
    """Share of images with the float model's prediction, and how often it was asked."""

    def __init__(self, model):
        self.x, self.asked = noise(200, seed=1), 0
        self.expected = logits(model, self.x).argmax(1)

    def __call__(self, model):
        self.asked += 1
        return float((logits(model, self.x).argmax(1) == self.expected).mean())


def test_the_spoiled_node_is_found(images):
    model = exported(Spoiled)
    culprit = outputs_of(model, "Conv")[2]
    agreement = Agreement(model)
    assert agreement(quantise(model, images, U8)) < 0.8
    agreement.asked = 0
    made = quantise_measured(model, images, U8, agreement, floor=0.95)
    assert made.excluded == (culprit,) and made.accuracy >= 0.95 and made.scheme == U8
    assert agreement.asked == 2
    assert made.model == quantise(model, images, U8, exclude=made.excluded)


def test_a_good_model_is_measured_once(branches, images):
    agreement = Agreement(branches)
    made = quantise_measured(branches, images, U8, agreement, floor=0.9)
    assert made == Quantised(quantise(branches, images, U8), made.accuracy, (), U8)
    assert agreement.asked == 1


@pytest.mark.parametrize("trials, best", [(1, 0), (3, 2), (4, 2), (9, 2)])
def test_the_most_accurate_one_where_none_is_good_enough(branches, images, trials, best):
    scores = iter([0.3, 0.2, 0.5, 0.5, 0.4])  # for 0, 1, 2, 4 and 8 of 11 nodes in float
    made = quantise_measured(branches, images, U8, lambda model: next(scores), 0.9, trials)
    assert len(made.excluded) == best
    assert len(list(scores)) == max(0, 5 - trials)
    convolutions, joined = outputs_of(branches, "Conv"), outputs_of(branches, "Add")
    assert set(made.excluded) <= {*convolutions, *joined, *outputs_of(branches, "Gemm")}


def test_one_line_errors(branches, images):
    cases = [
        (lambda: quantise(branches, images, U8, ["conv9"]), "conv9"),
        (lambda: quantise(branches, images[:0], U8), "(0, 3, 12, 12)"),
        (lambda: quantise(branches, images[:, :1], U8), "(40, 1, 12, 12)"),
        (lambda: quantise(branches, images[0], U8), "(3, 12, 12)"),
        (lambda: quantise(branches, images.astype(np.float64), U8), "float64"),
        (lambda: quantise(branches, np.full_like(images, np.nan), U8), "nan"),
        (lambda: quantise_measured(branches, images, U8, lambda model: 1.0, 0.5, 0), "max_trials is 0"),
        (lambda: Int8Scheme("int4", "int8", False), "'int4'"),
        (lambda: Int8Scheme("int8", "uint8", False), "'uint8'"),
    ]  # fmt: skip
    for call, value in cases:
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert value in message and "\n" not in message
        assert "expected" in message or "give" in message


def test_an_error_leaves_logging_as_it_was(branches, images, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr("moodistill.onnx.quantise.QDQQuantizer", fail)
    with contextlib.suppress(RuntimeError):
        quantise(branches, images, U8)
    assert logging.root.manager.disable == 0
