"""Environments of their own for old runtimes and for converters; slow tests make them."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def interpreter(version):
    """A Python of this version, from the path or from pyenv; skips the test without one."""
    if version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    found = shutil.which(f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    known = sorted(root.glob(f"versions/{version}.*/bin/python"))
    if not known and found is None:
        pytest.skip(f"there is no Python {version} here")
    return str(known[-1]) if known else found


def environment(version, *packages):
    """The Python of an environment with these packages, made once; skips if they cannot be had."""
    key = hashlib.sha256(" ".join([version, *packages]).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"moodistill-tests-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([interpreter(version), "-m", "venv", folder], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr[-200:]}")
        (folder / "complete").write_text("")
    return str(python)
