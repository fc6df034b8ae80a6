"""A student as one safetensors file, rebuilt from the teacher's architecture and the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moodistill import __version__
from moodistill.errors import UserError
from moodistill.genome import GenomeLayout, Group
from moodistill.graph import trace
from moodistill.layout import skeleton
from moodistill.student import Student, build_student
from moodistill.teachers import read_safetensors, save_atomic

FORMAT = "1"


def save_student(
    student: Student, layout: GenomeLayout, genome: np.ndarray, path: Path, task: str
) -> None:
    """Write weights, the genome and the blocks that give its bits their meaning."""
    metadata = {
        "moodistill_format": FORMAT,
        "moodistill_version": __version__,
        "task": task,
        "genome": layout.pack(genome).hex(),
        "blocks": json.dumps({g.name: g.block.tolist() for g in layout.groups.values()}),
        "frozen": json.dumps([g.name for g in layout.groups.values() if g.frozen]),
    }
    save_atomic(dict(student.module.state_dict()), path, metadata)


def load_student(
    path: Path, teacher: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[Student, np.ndarray]:
    """The student and its genome; `teacher` gives the architecture, its weights are not used.

    Raises:
        UserError: if the file is damaged, no student, or of another teacher's architecture.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("moodistill_format") != FORMAT:
        raise UserError(
            f"{path} is no student file of format {FORMAT} "
            f"(found {metadata.get('moodistill_format')!r}); expected one from students/<id>/"
        )
    graph = trace(teacher, input_shape)
    try:
        blocks = {k: np.array(v, dtype=int) for k, v in json.loads(metadata["blocks"]).items()}
        frozen = set(json.loads(metadata["frozen"]))
        packed = bytes.fromhex(metadata["genome"])
        sizes = {name: len(block) for name, block in blocks.items()}
        if sizes != graph.groups:
            raise ValueError("its channel groups are not those of the given teacher")
        if any(block.min() < 0 or block.max() >= len(block) for block in blocks.values()):
            raise ValueError("a block index is out of range")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe a student of {type(teacher).__name__}: {error}; "
            "give the teacher that it was made from"
        ) from error
    groups = {n: Group(n, b, np.zeros(len(b)), n in frozen) for n, b in blocks.items()}
    layout = GenomeLayout(groups, skeleton(graph, blocks))
    genome = layout.unpack(packed)
    student = build_student(graph, layout, genome)
    expected = {k: tuple(v.shape) for k, v in student.module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        wrong = sorted(k for k in set(expected) | set(found) if expected.get(k) != found.get(k))
        raise UserError(
            f"{path}: tensor {wrong[0]} is {found.get(wrong[0])}, its genome expects "
            f"{expected.get(wrong[0])}; the file is damaged, export it again"
        )
    student.module.load_state_dict(tensors)
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; export the student again")
    return student, genome
