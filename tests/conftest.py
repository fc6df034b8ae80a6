"""Teachers for the tests: the shipped digits task, and VGG16 and ResNet18 without CIFAR-10."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["--population", "6", "--generations", "2", "--finalists", "2", "--distill-steps", "6"]

# Small networks: more threads cost more than they bring, above all beside other jobs.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Prepared:
    """A teacher with its graph, samples and layout, made without any data set."""

    teacher: Any
    graph: Any
    samples: Any
    layout: Any


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The `TeacherContext` of the digits task, with the shipped teacher."""
    from moodistill.context import load_context
    from moodistill.task import load_task

    return load_context(load_task("digits"), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def random_images():
    """96 training images of uniform noise as an `ImageData` of CIFAR-10's shape."""
    from moodistill.data import ImageData, Split

    rng = np.random.default_rng(5)
    parts = [
        Split(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
        for n in (96, 8, 8)
    ]
    labels = tuple(str(i) for i in range(10))
    return ImageData("noise", *parts, (0.5,) * 3, (0.3,) * 3, labels, "noise")


def prepare(teacher, data) -> Prepared:
    """Trace, sample and lay out a teacher."""
    from moodistill.graph import trace
    from moodistill.layout import build_layout
    from moodistill.statistics import CalibrationConfig, collect_samples

    graph = trace(teacher, data.input_shape)
    config = CalibrationConfig(images=64, pixels=2000)
    samples = collect_samples(graph, data, config, None, "")
    return Prepared(teacher, graph, samples, build_layout(graph, samples))


@pytest.fixture(scope="session")
def vgg16(random_images):
    """VGG16 with the shipped CIFAR-10 weights."""
    from moodistill.teachers import load_weights
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


TINY_RUN = (
    "--model", "digits", "--population", "6", "--generations", "3", "--finalists", "2",
    "--distill-steps", "6", "--simd-step", "8", "--torch-threads", "1",
)  # fmt: skip


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A warm process that runs, and kills, whole commands with recorded latencies."""
    from driver import Driver

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


def train_on(network, images, labels, steps=80):
    """A few steps of SGD, enough for pictures that differ in brightness; back in eval mode."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def random_genome(layout, rng: np.random.Generator, bypass: bool = False) -> np.ndarray:
    """A varied genome: any density, whole blocks gone, block-diagonal layers, dropped edges."""
    genome = layout.teacher()
    shared = rng.uniform(0.1, 1.0)
    style = rng.integers(4)
    for name in layout.shapes:
        view = layout.view(genome, name)
        kind, owner = name.split("/", 1)
        if kind == "mask":
            group = layout.groups[owner]
            density = shared if style != 1 else rng.uniform(0.1, 1.0)
            if style == 2:  # all or nothing
                view[:] = (rng.random(group.blocks) < max(0.4, density))[group.block]
            elif style == 3:  # equal widths in all blocks, so that convolutions can be grouped
                for block in range(group.blocks):
                    members = np.flatnonzero(group.block == block)
                    view[rng.permutation(members)[max(1, int(density * len(members))) :]] = False
            else:
                view[:] = rng.random(view.shape) < density
        elif kind == "block":
            choice = rng.random()
            if choice < (0.6 if style == 3 else 0.15) and view.shape[0] == view.shape[1]:
                view[:] = np.eye(len(view), dtype=bool)[rng.permutation(len(view))]
            elif choice < 0.7:
                view[:] = rng.random(view.shape) < rng.uniform(0.2, 1.0)
        elif kind == "merge":
            if rng.random() < 0.3:
                view[rng.integers(len(view))] = False
        elif bypass:
            view[0] = rng.random() < 0.7
    return genome


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
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                found = run_tool(command, [str(a) for a in arguments])
        assert found == code, out.getvalue() + error.getvalue()
        if code == 2:
            assert len(error.getvalue().strip().splitlines()) == 1, error.getvalue()
        return SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = subprocess.run(
        [
            sys.executable, ROOT / "scripts/run_nsga.py", "--model", "digits", "--out", folder,
            "--connections", "blocks,merges,bypasses", *TINY,
        ],  # fmt: skip
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "MOODISTILL_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "about" in done.stdout and "choose a student" in done.stdout
    return folder
