"""Windows, simulated by hiding what it lacks; text files and output in locales other than UTF-8."""

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.rows import ROWS

from moodistill.bundle.folder import write_package
from moodistill.bundle.model import Origin
from moodistill.data.images import ImageData, Split
from moodistill.pareto.table import write_front

OURS = [ROOT / name for name in ("moodistill", "scripts", "examples", "problems")]
# The libraries first: they know on which system they are by other signs.
WITHOUT = """
import importlib, os, pkgutil, signal, sys
import distributed, filelock, matplotlib.figure, msgspec, numpy, onnx, onnxruntime, pymoo, rich
import safetensors.torch, scipy.linalg, sklearn.ensemble, torch.fx, torchvision
from matplotlib.backends import backend_agg
from pymoo.algorithms.moo import nsga2
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "register_at_fork", "fork", "getloadavg", "pread", "pwrite",
             "killpg", "getuid"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGPIPE"):
    delattr(signal, name)
import moodistill
names = [m.name for m in pkgutil.walk_packages(moodistill.__path__, "moodistill.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
from pathlib import Path
from moodistill.student.context import default_threads
from moodistill.storage.lock import is_written, writer_lock
folder = Path(sys.argv[1])
assert default_threads() >= 1
with writer_lock(folder):
    assert is_written(folder)
assert not is_written(folder)
print(len(names))
"""


def test_every_module_without_what_windows_lacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def without_encoding(path):
    """Lines of a file that open a text file in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given:
            continue
        if name in ("read_text", "write_text"):
            if len(node.args) < (1 if name == "read_text" else 2):
                yield node.lineno
        elif name in ("open", "fdopen") and not (
            isinstance(function, ast.Attribute) and name == "open" and _is_other(function)
        ):
            modes = [*node.args, *given.values()]
            if not any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes):
                yield node.lineno
        elif "text" in given or "universal_newlines" in given:
            yield node.lineno


def _is_other(function):
    """Whether it opens an image, an archive, a store or a descriptor."""
    return getattr(function.value, "id", "") in (
        "Image",
        "tarfile",
        "zipfile",
        "Store",
        "os",
        "cls",
    )


def test_no_text_file_depends_on_the_locale():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in OURS
        for path in folder.rglob("*.py")
        for line in without_encoding(path)
    }
    assert found == set()


@pytest.fixture(scope="module")
def package(tmp_path_factory, digits):
    """A bundle whose labels few terminals can print."""
    from moodistill.bundle.model import ShipOptions, ship
    from moodistill.onnx.writer import to_onnx
    from moodistill.student.builder import build_student

    folder = tmp_path_factory.mktemp("shipped")
    labels = ("café", "日本", "Ω", *map(str, range(7)))
    data = digits.data
    split = Split(data.validation.images[:40], np.arange(40) % 10)
    named = ImageData("named", split, split, split, data.mean, data.std, labels, "digest")
    student = build_student(digits.graph, digits.layout, digits.layout.teacher())
    origin = Origin("café", "ab", b"x")
    bare = to_onnx(student.module, data.input_shape)
    (folder / "model.onnx").write_bytes(ship(bare, named, origin, ShipOptions()))
    device = {"onnxruntime": "1", "provider": "CPU", "threads": 1, "batch": 1, "cpu": "Prozeßor"}
    write_package(folder, ROWS[2], ROWS[0], named, origin, device)
    np.save(folder / "other.npy", data.validation.images[1])
    return folder


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_shipped_folder_in_another_locale(package, encoding):
    environment = {
        **os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C",
        "PYTHONIOENCODING": encoding,
    }  # fmt: skip
    command = [sys.executable, package / "run.py"]
    pictures = [package / "sample.npy", package / "other.npy"]
    done = subprocess.run([*command, *pictures], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    labels = json.loads((package / "manifest.json").read_bytes())["labels"]
    shown = {label.encode(encoding, "backslashreplace").decode(encoding) for label in labels}
    assert len(lines) == 2
    for line in lines:
        assert line.split(": ")[1].split(" (")[0] in shown
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "moodistill", "verify", package], capture_output=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "日本" in (package / "README.md").read_bytes().decode("utf-8")


def test_files_are_utf8_in_a_locale_that_is_not(tmp_path):
    """What is written in a C locale is what is written in any."""
    code = (
        "import locale, sys; from pathlib import Path; from helpers.rows import ROWS;"
        "from dataclasses import replace; from moodistill.pareto.table import *;"
        "from moodistill.storage.folder import *;"
        "assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8');"
        "folder = Path(sys.argv[1]);"
        "rows = [replace(row, summary='caf\\xe9 \\u65e5') for row in ROWS];"
        "write_front(folder, rows); write_run(folder, {'model': '\\u65e5'});"
        "assert read_front(folder) == rows and read_run(folder) == {'model': '\\u65e5'};"
        "assert read_front(folder / 'pareto.csv') == rows"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C",
             "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "日" in (tmp_path / "pareto.csv").read_bytes().decode("utf-8")
    write_front(tmp_path / "b", ROWS)
    assert (tmp_path / "b" / "pareto.csv").is_file()


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", ">&- 2>&-"])
def test_a_name_that_the_terminal_cannot_show_ends_no_command(closed, tmp_path):
    """Nor does a stream that is closed, as of a service."""
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    write_front(folder, ROWS)
    command = f'"{sys.executable}" -m moodistill choose "$1" --knee {closed}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", folder], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert (b"caf\\xe9" in done.stdout) == (closed in ("", "2>&-"))
