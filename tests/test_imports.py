"""The arrows between the modules: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moodistill"
NO_TORCH = ["genome", "evaluation", "errors", "pareto", "front", "choose", "store", "run_folder",
            "report", "problem", "search", "latency", "latency_worker", "device", "cli"]  # fmt: skip
NO_TORCH += [f"operators/{p.stem}" for p in (PACKAGE / "operators").glob("*.py")]
NO_PYMOO = ["genome", "graph", "layout", "statistics", "student", "student_file", "inherit",
            "distill", "training", "teachers", "data", "onnx_writer", "onnx_graph"]  # fmt: skip


def imported(module: str, top_level_only: bool = False) -> set[str]:
    """Top-level names that a module's source imports."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch(module):
    assert not {"torch", "torchvision"} & imported(module)


@pytest.mark.parametrize("module", NO_PYMOO)
def test_no_pymoo(module):
    assert "pymoo" not in imported(module)


def test_genome_knows_numpy_alone():
    outside = imported("genome") - set(sys.stdlib_module_names)
    assert outside == {"numpy", "moodistill"}


def test_nothing_imports_problems():
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        assert "problems" not in imported(module), module


@pytest.mark.parametrize("module", ["genome", "front", "choose", "store", "latency", "cli"])
def test_light_modules_start_without_torch(module):
    code = f"import sys, moodistill.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", ["graph", "genome", "layout", "student", "inherit"])
def test_no_architecture_is_named(module):
    """General rules only: no identifier or string in the code names VGG or ResNet."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    words = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    words += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    words += [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert not [w for w in words if "vgg" in w.lower() or "resnet" in w.lower()]
