"""The bundle: what it holds, that it runs without torch, and what `verify` refuses."""

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.bundles import DEVICE, ORIGIN, front_row
from onnx import TensorProto

from moodistill.bundle.folder import write_package
from moodistill.bundle.model import ShipOptions, ship
from moodistill.bundle.parity import compare, export_onnx
from moodistill.bundle.verify import checked_onnx, verify_package
from moodistill.errors import UserError
from moodistill.onnx.runtime import onnx_accuracy, outputs
from moodistill.onnx.writer import to_onnx
from moodistill.pareto.evaluation import Latency, accuracy_interval


def make_package(digits, folder, options=None):
    parity = export_onnx(
        digits.graph.module, digits.data, ORIGIN, folder / "model.onnx", options, 50
    )
    teacher = front_row(student="teacher", stage="teacher")
    write_package(folder, front_row(), teacher, digits.data, ORIGIN, DEVICE, options)
    return parity


@pytest.fixture(scope="module")
def bare(digits):
    return to_onnx(digits.graph.module, digits.data.input_shape)


@pytest.fixture(scope="module")
def package(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship") / "s0001"
    make_package(digits, folder)
    return folder


@pytest.fixture()
def copy(package, tmp_path):
    for path in package.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised"])
@pytest.mark.parametrize("softmax", [False, True])
def test_every_form_answers_like_torch(digits, bare, kind, softmax):
    data, options = digits.data, ShipOptions(kind, softmax)
    model = ship(bare, data, ORIGIN, options)
    assert model == ship(bare, data, ORIGIN, options)
    split = data.validation.head(230)  # more than two batches
    assert compare(model, digits.graph.module, data, split, softmax).passed
    session = onnxruntime.InferenceSession(model)
    assert session.get_inputs()[0].name == ("input" if kind == "normalised" else "pixels")
    assert session.get_inputs()[0].type == ("tensor(uint8)" if kind == "uint8" else "tensor(float)")
    assert session.get_outputs()[0].name == ("probabilities" if softmax else "logits")
    if softmax:
        assert np.allclose(next(outputs(model, data, split, 1))["logits"].sum(1), 1, atol=1e-5)


def test_raw_pixels_are_what_the_model_takes(digits, bare):
    data = digits.data
    images = data.validation.images[:64]
    session = onnxruntime.InferenceSession(ship(bare, data, ORIGIN, ShipOptions()))
    (found,) = session.run(None, {"pixels": images.transpose(0, 3, 1, 2)})
    with torch.no_grad():
        expected = digits.graph.module(data.normalise(images)).numpy()
    assert np.abs(found - expected).max() < 1e-3


def test_unknown_input():
    with pytest.raises(UserError, match="uint8, float32, normalised"):
        ShipOptions("bf16")


def test_accuracy_is_that_of_torch(digits, bare):
    from moodistill.training.teacher import accuracy

    split = digits.data.validation
    assert onnx_accuracy(bare, digits.data, split, 1) == accuracy(
        digits.graph.module, digits.data, split
    )


def test_metadata_says_what_a_device_needs(package, digits):
    session = onnxruntime.InferenceSession(package / "model.onnx")
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["labels"]) == list(digits.data.labels)
    assert json.loads(found["normalisation"])["mean"] == [0.305]
    assert found["teacher_sha256"] == ORIGIN.teacher_digest and found["genome"] == "AQI="
    assert found["opset"] == "11" and found["input_layout"] == "NCHW"
    assert json.loads(found["preparation"])["resize"] == "squash"
    model = onnx.load(package / "model.onnx")
    assert model.ir_version == 6 and model.opset_import[0].version == 11


