"""The search of a run, and what is said of it before and while it goes on."""

from __future__ import annotations

import time

from moodistill.evolution.driver import Progress, Search
from moodistill.evolution.surrogate import TRUSTED
from moodistill.progress import Stage
from moodistill.runs.estimate import estimate_seconds
from moodistill.runs.session import Session
from moodistill.runs.tables import run_tables

SHOWN = 10  # students in the live table


def announce(session: Session) -> None:
    """Say about how long it takes, which students are infeasible, and which layers stay whole."""
    config, stored = session.config, len(session.store)
    seconds = estimate_seconds(session.context, config, stored)
    count = max(0, config.search.population * config.search.generations - stored)
    if session.students:
        count, seconds["search"] = 0, 0.0
    minutes = {name: f"{value / 60:.0f} min" for name, value in seconds.items()}
    session.reporter.say(
        f"about {minutes['search']} for {count} evaluations, {minutes['finalists']} for "
        f"{config.finalists} finalists and {minutes['front']} for the front on this machine",
        estimated_seconds={name: round(value) for name, value in seconds.items()},
    )
    floor = config.search.limits.min_accuracy
    if floor and not session.students:
        metric = session.context.data.metric_label
        session.reporter.say(f"students below {metric} {floor:.4f} are infeasible (min_accuracy)")
    whole = session.context.graph.describe_uncut()
    if whole:
        session.reporter.say(f"left whole: {whole}")


def search(session: Session) -> None:
    """Evaluate all generations; those that are in the store are answered from it."""
    config = session.config.search
    with session.timed("tables"):
        tables = run_tables(session)
    searching = Search(
        session.context.layout, config, session.store, session.backend.executor, tables=tables
    )
    total = config.population * config.generations
    with (
        session.timed("search"),
        session.reporter.stage("searching", total, "student") as stage,
    ):
        listener = _Listener(session, stage)
        for progress in searching.run():
            listener.hear(progress)


class _Listener:
    """Tells the reporter what the search has reached."""

    def __init__(self, session: Session, stage: Stage) -> None:
        self.session, self.stage = session, stage
        self.began = time.monotonic()
        self.hypervolume, self.failure = 0.0, ""

    def hear(self, progress: Progress) -> None:
        """One student more."""
        fresh = progress.evaluated - progress.replayed
        if progress.generation_done:
            self.hypervolume = progress.hypervolume
        if progress.last.failure is not None and fresh:
            self.failure = progress.last.failure
            self.session.reporter.say(f"student failed: {self.failure}")
        facts: dict[str, object] = {
            "generation": progress.generation,
            "front": progress.front_size,
            "hypervolume": f"{self.hypervolume:.4f}",
        }
        if fresh:
            minutes = (time.monotonic() - self.began) / 60
            facts["per minute"] = f"{fresh / minutes:.1f}"
        if self.failure:
            facts["last failure"] = self.failure
        self.stage.update(progress.evaluated, **facts)
        if progress.generation_done:
            self._end_generation(progress, facts)

    def _end_generation(self, progress: Progress, facts: dict[str, object]) -> None:
        reporter = self.session.reporter
        reporter.say(
            f"generation {progress.generation}: {progress.evaluated} evaluated "
            f"({progress.replayed} from the store), front {progress.front_size}, "
            f"hypervolume {progress.hypervolume:.4f}{_surrogate(progress)}",
            **facts,
        )
        values = {"hypervolume": self.hypervolume, "front_size": float(progress.front_size)}
        reporter.measured(progress.evaluated, values)
        reporter.table(lambda: _best_so_far(self.session))


def _surrogate(progress: Progress) -> str:
    """How well the surrogate's ranks of the last generation were those that were measured."""
    found = progress.correlation
    if found is None:
        return ""
    off = "" if found >= TRUSTED else ", disabled for the next generation"
    return f", surrogate's rank correlation {found:.2f}{off}"


def _best_so_far(session: Session) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a small table: some of the front, spread over its latencies."""
    metric = session.context.data.metric_label
    header = ["student", metric, "parameters", "latency ms", "x faster"]
    searched = session.searched()
    if searched is None or not searched.students or searched.teacher.latency is None:
        return header, []
    teacher_ms = searched.teacher.latency.latency_ms
    rows = []
    for name, one in searched.front().items():
        assert one.latency is not None
        ms = one.latency.latency_ms
        rows.append(
            (ms, [name, f"{one.accuracy:.4f}", f"{one.parameters:,}", f"{ms:.3f}",
                  f"{teacher_ms / ms:.1f}"])
        )  # fmt: skip
    rows.sort(reverse=True)
    step = max(1, len(rows) // SHOWN)
    return header, [cells for _, cells in rows[::step][:SHOWN]]
