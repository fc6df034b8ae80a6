"""A network and images that the project did not ship, from the shell and from Python."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import train_on
from helpers.small import make_small
from PIL import Image
from torch import nn

import moodistill
from moodistill.config import new_config
from moodistill.data.datasets import _statistics, from_datasets, from_splits
from moodistill.data.digits import load_digits
from moodistill.data.folders import load_image_folder
from moodistill.data.images import Split, metric_name
from moodistill.data.pixels import read_picture
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError
from moodistill.io.tensorfile import save_atomic
from moodistill.pareto.table import read_front
from moodistill.settings import Settings
from moodistill.teacher.weights import load_weights, read_state

RNG = np.random.default_rng(0)
NETWORK = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )
"""


def small(channels=3, classes=2):
    """A small CNN for any size, with any channels and classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    ).eval()  # fmt: skip


def picture(label, size=(20, 24), mode="RGB"):
    """Noise, brighter for class 1."""
    channels = len(mode)
    noise = RNG.integers(0, 120, (*size, channels), dtype=np.uint8) + np.uint8(100 * label)
    return Image.fromarray(noise.squeeze(), mode if channels > 1 else "L")


@pytest.fixture
def folder(tmp_path):
    """`dark/` and `light/` with 60 images each."""
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(60):
            picture(label).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_one_folder_a_class(folder):
    data = load_image_folder(folder, (16, 20))
    assert data.labels == ("dark", "light") and data.input_shape == (3, 16, 20)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [96, 12, 12]
    bright = data.train.images.mean((1, 2, 3))
    assert bright[data.train.labels == 1].min() > bright[data.train.labels == 0].max()
    normal = data.normalise(data.train.images)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.3
    before = {image.tobytes() for image in data.test.images}
    picture(1).save(folder / "light" / "one more.png")
    again = load_image_folder(folder, (16, 20))
    assert len(before - {image.tobytes() for image in again.test.images}) <= 1  # one may move
    assert again.digest != data.digest


def test_split_folders(folder, tmp_path):
    root = tmp_path / "split"
    for part, count in (("train", 40), ("val", 10), ("test", 10)):
        for name in ("dark", "light"):
            (root / part / name).mkdir(parents=True)
            for path in sorted((folder / name).iterdir())[:count]:
                (root / part / name / path.name).write_bytes(path.read_bytes())
    data = load_image_folder(root, channels=1, mean=[0.5], std=[0.25])
    assert [len(s) for s in (data.train, data.validation, data.test)] == [80, 20, 20]
    assert data.input_shape == (1, 32, 32) and data.mean == (0.5,)


@pytest.mark.parametrize("damage", ["missing", "one class", "no images", "broken", "mean"])
def test_bad_folders_are_one_line(folder, damage):
    settings = {}
    if damage == "missing":
        folder = folder / "nowhere"
    elif damage == "one class":
        for path in (folder / "dark").iterdir():
            path.unlink()
        (folder / "dark").rmdir()
    elif damage == "no images":
        (folder / "empty").mkdir()
    elif damage == "broken":
        path = folder / "dark" / "7.png"
        path.write_bytes(path.read_bytes()[:100])
    else:
        settings = {"mean": [0.5, 0.5]}
    with pytest.raises(UserError) as caught:
        load_image_folder(folder, **settings)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value) or damage in (
        "broken", "mean"
    )  # fmt: skip


def test_another_normalisation_is_other_data(folder):
    """All that is cached of a teacher depends on it."""
    one, two = (load_image_folder(folder, mean=mean, std=[0.2] * 3).digest
                for mean in ([0.5, 0.5, 0.5], [0.5, 0.5, 0.4]))  # fmt: skip
    assert one != two


def test_a_problem_file_may_be_called_like_a_module(tmp_path):
    import random

    from moodistill.teacher.task import load_task

    (tmp_path / "random.py").write_text("from problems.digits import TASK\n")
    assert load_task(str(tmp_path / "random.py")).name == "digits"
    assert sys.modules["random"] is random


def test_pictures_that_come_class_by_class_are_mixed(folder):
    """A search scores the first validation images: they must be of all classes."""
    train = load_image_folder(folder).train
    assert 0.3 < train.labels[: len(train) // 2].mean() < 0.7
    images = np.zeros((200, 4, 4, 3), np.uint8)
    ordered, in_turn = np.arange(200) // 100, np.arange(200) % 2
    for labels in (ordered, in_turn):  # every second one would be of one class
        images[:, 0, 0, 0] = labels
        data = from_splits("own", {"train": Split(images, labels), "validation": Split(images, labels)},
                           None, None, None)  # fmt: skip
        for split in (data.validation, data.test):
            assert len(split) == 100 and 0.3 < split.labels.mean() < 0.7
            assert np.array_equal(split.images[:, 0, 0, 0], split.labels)


def test_measured_statistics_are_exact():
    images = RNG.integers(0, 256, (2100, 3, 5, 2), dtype=np.uint8)
    images[..., 1] //= 4
    pixels = images.reshape(-1, 2).astype(np.float64) / 255
    mean, std = _statistics(images)
    assert mean == pixels.mean(0).round(4).tolist() and std == pixels.std(0).round(4).tolist()
    assert _statistics(np.full((3, 2, 2, 1), 255, np.uint8)) == ([1.0], [1e-3])


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_of_16_bits(folder, channels):
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(deep.astype(np.uint16)).save(folder / "dark" / "deep.png")
    found, _ = read_picture(folder / "dark" / "deep.png", channels, Preparation().settings())
    assert np.abs(found - (deep / 257)[..., None]).max() < 0.51
    Image.fromarray(deep.astype(np.float32)).save(folder / "dark" / "deep.tif")
    with pytest.raises(UserError, match="floating-point"):
        load_image_folder(folder)


def test_a_picture_too_large_to_be_opened_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"120 file.* no readable image: .*0\.png"):
        load_image_folder(folder)


@pytest.mark.parametrize("classes", [9, 11])
def test_as_many_logits_as_classes(classes, tmp_path):
    digits = load_digits()
    splits = [(s.images, s.labels) for s in (digits.train, digits.validation, digits.test)]
    with pytest.raises(UserError, match=f"gives {classes} logits, the data have 10 classes"):
        moodistill.search(small(1, classes), *splits, out=tmp_path / "run", progress="quiet")
    with pytest.raises(UserError, match="labels name 9 classes, the data have 10"):
        moodistill.search(small(1, 10), *splits, out=tmp_path / "run", labels=list("abcdefghi"))


def test_a_metric_that_is_no_number_is_said_and_named(folder):
    data = load_image_folder(folder, metric=partial(fixed, value=float("nan")))
    assert metric_name(data).endswith("fixed(value=nan)")
    with pytest.raises(UserError, match="metric fixed gives nan; expected a number from 0"):
        data.score([{"logits": np.zeros((2, 2))}], Split(np.zeros((2, 1, 1, 1)), np.zeros(2, int)))
    one, two = (metric_name(replace(data, metric=Always(value))) for value in (1.0, fixed))
    assert one == f"{__name__}.Always(value=1.0)" and two.endswith(
        f"Always(value={__name__}.fixed)"
    )
    assert metric_name(replace(data, metric=partial(fixed, value=fixed))).endswith(".fixed)")


def fixed(logits, labels, value):
    return value


class Always:
    """A metric that is an object."""

    def __init__(self, value):
        self.value = value

    def __call__(self, logits, labels):
        return self.value


def test_datasets_of_many_forms():
    arrays = [(RNG.integers(0, 256, (8, 6, 3), np.uint8), i % 3) for i in range(9)]
    pictures = [(Image.fromarray(a), label) for a, label in arrays]
    tensors = [(torch.from_numpy(a).permute(2, 0, 1) / 255, label) for a, label in arrays]
    made = [from_datasets(one, one, one) for one in (arrays, pictures, tensors)]
    assert len({data.digest for data in made}) == 1 and made[0].labels == ("0", "1", "2")
    halves = from_datasets(arrays, arrays)
    assert len(halves.validation) == 5 and len(halves.test) == 4
    with pytest.raises(UserError, match="leave the normalisation"):
        from_datasets([(torch.randn(3, 8, 8), 0)], arrays)
    with pytest.raises(UserError, match="resize them"):
        from_datasets([*arrays, (np.zeros((9, 9, 3), np.uint8), 0)], arrays)
    with pytest.raises(UserError, match="name them all"):
        from_datasets(arrays, arrays, labels=["a", "b"])


@pytest.mark.parametrize("form", ["plain", "module", "lightning", "timm", "half", "deep"])
def test_checkpoints_that_people_have(form, tmp_path):
    network = small()
    state = network.state_dict()
    kept = {
        "plain": state,
        "module": {f"module.{k}": v for k, v in state.items()},
        "lightning": {"epoch": 3, "hyper_parameters": {"lr": 0.1}, "state_dict": {
            **{f"model.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(2)}},
        "timm": {"model": state, "arch": "small"},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        "deep": {f"model.module.{k}": v for k, v in state.items()},
    }[form]  # fmt: skip
    torch.save(kept, tmp_path / "best.ckpt")
    loaded = load_weights(small().apply(lambda m: None), tmp_path / "best.ckpt")
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(loaded(images), network(images), atol=1e-2 if form == "half" else 1e-6)


def test_checkpoints_that_are_none(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_state(tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no state dict"):
        read_state(tmp_path / "list.pt")
    with pytest.raises(UserError, match="does not exist"):
        read_state(tmp_path / "none.pt")
    save_atomic({"0.weight": torch.zeros(16, 3, 5, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"keys missing \(first: 0.bias\).*0.weight is"):
        load_weights(small(), tmp_path / "other.safetensors")


def test_own_network_from_the_shell(folder, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)
    network = scope["build"]()
    data = load_image_folder(folder, (16, 20))
    train_on(network, data.normalise(data.train.images), torch.from_numpy(data.train.labels))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "best.pt")
    arguments = ["--weights", "best.pt", "--data", folder, "--size", "16", "20"]
    budget = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2"]
    call("run", "--teacher", "mine:build", *arguments, "--out", "run", *budget, "--no-int8")
    call("run", "--resume", "run", "--distill-steps", "3")
    student = next((tmp_path / "run" / "students").glob("s*")).name
    call("export", "run", student, "--out", "shipped")
    assert "as expected" in call("verify", "shipped").stdout
    manifest = json.loads((tmp_path / "shipped" / "manifest.json").read_text())
    assert manifest["input"]["shape"] == [3, 16, 20] and manifest["labels"] == ["dark", "light"]
    done = subprocess.run(
        [sys.executable, "shipped/run.py", str(folder / "dark" / "3.png")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("3.png: "), done.stderr
    for wrong, words in (
        (["--teacher", "mine:nothing", *arguments], "no callable"),
        (["--teacher", "nowhere:build", *arguments], "cannot be imported"),
        (["--resume", "run", "--size", "20"], "takes --size from its run"),
        (["--teacher", "mine:build"], "needs --weights"),
        (["--teacher", "mine:build", "--model", "digits", *arguments], "give one of them"),
    ):
        out = [] if "--resume" in wrong else ["--out", "other"]
        assert words in call("run", *wrong, *out, code=2).stderr
    assert not (tmp_path / "other").exists()


def test_a_run_is_carried_on_and_exported_from_anywhere(folder, call, tmp_path, monkeypatch):
    """With a problem file that was named as seen from elsewhere, and a module beside it."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    (tmp_path / "project" / "beside_it.py").write_text("from problems.digits import TASK\n")
    (tmp_path / "project" / "mine.py").write_text("from beside_it import TASK\n")
    tiny = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2"]
    call("run", "--model", "mine.py", "--out", tmp_path / "run", *tiny, "--no-int8")
    monkeypatch.chdir(folder)
    call("run", "--resume", tmp_path / "run", "--model", tmp_path / "project" / "mine.py")
    name = next(path.name for path in (tmp_path / "run" / "students").glob("s*"))
    call("export", tmp_path / "run", name, "--out", tmp_path / "out")
    done = call("run", "--resume", tmp_path / "run", "--model", "digits", code=2)
    assert "was started with model" in done.stderr


