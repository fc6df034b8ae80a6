"""Classify pictures with the model.onnx beside this file; needs numpy and onnxruntime alone.

python run.py                  runs the sample picture and compares it with the expected answer
python run.py PICTURE ...      .npy arrays of pixels (H, W, C), or any picture if Pillow is there
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3


def load(path, shape):
    """Pixels `(C, H, W)` uint8 of a file."""
    channels, height, width = shape
    if path.suffix == ".npy":
        pixels = np.load(path, allow_pickle=False)
    else:
        try:
            from PIL import Image
        except ImportError:
            sys.exit(f"error: {path}: install Pillow to read pictures, or give a .npy array")
        picture = Image.open(path)
        if picture.mode.startswith("I"):  # grey of 16 bits, of which Pillow would cut off the top
            picture = Image.fromarray((np.asarray(picture) / 257.0).round().astype(np.uint8))
        picture = picture.convert({3: "RGB", 4: "RGBA"}.get(channels, "L"))
        pixels = np.asarray(picture.resize((width, height), Image.BILINEAR), np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape != (height, width, channels) or pixels.dtype != np.uint8:
        sys.exit(
            f"error: {path} holds {pixels.dtype} {pixels.shape}, "
            f"expected uint8 {(height, width, channels)}: pixels from 0 to 255"
        )
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def main():
    """Print one line for each picture; exit code 1 if the sample's answer is not the expected."""
    if hasattr(sys.stdout, "reconfigure"):  # a label that the terminal cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    manifest = json.loads((HERE / "manifest.json").read_text("utf-8"))
    model, sample = manifest["input"], manifest["sample"]
    session = onnxruntime.InferenceSession(
        str(HERE / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    names = sys.argv[1:]
    for path in map(Path, names or [HERE / sample["file"]]):
        images = load(path, model["shape"])[None]
        if model["kind"] != "uint8":
            images = images.astype(np.float32)
        if model["kind"] == "normalised":
            mean = np.reshape(np.float32(model["mean"]), (1, -1, 1, 1))
            std = np.reshape(np.float32(model["std"]), (1, -1, 1, 1))
            images = (images / np.float32(255) - mean) / std
        answer = session.run(None, {model["name"]: images})[0][0]
        best = int(answer.argmax())
        print(f"{path.name}: {manifest['labels'][best]} ({manifest['output']} {answer[best]:.3f})")
    if not names:
        difference = float(np.abs(answer - np.array(sample["expected"])).max())
        # INT8 kernels differ between processors; the class must not.
        exact = manifest["precision"] == "fp32"
        good = best == sample["answer"] and (difference <= TOLERANCE or not exact)
        print(f"expected answer: {'yes' if good else 'NO'} (largest difference {difference:.1e})")
        return 0 if good else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
