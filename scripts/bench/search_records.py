"""Records of `scripts/bench/search.py`: hypervolume, best accuracies, table and figure."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moodistill.evolution.driver import hypervolume as normalised_hypervolume
from moodistill.io.atomic import write_atomic

LEAST = (0.5, 0.7)  # accuracies, before distillation, from which a student is of use
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the teacher's latency
ARMS = {
    "ours": "our search",
    "no-tables": "ours without tables: no seeds, and a surrogate that begins with nothing",
    "no-screening": "ours without the surrogate that screens offspring",
    "no-mutation": "ours with bit flips for our mutations",
    "random": "our sampling, no search",
    "plain": "pymoo's binary sampling, uniform crossover, bit flips",
    "torch-pruning": "Torch-Pruning: magnitude, BN scale, Taylor; uniform and global",
    "l1": "uniform widths by L1 norm",
    "only-kernels": "ours with widths and kernels",
    "only-ranks": "ours with widths and ranks",
    "only-merges": "ours with widths and merge edges",
    "only-bypasses": "ours with widths and bypass edges",
    "no-connections": "ours with widths alone",
    "with-blocks": "ours with block connections beside all others",
    "no-inheritance": "ours with plain slicing",
    "former": "merge and bypass edges, solved at single pixels, without tables",
    "former-widths": "widths alone, solved at single pixels, without tables",
}

Records = dict[str, dict[str, Any]]  # by arm and seed, `ours-0`


def hypervolume(record: dict[str, Any], count: int | None = None, least: float = 0.0) -> float:
    """The search's own of the first `count` students, with accuracy counted from chance.

    Those of an accuracy below `least` are left out.
    """
    students = [one for one in record["students"][:count] if 1.0 - one[0] >= least]
    rows = np.array([record["teacher"], *students], dtype=float)
    rows[:, 0] = np.minimum(1.0, rows[:, 0] / (1.0 - record["chance"]))
    return normalised_hypervolume(rows[1:], rows[0])


def best_within(points: np.ndarray, limit_ms: float) -> int | None:
    """The place of the most accurate among `(n, 3)` [error, parameters, ms] within `limit_ms`."""
    fitting = np.flatnonzero(points[:, 2] <= limit_ms)
    return int(fitting[np.argmin(points[fitting, 0])]) if len(fitting) else None


def relative(record: dict[str, Any]) -> np.ndarray:
    """`(n, 3)` of a record: error, and parameters and latency as shares of the teacher's."""
    return np.array(record["students"]) / [1.0, *record["teacher"][1:]]


def table(records: Records) -> str:
    """The table in Markdown: medians over seeds, and the range of the hypervolume."""
    lines = [
        "| arm | seeds | hypervolume (range) | "
        + "".join(f"of students of {least:.0%} and more | " for least in LEAST)
        + " | ".join(f"1/{round(1 / s)}" for s in SHARES) + " | 1/4 distilled |",
        "| --- |" + " --- |" * (len(LEAST) + len(SHARES) + 3),
    ]  # fmt: skip
    for arm in ARMS:
        runs = runs_of(records, arm)
        if not runs:
            continue
        volumes = [hypervolume(run) for run in runs]
        cells = [
            f"{np.median([hypervolume(run, least=least) for run in runs]):.4f}" for least in LEAST
        ]
        for share in SHARES:
            places = [best_within(relative(run), share) for run in runs]
            best = [0.0 if i is None else 1 - run["students"][i][0]
                    for run, i in zip(runs, places, strict=True)]  # fmt: skip
            cells.append(f"{np.median(best):.1%}" if any(best) else "none")
        cells.append(distilled_cell(runs))
        lines.append(
            f"| {arm} | {len(runs)} | {np.median(volumes):.4f} "
            f"({min(volumes):.4f}-{max(volumes):.4f}) | " + " | ".join(cells) + " |"
        )
    for arm in ("torch-pruning", "l1"):
        counts = [beaten(peer, run) for peer in runs_of(records, arm)
                  for run in runs_of(records, "ours")]  # fmt: skip
        if counts:
            lines += ["", f"Students of {arm} that one of ours is at least as accurate and as fast "
                      f"as, by seed of ours: {', '.join(counts)}."]  # fmt: skip
    places = {
        json.dumps(record["device"], sort_keys=True): record["device"]
        for record in records.values()
    }
    lines += ["", "Measured on " + " and ".join(
        f"{one['cpu']} ({', '.join(one['simd'])})" for one in places.values()
    ) + "."]  # fmt: skip
    return "\n".join(lines)


def distilled_cell(runs: list[dict[str, Any]]) -> str:
    """Median accuracy after the longest distillation that runs of an arm have had."""
    done = [run.get("quarter", {}).get("distilled", {}) for run in runs]
    steps = max((count for one in done for count in one), key=int, default=None)
    if steps is None:
        return "-"
    reached = [one[steps] for one in done if steps in one]
    seeds = f"{len(reached)} seed" + "s" * (len(reached) > 1)
    return f"{np.median(reached):.1%} ({steps} steps, {seeds})"


def beaten(peer: dict[str, Any], run: dict[str, Any]) -> str:
    """How many students of `peer` are no better in accuracy and latency than one of `run`'s."""
    theirs, mine = relative(peer)[:, [0, 2]], relative(run)[:, [0, 2]]
    count = int((mine[None] <= theirs[:, None]).all(axis=2).any(axis=1).sum())
    return f"{count} of {len(theirs)}"


def runs_of(records: Records, arm: str) -> list[dict[str, Any]]:
    """An arm's records, by seed."""
    return [record for name, record in records.items() if name.rpartition("-")[0] == arm]


def figure(records: Records, path: Path) -> None:
    """Hypervolume against evaluations, median over seeds."""
    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    for arm in ARMS:
        runs = runs_of(records, arm)
        if runs:
            least = min(len(run["students"]) for run in runs)
            places = np.unique(np.linspace(8, least, 20).astype(int))
            curves = [[hypervolume(run, n) for n in places] for run in runs]
            axes.plot(places, np.median(curves, axis=0), label=arm)
    axes.set_xlabel("students evaluated")
    axes.set_ylabel("hypervolume")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    FigureCanvasAgg(picture)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def keep(records: Records, path: Path) -> None:
    """Write the records, their table and their figure."""
    # One line a run: thousands of numbers are not for reading.
    runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in records.items())
    write_atomic(path, f"{{\n{runs}\n}}\n".encode())
    write_atomic(path.with_suffix(".md"), f"{table(records)}\n".encode())
    figure(records, path.with_suffix(".png"))