def test_other_pictures_are_not_exported_under_the_runs_accuracy(folder, call, tmp_path):
    data = load_image_folder(folder)
    network = train_on(small(), data.normalise(data.train.images),
                       torch.from_numpy(data.train.labels))  # fmt: skip
    save_atomic(dict(network.state_dict()), tmp_path / "w.safetensors")
    (tmp_path / "network_of_mine.py").write_text(NETWORK)
    call(
        "run", "--teacher", f"{tmp_path / 'network_of_mine.py'}:build", "--out", tmp_path / "run",
        "--weights", tmp_path / "w.safetensors", "--data", folder, "--simd-step", "4", "--no-int8",
        "--population", "6", "--generations", "1", "--finalists", "1", "--distill-steps", "2",
    )  # fmt: skip
    rows = read_front(tmp_path / "run")
    one = next(row for row in rows if row.stage != "teacher")
    picture(1).save(folder / "dark" / "new.png")  # comes too late for the run
    call("export", tmp_path / "run", one.student, "--out", tmp_path / "kept")
    assert "as expected" in call("verify", tmp_path / "kept").stdout
    for number in range(40):
        picture(1).save(folder / "dark" / f"{number}.png")
    for stage in ("distilled", "searched"):
        for row in [row for row in rows if row.stage == stage][:1]:
            done = call("export", tmp_path / "run", row.student, "--out", tmp_path / "out", code=2)
            assert "was started with other images" in done.stderr
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_teacher_that_cannot_classify_is_said_at_once(folder, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(NETWORK)
    network = small()
    data = load_image_folder(folder)
    train_on(network, data.normalise(data.train.images), torch.from_numpy(data.train.labels))
    network[-1].load_state_dict({k: -v for k, v in network[-1].state_dict().items()})  # all wrong
    torch.save(network.state_dict(), tmp_path / "bad.pt")
    done = call(
        "run", "--teacher", "mine:build", "--weights", "bad.pt", "--data", folder, "--out", "r",
        "--population", "4", "--generations", "1", code=2,
    )  # fmt: skip
    assert "the teacher itself reaches accuracy 0." in done.stderr and "mean, std" in done.stderr


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 2, (28, 20)), (4, 1000, (40, 40))])
def test_search_from_python(channels, classes, size, tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))

    def split(count):
        labels = np.arange(count) % classes
        images = RNG.integers(0, 256, (count, *size, channels), dtype=np.uint8)
        return images, labels

    network = small(channels, classes)
    settings = dict(
        out=tmp_path / "run", population=4, generations=1, finalists=1, distill_steps=2,
        progress="quiet", int8=moodistill.Int8Config(wanted=False),
        labels=[f"class {i}" for i in range(classes)], limits=moodistill.Limits(),
        metric=half_right,
    )  # fmt: skip
    # The metric gives every student at least 0.5, above the floor of a search.
    parts = split(64), split(64), split(32)
    run = moodistill.search(network, *parts, **settings)
    assert [row.stage for row in run.front].count("distilled") == 1
    assert all(0.5 <= row.validation_accuracy <= 1 for row in run.front)
    chosen = run.choose(knee=True)
    module = chosen.to_torch()
    assert module(torch.zeros(2, channels, *size)).shape == (2, classes)
    assert sum(p.numel() for p in module.parameters()) == chosen.row.parameters
    assert "<table>" in run._repr_html_() and chosen.row.student in chosen._repr_html_()
    path = chosen.export(tmp_path / "shipped", softmax=True)
    assert path.is_file() and (tmp_path / "shipped" / "manifest.json").is_file()
    with pytest.raises(UserError, match="unknown student"):
        run.student("s9999")
    other = {**settings, "metric": other_metric}
    with pytest.raises(UserError, match="metric"):
        moodistill.search(network, *parts, **other)


