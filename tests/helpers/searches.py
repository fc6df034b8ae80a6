"""A search on a synthetic layout with recorded scores."""

import numpy as np

from moodistill.evolution.driver import Search, SearchConfig
from moodistill.evolution.executor import SerialExecutor
from moodistill.genome.layout import CONNECTIONS, INPUT, GenomeLayout, Group, Node
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.storage.store import Store


def chain_layout(layers: int = 6, channels: int = 64) -> GenomeLayout:
    """A plain chain of convolutions behind an input of 3 channels, 10 outputs."""
    rng = np.random.default_rng(0)
    groups = {INPUT: Group(INPUT, np.zeros(3, int), np.zeros(3), True)}
    nodes = [Node("x", "input", (), (INPUT,), lanes=(1,))]
    for index in range(layers):
        name = f"conv{index}"
        block = np.arange(channels) * 4 // channels
        groups[name] = Group(name, block, rng.random(channels))
        energy = rng.random((4, groups[nodes[-1].groups[0]].blocks))
        nodes.append(
            Node(
                name,
                "layer",
                (nodes[-1].name,),
                (name,),
                nodes[-1].groups,
                index > 0,
                energy,
                lanes=(1,),
            )  # fmt: skip
        )
    groups["head"] = Group("head", np.zeros(10, int), np.zeros(10), True)
    nodes.append(Node("head", "layer", (nodes[-1].name,), ("head",), nodes[-1].groups, lanes=(1,)))
    nodes.append(Node("output", "output", ("head",), ("head",)))
    return GenomeLayout(groups, tuple(nodes))


LAYOUT = chain_layout()


def recorded(genome: np.ndarray, fail: bool = False) -> Evaluation:
    """A deterministic stand-in: accuracy follows importance kept, cost follows channels."""
    digest = LAYOUT.digest(genome)
    kept = [LAYOUT.view(genome, f"mask/{g}") for g in LAYOUT.groups if f"mask/{g}" in LAYOUT.slices]
    worth = np.mean(
        [
            (LAYOUT.groups[f"conv{i}"].importance * mask).sum()
            / LAYOUT.groups[f"conv{i}"].importance.sum()
            for i, mask in enumerate(kept)
        ]
    )
    widths = [int(mask.sum()) for mask in kept]
    bypasses = sum(not LAYOUT.view(genome, f"bypass/conv{i}")[0] for i in range(1, 6))
    parameters = sum(a * b for a, b in zip(widths, widths[1:], strict=False)) // (1 + bypasses)
    if fail:
        return Evaluation(
            digest, LAYOUT.pack(genome), 0.0, parameters, 0, 0, None, failure="ValueError: no"
        )
    time = parameters / 4096.0 + 0.01
    return Evaluation(
        digest, LAYOUT.pack(genome), float(worth) ** 0.5 * 0.9**bypasses, parameters, parameters, 1,
        Latency(time, time, time, 1.0),
    )  # fmt: skip


def make(folder, config, evaluate=recorded, tables=None):
    (folder / "run.json").parent.mkdir(parents=True, exist_ok=True)
    if (folder / "evaluations.sqlite").exists():
        store = Store.open(folder)
    else:
        (folder / "run.json").write_text("{}")
        store = Store.create(folder)
    return store, Search(LAYOUT, config, store, SerialExecutor(evaluate), tables=tables)


CONFIG = SearchConfig(
    population=12, generations=6, seed=3, simd_step=8, connections=tuple(CONNECTIONS)
)
