"""Classify images with the model.onnx beside this file; needs numpy and onnxruntime alone.

python run.py                  runs the sample image and compares it with the expected answer
python run.py IMAGE ...        any images if Pillow is there, or .npy arrays of pixels (H, W, C)
python run.py --json IMAGE     one JSON object a line with all values of the answer
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3


def load(path, entry):
    """Pixels `(C, H, W)` uint8 of a file, prepared as the manifest's `input` says."""
    channels, height, width = entry["shape"]
    if path.suffix == ".npy":
        try:
            pixels = np.load(str(path), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            sys.exit(f"error: {path} is no readable array ({error})")
    else:
        pixels = picture(path, entry)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape != (height, width, channels) or pixels.dtype != np.uint8:
        sys.exit(
            f"error: {path} holds {pixels.dtype} {pixels.shape}, "
            f"expected uint8 {(height, width, channels)}: pixels from 0 to 255"
        )
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def picture(path, entry):
    """Pixels `(H, W, C)` of an image's file."""
    from moodistill.data.pixels import read_picture

    channels, height, width = entry["shape"]
    settings = entry["preparation"]
    try:
        pixels, seen = read_picture(path, channels, settings)
    except ImportError:
        sys.exit(f"error: {path}: install Pillow to read images, or give a .npy array")
    except Exception as error:  # Pillow raises what it likes at damaged files
        sys.exit(f"error: {path} is no readable image ({error})")
    if settings is None:
        if pixels.shape[:2] != (height, width):
            sys.exit(
                f"error: {path} is {pixels.shape[0]} x {pixels.shape[1]} pixels, expected exactly "
                f"{height} x {width} (height x width): how images of other sizes were prepared "
                "for this model is not known; prepare it as the training data were"
            )
        if seen["tagged"]:
            print(f"note: {path} has an EXIF orientation, which is ignored", file=sys.stderr)
    return pixels


def main():
    """Print one line for each image; exit code 1 if the sample's answer is not the expected."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack the letters of a label
        sys.stdout.reconfigure(errors="backslashreplace")
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    model, sample = manifest["input"], manifest["sample"]
    session = onnxruntime.InferenceSession(
        str(HERE / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    as_json = sys.argv[1:2] == ["--json"]
    names = sys.argv[2:] if as_json else sys.argv[1:]
    for path in map(Path, names or [HERE / sample["file"]]):
        images = load(path, model)[None].repeat(model["batch"] or 1, 0)
        if model["kind"] != "uint8":
            images = images.astype(np.float32)
        if model["kind"] == "normalised":
            mean = np.reshape(np.float32(model["mean"]), (1, -1, 1, 1))
            std = np.reshape(np.float32(model["std"]), (1, -1, 1, 1))
            images = (images / np.float32(255) - mean) / std
        answer = session.run(None, {model["name"]: images})[0][0]
        best = int(answer.argmax())
        label = manifest["labels"][best]
        if as_json:
            values = [float(value) for value in answer]
            print(json.dumps({"file": str(path), "label": label, manifest["output"]: values}))
        else:
            print(f"{path.name}: {label} ({manifest['output']} {answer[best]:.3f})")
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
