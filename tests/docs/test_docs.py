"""Every command of the documentation runs, with tiny budgets put in.

Of runs that differ in nothing but their values and budgets one is run; the others are parsed.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from helpers import ROOT, train_on
from helpers.small import make_small

from moodistill.cli.program import COMMANDS
from moodistill.data.folders import load_image_folder

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
SCRIPTS = {
    "run_nsga.py": "run", "choose.py": "choose", "export_onnx.py": "export",
    "train_teacher.py": "teacher",
}  # fmt: skip
TINY_RUN = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
            "--seeded", "0"]  # fmt: skip
PROBLEM = """
from dataclasses import replace
from pathlib import Path
from moodistill.task import TrainConfig
from problems.digits import TASK as DIGITS
TASK = replace(DIGITS, train=TrainConfig(phases=((1, 32),), batch_size=256),
               weights=Path(__file__).with_name("tiny.safetensors"))
"""


def commands():
    """Every line in a `sh` block, once."""
    seen = set()
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                command = line.split("  #")[0].strip()
                if command and command not in seen:
                    seen.add(command)
                    yield pytest.param(command, id=f"{page.name}: {command[:70]}")


def parts(command):
    """The command's name among ours and its arguments; None for other programs."""
    words = shlex.split(command)
    if words[0] == "moodistill":
        return words[1], words[2:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        script = words[1].removeprefix("scripts/")
        return SCRIPTS.get(script, script), words[2:]
    return None


def asked(command):
    """What a run is asked for: its options, and whose network it is; None for other commands."""
    found = parts(command)
    if found is None or found[0] not in ("run", "resume"):
        return None
    own = {word for word in found[1] if word.endswith(".py")}
    return frozenset(own | {word for word in found[1] if word.startswith("--")})


def runs():
    """The runs that are run: one for each set of options that no other command contains."""
    wanted = {}
    for parameter in commands():
        (command,) = parameter.values
        if asked(command) is not None:
            wanted.setdefault(asked(command), command)
    return {c for options, c in wanted.items() if not any(options < other for other in wanted)}


@pytest.fixture(scope="module")
def student(finished):
    """A finalist's id."""
    return sorted(p.parent.name for p in finished.glob("students/s*/model.onnx"))[0]


@pytest.mark.parametrize("command", commands())
def test_command(command, call, finished, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    if "RUN" in command or "results/" in command or "my_student" in command:
        shutil.copytree(finished, tmp_path / "RUN")
    names = {
        "RUN": "RUN", "results/mine": "RUN", "results/vgg16": "RUN", "results/resnet18": "RUN",
        "vgg16": "digits", "resnet18": "digits", "10000": "8", "features.0": "conv3.0", "features.3=32": "hidden=32",
        **dict.fromkeys(("s0042", "s0123", "s0214", "s0381", "s0576"), student),
    }  # fmt: skip
    found = parts(command)
    if found is None:
        return other_program(command, call, student, tmp_path)
    name, arguments = found
    arguments = [names.get(word, word) for word in arguments]
    if asked(command) is not None and command not in runs():
        parser = argparse.ArgumentParser()
        COMMANDS[name].add_arguments(parser)
        parser.parse_args(arguments)
    elif "--teacher" in arguments and ("--resume" in arguments or name == "resume"):
        moved_and_carried_on(name, arguments, call, tmp_path)
    elif name in ("run", "resume") and "--teacher" in arguments or "mine.py" in arguments:
        own_network(folder=tmp_path)
        call(name, *arguments, *TINY_RUN, "--no-int8")
    elif name in ("run", "resume"):
        if "--out" in arguments:
            arguments[arguments.index("--out") + 1] = "new"
        budget = ["--generations", "2", "--finalists", "1", "--distill-steps", "2"]
        going_on = name == "resume" or "--resume" in arguments
        limits = ["--max-latency-ms", "400"] if "--max-latency-ms" in arguments else []
        budget = [] if "--student" in arguments else budget
        extra = budget if going_on else [*TINY_RUN, "--no-int8", *limits]
        call(name, *arguments, *extra)
    elif name == "teacher":
        (tmp_path / "tiny.py").write_text(PROBLEM)
        arguments[arguments.index("--model") + 1] = "tiny.py"
        assert "test accuracy" in call(name, *arguments).stdout
    elif name == "verify" and arguments[0].startswith("results/reference/"):
        call(name, ROOT / arguments[0])
    elif name == "verify":
        call("export", "RUN", student, "--out", "my_student")
        call(name, *arguments)
    elif name == "choose":
        words = [w if w not in ("2", "0.85") else {"2": "400", "0.85": "0.1"}[w] for w in arguments]
        call(name, *words)
    elif name in COMMANDS:
        call(name, *arguments)
    else:  # a benchmark: hours; its options must exist
        text = script(ROOT / "scripts" / name, "--help")
        for option in (word for word in arguments if word.startswith("--")):
            assert option in text, option


def script(path, *arguments):
    """What a script prints, run in this process (a start of torch costs seconds)."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        make_small(patch)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    return out.getvalue()


def test_a_network_that_is_too_narrow_for_whole_simd_blocks(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    own_network(tmp_path)
    arguments = [
        "--teacher", "mine:build", "--weights", "best.pt", "--data", "images", "--out", "run",
        "--simd-step", "64", *TINY_RUN,
    ]  # fmt: skip
    error = call("run", *arguments, code=2).stderr
    assert "every student came out as the teacher" in error and "smaller --simd-step" in error


def own_network(folder):
    """A network, its weights, a problem file and images, as docs/own_network.md names them."""
    import torch
    from PIL import Image
    from torch import nn

    source = (
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))\n"
        "from pathlib import Path\n"
        "from moodistill.data.folders import load_image_folder\n"
        "from moodistill.teacher.task import Task\n"
        "TASK = Task('mine', build, lambda _: load_image_folder(Path('images')), Path('best.pt'))\n"
    )
    (folder / "mine.py").write_text(source)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 2),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(50):
            pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * label)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    data = load_image_folder(folder / "images")
    train_on(network, data.normalise(data.train.images), torch.from_numpy(data.train.labels))
    torch.save(network.state_dict(), folder / "best.pt")


def moved_and_carried_on(name, arguments, call, folder):
    """A run whose images, weights and network lie elsewhere when it is carried on."""
    old, new = folder / "old", folder / "new"
    old.mkdir()
    own_network(folder=old)
    shutil.rmtree(folder / "RUN")
    call("run", "--teacher", f"{old}/mine.py:build", "--weights", old / "best.pt", "--data",
         old / "images", "--out", "RUN", *TINY_RUN, "--no-int8")  # fmt: skip
    old.rename(new)
    call(name, *[word.replace("/new/", f"{new}/") for word in arguments], "--distill-steps", "3")


def other_program(command, call, student, folder):
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", command)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= set(known["optional-dependencies"])
    elif words[:2] == ["python", "examples/own_pictures.py"]:
        tiny = ["--epochs", "1", "--generations", "1", "--distill-steps", "2"]
        assert "exported: " in script(ROOT / words[1], *words[2:], *tiny)
    elif words[0] == "python" and words[1] == "my_student/run.py":
        from PIL import Image

        call("export", "RUN", student, "--out", "my_student")
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "picture.png")
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout.splitlines()) >= 1, done.stderr
    elif words[0] == "python" and words[1].startswith("results/reference/"):
        done = subprocess.run([sys.executable, ROOT / words[1]], capture_output=True, text=True)
        assert done.returncode == 0 and "logits" in done.stdout, done.stderr
    elif words[:3] == ["python", "-m", "pytest"]:
        arguments = words[3:]
        if arguments[:1] == ["-m"]:
            settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
            markers = [m.partition(":")[0] for m in settings["ini_options"]["markers"]]
            assert arguments[1] in markers
        else:
            assert all((ROOT / path).is_dir() for path in arguments)
    else:  # tools of the checks, which .ci/run calls with the same words
        assert command in (ROOT / ".ci/run").read_text() or command in (
            "python -m venv .venv", ". .venv/bin/activate"
        )  # fmt: skip