def test_a_file_that_differs_is_not_left(digits, tmp_path, monkeypatch):
    spoil = onnx.load_from_string

    def spoiled(data):
        model = spoil(data)
        values = onnx.numpy_helper.to_array(model.graph.initializer[0]) * 1.1
        model.graph.initializer[0].raw_data = values.astype(np.float32).tobytes()
        return model

    monkeypatch.setattr("moodistill.bundle.model.onnx.load_from_string", spoiled)
    with pytest.raises(UserError, match="differs from torch"):
        export_onnx(digits.graph.module, digits.data, ORIGIN, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_manifest_and_card(package):
    manifest = json.loads((package / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["README.md", "model.onnx", "run.py", "sample.npy"]
    test = manifest["accuracy"]["test"]
    assert test["images"] == 350 and test["low"] < 0.9 < test["high"]
    assert manifest["latency"]["device"]["cpu"] == "test"
    card = (package / "README.md").read_text()
    assert "90.00%" in card and "0.500 ms" in card and "uint8" in card


def test_accuracy_interval():
    low, high = accuracy_interval(0.9, 1000)
    assert low == pytest.approx(0.8799, abs=1e-3) and high == pytest.approx(0.9171, abs=1e-3)
    assert accuracy_interval(1.0, 10) == (pytest.approx(0.722, abs=1e-3), 1.0)


def test_p90_needs_64_timings():
    few = Latency(1.0, 0.9, 1.1, 0.5, (1.0,) * 63)
    many = Latency(1.0, 0.9, 1.1, 0.5, (2.0,) * 60 + (3.0,) * 10)
    assert few.p90_ms is None and many.p90_ms == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised"])
def test_run_py_without_torch(digits, tmp_path, kind):
    folder = tmp_path / kind
    make_package(digits, folder, ShipOptions(kind, softmax=kind == "uint8"))
    # An environment with numpy and ONNX Runtime and nothing else of ours.
    path = os.pathsep.join([str(folder)])
    code = (
        "import sys, runpy\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'moodistill', 'onnx', 'PIL', 'scipy'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.argv = ['run.py', *sys.argv[1:]]\n"
        f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')\n"
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
            cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": path},
        )  # fmt: skip

    done = run()
    assert done.returncode == 0 and "expected answer: yes" in done.stdout, done.stderr
    np.save(tmp_path / "two.npy", digits.data.validation.images[1])
    done = run("two.npy")
    assert done.returncode == 0 and done.stdout.startswith("two.npy: "), done.stderr
    np.save(tmp_path / "bad.npy", np.zeros((3, 3), np.float32))
    done = run("bad.npy")
    assert done.returncode == 1 and "expected uint8" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("picture.png")
    assert done.returncode == 1 and "Pillow" in done.stderr


def test_verify(package):
    found = verify_package(package)
    assert found.files == 4 and found.difference < 1e-4 and found.student == "s0001"


@pytest.mark.parametrize("name", ["README.md", "model.onnx", "run.py", "sample.npy"])
def test_verify_refuses_a_changed_or_missing_file(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} has SHA-256"):
        verify_package(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        verify_package(copy)


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}}, {"files": None}, {"format": 7}, {"labels": ["one"]}, {"sample": {}},
        {"files": {"model.onnx": "", "README.md": "", "run.py": "", "sample.npy": "",
                   "../secret": ""}},
        {"sample": {"expected": [0.0] * 10, "answer": 3}}, {"input": None},
    ],
)  # fmt: skip
def test_verify_refuses_a_manifest_that_disagrees(copy, changes):
    change_manifest(copy, **changes)
    with pytest.raises(UserError, match="manifest.json|model.onnx"):
        verify_package(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
def test_verify_refuses_what_is_no_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        verify_package(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no bundle"):
        verify_package(copy)


def test_external_data_is_refused(bare, tmp_path):
    model = onnx.load_from_string(bare)
    secret = tmp_path / "secret"
    secret.write_bytes(b"0" * 4000)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="in another file"):
        checked_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("place", ["graph", "attribute", "function"])
def test_external_data_of_a_sparse_tensor_is_refused(bare, tmp_path, place):
    model = onnx.load_from_string(bare)
    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "v"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    sparse.values.ClearField("raw_data")
    sparse.values.data_location = TensorProto.EXTERNAL
    sparse.values.external_data.add(key="location", value="secret")
    if place == "graph":
        model.graph.sparse_initializer.append(sparse)
    else:
        where = model.graph if place == "attribute" else model.functions.add(name="f", domain="d")
        node = where.node.add(op_type="Constant", output=["c"])
        node.attribute.append(onnx.helper.make_attribute("sparse_value", sparse))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="in another file"):
        checked_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x76\x00", b"x"])
def test_verify_refuses_a_sample_that_is_no_array(copy, content):
    """Also where the manifest has its digest."""
    if content.startswith(b"\x93"):
        header = "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 9), }"
        content += header.ljust(117).encode() + b"\n"
    (copy / "sample.npy").write_bytes(content)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change_manifest(copy, files={**files, "sample.npy": hashlib.sha256(content).hexdigest()})
    with pytest.raises(UserError, match=r"sample\.npy is no readable array"):
        verify_package(copy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_model_is_refused(bare, tmp_path, share):
    (tmp_path / "model.onnx").write_bytes(bare[: int(share * len(bare))])
    with pytest.raises(UserError, match="no whole ONNX file"):
        checked_onnx(tmp_path / "model.onnx")


@pytest.mark.slow
def test_runs_in_an_old_onnxruntime(package, tmp_path):
    """The oldest ONNX Runtime with wheels for this Python, in an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    old = {(3, 11): "1.15.0", (3, 12): "1.17.0"}.get(sys.version_info[:2], "1.20.0")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "numpy<2" if old < "1.19" else "numpy",
         f"onnxruntime=={old}"], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"onnxruntime {old} cannot be installed: {done.stderr.strip()[-200:]}")
    done = subprocess.run([python, package / "run.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "expected answer: yes" in done.stdout, done.stderr
    assert not list(Path(tmp_path / "venv").glob("lib/*/site-packages/torch"))
