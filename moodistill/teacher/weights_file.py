"""What a file of weights holds, read without running any of it; or one line on what it is instead.

Files are told apart by their content, whatever they are called. Of a checkpoint only tensors, plain
values and plain containers are read; every other object in it (arguments, configurations, a whole
network) becomes a `StandIn`, and no code of the file is run.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from moodistill.errors import UserError
from moodistill.io.tensorfile import read_safetensors

HEAD_BYTES = 1024
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before 1.6
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")

# Beginnings of files that people take for weights: offset, bytes, what it is, what to do.
OTHER_FILES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file that it points to",
     "fetch that with: git lfs pull"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras writes such)",
     "give what torch.save(model.state_dict(), path) writes"),
    (0, b"GGUF", "a GGUF file", "give what torch.save(model.state_dict(), path) writes"),
    (4, b"TFL3", "a TFLite model", "give the checkpoint that it was converted from"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (0, b"BZh", "compressed by bzip2", "unpack it"),
    (0, b"\xfd7zXZ", "compressed by xz", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
)  # fmt: skip


class StandIn:
    """In place of an object that is no tensor, plain value or plain container.

    Attributes:
        origin: the name of its class, or of the function that would have made it.
        state: what would have been its attributes, if it has any.
    """

    origin = ""
    state: Any = None

    def __new__(cls, *_: Any) -> StandIn:
        """Take whatever the object would have been made of."""
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        """Keep none of it."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        self.state = state

    @property
    def is_network(self) -> bool:
        """Whether it stands for a `torch.nn.Module`."""
        return isinstance(self.state, dict) and {"_parameters", "_modules"} <= set(self.state)


# What checkpoints of the old form, whose names cannot be listed beforehand, hold beside tensors.
USUAL = (
    "argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.dtype",
    "numpy.ndarray", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "collections.defaultdict", "builtins.list", "builtins.dict",
    "builtins.int", "builtins.float",
)  # fmt: skip


def read_weights_file(path: Path) -> Any:
    """What a file holds: tensors in (nested) dicts and lists, and what stands beside them.

    Raises:
        UserError: if it is no file of weights; says what it is and how to make one of it.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file of a teacher's weights: name it")
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a teacher's weights")
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    if _is_safetensors(head, path.stat().st_size):
        return read_safetensors(path)[0]
    found = _other_file(path, head)
    if found is not None:
        raise _refusal(path, *found)
    if head.startswith((b"PK\x03\x04", LEGACY_TORCH)):
        return _read_torch(path, zipped=head.startswith(b"PK"))
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]  # says what is wrong with it
    raise _refusal(
        path, "no file of weights", "give what torch.save(model.state_dict(), path) writes"
    )


def network_refusal(path: Path, network: StandIn) -> UserError:
    """Of a file that holds a network as Python pickles it."""
    return _refusal(
        path,
        f"a whole pickled network ({network.origin}), not its weights alone",
        _lines(f"net = torch.load({str(path)!r}, weights_only=False)",
               'torch.save(net.state_dict(), "weights.pt")')
        + " (the first runs code of the file: only if you trust it)",
    )  # fmt: skip


def _refusal(path: Path, what: str, remedy: str) -> UserError:
    return UserError(f"{path} cannot be read as weights: it is {what}; {remedy}")


def _lines(first: str, second: str) -> str:
    """Two lines of Python, within one line of a message."""
    return f"make a file of weights of it by: {first}; {second}"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes say how long the JSON header is that follows them."""
    if len(head) < 9:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return head[8:9] == b"{" and 2 <= length <= size - 8


def _other_file(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that holds no weights of torch, and the remedy; None if it may hold some."""
    if not head and path.suffix != ".safetensors":
        return "empty", "copy or train it again"
    for offset, begins, what, remedy in OTHER_FILES:
        if head[offset : offset + len(begins)] == begins:
            return what, remedy
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "a web page (of a login, or of a link that shows the file)",
            "download the file itself",
        )
    if head.startswith(b"PK\x03\x04"):
        return _other_zip(path)
    if head.startswith(b"\x93NUMPY"):
        return "one NumPy array", "give what torch.save(model.state_dict(), path) writes"
    if head.startswith(b"\x80") and not head.startswith(LEGACY_TORCH):
        return (
            "a Python pickle that torch.save did not write",
            _lines(f"import pickle, torch; state = pickle.load(open({str(path)!r}, 'rb'))",
                   'torch.save(state, "weights.pt")')
            + " (the first runs code of the file: only if you trust it)",
        )  # fmt: skip
    if head.startswith(b"\x08") and _is_onnx(path):
        return (
            "an ONNX model, whose weights no longer have the names that they have in the network",
            "give the checkpoint that it was exported from",
        )
    if path.suffix != ".safetensors" and head.isascii() and head.decode().isprintable():
        return "text", "give what torch.save(model.state_dict(), path) writes"
    return None


def _other_zip(path: Path) -> tuple[str, str] | None:
    """What a zip archive is, if it is not one that torch.save writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "cut short (an archive without its end)", "copy or fetch it again"
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return (
            "TorchScript, a compiled network",
            _lines(f"net = torch.jit.load({str(path)!r})",
                   'torch.save(net.state_dict(), "weights.pt")'),
        )  # fmt: skip
    if "data.pkl" in inner:
        return None
    if any("serialized_exported_program" in name or "archive_format" in name for name in names):
        return (
            "a network written by torch.export",
            _lines(f"net = torch.export.load({str(path)!r})",
                   'torch.save(net.state_dict, "weights.pt")'),
        )  # fmt: skip
    if names and all(name.endswith(".npy") for name in names):
        return (
            "an archive of NumPy arrays",
            _lines(f"found = numpy.load({str(path)!r})",
                   'torch.save({k: torch.from_numpy(found[k]) for k in found}, "weights.pt")'),
        )  # fmt: skip
    if "model.weights.h5" in names:
        return "a Keras model", "give what torch.save(model.state_dict(), path) writes"
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return f"a zip archive that holds {shown[:120]}", "unpack it and name the file of weights in it"


def _is_onnx(path: Path) -> bool:
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf has an error of its own in every version
        return False
    return bool(model.graph.node)


def _read_torch(path: Path, zipped: bool) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else USUAL
    except Exception:
        names = USUAL  # what is wrong with the file, reading it will tell
    allowed: Any = [_stand_in(name) for name in sorted(names)]
    try:
        with (
            open(path, "rb") as stream,  # by a name that ends in .safetensors torch would go by it
            warnings.catch_warnings(),
            torch.serialization.safe_globals(allowed),
        ):
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the archive's damage leads to
        raise UserError(
            f"{path} cannot be read as weights ({plain_text(error)}); expected safetensors, or "
            "what torch.save(model.state_dict(), path) writes"
        ) from error


def _stand_in(name: str) -> tuple[Any, str]:
    """What a checkpoint's global `name` is read as."""
    if name == "collections.defaultdict":
        return (_empty_dict, name)
    return (type("StandIn", (StandIn,), {"origin": name}), name)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """A plain dict, which the checkpoint fills."""
    return {}


def plain_text(error: BaseException) -> str:
    """What an error says in one line, without escape codes and cut to a length.

    Of torch's long text on files that it refuses this is the reason, which stands far below.
    """
    text = ESCAPES.sub("", str(error))
    text = text.partition("WeightsUnpickler error:")[2] or text
    lines = (line.strip() for line in text.splitlines())
    return next(filter(None, lines), type(error).__name__)[:160]
