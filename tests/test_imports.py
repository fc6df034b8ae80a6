"""The import arrows: who may know numpy, torch and pymoo."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moodistill

PACKAGE = Path(moodistill.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NO_TORCH = ["evolution", "front", "store", "problem", "latency", "latency_worker", "genome", "resolve", "channels", "errors",
            "evaluation", "pareto", "run_folder", "files", "device", "ship", "quantise", "verify",
            "shipped_run"]  # fmt: skip
NO_PYMOO = ["graph", "tracing", "rearrange", "steps", "reader", "masked", "parts", "slicing", "tensors", "student", "inherit", "distill", "layout", "statistics", "genome", "recipe",
            "student_file", "latency", "store", "front", "onnx_ops", "onnx_modules", "onnx_graph",
            "onnx_writer"]  # fmt: skip
# What each module of the ONNX writer may know of the package.
ONNX = {
    "onnx_ops": set(),
    "onnx_modules": {"onnx_ops"},
    "onnx_graph": {"onnx_ops", "onnx_modules"},
    "onnx_writer": {"onnx_ops", "onnx_modules", "onnx_graph", "errors"},
}


def imported(path):
    """Full names of everything that a file imports, at the top or inside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path):
    return {name.split(".")[0] for name in imported(path)}


def loaded(module):
    """Which heavy packages a fresh interpreter holds after importing a module."""
    code = f"import sys, {module}; print(*(m for m in ('torch', 'pymoo') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "known"), [("genome", {"moodistill.errors"}), ("resolve", {"moodistill.genome.layout"})]
)
def test_the_genome_knows_numpy_alone(name, known):
    path = PACKAGE / f"{name}.py"
    others = tops(path) - set(sys.stdlib_module_names)
    assert others == {"numpy", "moodistill"}
    own = {n.rpartition(".")[0] for n in imported(path) if n.startswith("moodistill")}
    assert own == known


@pytest.mark.parametrize("name", [*NO_TORCH, "operators"])
def test_no_torch(name):
    path = PACKAGE / name
    paths = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert paths and all(p.is_file() for p in paths)
    for one in paths:
        assert not tops(one) & {"torch", "torchvision", "safetensors"}, one.name


@pytest.mark.parametrize("name", NO_PYMOO)
def test_no_pymoo(name):
    assert "pymoo" not in tops(PACKAGE / f"{name}.py")


@pytest.mark.parametrize("name", ["genome", "front", "store", "latency", "cli"])
def test_nothing_heavy_is_loaded(name):
    assert loaded(f"moodistill.{name}") == set()


@pytest.mark.parametrize("name", ["operators", "evolution", "problem"])
def test_the_search_loads_no_torch(name):
    assert loaded(f"moodistill.{name}") == {"pymoo"}


def test_the_network_side_loads_no_pymoo():
    code = "import moodistill.student.file, moodistill.student.evaluator, moodistill.training.distill as module"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print('pymoo' in sys.modules)"],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def test_problems_are_found_by_name_only():
    assert len(MODULES) > 20
    for path in MODULES:
        assert "problems" not in tops(path), path.name
    dynamic = {
        p.stem for p in MODULES if "importlib" in tops(p) and "import_module" in p.read_text()
    }
    assert dynamic == {"task"}


def test_operators_know_the_genome_only():
    for path in (PACKAGE / "operators").glob("*.py"):
        own = {n for n in imported(path) if n.startswith("moodistill")}
        assert all(
            n.startswith(("moodistill.genome.layout.", "moodistill.genome.resolve.", "moodistill.operators."))
            for n in own
        ), path


@pytest.mark.parametrize("name", ONNX)
def test_the_onnx_writer_knows_no_more_of_the_package(name):
    names = imported(PACKAGE / f"{name}.py")
    own = {n.split(".")[1] for n in names if n.startswith("moodistill.")}
    assert own == ONNX[name]
    heavy = {"onnx", "onnxruntime", "torchvision"} & {n.split(".")[0] for n in names}
    assert heavy == ({"onnx"} if name == "onnx_writer" else set())
