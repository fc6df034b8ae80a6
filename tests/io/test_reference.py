"""Runs of the last version open: they are chosen from, shown and verified."""

import contextlib
import io
import json
import shutil

import pytest
from helpers import ROOT

from moodistill.cli import run_tool


def call(*arguments):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = run_tool(arguments[0], [str(one) for one in arguments[1:]])
    return code, out.getvalue(), error.getvalue()


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
@pytest.mark.parametrize("alone", [None, "pareto.json", "pareto.csv"])
def test_a_run_of_the_last_version(model, alone, tmp_path):
    """With both files of its front, and with either alone."""
    run = tmp_path / model
    shutil.copytree(ROOT / "results" / "reference" / model, run)
    for name in {"pareto.json", "pareto.csv"} - {alone} if alone else ():
        (run / name).unlink()
    code, text, error = call("choose", run, "--knee", "--json")
    assert code == 0, error
    chosen, count = {"vgg16": ("s0381-int8", 640), "resnet18": ("s0214-int8", 704)}[model]
    assert json.loads(text)["student"]["student"] == chosen
    if alone != "pareto.json":
        code, text, error = call("report", run)
        assert code == 0 and f"{count} students" in text, error
    if alone is None:
        (student,) = (run / "students").iterdir()
        code, text, error = call("verify", student)
        assert code == 0 and student.name in text, error
