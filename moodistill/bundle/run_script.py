"""Run the model.onnx beside this file; needs numpy and onnxruntime alone.

python run.py                  runs the sample and compares the answer with the expected one
python run.py FILE ...         images if Pillow is there, or .npy arrays: pixels (H, W, C) of
                               images, else arrays as the model takes them
python run.py --json FILE      one JSON object a line with all values of the answer
python run.py --out DIR FILE   writes all outputs to DIR/<name>.npz, and a picture of every map
                               of classes to DIR/<name>.png
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
SHOWN = 8  # values of an output that are printed


def load(path, entry):
    """An input `(C, ...)` of a file, as the manifest's `input` says."""
    shape = tuple(entry["shape"])
    if path.suffix in (".npy", ".npz"):
        try:
            array = np.load(str(path), allow_pickle=False)
            array = array if path.suffix == ".npy" else array[array.files[0]]
        except (OSError, ValueError, EOFError, IndexError) as error:
            sys.exit(f"error: {path} is no readable array ({error})")
    elif entry["pictures"]:
        array = picture(path, entry)
    else:
        sys.exit(f"error: {path}: expected a .npy or .npz array of shape {shape}")
    if not entry["pictures"]:
        if array.shape != shape or array.dtype.kind not in "biuf":
            sys.exit(f"error: {path} holds {array.dtype} {array.shape}, expected floats {shape}")
        return np.ascontiguousarray(array, np.float32)
    channels, height, width = shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape != (height, width, channels) or array.dtype != np.uint8:
        sys.exit(
            f"error: {path} holds {array.dtype} {array.shape}, "
            f"expected uint8 {(height, width, channels)}: pixels from 0 to 255"
        )
    return np.ascontiguousarray(array.transpose(2, 0, 1))


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


def feed(array, entry):
    """A batch for the model from one input."""
    batch = array[None].repeat(entry["batch"] or 1, 0)
    if entry["kind"] != "uint8":
        batch = batch.astype(np.float32)
    if entry["kind"] == "normalised":
        shape = (1, -1, *[1] * (batch.ndim - 2))
        mean, std = (np.reshape(np.float32(entry[name]), shape) for name in ("mean", "std"))
        scale = np.float32(255 if entry["pictures"] else 1)
        batch = (batch / scale - mean) / std
    return batch


def described(values, output):
    """What one output `(...)` says, in words."""
    kind, labels = output["kind"], output["labels"]
    if kind == "classification":
        best = int(values.argmax())
        return f"{name_of(labels, best)} ({output['name']} {values[best]:.3f})"
    if kind == "multilabel" and values.ndim == 1:
        present = np.flatnonzero(values > output["level"])
        return ", ".join(name_of(labels, int(one)) for one in present) or "none of the labels"
    if kind == "segmentation":
        classes, counts = np.unique(values.argmax(0), return_counts=True)
        shares = zip(classes, counts / counts.sum())  # noqa: B905
        return ", ".join(f"{name_of(labels, int(one))} {100 * s:.1f}%" for one, s in shares)
    if values.size <= SHOWN:
        return ", ".join(f"{value:.5g}" for value in values.reshape(-1))
    return f"{values.shape}, from {values.min():.4g} to {values.max():.4g}"


def name_of(labels, number):
    """The name of a class, its number where it has none."""
    return labels[number] if number < len(labels) else str(number)


def write_map(path, classes):
    """A PNG of class indices `(H, W)` in colours that are as far apart as may be."""
    height, width = classes.shape
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):  # the bits of the class go to the high bits of red, green and blue
        for channel in range(3):
            place = 3 * bit + channel
            if place < 8:
                colours[:, channel] |= (((numbers >> place) & 1) << (7 - bit)).astype(np.uint8)
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, 0
    rows[:, 1:] = classes
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", colours.tobytes()),
             (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]  # fmt: skip
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def write_outputs(folder, stem, answers, outputs):
    """All outputs as `.npz`, and a picture of each two-dimensional map of classes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{stem}.npz").open("wb") as file:
        np.savez(file, **answers)
    for output in outputs:
        values = answers[output["name"]]
        if output["kind"] == "segmentation" and values.ndim == 3:
            more = "" if len(outputs) == 1 else f"-{output['name']}"
            write_map(folder / f"{stem}{more}.png", values.argmax(0).astype(np.uint8))


def as_json(path, answers, outputs):
    """One line with all values; of maps of classes the classes alone."""
    line = {"file": str(path)}
    for output in outputs:
        values = answers[output["name"]]
        if output["kind"] == "classification":
            label = name_of(output["labels"], int(values.argmax()))
            line["label" if len(outputs) == 1 else f"{output['name']} label"] = label
        if output["kind"] == "segmentation":
            values = values.argmax(0)
        line[output["name"]] = values.tolist()
    return json.dumps(line)


def compare(answers, manifest):
    """Print whether the sample's answer is the expected one; whether it is."""
    sample, outputs = manifest["sample"], manifest["outputs"]
    wanted = {outputs[0]["name"]: sample["expected"]}
    if sample["expected_file"]:
        with np.load(str(HERE / sample["expected_file"]), allow_pickle=False) as file:
            wanted = {name: file[name] for name in file.files}
    # INT8 kernels differ between processors; the class must not.
    good, worst = True, 0.0
    for output in outputs:
        expected, found = np.array(wanted[output["name"]]), answers[output["name"]]
        classes = output["kind"] == "classification"
        scale = 1.0 if classes else max(1.0, float(np.abs(expected).max()))
        worst = max(worst, float(np.abs(found - expected).max()) / scale)
        if classes:
            good = good and int(found.argmax()) == int(expected.argmax())
    good = good and (worst <= TOLERANCE or manifest["precision"] != "fp32")
    print(f"expected answer: {'yes' if good else 'NO'} (largest difference {worst:.1e})")
    return good


def main():
    """Print one line for each input; exit code 1 if the sample's answer is not the expected."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack the letters of a label
        sys.stdout.reconfigure(errors="backslashreplace")
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    entry, outputs = manifest["input"], manifest["outputs"]
    session = onnxruntime.InferenceSession(
        str(HERE / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    files, folder, in_json = sys.argv[1:], None, False
    while files and files[0] in ("--json", "--out"):
        if files.pop(0) == "--json":
            in_json = True
        elif files:
            folder = Path(files.pop(0))
        else:
            sys.exit("error: --out needs a folder")
    stems = {}
    for path in map(Path, files or [HERE / manifest["sample"]["file"]]):
        found = session.run(None, {entry["name"]: feed(load(path, entry), entry)})
        answers = {output["name"]: one[0] for output, one in zip(outputs, found)}  # noqa: B905
        if folder is not None:
            stems[path.stem] = stems.get(path.stem, 0) + 1
            more = f"-{stems[path.stem]}" if stems[path.stem] > 1 else ""
            write_outputs(folder, path.stem + more, answers, outputs)
        if in_json:
            print(as_json(path, answers, outputs))
            continue
        said = [described(answers[output["name"]], output) for output in outputs]
        if len(outputs) > 1:
            said = [f"{output['name']}: {one}" for output, one in zip(outputs, said)]  # noqa: B905
        print(f"{path.name}: {'; '.join(said)}")
    if not files and not in_json:
        return 0 if compare(answers, manifest) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
