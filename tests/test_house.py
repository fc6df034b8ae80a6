"""What holds of every module: few parameters, and messages that know no command line."""

import argparse
import ast
import re

from helpers import ROOT

from moodistill.cli.program import COMMANDS

PACKAGE = ROOT / "moodistill"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST = 5  # parameters, besides self

# Functions that a user calls, each parameter by name, and what torch, pymoo or a table decides.
PUBLIC = {
    "api.search", "api.RunStudent.export", "api.Run.choose", "data.folders.load_image_folder",
    "data.datasets.from_datasets", "data.pixels.prepare", "settings._setting",
    "teacher.tracing._norm", "teacher.tracing._conv",
    "teacher.value_tracer.ValueTracer.create_proxy", "api.open_run", "data.arrays.from_arrays",
    "onnx.calls._instance_norm", "onnx.calls._interpolate",
}  # fmt: skip
# Others that were there before this was checked: to be shortened, none to be added.
LONG = {
    "api._image_data",
    "bundle.folder.write_package",
    "bundle.int8.quantise_student",
    "bundle.parity.export_onnx",
    "cluster.executor.DaskExecutor.__init__",
    "cluster.meter.RemoteMeter.__init__",
    "data.datasets.from_splits",
    "evolution.driver.Search.__init__",
    "evolution.driver.Search._tell",
    "evolution.operators.connection_mutation.ConnectionMutation.__init__",
    "finalists.confirm.confirm",
    "finalists.distil.finish",
    "genome.resolve._Repair.__init__",
    "heads.losses._loss",
    "heads.losses.distillation_loss",
    "latency.meter.LatencyMeter.__init__",
    "latency.meter.LatencyMeter.measure",
    "latency.worker.TimedModel.__init__",
    "onnx.maps._padded",
    "onnx.maps.resize",
    "onnx.quantise.quantise_measured",
    "runs.export.export_student",
    "runs.run.resume_run",
    "runs.run.start_run",
    "student.context.load_context",
    "student.regression.regress",
    "student.slicing._conv_like",
    "student.solve._on_patches",
    "student.solve._on_pixels",
    "student.solve.solve_unit",
    "teacher.recorder.Recorder._add",
    "training.distill.distill",
    "training.teacher._Training.__init__",
    "training.views.view",
}

# These print, or call, a whole command.
WHOLE_COMMANDS = {
    "bundle/run_script.py": ["--json", "--out"], "bundle/trial.py": ["--json", "--out"],
    "bundle/folder.py": ["--out"], "report/page.py": ["--out"],
}  # fmt: skip


def functions(path):
    """By its whole name, every function of a module and the names of its parameters."""
    stem = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)

    def visit(body, prefix):
        for one in body:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                given = one.args.posonlyargs + one.args.args + one.args.kwonlyargs
                yield prefix + one.name, [a.arg for a in given if a.arg not in ("self", "cls")]
                yield from visit(one.body, f"{prefix}{one.name}.")
            elif isinstance(one, ast.ClassDef):
                yield from visit(one.body, f"{prefix}{one.name}.")

    return visit(ast.parse(path.read_text()).body, f"{stem}.")


def test_functions_have_at_most_five_parameters():
    long = {name for path in MODULES for name, given in functions(path) if len(given) > MOST}
    assert long - PUBLIC - LONG == set()
    assert long >= PUBLIC | LONG, "shorter now: take it off the list"


def options():
    """Every option of the command line."""
    found = set()
    for command in COMMANDS.values():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        found |= {one for one in parser._option_string_actions if one.startswith("--")}
    return found


def texts(path):
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def test_below_the_command_line_settings_are_named_not_options():
    """`cli.options.with_flags` says them in the command line's words."""
    known = options()
    assert "--resume" in known and "--data-dir" in known
    found = {
        str(path.relative_to(PACKAGE)): sorted(named)
        for path in MODULES
        if path.parent.name != "cli" and path.name != "settings.py"
        for named in [
            {w for text in texts(path) for w in re.findall(r"--[a-z][a-z-]*", text)} & known
        ]
        if named
    }
    assert found == WHOLE_COMMANDS
