"""The genome's layout as JSON, so that a run's genomes can be read without its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.genome.layout import GenomeLayout, Group, Node
from moodistill.io.atomic import write_json_atomic
from moodistill.io.records import parse_json

LAYOUT_FILE = "layout.json"


def write_layout(folder: Path, layout: GenomeLayout) -> None:
    """Write `layout.json`: groups with their blocks, nodes with their wiring; no importance."""
    content = {
        "groups": [
            {
                "name": g.name, "block": g.block.tolist(), "frozen": g.frozen,
                "least": g.least, "most": g.most, "width": g.width,
            }
            for g in layout.groups.values()
        ],
        "nodes": [
            {
                "name": n.name, "kind": n.kind, "inputs": list(n.inputs),
                "groups": list(n.groups), "reads": list(n.reads),
                "bypassable": n.bypassable, "fixed": n.fixed, "shared": n.shared,
                "module": n.module, "lanes": list(n.lanes), "repeat": n.repeat,
                "kernel": list(n.kernel), "rings": list(n.rings), "ranks": list(n.ranks),
            }
            for n in layout.nodes
        ],
    }  # fmt: skip
    write_json_atomic(folder / LAYOUT_FILE, content)


def read_layout(folder: Path) -> GenomeLayout | None:
    """The layout of a run's genomes, None if the run has none on file.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / LAYOUT_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = parse_json(path.read_bytes())
        groups = {
            g["name"]: Group(
                g["name"],
                np.array(g["block"], int),
                np.zeros(len(g["block"])),
                g["frozen"],
                g["least"],
                g["most"],
                g["width"],
            )
            for g in content["groups"]
        }
        nodes = tuple(
            Node(
                n["name"],
                n["kind"],
                tuple(n["inputs"]),
                tuple(n["groups"]),
                tuple(n["reads"]),
                n["bypassable"],
                fixed=n["fixed"],
                # Runs of earlier versions have no kernel and rank genes, and lack all of these.
                shared=n.get("shared", False),
                module=n.get("module", ""),
                lanes=tuple(n.get("lanes", ())),
                repeat=n.get("repeat", 1),
                kernel=tuple(n.get("kernel", ())),
                rings=tuple(n.get("rings", ())),
                ranks=tuple(n.get("ranks", ())),
            )
            for n in content["nodes"]
        )
        return GenomeLayout(groups, nodes)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); resume the run to write it again"
        ) from error
