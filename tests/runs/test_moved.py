"""Network, weights and images of a run lie elsewhere; what they are is told by digests."""

import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import train_on
from PIL import Image

import moodistill
from moodistill.config import RunConfig, new_config
from moodistill.data.folders import load_image_folder
from moodistill.errors import UserError
from moodistill.io.tensorfile import save_atomic
from moodistill.pareto.table import read_front
from moodistill.runs.backend import Places
from moodistill.runs.moved import moved_config
from moodistill.settings import Settings
from moodistill.teacher.task import builder_of, load_task, module_folder

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )
"""
TINY = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
        "--no-int8", "--simd-step", "8", "--seeded", "0"]  # fmt: skip


def forget():
    """What another process would not have imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nets_of_mine"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if "moved_project" not in path]


@pytest.fixture(scope="module")
def made(tmp_path_factory, call):
    """A run of a network in a package, that was started in its folder, and all that it needs."""
    root, rng = tmp_path_factory.mktemp("moved_project"), np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(120 * label)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    (root / "nets_of_mine").mkdir()
    (root / "nets_of_mine" / "__init__.py").write_text("")
    (root / "nets_of_mine" / "small.py").write_text(NETWORK)
    scope: dict = {}
    exec(NETWORK, scope)
    data = load_image_folder(root / "images", (16, 16))
    network = scope["build"]()
    train_on(network, data.normalise(data.train.images), torch.from_numpy(data.train.labels))
    ema = {k: v + 0.01 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save({"model": network.state_dict(), "model_ema": ema}, root / "best.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call("run", "--teacher", "nets_of_mine.small:build", "--weights", "best.pt", "--data",
             "images", "--size", "16", "--out", "run", "--weights-key", "model", *TINY)  # fmt: skip
    forget()
    return root


@pytest.fixture
def moved(made, tmp_path, monkeypatch):
    """A copy of the run alone, far from everything, with the rest moved into `elsewhere`."""
    forget()
    shutil.copytree(made, tmp_path / "moved_project")
    run, elsewhere = tmp_path / "far" / "run", tmp_path / "elsewhere"
    run.parent.mkdir()
    shutil.move(tmp_path / "moved_project" / "run", run)
    shutil.move(tmp_path / "moved_project", elsewhere)
    config = json.loads((run / "run.json").read_text())
    for name, old in (("weights", "best.pt"), ("data", "images"), ("module_folder", "")):
        config["config"]["own"][name] = str(tmp_path / "moved_project" / old).rstrip("/")
    (run / "run.json").write_text(json.dumps(config))
    monkeypatch.chdir(run.parent)
    yield run, elsewhere
    forget()


def given(elsewhere, **changed):
    """The options that say where everything is now."""
    places = {"teacher": f"{elsewhere}/nets_of_mine/small.py:build",
              "weights": elsewhere / "best.pt", "data": elsewhere / "images"} | changed  # fmt: skip
    return [word for name, value in places.items() for word in (f"--{name}", value)]


def stage(run, name):
    return next(row.student for row in read_front(run) if row.stage == name)


def test_a_module_is_found_from_another_folder(made, call, tmp_path, monkeypatch):
    own = RunConfig.read(made / "run").own
    assert own.module_folder == str(made) and own.weights == str(made / "best.pt")
    monkeypatch.chdir(tmp_path)
    call("export", made / "run", stage(made / "run", "distilled"), "--out", "out")
    assert "as expected" in call("verify", "out").stdout
    forget()
    # One of the same name in the current folder is another.
    (tmp_path / "nets_of_mine").mkdir()
    (tmp_path / "nets_of_mine" / "small.py").write_text("raise RuntimeError")
    (tmp_path / "nets_of_mine" / "__init__.py").write_text("")
    call("export", made / "run", stage(made / "run", "distilled"), "--out", "again")
    forget()


def test_all_that_is_gone_is_named_at_once(moved, call):
    run, _ = moved
    for command in (
        ["resume", run], ["export", run, stage(run, "searched"), "--out", "x"],
        ["resume", run, "--student", stage(run, "searched")],
    ):  # fmt: skip
        said = call(*command, code=2).stderr
        assert "moved_project/best.pt (--weights); and its images" in said
        assert "moved_project/images (--data)" in said
    with pytest.raises(UserError, match=r"best.pt \(`weights`\); and its images"):
        moodistill.open_run(run)


def test_a_run_is_carried_on_and_exported_where_all_lies_elsewhere(moved, call):
    run, elsewhere = moved
    places = given(elsewhere)
    name = stage(run, "distilled")
    call("export", run, name, "--out", "distilled", *places)
    assert "as expected" in call("verify", "distilled").stdout
    call("resume", run, "--generations", "2", *places)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    # From now on it knows the new places.
    call("export", run, stage(run, "searched"), "--out", "searched")
    assert "as expected" in call("verify", "searched").stdout


def test_a_student_is_distilled_where_all_lies_elsewhere(moved, call):
    run, elsewhere = moved
    name = stage(run, "searched")
    call("resume", run, "--student", name, *given(elsewhere))
    assert {row.student: row.stage for row in read_front(run)}[name] == "distilled"
    # What it was started with stays in its record, beside where it was last.
    stored = json.loads((run / "run.json").read_text())
    assert stored["places"]["data"] == str(elsewhere / "images")
    assert RunConfig.read(run).own.data.endswith("moved_project/images")
    shutil.move(elsewhere / "images", stored["config"]["own"]["data"])
    call("resume", run, "--student", name)  # back again, weights and network where they were last


def test_from_python(moved):
    run, elsewhere = moved
    sys.path.append(str(elsewhere))
    opened = moodistill.open_run(
        run, network="nets_of_mine.small:build", weights=elsewhere / "best.pt",
        data=elsewhere / "images",
    )  # fmt: skip
    assert opened.student(stage(run, "searched")).export("out").is_file()
    with pytest.raises(UserError, match="give it alone"):
        moodistill.open_run(run, opened.task, weights=elsewhere / "best.pt")
    with pytest.raises(UserError, match="`data_dir` is for a problem's data"):
        moodistill.open_run(run, data_dir=elsewhere)


def test_what_is_another_is_named(moved, call):
    run, elsewhere = moved
    stored = json.loads((run / "run.json").read_text())
    before = (run / "run.json").read_bytes()
    other = elsewhere / "other.pt"
    state = torch.load(elsewhere / "best.pt")
    state["model"]["6.bias"] += 1
    torch.save(state, other)
    shutil.copytree(elsewhere / "images", elsewhere / "others")
    Image.new("RGB", (16, 16), (9, 9, 200)).save(elsewhere / "others" / "dark" / "3.png")
    shutil.copytree(elsewhere / "images", elsewhere / "fewer")
    (elsewhere / "fewer" / "dark" / "3.png").unlink()
    (elsewhere / "forward.py").write_text(NETWORK.replace("nn.ReLU()", "nn.SiLU()"))
    (elsewhere / "wider.py").write_text(NETWORK.replace("32", "40"))
    teacher, data = stored["teacher_digest"][:12], stored["data_digest"][:12]
    for changed, words in (
        ({"weights": other}, ["other.pt has digest", f"expected {teacher}", "--weights"]),
        ({"data": elsewhere / "others"}, ["others has digest", f"expected {data}"]),
        ({"data": elsewhere / "fewer"}, ["fewer lacks 1 of the 40 images", "dark/3.png"]),
        ({"teacher": f"{elsewhere}/forward.py:build"}, ["another network of the same weights"]),
        ({"teacher": f"{elsewhere}/wider.py:build"}, ["does not fit", "expected (40,"]),
        ({"teacher": f"{elsewhere}/none.py:build"}, ["none.py (--teacher"]),
        ({"data": elsewhere / "none"}, ["elsewhere/none (--data)"]),
    ):
        places = given(elsewhere, **changed)
        for name in (stage(run, "searched"), stage(run, "distilled")):
            if "wider" in str(changed) and name != stage(run, "searched"):
                words = ["another network"]  # its weights are not read
            said = call("export", run, name, "--out", "out", *places, code=2).stderr
            assert all(word in said for word in words), said
        said = call("resume", run, *places, code=2).stderr
        assert said
    assert not (run.parent / "out" / "model.onnx").exists()
    assert (run / "run.json").read_bytes() == before


def test_no_option_is_accepted_and_ignored(moved, call, tmp_path):
    run, elsewhere = moved
    name = stage(run, "distilled")
    for options, said in (
        (["--data-dir", elsewhere], "--data-dir is for a problem's data"),
        (["--model", "digits"], "was started with the teacher"),
        (["--teacher", "a:b", "--model", "digits"], "both name a network"),
    ):
        assert said in call("resume", run, *options, code=2).stderr
        assert said in call("export", run, name, "--out", "out", *options, code=2).stderr
    said = call("resume", run, "--weights-key", "model_ema", *given(elsewhere), code=2).stderr
    assert "was started with weights_key model, not model_ema" in said
    for options, said in (
        (["--teacher", "a:b", "--weights", "x", "--data", "y", "--data-dir", "z"], "for a problem"),
        (["--teacher", "a.py", "--weights", "x", "--data", "y"], "expected MODULE:CALLABLE"),
        (["--model", "digits", "--no-int8", "--int8-max-loss", "0.1"], "which --no-int8 leaves"),
        (["--model", "digits", "--data", "y"], "is for a network of your own"),
        (["--model", "digits", "--data-dir", "y"], "scikit-learn brings the digits"),
    ):
        assert said in call("run", "--out", tmp_path / "none", *options, code=2).stderr
    assert not (tmp_path / "none").exists()


def test_weights_and_key_of_a_problem(call, tmp_path, monkeypatch):
    """They are kept with the run, and a problem's file may move."""
    monkeypatch.chdir(tmp_path)
    task = load_task("digits")
    from moodistill.teacher.weights import load_weights

    state = load_weights(task.build(), task.weights).state_dict()
    raw = {k: v.clone() for k, v in state.items()}
    raw["output.bias"] = raw["output.bias"] + torch.linspace(0, 1, 10)
    torch.save({"model": raw, "model_ema": state}, "both.pt")
    (tmp_path / "mine.py").write_text("from problems.digits import TASK\n")
    options = ["--weights", "both.pt", "--out", "run", *TINY]
    said = call("run", "--model", "mine.py", "--weights-key", "nothing", *options, code=2).stderr
    assert "nothing" in said and "model_ema" in said and not (tmp_path / "run").exists()
    call("run", "--model", "mine.py", "--weights-key", "model", *options)
    config = RunConfig.read(tmp_path / "run")
    assert (config.weights, config.weights_key) == (str(tmp_path / "both.pt"), "model")
    (tmp_path / "away").mkdir()
    for name in ("mine.py", "both.pt"):
        shutil.move(name, tmp_path / "away" / name)
    said = call("resume", "run", code=2).stderr
    assert "mine.py (--model says" in said and "both.pt (--weights)" in said
    places = ["--model", "away/mine.py", "--weights", "away/both.pt"]
    said = call("resume", "run", "--weights-key", "model_ema", *places, code=2).stderr
    assert "weights_key model, not model_ema" in said
    name = stage(tmp_path / "run", "searched")
    call("export", "run", name, "--out", "out", *places)
    assert "as expected" in call("verify", "out").stdout
    save_atomic(dict(state), tmp_path / "ema.safetensors")
    said = call("export", "run", stage(tmp_path / "run", "distilled"), "--out", "no",
                "--model", "away/mine.py", "--weights", "ema.safetensors", code=2).stderr  # fmt: skip
    assert "ema.safetensors has digest" in said
    call("resume", "run", *places)
    call("resume", "run")  # it knows them now


def test_names_of_networks():
    assert builder_of("a.b:build") == ("a.b", "build")
    assert builder_of("C:\\nets\\mine.py") == ("C:\\nets\\mine.py", "")
    assert builder_of("C:\\nets\\mine.py:build") == ("C:\\nets\\mine.py", "build")
    assert builder_of("vgg16") == ("vgg16", "")
    # What is installed is found from anywhere.
    assert module_folder("torch.nn:Identity") is None and module_folder("no_such:x") is None


def test_a_problem_that_others_bring_is_another(tmp_path):
    config = new_config("digits", Settings())
    (tmp_path / "run.json").write_text(json.dumps({"config": asdict(config)}))
    for places, said in (
        (Places(network="vgg16"), "was started with model digits, not vgg16"),
        (Places(network="a:b"), "was started with model digits, not a:b"),
        (Places(data=tmp_path), "give `data_dir`"),
    ):
        with pytest.raises(UserError, match=said):
            moved_config(tmp_path, config, places)
    assert moved_config(tmp_path, config, Places(network="digits")) == config
