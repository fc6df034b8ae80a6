"""Rows of a front, made up."""

import dataclasses

from moodistill.pareto.table import FrontRow


def student(name, accuracy, parameters, latency, stage="distilled", **changes):
    row = FrontRow(
        name, stage, None if stage == "teacher" else accuracy - 0.05, accuracy, None, parameters,
        1000, latency, latency * 0.9, latency * 1.1, 4.0, 4 * parameters, f"{name}.onnx", "ab" * 8,
        "a summary",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


TEACHER = student("teacher", 0.93, 14_000_000, 4.0, "teacher")


ROWS = [
    TEACHER,
    student("s1", 0.60, 10_000, 0.4, "searched"),
    student("d1", 0.92, 8_000_000, 3.0),
    student("d2", 0.91, 1_000_000, 1.0),
    student("d3", 0.80, 500_000, 0.8),
    student("d4", 0.62, 100_000, 0.43),
]
