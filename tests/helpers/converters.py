"""Run a bundle's sample in another runtime: CONVERTER FOLDER; prints the answer as JSON.

Called by the interpreter of an environment that has the converter and nothing of ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def sample(folder, entry):
    """The sample as the model takes it, `(1, C, H, W)`."""
    images = np.load(folder / "sample.npy").transpose(2, 0, 1)[None]
    if entry["kind"] != "uint8":
        images = images.astype(np.float32)
    if entry["kind"] == "normalised":
        mean, std = (np.float32(entry[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
        images = (images / np.float32(255) - mean) / std
    return np.ascontiguousarray(images)


def tool(name, *arguments, cwd):
    """Call a program of the environment, which may call others of it."""
    place = Path(sys.executable).parent
    path = f"{place}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(place / name), *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    return done.stdout + done.stderr


def run_tflite(model, name, images, place):
    from ai_edge_litert.interpreter import Interpreter

    # onnx2tf would fetch these images, with which it checks itself.
    made_up = np.random.default_rng(0).random((20, 128, 128, 3), np.float32)
    np.save(place / "calibration_image_sample_data_20x128x128x3_float32.npy", made_up)
    said = tool("onnx2tf", "-i", str(model), "-o", "out", "-n", cwd=place)
    found = sorted((place / "out").glob("*float32.tflite"))
    assert found, said[-500:]
    interpreter = Interpreter(str(found[0]))
    interpreter.allocate_tensors()
    entry, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    if tuple(entry["shape"]) != images.shape:
        images = images.transpose(0, 2, 3, 1)
    interpreter.set_tensor(entry["index"], np.ascontiguousarray(images.astype(entry["dtype"])))
    interpreter.invoke()
    return interpreter.get_tensor(answer["index"])


def run_openvino(model, name, images, place):
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 where the processor has it, else
    return openvino.Core().compile_model(str(model), "CPU", exact)(images)[0]


def run_opencv(model, name, images, place):
    import cv2

    network = cv2.dnn.readNetFromONNX(str(model))
    network.setInput(images)
    return network.forward()


def run_ncnn(model, name, images, place):
    import ncnn

    (place / "model.onnx").write_bytes(model.read_bytes())
    said = tool("pnnx", "model.onnx", f"inputshape={list(images.shape)}".replace(" ", ""),
                cwd=place)  # fmt: skip
    assert (place / "model.ncnn.param").is_file(), said[-500:]
    network = ncnn.Net()
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = False
    network.opt.use_fp16_arithmetic = False
    network.load_param(str(place / "model.ncnn.param"))
    network.load_model(str(place / "model.ncnn.bin"))
    extractor, entry = network.create_extractor(), ncnn.Mat(images[0]).clone()
    extractor.input("in0", entry)
    return np.array(extractor.extract("out0")[1])


def run_float16(model, name, images, place):
    import onnx
    import onnxruntime
    from onnxconverter_common import float16

    half = float16.convert_float_to_float16(onnx.load(str(model)), keep_io_types=True)
    session = onnxruntime.InferenceSession(
        half.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: images})[0]


def run_onnxruntime(model, name, images, place):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, {name: images})[0]


if __name__ == "__main__":
    converter, path = sys.argv[1], Path(sys.argv[2])
    described = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["input"]
    with tempfile.TemporaryDirectory() as temporary:
        found = globals()[f"run_{converter}"](
            path / "model.onnx", described["name"], sample(path, described), Path(temporary)
        )
    print(json.dumps(np.asarray(found, np.float64).reshape(-1).tolist()))
