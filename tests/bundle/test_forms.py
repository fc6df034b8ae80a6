"""Files for other runtimes: the lowest opset and IR version, and a batch that is written in."""

import json
import subprocess

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.bundles import ORIGIN
from onnx import TensorProto, helper
from torch import fx, nn

from moodistill.bundle.model import ShipOptions, ship
from moodistill.bundle.parity import checked_onnx
from moodistill.errors import UserError
from moodistill.onnx.opset import lowest_opset, opset_of, set_opset
from moodistill.onnx.quantise import Int8Scheme, quantise
from moodistill.onnx.runtime import onnx_accuracy, outputs
from moodistill.onnx.writer import to_onnx

# Of an activation: the opset that it needs.
NEEDED = {
    nn.ReLU: 11, nn.ReLU6: 11, nn.LeakyReLU: 11, nn.SiLU: 11, nn.GELU: 11, nn.Mish: 11,
    nn.PReLU: 11, nn.ELU: 11, nn.SELU: 11, nn.Softplus: 11, nn.Softsign: 11, nn.Hardsigmoid: 11,
    nn.CELU: 12, nn.Hardswish: 14,
}  # fmt: skip
IR = {11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 17: 8, 18: 8, 19: 9, 21: 10}


class Net(nn.Module):
    """Every kind of node that a student of a plain CNN may have, and one activation."""

    def __init__(self, activation):
        super().__init__()
        self.one = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.activation = activation()
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mean = nn.AvgPool2d(2, padding=1)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(self.activation(self.norm(self.one(x))))
        x = torch.cat([x, self.two(x) + x], 1)
        x = self.mean(nn.functional.pad(x, (1, 1, 0, 0)))
        return self.out(x.mean((2, 3)))


def module_of(activation):
    torch.manual_seed(0)
    return fx.symbolic_trace(Net(activation).eval())


def loaded(model):
    return onnx.load_from_string(model)


@pytest.mark.parametrize("activation", NEEDED, ids=lambda kind: kind.__name__)
def test_a_file_has_the_lowest_opset_that_its_operations_need(digits, activation):
    module = module_of(activation)
    model, parity = checked_onnx(module, digits.data, ORIGIN, images=20)
    made = loaded(model)
    assert parity.passed
    assert opset_of(made) == NEEDED[activation] and made.ir_version == IR[NEEDED[activation]]
    properties = {entry.key: entry.value for entry in made.metadata_props}
    assert properties["opset"] == str(NEEDED[activation])


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 19, 21])
@pytest.mark.parametrize("softmax", [False, True])
def test_an_opset_that_is_asked_for(digits, opset, softmax):
    options = ShipOptions(opset=opset, softmax=softmax)
    model, parity = checked_onnx(module_of(nn.GELU), digits.data, ORIGIN, options, 20)
    made = loaded(model)
    assert parity.passed and opset_of(made) == opset and made.ir_version == IR[opset]


def test_a_lower_opset_than_the_writers_form_is_exported_by_torch(digits):
    """HardSwish came with 14; below it is written as its parts."""
    module = module_of(nn.Hardswish)
    model, parity = checked_onnx(module, digits.data, ORIGIN, ShipOptions(opset=11), 20)
    made = loaded(model)
    assert parity.passed and opset_of(made) == 11
    assert "HardSwish" not in {node.op_type for node in made.graph.node}


def test_opsets_that_cannot_be(digits):
    for wrong in (10, 22, 0):
        with pytest.raises(UserError, match=f"opset is {wrong}; expected 11 to 21"):
            ShipOptions(opset=wrong)
    bare = to_onnx(module_of(nn.Hardswish), (1, 32, 32))
    with pytest.raises(UserError, match="opset is 13; the operation HardSwish .* needs 14"):
        ship(bare, digits.data, ORIGIN, ShipOptions(opset=13))
    with pytest.raises(UserError, match="batch is 0"):
        ShipOptions(batch=0)


def model_of(nodes, opset, *initializers):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 6])
            for name in ("input", "logits")]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_operations_in_a_form_of_a_later_opset_keep_it():
    # BatchNormalization's attribute came with 14, Reshape's too; ReduceMean's axes moved in 18.
    shape = onnx.numpy_helper.from_array(np.array([0, 4, 6]), "shape")
    later = helper.make_node("Reshape", ["input", "shape"], ["logits"], allowzero=0)
    assert lowest_opset(model_of([later], 17, shape)) == (14, "Reshape")
    plain = helper.make_node("Reshape", ["input", "shape"], ["logits"])
    assert lowest_opset(model_of([plain], 17, shape)) == (11, "Reshape")
    unknown = helper.make_node("ReduceMean", ["input"], ["logits"], axes=[2], keepdims=1)
    model = model_of([unknown], 17)
    assert lowest_opset(model) == (17, "ReduceMean")
    with pytest.raises(UserError, match="have another form there: give 17 to 17"):
        set_opset(model, 18)


