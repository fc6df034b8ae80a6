"""What tests of several rooms share: paths, small runs, random genomes, prepared teachers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
# Without tables of single changes, which take longer than these searches.
TINY = ["--population", "6", "--generations", "2", "--finalists", "2", "--distill-steps", "6",
        "--seeded", "0"]  # fmt: skip

TINY_RUN = (
    "--model", "digits", "--population", "6", "--generations", "3", "--finalists", "2",
    "--distill-steps", "6", "--simd-step", "8", "--torch-threads", "1",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A teacher with its graph, samples and layout, made without any data set."""

    teacher: Any
    graph: Any
    samples: Any
    layout: Any


def prepare(teacher, data) -> Prepared:
    """Trace, sample and lay out a teacher."""
    from moodistill.teacher.blocks import build_layout
    from moodistill.teacher.graph import trace
    from moodistill.teacher.samples import CalibrationConfig, collect_samples

    graph = trace(teacher, data.input_shape)
    config = CalibrationConfig(images=64, pixels=2000)
    samples = collect_samples(graph, data, config, None, "")
    return Prepared(teacher, graph, samples, build_layout(graph, samples))


def train_on(network, images, labels, steps=80):
    """A few steps of SGD, enough for images that differ in brightness; back in eval mode."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def random_genome(layout, rng: np.random.Generator, bypass: bool = False) -> np.ndarray:
    """A varied genome: any density, whole blocks gone, block-diagonal layers, dropped edges.

    Some have lost no connections between blocks, so that their layers may have ranks; half of all
    genomes lose taps, half ranks.
    """
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
        elif kind == "bypass" and bypass:
            view[0] = rng.random() < 0.7
    whole, taps, ranks = rng.random(3)
    for name in layout.shapes:
        view = layout.view(genome, name)
        if name.startswith("block/") and whole < 0.4:
            view[:] = True
        elif name.startswith("kernel/") and taps < 0.5:
            view[:] = rng.random(view.shape) < rng.uniform(0.0, 1.0)
        elif name.startswith("rank/") and ranks < 0.5 and rng.random() < 0.7:
            # The lowest ranks are all that thin layers have a use for.
            view[rng.integers(min(len(view), rng.choice([3, 6, 40]))) :] = False
    return genome
