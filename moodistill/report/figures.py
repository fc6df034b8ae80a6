"""What a person looks at: the front as figures and as a table for the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moodistill.io.atomic import write_atomic
from moodistill.pareto.table import FrontRow
from moodistill.storage.store import Generation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

# Okabe and Ito's palette, told apart with any colour vision.
GREY, BLUE, GREEN, VERMILION, BLACK = "#999999", "#0072B2", "#009E73", "#D55E00", "#000000"


def plot_front(rows: Sequence[FrontRow], path: Path, title: str) -> None:
    """Write a PNG of accuracy against latency and against parameters, finalists marked."""
    figure = _figure(11.0, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, rows, "latency_ms", "latency (ms, log scale)")
    _panel(right, rows, "parameters", "parameters (log scale)")
    metric = rows[0].metric if rows else "accuracy"
    left.set_ylabel(f"validation {metric} (%)")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title, parse_math=False)
    _save(figure, path)


def _panel(axes: Axes, rows: Sequence[FrontRow], field: str, label: str) -> None:
    def points(stage: str) -> tuple[list[FrontRow], list[float], list[float]]:
        found = [row for row in rows if row.stage == stage]
        return (
            found,
            [getattr(row, field) for row in found],
            [100 * r.validation_accuracy for r in found],
        )

    _, x, y = points("searched")
    if x:
        axes.plot(x, y, "o", color=GREY, alpha=0.5, markersize=4, mew=0, label="searched")
    finalists, _, _ = points("distilled")
    before = [row for row in finalists if row.search_accuracy is not None]
    for row in before:
        place = getattr(row, field)
        ends = [100 * (row.search_accuracy or 0.0), 100 * row.validation_accuracy]
        axes.plot([place, place], ends, "-", color=BLUE, linewidth=0.8, zorder=1)
    if before:
        axes.plot([getattr(row, field) for row in before],
                  [100 * (row.search_accuracy or 0.0) for row in before],
                  "o", color=BLUE, markerfacecolor="white", markersize=5,
                  label="finalist before distillation")  # fmt: skip
    kinds = (("fp32", "o", BLUE, "finalist distilled"), ("int8", "D", GREEN, "its INT8 twin"))
    for precision, marker, colour, name in kinds:
        ones = [row for row in finalists if row.precision == precision]
        if not ones:
            continue
        x = [getattr(row, field) for row in ones]
        y = [100 * row.validation_accuracy for row in ones]
        axes.plot(x, y, marker, color=colour, markersize=6, label=name)
        if field == "latency_ms":
            # The low and high end of a bootstrap need not enclose the median to the last digit.
            below = [max(r.latency_ms - r.latency_ms_low, 0.0) for r in ones]
            above = [max(r.latency_ms_high - r.latency_ms, 0.0) for r in ones]
            axes.errorbar(x, y, xerr=[below, above], fmt="none", ecolor=colour, elinewidth=0.8)
    _, x, y = points("teacher")
    if x:
        axes.axhline(y[0], color=VERMILION, linewidth=0.8, linestyle=":")
        axes.plot(x, y, "*", color=VERMILION, markersize=13, label="teacher")
    if rows:
        _log_axis(axes, [getattr(row, field) for row in rows])
    axes.set_xlabel(label)
    axes.grid(True, which="both", alpha=0.2)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    # Matplotlib's own labels (3 x 10^-1, 4 x 10^-1) overlap on one decade.
    ratio = max(values) / min(values)
    if ratio < 4:
        axes.xaxis.set_major_locator(AutoLocator())
    else:
        steps = (1, 1.5, 2, 3, 5, 7) if ratio < 30 else (1, 2, 5) if ratio < 1000 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
    thousands = EngFormatter(sep="")
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x) if x >= 1000 else f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_history(generations: Sequence[Generation], path: Path) -> None:
    """Write a PNG of the front's hypervolume against the number of evaluations."""
    figure = _figure(6.0, 4.0)
    axes = figure.subplots()
    axes.plot(
        [generation.evaluations for generation in generations],
        [generation.hypervolume for generation in generations],
        "o-", color=BLUE, markersize=4,
    )  # fmt: skip
    axes.set_xlabel("students evaluated")
    axes.set_ylabel("hypervolume of the front")
    axes.grid(True, alpha=0.2)
    _save(figure, path)


def plot_structure(structure: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG of `report_html.structure_data`: widths, taps, ranks and connections by layer."""
    layers = structure["layers"]
    figure = _figure(7.0, 0.9 + 0.34 * len(layers))
    bars, blocks = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(layers))
    bars.barh(places, [layer["full"] for layer in layers], color="white", edgecolor=GREY)
    bars.barh(places, [layer["kept"] for layer in layers], color=BLUE)
    bars.set_yticks(places, [layer["name"] for layer in layers])
    bars.set_ylim(len(layers) - 0.4, -0.6)
    bars.set_xlabel("channels or neurons kept (blue) of the teacher's (outline)")
    for place, layer in enumerate(layers):
        text = f"{layer['kept']}/{layer['full']}" if layer["kept"] else layer["state"]
        text += f"  {layer['thinned']}" if layer["thinned"] else ""
        bars.text(layer["full"], place, f" {text}", va="center", fontsize=8)
        for row, cells in enumerate(layer["matrix"] or ()):
            for column, value in enumerate(cells):
                height = 0.8 / len(layer["matrix"])
                corner = (column, place - 0.4 + row * height)
                colour = BLUE if value == 1 else "white" if value == 0 else "#eeeeee"
                blocks.add_patch(_square(corner, height, colour))
    bars.margins(x=0.45 if any(layer["thinned"] for layer in layers) else 0.2)
    widest = max((len(layer["matrix"][0]) for layer in layers if layer["matrix"]), default=1)
    blocks.set_xlim(-0.2, widest + 0.2)
    blocks.set_xticks([])
    blocks.set_xlabel("block connections")
    for side in ("top", "right", "left", "bottom"):
        blocks.spines[side].set_visible(False)
    blocks.tick_params(left=False)
    figure.suptitle(title, parse_math=False)
    _save(figure, path)


def _square(corner: tuple[float, float], height: float, colour: str) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.92, 0.9 * height, facecolor=colour, edgecolor=GREY, linewidth=0.4)


def _figure(width_inches: float, height_inches: float) -> Figure:
    # Here, because matplotlib takes half a second and the table does not need it. No pyplot: its
    # global state would leak figures and pick a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomic(path, picture.getvalue())


def front_table(rows: Sequence[FrontRow]) -> str:
    """Aligned plain text: finalists, searched students and the teacher, most accurate first."""
    teacher = next((row for row in rows if row.stage == "teacher"), None)
    order = ("distilled", "searched", "teacher")
    ranked = sorted(
        rows, key=lambda row: (order.index(row.stage), -row.validation_accuracy, row.latency_ms)
    )
    metric = rows[0].metric if rows else "accuracy"
    lines = [
        ("student", "stage", metric, f"test {metric}", "parameters", "x fewer parameters",
         "latency ms", "x faster"),
    ]  # fmt: skip
    for row in ranked:
        fewer = f"{teacher.parameters / row.parameters:.2f}" if teacher else "-"
        lines.append((
            row.student, row.stage, f"{row.validation_accuracy:.4f}",
            "-" if row.test_accuracy is None else f"{row.test_accuracy:.4f}",
            f"{row.parameters:,}", fewer, f"{row.latency_ms:.4g}",
            f"{row.teacher_latency_ms / row.latency_ms:.2f}",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
