"""The shipped forms in other runtimes, each in an environment of its own; docs/runtimes.md."""

import json
import subprocess
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers.bundles import DEVICE, ORIGIN, front_row
from helpers.interpreters import environment

from moodistill.bundle.folder import write_package
from moodistill.bundle.model import ShipOptions, ship
from moodistill.onnx.quantise import Int8Scheme, quantise
from moodistill.onnx.writer import to_onnx

pytestmark = pytest.mark.slow
OPTIONS = {
    "uint8": ShipOptions(),
    "float32": ShipOptions("float32"),
    "bare": ShipOptions("normalised"),
    "softmax": ShipOptions(softmax=True),
    "int8": ShipOptions(),
    "fixed": ShipOptions(batch=1),
}
# Of a converter: Python, packages, and by form the largest difference allowed; None: it fails.
CONVERTERS = {
    "tflite": (
        "3.11",
        ("onnx2tf", "tensorflow", "tf_keras", "onnx", "onnxsim", "onnx_graphsurgeon",
         "ai-edge-litert", "sng4onnx", "psutil", "onnxruntime"),
        {"fixed": 1e-3},
    ),
    "openvino": (
        "3.11", ("openvino", "numpy"),
        {"uint8": 1e-3, "float32": 1e-3, "bare": 1e-3, "softmax": 1e-3, "fixed": 1e-3, "int8": 1.0},
    ),
    "opencv": (
        "3.11", ("opencv-python-headless", "numpy"),
        {"uint8": 1e-3, "float32": 1e-3, "bare": 1e-3, "softmax": 1e-3, "fixed": 1e-3, "int8": 1.0},
    ),
    "ncnn": ("3.11", ("ncnn", "pnnx", "numpy"), {"float32": 0.05, "bare": 0.05, "uint8": None}),
    "float16": (
        "3.11", ("onnxconverter-common", "onnxruntime", "onnx"),
        {"float32": 0.05, "bare": 0.05, "uint8": None, "int8": None},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """The digits' teacher, shipped in every form."""
    root, data = tmp_path_factory.mktemp("forms"), digits.data
    bare = to_onnx(digits.graph.module, data.input_shape)
    images = data.calibration(64).numpy()
    int8 = quantise(bare, images, Int8Scheme("uint8", "int8", reduce_range=True))
    teacher = front_row(student="teacher", stage="teacher")
    for name, options in OPTIONS.items():
        (root / name).mkdir()
        model = ship(int8 if name == "int8" else bare, data, ORIGIN, options)
        (root / name / "model.onnx").write_bytes(model)
        row = front_row(precision="int8" if name == "int8" else "fp32")
        write_package(root / name, row, teacher, data, ORIGIN, DEVICE, options)
    return root


CASES = [(name, form) for name, (_, _, forms) in CONVERTERS.items() for form in forms]


@pytest.mark.parametrize(("converter", "form"), CASES)
def test_a_form_in_another_runtime(folders, converter, form):
    version, packages, forms = CONVERTERS[converter]
    python = environment(version, *packages)
    script = Path(helpers.__file__).parent / "converters.py"
    done = subprocess.run(
        [python, script, converter, folders / form], capture_output=True, text=True
    )
    if forms[form] is None:  # said in docs/runtimes.md; take the line there away if it works now
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr[-800:]
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    expected = json.loads((folders / form / "manifest.json").read_text())["sample"]["expected"]
    assert found.argmax() == np.argmax(expected)
    assert np.abs(found - expected).max() <= forms[form]
