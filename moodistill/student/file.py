"""A student as one safetensors file, rebuilt from the teacher's architecture and the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moodistill.errors import UserError
from moodistill.genome.canonical import canonical
from moodistill.genome.layout import GenomeLayout, Group
from moodistill.io.cache import content_digest
from moodistill.io.tensorfile import read_safetensors, save_atomic
from moodistill.student.builder import build_student
from moodistill.student.network import Student
from moodistill.teacher.blocks import skeleton
from moodistill.teacher.graph import TeacherGraph, trace
from moodistill.version import __version__

FORMAT = "5"
READABLE = ("4", FORMAT)  # 4 came before kernel and rank genes: no layer has lost any
REQUIRED = ("genome", "blocks", "frozen", "fixed", "task", "digest")


def save_student(
    student: Student, layout: GenomeLayout, genome: np.ndarray, path: Path, task: str
) -> None:
    """Write weights, the genome and the blocks that give its bits their meaning.

    Raises:
        ValueError: if the genome is not canonical; its repair needs what the file does not hold.
    """
    if not np.array_equal(canonical(layout, genome), genome):
        raise ValueError("the genome is not canonical; build and save the student of canonical()")
    # Modules that are left whole may hold one tensor under two names, which the format refuses.
    tensors = {name: t.clone() for name, t in student.module.state_dict().items()}
    metadata = {
        "moodistill_format": FORMAT,
        "moodistill_version": __version__,
        "task": task,
        "genome": layout.pack(genome).hex(),
        "blocks": json.dumps({g.name: g.block.tolist() for g in layout.groups.values()}),
        "frozen": json.dumps([g.name for g in layout.groups.values() if g.frozen]),
        "fixed": json.dumps([layer.name for layer in layout.layers if layer.fixed]),
        "opaque": json.dumps([node.name for node in layout.nodes if node.kind == "opaque"]),
    }
    metadata["digest"] = content_digest(tensors, metadata)
    save_atomic(tensors, path, metadata)


def load_student(
    path: Path, teacher: nn.Module, input_shape: tuple[int, ...]
) -> tuple[Student, np.ndarray]:
    """The student and its genome; `teacher` gives the architecture, its weights are not used.

    Raises:
        UserError: if the file is damaged, no student, or of another teacher's architecture.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("moodistill_format") not in READABLE:
        raise UserError(
            f"{path} is no student file: moodistill_format is "
            f"{metadata.get('moodistill_format')!r}, expected {FORMAT!r}; "
            "give a student.safetensors from a run's students/<id>/"
        )
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; the file is damaged, export it again")
    if content_digest(tensors, metadata) != metadata["digest"]:
        raise UserError(
            f"{path} does not have the digest it states; it is damaged, export it again"
        )
    modules = {name for name, _ in teacher.named_modules()}
    try:
        whole = modules.intersection(json.loads(metadata.get("opaque", "[]")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: opaque is no list of modules; export it again") from error
    graph = trace(teacher, input_shape, whole)
    try:
        student, genome = _rebuild(graph, metadata)
    except UserError:
        raise
    except Exception as error:
        # The digest holds, so the file was written like this; whatever it says, say it in one line.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} does not describe a student of {type(teacher).__name__}: {reason[0]}; "
            "give the teacher that it was made from"
        ) from error
    expected = {k: tuple(v.shape) for k, v in student.module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        wrong = sorted(k for k in set(expected) | set(found) if expected.get(k) != found.get(k))
        raise UserError(
            f"{path}: tensor {wrong[0]} is {found.get(wrong[0])}, its genome expects "
            f"{expected.get(wrong[0])}; give the teacher that it was made from"
        )
    student.module.load_state_dict(tensors)
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; export the student again")
    return student, genome


def _rebuild(graph: TeacherGraph, metadata: dict[str, str]) -> tuple[Student, np.ndarray]:
    """The student's structure from the metadata; raises whatever is wrong with it."""
    blocks = {k: np.array(v, dtype=int) for k, v in json.loads(metadata["blocks"]).items()}
    frozen = set(json.loads(metadata["frozen"]))
    if {name: len(block) for name, block in blocks.items()} != graph.groups:
        raise ValueError("its channel groups are not those of the given teacher")
    if any(block.min() < 0 or block.max() >= len(block) for block in blocks.values()):
        raise ValueError("a block index is out of range")
    widths = graph.grouping.widths
    groups = {
        n: Group(n, b, np.zeros(len(b)), n in frozen, width=widths[n]) for n, b in blocks.items()
    }
    fixed = set(json.loads(metadata["fixed"]))
    layout = GenomeLayout(groups, skeleton(graph, blocks, keep=fixed))
    genome = layout.unpack(bytes.fromhex(metadata["genome"]))
    return build_student(graph, layout, genome), genome
