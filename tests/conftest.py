"""Teachers for the tests: the shipped digits task, and VGG16 and ResNet18 without CIFAR-10."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, TINY_RUN, prepare
from helpers.small import make_small

# Small networks: more threads cost more than they bring, above all beside other jobs.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The `TeacherContext` of the digits task, with the shipped teacher."""
    from moodistill.student.context import load_context
    from moodistill.teacher.task import load_task

    return load_context(load_task("digits"), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def random_images():
    """96 training images of uniform noise as an `ImageData` of CIFAR-10's shape."""
    from moodistill.data.images import ImageData, Split

    rng = np.random.default_rng(5)
    parts = [
        Split(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
        for n in (96, 8, 8)
    ]
    labels = tuple(str(i) for i in range(10))
    return ImageData("noise", *parts, (0.5,) * 3, (0.3,) * 3, labels, "noise")


@pytest.fixture(scope="session")
def vgg16(random_images):
    """VGG16 with the shipped CIFAR-10 weights."""
    from moodistill.teacher.weights import load_weights
    from problems.vgg16 import TASK

    return prepare(load_weights(TASK.build(), TASK.weights), random_images)


@pytest.fixture(scope="session")
def resnet18(random_images):
    """ResNet18 with seeded random weights; its batch normalisations are far from the identity."""
    from torch import nn

    from problems.resnet18 import build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        teacher = build()
        norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            for norm in norms:
                norm.momentum = 1.0  # one pass sets the statistics
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
            teacher.train()
            teacher(random_images.calibration(32))
            for norm in norms:
                norm.momentum = 0.1
                norm.running_mean.add_(torch.randn(norm.num_features) * 0.2)
                norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.5, 1.5))
    return prepare(teacher.eval(), random_images)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A warm process that runs, and kills, whole commands with recorded latencies."""
    from helpers.driver import Driver

    folder = tmp_path_factory.mktemp("driver")
    driver = Driver(folder, folder / "cache")
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def recorded_run(driver, tmp_path_factory):
    """A finished, never interrupted run on the digits with recorded latencies; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    done = driver.call("run", "--out", folder, *TINY_RUN)
    assert done.code == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def call(cache):
    """Runs a command in this process (a start of torch costs seconds); checks its exit code."""

    from moodistill.cli import run_tool

    def run(command, *arguments, code=0):
        out, error = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOODISTILL_CACHE", str(cache))
            make_small(patch)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                found = run_tool(command, [str(a) for a in arguments])
        assert found == code, out.getvalue() + error.getvalue()
        if code == 2:
            assert len(error.getvalue().strip().splitlines()) == 1, error.getvalue()
        return SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(cache, driver, tmp_path_factory):
    """A finished run on the digits, with real latencies; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = driver.call(
        "run", "--model", "digits", "--out", folder, "--connections", "blocks,merges,bypasses",
        *TINY, recorded=False, environment={"MOODISTILL_CACHE": str(cache)},
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    assert "about" in done.stdout and "choose a student" in done.stdout
    return folder