class Answer(nn.Module):
    """A network whose logits lie in a dict."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"logits": self.inner(x)}


def test_a_module_left_whole_and_logits_in_a_dict(tmp_path, monkeypatch):
    """The run's student exports: the network is traced again as the run traced it."""
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))
    labels = np.arange(64) % 2
    images = RNG.integers(0, 256, (64, 28, 20, 1), dtype=np.uint8)
    torch.manual_seed(0)
    inner = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(2):
        inner += [nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    network = Answer(
        nn.Sequential(*inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    ).eval()
    run = moodistill.search(
        network, (images, labels), (images, labels), (images, labels), out=tmp_path / "run",
        population=4, generations=1, finalists=1, distill_steps=2, progress="quiet",
        simd_step=4, int8=moodistill.Int8Config(wanted=False), metric=half_right,
        rules=moodistill.LayerRules(opaque=("inner.6",)),
    )  # fmt: skip
    chosen = run.choose(knee=True)
    assert chosen.to_torch()(torch.zeros(2, 1, 28, 20)).shape == (2, 2)
    assert chosen.export(tmp_path / "shipped").is_file()


def half_right(logits, labels):
    """A metric of one's own."""
    return 0.5 + 0.5 * float((logits.argmax(1) == labels).mean())


def other_metric(logits, labels):
    """Another one."""
    return 0.9


def test_a_run_goes_on_and_opens_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MOODISTILL_CACHE", str(tmp_path / "cache"))
    digits = load_digits()
    from moodistill.teacher.task import load_task

    task = load_task("digits")
    network = load_weights(task.build(), task.weights)
    splits = [(s.images, s.labels) for s in (digits.train, digits.validation, digits.test)]
    make_small(monkeypatch)
    settings = dict(
        out=tmp_path / "run", population=4, finalists=1, distill_steps=2, progress="quiet",
        simd_step=8, mean=digits.mean, std=digits.std, int8=moodistill.Int8Config(wanted=False),
    )  # fmt: skip
    first = moodistill.search(network, *splits, generations=1, **settings)
    more = moodistill.search(network, *splits, generations=2, **settings)
    assert len(more.front) >= len(first.front) and more.front[0].accuracy == 1.0
    opened = moodistill.open_run(tmp_path / "run", more.task)
    searched = next(row for row in opened.front if row.stage == "searched")
    module = opened.student(searched.student).to_torch()
    assert sum(p.numel() for p in module.parameters()) == searched.parameters
    assert opened.student(searched.student).distil(3, "quiet").row.stage == "distilled"
    with pytest.raises(UserError, match="unknown model"):
        moodistill.open_run(tmp_path / "run")
    # What decides the result is that of the run; nothing that is given is left unheard.
    for name, value, said in (
        ("seed", 1, "seed 0, not 1"),
        (
            "objectives",
            ("accuracy", "macs"),
            "objectives accuracy,parameters,latency, not accuracy",
        ),
        ("limits", moodistill.Limits(max_macs=1e6), "max_macs none, not 1000000.0"),
        ("latency", moodistill.LatencyConfig(batch=2), "batch 1, not 2"),
        ("rules", moodistill.LayerRules(keep=("output",)), "keep none, not output"),
    ):
        with pytest.raises(UserError, match=f"started with {said}"):
            moodistill.search(network, *splits, generations=2, **settings, **{name: value})
    asked = dict(
        seed=0, objectives=("accuracy", "latency", "parameters"), limits=moodistill.Limits()
    )
    moodistill.search(network, *splits, generations=2, **settings, **asked)
    network.output.weight.data *= 1.5
    with pytest.raises(UserError, match="other weights"):
        moodistill.search(network, *splits, generations=2, **settings)


def test_a_network_of_which_nothing_can_be_left_out_is_refused(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    digits = load_digits()
    splits = [(s.images, s.labels) for s in (digits.train, digits.validation, digits.test)]
    with pytest.raises(UserError, match="nothing of this network can be left out"):
        moodistill.search(network, *splits, out=tmp_path / "run", progress="quiet")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["population", "finalists", "distill_steps", "generations"])
def test_budgets_of_nothing_are_refused_before_anything_is_done(name):
    with pytest.raises(UserError, match="expected"):
        new_config("digits", Settings(**{name: 0}))


def test_the_package_is_light_until_it_is_used():
    code = "import sys, moodistill; print('torch' in sys.modules); moodistill.search; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError):
        moodistill.nothing  # noqa: B018
