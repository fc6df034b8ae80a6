"""One genome for one student: bits without effect are True; and a student in one line."""

from __future__ import annotations

import numpy as np

from moodistill.genome.kernels import write_kernel
from moodistill.genome.layout import GenomeLayout
from moodistill.genome.ranks import write_rank
from moodistill.genome.resolve import resolve
from moodistill.genome.structure import Structure, alive_in, thinned


def canonical(layout: GenomeLayout, genome: np.ndarray, step: int = 1) -> np.ndarray:
    """The repaired genome in which every bit that has no effect is True.

    Two genomes of the same student have the same canonical form; it is idempotent.
    """
    return settled(layout, genome, step)[0]


def settled(
    layout: GenomeLayout, genome: np.ndarray, step: int = 1
) -> tuple[np.ndarray, Structure]:
    """The canonical genome, and what it means."""
    while True:
        structure = resolve(layout, genome, step)
        result = _genome_of(layout, structure)
        # A bypass without effect is taken back, which may wire a layer in that nobody reads.
        back = [f"bypass/{n.name}" for n in layout.layers if n.bypassable]
        if all(layout.view(result, name)[0] == layout.view(genome, name)[0] for name in back):
            return result, structure
        genome = result


def _genome_of(layout: GenomeLayout, structure: Structure) -> np.ndarray:
    result = layout.teacher()
    for name, kept in structure.kept.items():
        if f"mask/{name}" in layout.slices:
            layout.view(result, f"mask/{name}")[:] = kept
    for name in structure.dropped:
        layout.view(result, f"mask/{name}")[:] = False
    alive = {name: alive_in(layout, structure, [name]) for name in layout.groups}
    for name, matrix in structure.connected.items():
        if f"block/{name}" in layout.slices and name not in structure.through:
            rows = np.concatenate([alive[g] for g in layout.by_name[name].groups])
            columns = np.concatenate([alive[g] for g in structure.source[name]])
            matters = rows[:, None] & columns[None, :]
            layout.view(result, f"block/{name}")[:] = matrix | ~matters
    for name, inputs in structure.merges.items():
        layout.view(result, f"merge/{name}")[:] = inputs
    for name in structure.bypassed:
        layout.view(result, f"bypass/{name}")[:] = False
    for path, taps in structure.kernels.items():
        node = layout.kernels[path]
        write_kernel(layout.view(result, f"kernel/{path}"), node.kernel, node.rings, taps)
    for path, rank in structure.ranks.items():
        write_rank(layout.view(result, f"rank/{path}"), layout.ranked[path].ranks, rank)
    return result


def summary(layout: GenomeLayout, genome: np.ndarray | Structure) -> str:
    """One line: widths, connections, merges and bypasses, kernels and ranks that are left."""
    structure = genome if isinstance(genome, Structure) else resolve(layout, genome)
    masked = [g for g in layout.groups.values() if not g.frozen]
    live = [g for g in masked if g.name in structure.kept]
    kept = sum(int(structure.kept[g.name].sum()) * g.width for g in live)
    channels = f"channels {kept}/{sum(g.size * g.width for g in masked)}"
    cut = total = 0
    for name, matrix in structure.connected.items():
        if f"block/{name}" in layout.slices and name not in structure.through:
            rows = alive_in(layout, structure, layout.by_name[name].groups)
            columns = alive_in(layout, structure, structure.source[name])
            total += int(rows.sum() * columns.sum())
            cut += int((~matrix[np.ix_(rows, columns)]).sum())
    parts = [channels, f"connections {total - cut}/{total}"]
    edges = sum(len(kept) for kept in structure.merges.values())
    if edges:
        parts.append(f"merge edges {sum(map(sum, structure.merges.values()))}/{edges}")
    parts.append(f"bypassed {', '.join(sorted(structure.bypassed)) or 'none'}")
    paths = [path for path in layout.calls if thinned(structure, path)]
    if paths:
        parts.append("thinned " + ", ".join(f"{p} {thinned(structure, p)}" for p in paths))
    gone = [n.name for n in layout.layers if n.name not in structure.live]
    if gone:
        parts.append(f"gone {', '.join(gone)}")
    return "; ".join(parts)
