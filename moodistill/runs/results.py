"""What a run leaves: its table, figures and report, and its bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moodistill.bundle.folder import write_package
from moodistill.bundle.model import Origin
from moodistill.finalists.confirm import SLACK, Confirmed, still_confirmed
from moodistill.finalists.distil import read_finalists
from moodistill.pareto.evaluation import Latency
from moodistill.pareto.table import SUFFIX, FrontRow, write_front
from moodistill.report import figures
from moodistill.report.page import structure_data, write_report
from moodistill.runs.rows import exported_front, make_rows
from moodistill.runs.session import Session
from moodistill.storage.folder import read_run, write_run
from moodistill.storage.searched import Searched

Changes = dict[str, list[str]]


def write_results(session: Session, status: str, confirmed: Confirmed) -> None:
    """Write all that has been found, and how the run ended.

    Args:
        session: the run.
        status: how it ended.
        confirmed: what was measured again; nothing if it ended before.
    """
    searched = session.searched()
    if searched is None:
        write_status(session, status, {})
        return
    if not confirmed.latencies:
        confirmed = _confirmed_before(session, searched)
    rows = make_rows(
        session.folder, searched, session.accuracies.known, confirmed,
        session.backend.timing.teacher_latency_ms,
    )  # fmt: skip
    write_table(session, rows)
    package_finalists(session, searched, rows)
    changes = changed_places(searched, confirmed.latencies)
    _tell(session, searched, rows, confirmed, changes)
    write_status(session, status, changes)
    write_report(session.folder, session.store, rows)
    _draw_structures(session, searched)
    session.tell(f"time: {_times(session.seconds)}")


def _confirmed_before(session: Session, searched: Searched) -> Confirmed:
    """What was measured again before, where the front is what it was; else nothing."""
    before = still_confirmed(session.folder, searched)
    whole = before.latencies.keys() >= searched.near_front(SLACK).keys()
    return before if session.students or whole else Confirmed()


def write_table(session: Session, rows: Sequence[FrontRow]) -> None:
    """`pareto.csv`, `pareto.json` and the figures."""
    folder, config = session.folder, session.config
    title = f"{config.model}: {len(session.store)} students searched, {config.preset} preset"
    write_front(folder, list(rows))
    figures.plot_front(list(rows), folder / "pareto.png", title)
    figures.plot_history(session.store.generations(), folder / "history.png")


def package_finalists(session: Session, searched: Searched, rows: Sequence[FrontRow]) -> None:
    """Complete the folder of every exported student into a bundle."""
    context = session.context
    teacher = next(row for row in rows if row.stage == "teacher")
    for row in rows:
        model = session.folder / row.onnx
        if row.onnx and model.is_file():
            genome = searched.students[row.student.removesuffix(SUFFIX)].genome
            origin = Origin(context.task.name, context.teacher_digest, genome)
            write_package(model.parent, row, teacher, context.data, origin, session.device)


def changed_places(searched: Searched, confirmed: Mapping[str, Latency]) -> Changes:
    """Ids that the second measurement put out of the front (`lost`) and into it (`gained`)."""
    if not confirmed.keys() & searched.students.keys():
        return {"lost": [], "gained": []}
    before, after = set(searched.front()), set(exported_front(searched, confirmed))
    return {"lost": sorted(before - after), "gained": sorted(after - before)}


def _tell(
    session: Session,
    searched: Searched,
    rows: Sequence[FrontRow],
    confirmed: Confirmed,
    changes: Changes,
) -> None:
    """Say the table, and what the second measurement has changed."""
    session.tell(figures.front_table(list(rows)))
    finalists = read_finalists(session.folder, searched)
    for name in searched.beyond(confirmed.latencies):
        if name in finalists:
            session.tell(
                f"{name} takes {confirmed.latencies[name].latency_ms:.3f} ms measured again, more "
                "than max_latency_ms; it is listed because it is distilled"
            )
    if changes["lost"] or changes["gained"]:
        session.tell(
            f"measured again: {len(changes['lost'])} students lost their place in the front "
            f"to slower timings, {len(changes['gained'])} came in (run.json names them)"
        )


def _times(seconds: Mapping[str, float]) -> str:
    """Stages with what they took, and the sum."""
    parts = [f"{name} {_minutes(value)}" for name, value in seconds.items()]
    return f"{', '.join(parts)}; in all {_minutes(sum(seconds.values()))}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def write_status(session: Session, status: str, changes: Changes) -> None:
    """Write into `run.json` how the run ended."""
    stored = read_run(session.folder)
    before = stored.get("seconds", {})
    if session.students:  # of a run whose search has ended, however this one did
        status = str(stored.get("status")).replace("running", "interrupted")
    stored.update(
        status=status,
        rejected_latency_windows=session.backend.timing.meter.rejected_windows,
        changed_by_confirmation=changes,
        # Of a resumed run those of all its parts.
        seconds={
            name: round(session.seconds.get(name, 0.0) + before.get(name, 0.0), 1)
            for name in {**before, **session.seconds}
        },
    )
    write_run(session.folder, stored)


def _draw_structures(session: Session, searched: Searched) -> None:
    """A figure of every finalist's structure."""
    layout = session.context.layout
    for name in read_finalists(session.folder, searched):
        structure = structure_data(layout, layout.unpack(searched.students[name].genome))
        path = session.folder / f"structure-{name}.png"
        figures.plot_structure(structure, path, f"{session.config.model}, student {name}")
