"""What the documentation says about the code: links, names, options, numbers, the order of rooms."""

import argparse
import ast
import re
import subprocess
import tomllib

import pytest
from helpers import ROOT

import moodistill
from moodistill.cli.program import COMMANDS
from moodistill.config import PRESETS, SearchConfig
from moodistill.evolution.algorithms import ALGORITHMS
from moodistill.genome.layout import CONNECTIONS
from moodistill.pareto.objectives import MEASURES

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "results/README.md",
    *DOCS,
]  # fmt: skip
# Options in the text that belong to other programs.
FOREIGN = {
    "--host", "--nthreads", "--resources", "--tls-ca-file", "--tls-cert", "--tls-key", "--protocol",
    "--strict", "--check", "--import-mode", "--help",
}  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == [page.name for page in DOCS]


@each_page
def test_code_blocks_parse(page):
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert page.read_text().count("```") % 2 == 0


def defined(path):
    """Dotted names that a module defines, methods and class attributes among them."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                names.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)

    visit(ast.parse(path.read_text()).body, "")
    return names


@pytest.mark.parametrize("name", ["architecture.md", "method.md"])
def test_files_and_functions_that_a_page_names_are_there(name):
    text = (ROOT / "docs" / name).read_text()
    found = re.findall(r"`([\w/]+\.py)`(?:\s+`(\w[\w.]*)`)?", text)
    assert found
    for path, member in found:
        places = [ROOT / "moodistill" / path, ROOT / path]
        place = next((p for p in places if p.is_file()), None)
        assert place is not None, path
        if member:
            assert member in defined(place), f"{path} {member}"


def test_the_architecture_draws_the_order_that_the_linter_holds():
    (drawing,) = [b for b in blocks(ROOT / "docs/architecture.md", "text") if "floor" in b]
    drawn = [
        set(re.findall(r"\w+", re.split(r" {4,}", line.split(maxsplit=2)[2])[0]))
        for line in drawing.splitlines()
        if line.startswith("floor")
    ]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = settings["contracts"][0]["layers"]
    compatible = {"task", "own_data", "teachers", "int8"}  # old import paths
    assert drawn == [set(re.findall(r"\w+", layer)) - compatible for layer in layers]


def test_every_room_is_described():
    rooms = {path.parent.name for path in (ROOT / "moodistill").glob("*/__init__.py")}
    text = (ROOT / "docs/architecture.md").read_text()
    assert rooms <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(moodistill.__all__) - {"__version__"} <= set(shown)


def known_options():
    options = set()
    for command in COMMANDS.values():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        options |= {o for action in parser._actions for o in action.option_strings}
    for script in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts/bench").glob("*.py")]:
        options |= set(re.findall(r"\"(--[\w-]+)\"", script.read_text()))
    return options


def test_options_in_the_text_exist():
    known = known_options() | FOREIGN
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # of all versions
            continue
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose(page)))
        assert named <= known, f"{page.name}: {named - known}"


def test_presets_and_defaults_are_those_of_the_code():
    text = (ROOT / "docs/getting_started.md").read_text()
    rows = re.findall(r"^\| `(\w+)`.*?\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    found = {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in rows}
    population = SearchConfig().population
    assert found == {
        name: (population * p.generations, p.finalists, p.distill_steps)
        for name, p in PRESETS.items()
    }
    settings = (ROOT / "docs/tuning.md").read_text()
    assert f"`--population` ({population})" in settings
    assert f"`--screen N` ({SearchConfig().screen})" in settings
    assert f"`--connections {','.join(SearchConfig().connections)}`" in settings


def test_objectives_algorithms_and_gene_kinds_are_described():
    settings = (ROOT / "docs/tuning.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE) == list(MEASURES)
    for name in (*ALGORITHMS, *CONNECTIONS):
        assert f"`{name}`" in settings or name in settings, name
    glossary = (ROOT / "docs/glossary.md").read_text()
    for prefix in ("mask/", *CONNECTIONS.values()):
        assert f"`{prefix}<" in glossary, prefix