def test_layer_norm_needs_17(digits):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Conv2d(1, 8, 3, 4), nn.LayerNorm(8)
            self.out = nn.Linear(8, 10)

        def forward(self, x):
            return self.out(self.norm(self.body(x).mean((2, 3))))

    torch.manual_seed(0)
    module = fx.symbolic_trace(Normed().eval())
    model, _ = checked_onnx(module, digits.data, ORIGIN, images=20)
    assert opset_of(loaded(model)) == 17
    low, parity = checked_onnx(module, digits.data, ORIGIN, ShipOptions(opset=12), 20)
    assert parity.passed and opset_of(loaded(low)) == 12  # written as its parts


@pytest.fixture(scope="module")
def int8(digits):
    bare = to_onnx(digits.graph.module, digits.data.input_shape)
    images = digits.data.calibration(64).numpy()
    return quantise(bare, images, Int8Scheme("uint8", "int8", reduce_range=True))


def test_int8_needs_13(digits, int8):
    made = loaded(ship(int8, digits.data, ORIGIN, ShipOptions()))
    assert (opset_of(made), made.ir_version) == (13, 7)
    with pytest.raises(UserError, match="opset is 12; the operation .*izeLinear .* needs 13"):
        ship(int8, digits.data, ORIGIN, ShipOptions(opset=12))
    split = digits.data.validation.head(100)
    scores = [
        onnx_accuracy(ship(int8, digits.data, ORIGIN, ShipOptions(opset=opset)), digits.data,
                      split, 1)
        for opset in (None, 17, 19)
    ]  # fmt: skip
    assert len(set(scores)) == 1 and scores[0] > 0.8


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised"])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_batch_that_is_written_in(digits, kind, batch):
    options = ShipOptions(kind, softmax=True, batch=batch)
    model, parity = checked_onnx(digits.graph.module, digits.data, ORIGIN, options, 50)
    assert parity.passed and parity.images == 50  # 50 is no multiple of 7
    session = onnxruntime.InferenceSession(model)
    assert session.get_inputs()[0].shape == [batch, 1, 32, 32]
    assert session.get_outputs()[0].shape == [batch, 10]
    free, _ = checked_onnx(digits.graph.module, digits.data, ORIGIN, ShipOptions(kind, True), 50)
    split = digits.data.validation.head(20)
    found = [np.concatenate([b["logits"] for b in outputs(m, digits.data, split, 1)])
             for m in (free, model)]  # fmt: skip
    assert np.abs(found[0] - found[1]).max() < 1e-5


OLD = """
import json, sys
import numpy as np
import onnxruntime as ort
feed = np.load(sys.argv[1])
for path in sys.argv[2:]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    x = feed if first.type == "tensor(uint8)" else feed.astype(np.float32)
    print(json.dumps(session.run(None, {first.name: x})[0].tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.10.0", "1.11.1"])
def test_old_runtimes_read_every_form(digits, int8, tmp_path, version):
    """On an old Python with an old ONNX Runtime, where both can be had."""
    from helpers.interpreters import environment

    python = environment("3.8", f"onnxruntime=={version}", "numpy<1.24")
    images = digits.data.validation.images[:5].transpose(0, 3, 1, 2)
    np.save(tmp_path / "feed.npy", images)
    forms = {"uint8": ShipOptions(), "float32": ShipOptions("float32", True)}
    models = {
        name: ship(to_onnx(digits.graph.module, (1, 32, 32)), digits.data, ORIGIN, options)
        for name, options in forms.items()
    }
    models["int8"] = ship(int8, digits.data, ORIGIN, ShipOptions())
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(model)
    (tmp_path / "old.py").write_text(OLD)
    done = subprocess.run(
        [python, tmp_path / "old.py", tmp_path / "feed.npy",
         *(tmp_path / f"{name}.onnx" for name in models)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    split = digits.data.validation.head(5)
    for (name, model), line in zip(models.items(), done.stdout.splitlines(), strict=True):
        expected = np.concatenate([b["logits"] for b in outputs(model, digits.data, split, 1)])
        found = np.array(json.loads(line))
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert np.abs(found - expected).max() < (1e-3 if name != "int8" else 2.0)
