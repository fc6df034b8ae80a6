"""What a fresh interpreter loads, and what else import-linter (pyproject.toml) cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moodistill

PACKAGE = Path(moodistill.__file__).parent
HEAVY = ("torch", "torchvision", "pymoo", "scipy", "sklearn", "onnx", "onnxruntime", "matplotlib",
         "plotly")  # fmt: skip
NUMBERS = {"scipy", "sklearn"}


def fresh(code):
    """What a fresh interpreter prints, run outside the checkout's tests."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout


def loaded(module):
    """Which heavy packages a fresh interpreter holds after importing a module."""
    code = f"import sys, {module}; print(*(m for m in {HEAVY} if m in sys.modules))"
    return set(fresh(code).split())


@pytest.mark.parametrize(
    "module",
    ["", "genome.resolve", "pareto.choose", "storage.store", "io.records", "progress", "report.page",
     "latency.meter", "latency.worker", "cli", "cli.program"],
)  # fmt: skip
def test_nothing_heavy_is_loaded(module):
    assert loaded(f"moodistill.{module}".rstrip(".")) == set()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("bundle.run_script", {"onnxruntime"}),
        ("onnx.quantise", {"onnx", "onnxruntime"}),
        ("data", {"torch"}),
        ("evolution.driver", {"pymoo", *NUMBERS}),
        ("training.distill", {"torch"}),
        ("student.evaluator", {"torch", "onnx", "onnxruntime", "scipy"}),
    ],
)
def test_a_room_loads_what_it_needs(module, expected):
    assert loaded(f"moodistill.{module}") == expected


def test_the_commands_on_a_finished_run_load_nothing_heavy():
    code = (
        "import sys\n"
        "from moodistill.cli import main\n"
        "code = main(['choose', 'results/reference/vgg16', '--knee'])\n"
        f"print(code, *(m for m in {HEAVY} if m in sys.modules))"
    )
    assert fresh(code).splitlines()[-1] == "0"


def test_no_room_has_the_name_of_a_public_function():
    """Importing it would put the room in the function's place."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert "evolution" in rooms and not rooms & set(moodistill.__all__)


def test_every_public_name_is_there():
    code = (
        "import moodistill\nfor n in moodistill.__all__: print(n, getattr(moodistill, n) is None)"
    )
    found = [line.split() for line in fresh(code).splitlines()]
    assert found == [[name, "False"] for name in moodistill.__all__]


def test_a_script_of_an_earlier_version_finds_what_has_moved():
    code = "import moodistill\nprint(moodistill.int8.Int8Config is moodistill.Int8Config)"
    assert fresh(code).strip() == "True"


def test_modules_are_named_where_they_are_imported():
    """Imports by a computed name, which the linter does not see, in two places only."""
    dynamic = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if name in ("import_module", "__import__", "exec_module"):
                dynamic.add(path.relative_to(PACKAGE).as_posix())
    assert dynamic == {"__init__.py", "teacher/task.py"}


def test_the_longest_chain_of_rooms_has_at_most_ten_links():
    graph = pytest.importorskip("grimp").build_graph("moodistill")
    below = {}  # room: the rooms that it imports
    for module in graph.modules - {"moodistill"}:
        room = module.split(".")[1]
        found = {
            m.split(".")[1] for m in graph.find_modules_directly_imported_by(module) if "." in m
        }
        below.setdefault(room, set()).update(found - {room})

    def links(room):
        return max((1 + links(other) for other in below[room]), default=0)

    assert 5 < max(links(room) for room in below) <= 10
