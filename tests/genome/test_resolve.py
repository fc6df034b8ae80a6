"""The genome: slices, packing, repair and the canonical form."""

import numpy as np
import pytest
import torch
from helpers import random_genome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moodistill.errors import UserError
from moodistill.genome.canonical import canonical, summary
from moodistill.genome.layout import INPUT, GenomeLayout, Group, Node
from moodistill.genome.resolve import resolve
from moodistill.student.builder import build_student

STEPS = (1, 8, 16)
LAYOUTS = ("digits", "vgg16", "resnet18")


@pytest.fixture(scope="module", params=LAYOUTS)
def prepared(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def layout(prepared):
    return prepared.layout


def genomes(layout, count, bypass=True):
    """Random genomes; a few are plain noise of any density, one is empty."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        if seed == 0:
            yield np.zeros(layout.length, dtype=bool)
        elif seed % 4 == 0:
            yield rng.random(layout.length) < rng.uniform(0.0, 1.0)
        else:
            yield random_genome(layout, rng, bypass=bypass)


def blocks_alive(group, kept):
    return np.isin(np.arange(group.blocks), group.block[kept])


def test_slices_tile_the_vector(layout):
    end = 0
    for name, place in layout.slices.items():
        assert place.start == end and place.stop > place.start
        assert place.stop - place.start == np.prod(layout.shapes[name])
        end = place.stop
    assert end == layout.length
    assert layout.teacher().all() and layout.teacher().shape == (layout.length,)


def test_views_write_through(layout):
    genome = layout.teacher()
    for name in layout.shapes:
        layout.view(genome, name)[...] = False
        assert not genome[layout.slices[name]].any()
    assert not genome.any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_pack_and_unpack(size, data):
    groups = {
        "a": Group("a", np.zeros(size, dtype=int), np.ones(size)),
        "o": Group("o", np.zeros(2, dtype=int), np.ones(2), frozen=True),
        INPUT: Group(INPUT, np.zeros(3, dtype=int), np.ones(3), frozen=True),
    }
    nodes = (
        Node("x", "input", (), (INPUT,)),
        Node("a", "layer", ("x",), ("a",), (INPUT,)),
        Node("o", "layer", ("a",), ("o",), ("a",)),
        Node("output", "output", ("o",), ("o",)),
    )
    layout = GenomeLayout(groups, nodes)
    assert layout.length == size
    genome = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    packed = layout.pack(genome)
    assert len(packed) == (size + 7) // 8
    restored = layout.unpack(packed)
    assert restored.dtype == bool and (restored == genome).all()
    restored[0] = not restored[0]  # writable, and a digest tells them apart
    assert layout.digest(restored) != layout.digest(genome)
    for wrong in (b"", packed + b"\0", packed[:-1]):
        with pytest.raises(UserError, match=f"{len(wrong)} bytes, expected {len(packed)}"):
            layout.unpack(wrong)


@pytest.mark.parametrize("step", STEPS)
def test_canonical_is_idempotent_and_leaves_its_argument(layout, step):
    for genome in genomes(layout, 24):
        before = genome.copy()
        once = canonical(layout, genome, step)
        assert (genome == before).all()
        assert (canonical(layout, once, step) == once).all()
        # A whole-step genome needs no further repair by those who do not know the step.
        assert (canonical(layout, once, 1) == once).all()
    assert canonical(layout, layout.teacher(), step).all()


@pytest.mark.parametrize("step", STEPS)
def test_repaired_structures_work(layout, step):
    """Whole steps, nothing without a reader, nothing without an input."""
    for genome in genomes(layout, 24):
        structure = resolve(layout, genome, step)
        assert structure.kept[INPUT].all()
        last = next(n for n in layout.nodes if n.kind == "output")
        assert structure.kept[last.groups[0]].all() and last.name in structure.live
        assert structure.bypassed.isdisjoint(structure.source)
        for node in layout.nodes:
            if node.name in structure.live and node.kind == "merge":
                assert any(structure.merges[node.name])
        alive = {n: blocks_alive(layout.groups[n], kept) for n, kept in structure.kept.items()}
        read = {name: np.zeros(layout.groups[name].blocks, dtype=bool) for name in alive}
        split = set()
        for name, (source,) in structure.source.items():
            group = layout.by_name[name].groups[0]
            matrix = structure.connected[name]
            assert matrix[alive[group]].any(axis=1).all(), f"{name}: a row reads nothing"
            assert not matrix[~alive[group]].any() and not matrix[:, ~alive[source]].any()
            read[source] |= matrix.any(axis=0)
            if not matrix[np.ix_(alive[group], alive[source])].all():
                split |= {group, source}
        for name, kept in structure.kept.items():
            group = layout.groups[name]
            if group.frozen:
                continue
            assert kept.any()
            assert (read[name] == alive[name]).all(), f"{name}: a block without a reader"
            parts = [group.block == b for b in range(group.blocks)] if name in split else [
                alive[name][group.block]
            ]  # fmt: skip
            for part in parts:
                width = kept[part].sum()
                assert width % step == 0 or width == part.sum(), (name, width)


def test_widths_round_to_the_nearest_step_by_importance(vgg16):
    layout = vgg16.layout
    name = "features.7"
    group = layout.groups[name]
    for width, expected in ((1, 8), (3, 8), (11, 8), (12, 16), (13, 16), (125, 128), (128, 128)):
        genome = layout.teacher()
        chosen = np.random.default_rng(width).permutation(group.size)[:width]
        layout.view(genome, f"mask/{name}")[:] = np.isin(np.arange(group.size), chosen)
        kept = resolve(layout, genome, 8).kept[name]
        assert kept.sum() == expected
        if expected >= width:
            assert kept[chosen].all()
            added = np.setdiff1d(np.flatnonzero(kept), chosen)
            # Rounding brings no block back that had no channel left.
            left = np.flatnonzero(~kept & np.isin(group.block, group.block[chosen]))
            if len(added) and len(left):
                assert group.importance[added].min() >= group.importance[left].max()
        else:
            gone = np.setdiff1d(chosen, np.flatnonzero(kept))
            assert np.isin(np.flatnonzero(kept), chosen).all()
            assert group.importance[gone].max() <= group.importance[kept].min()


def flip_irrelevant(layout, genome, rng):
    """A copy of a canonical genome with random values in every bit that has no effect."""
    structure = resolve(layout, genome)
    other = genome.copy()
    flipped = 0

    def scatter(view, where):
        nonlocal flipped
        noise = rng.random(view.shape) < 0.5
        flipped += int((where & (view != noise)).sum())
        view[where] = noise[where]

    for name, shape in layout.shapes.items():
        kind, owner = name.split("/", 1)
        view = layout.view(other, name)
        everything = np.ones(shape, dtype=bool)
        if (
            kind == "mask"
            and owner not in structure.kept
            or kind == "merge"
            and owner not in structure.live
            or kind == "bypass"
            and owner not in structure.live
            or kind in ("kernel", "rank")
            and owner not in structure.source
        ):
            scatter(view, everything)
        elif kind == "block":
            if owner not in structure.source or owner in structure.through:
                scatter(view, everything)
            else:
                node = layout.by_name[owner]
                rows = blocks_alive(layout.groups[node.groups[0]], structure.kept[node.groups[0]])
                columns = blocks_alive(layout.groups[node.reads[0]], structure.kept[node.reads[0]])
                scatter(view, ~(rows[:, None] & columns[None, :]))
    return other, flipped


def test_bits_without_effect_do_not_reach_the_canonical_form(prepared):
    layout = prepared.layout
    images = torch.randn(2, *prepared.graph.input_shape)[:, :, ::2, ::2]
    if "hidden" in layout.by_name:
        images = torch.randn(2, *prepared.graph.input_shape)
    total = compared = 0
    for seed, genome in enumerate(genomes(layout, 24)):
        step = STEPS[seed % 3]
        once = canonical(layout, genome, step)
        other, flipped = flip_irrelevant(layout, once, np.random.default_rng(seed))
        total += flipped
        assert (canonical(layout, other, step) == once).all()
        if flipped and compared < 3:
            compared += 1
            with torch.no_grad():
                logits = [
                    build_student(prepared.graph, layout, g).module(images)
                    for g in (genome, canonical(layout, genome), once, other)
                ]
            assert torch.equal(logits[0], logits[1])  # repair does not change the student
            assert torch.equal(logits[2], logits[3])
    assert total > 0 and compared == 3


def test_masks_of_blocks_that_nobody_reads_have_no_effect(vgg16):
    layout = vgg16.layout
    group = layout.groups["features.24"]
    genome = layout.teacher()
    layout.view(genome, "block/features.27")[:, 2] = False
    once = canonical(layout, genome)
    assert not layout.view(once, "mask/features.24")[group.block == 2].any()
    other = genome.copy()
    members = np.flatnonzero(group.block == 2)
    layout.view(other, "mask/features.24")[members[5:]] = False
    assert (canonical(layout, other) == once).all()
    # What feeds only them is gone as well: every other bit is as it was.
    once[layout.slices["mask/features.24"]] = True
    assert once.all()


def test_dead_blocks_take_with_them_what_feeds_only_them(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    layout.view(genome, "block/features.27")[:, 1] = False
    layout.view(genome, "block/features.24")[:] = np.eye(4, dtype=bool)
    structure = resolve(layout, genome)
    for name in ("features.24", "features.20"):
        group = layout.groups[name]
        assert (structure.kept[name] == (group.block != 1)).all(), name
    assert structure.kept["features.17"].all()


@pytest.mark.parametrize("step", STEPS)
def test_the_empty_genome_is_repaired_to_a_working_network(prepared, step):
    layout = prepared.layout
    genome = canonical(layout, np.zeros(layout.length, dtype=bool), step)
    structure = resolve(layout, genome)
    assert all(kept.sum() in (step, len(kept)) for kept in structure.kept.values())
    student = build_student(prepared.graph, layout, genome)
    with torch.no_grad():
        logits = student.module(torch.zeros(2, *prepared.graph.input_shape))
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()
    assert student.parameters < 0.05 * sum(p.numel() for p in prepared.graph.module.parameters())


def test_bypass_passes_the_input_on(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    for name in ("features.27", "features.30"):
        layout.view(genome, f"bypass/{name}")[0] = False
    structure = resolve(layout, genome)
    assert structure.bypassed == {"features.27", "features.30"}
    assert structure.source["features.34"] == ("features.24",)
    assert structure.through == {"features.34"}
    assert not {"features.27", "features.30"} & set(structure.kept)
    assert not {"features.27", "features.30"} & set(structure.source)
    # The mask of what is read past a bypass counts, the masks of what is bypassed do not.
    other = genome.copy()
    layout.view(other, "mask/features.27")[:200] = False
    layout.view(other, "block/features.34")[:, 1] = False
    assert (canonical(layout, other) == genome).all()
    layout.view(other, "mask/features.24")[:200] = False
    assert (canonical(layout, other) != genome).any()


def test_an_add_keeps_an_input(resnet18):
    layout = resnet18.layout
    genome = layout.teacher()
    layout.view(genome, "merge/add_3")[:] = False
    structure = resolve(layout, genome)
    assert structure.merges["add_3"] == (True, False)
    expected = layout.teacher()
    layout.view(expected, "merge/add_3")[1] = False
    assert resolve(layout, expected).source == structure.source
    # Without the residual branch its layers are gone, and with them their own group.
    layout.view(genome, "merge/add_3")[1] = True
    structure = resolve(layout, genome)
    assert {"layer2.1.conv1", "layer2.1.conv2"}.isdisjoint(structure.live)
    assert "layer2.1.conv1" not in structure.kept


def test_summary(vgg16, resnet18):
    layout = vgg16.layout
    assert summary(layout, layout.teacher()).startswith("channels 4736/4736; connections ")
    assert summary(layout, layout.teacher()).endswith("bypassed none")
    genome = layout.teacher()
    layout.view(genome, "bypass/features.37")[0] = False
    layout.view(genome, "bypass/classifier.0")[0] = False
    layout.view(genome, "mask/features.0")[:16] = False
    layout.view(genome, "block/features.20")[0, :3] = False
    text = summary(layout, genome)
    assert "bypassed classifier.0, features.37" in text and "\n" not in text
    assert f"channels {4736 - 512 - 512 - 16}/4736" in text
    whole = sum(int(np.prod(s)) for n, s in layout.shapes.items() if n.startswith("block/"))
    # The two bypassed layers and the two that read past them have no connection bits in use.
    free = sum(
        int(np.prod(layout.shapes[f"block/{n}"]))
        for n in ("features.37", "features.40", "classifier.0", "classifier.3")
    )
    assert f"connections {whole - free - 3}/{whole - free}" in text
    genome = resnet18.layout.teacher()
    resnet18.layout.view(genome, "merge/add_7")[0] = False
    text = summary(resnet18.layout, genome)
    assert "merge edges 15/16" in text and "gone layer4.1.conv1, layer4.1.conv2" in text


def sizes(layout, kind):
    return {n.split("/", 1)[1]: s for n, s in layout.shapes.items() if n.startswith(f"{kind}/")}


def test_layout_of_vgg16(vgg16):
    layout = vgg16.layout
    masks = {name: shape[0] for name, shape in sizes(layout, "mask").items()}
    assert masks.pop("classifier.0") == 512
    assert sum(masks.values()) == 4224 and len(masks) == 13
    assert not sizes(layout, "merge")
    bypass = sizes(layout, "bypass")
    assert len(bypass) == 13
    assert "features.0" not in bypass and "classifier.3" not in bypass
    assert sizes(layout, "block")["features.27"] == (4, 4)
    assert "features.0" not in sizes(layout, "block")  # it reads the image
    assert sizes(layout, "block")["classifier.3"] == (1, 4)


def test_layout_of_resnet18(resnet18):
    layout = resnet18.layout
    merges = sizes(layout, "merge")
    assert len(merges) == 8 and set(merges.values()) == {(2,)}
    group = {layer.name: layer.groups[0] for layer in layout.layers}
    assert group["conv1"] == group["layer1.0.conv2"] == group["layer1.1.conv2"] == "conv1"
    for stage in (2, 3, 4):
        tied = {group[f"layer{stage}.{part}"] for part in ("0.conv2", "1.conv2", "0.downsample.0")}
        assert len(tied) == 1
        assert group[f"layer{stage}.0.conv1"] == f"layer{stage}.0.conv1"
    masks = sizes(layout, "mask")
    assert len(masks) == 12 and sum(s[0] for s in masks.values()) == 3 * (64 + 128 + 256 + 512)
    # Bypassable: the first convolution of a block, where it keeps the resolution.
    assert set(sizes(layout, "bypass")) == {
        "layer1.0.conv1", "layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1", "layer4.1.conv1",
    }  # fmt: skip


def test_blocks_are_even_and_layouts_deterministic(prepared):
    from moodistill.teacher.blocks import build_layout

    again = build_layout(prepared.graph, prepared.samples)
    for name, group in prepared.layout.groups.items():
        counts = np.bincount(group.block)
        assert len(counts) == max(1, min(4, group.size // 16)) or group.frozen
        assert counts.max() - counts.min() <= 1
        assert (again.groups[name].block == group.block).all()
        assert (again.groups[name].importance == group.importance).all()
        assert (group.importance >= 0).all() and np.isfinite(group.importance).all()
        if not group.frozen:
            assert group.importance.std() > 0
    for node in prepared.layout.layers:
        shape = (
            prepared.layout.groups[node.groups[0]].blocks,
            prepared.layout.groups[node.reads[0]].blocks,
        )
        assert node.energy.shape == shape and (node.energy >= 0).all()


def same_structure(first, second):
    """Whether two repaired genomes describe one student."""
    return (
        first.live == second.live
        and first.bypassed == second.bypassed
        and first.source == second.source
        and first.merges == second.merges
        and first.kernels == second.kernels
        and first.ranks == second.ranks
        and first.kept.keys() == second.kept.keys()
        and all((first.kept[n] == second.kept[n]).all() for n in first.kept)
        and all((first.connected[n] == second.connected[n]).all() for n in first.connected)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1), step=st.sampled_from(STEPS))
def test_any_bits_have_one_canonical_form_of_one_structure(layout, seed, density, step):
    rng = np.random.default_rng(seed)
    genome = rng.random(layout.length) < density
    once = canonical(layout, genome, step)
    assert (layout.unpack(layout.pack(genome)) == genome).all()
    assert (canonical(layout, once, step) == once).all()
    structure = resolve(layout, genome, step)
    assert same_structure(structure, resolve(layout, once, step))
    # Further along the same bits: what is canonical stays the student it is without the step.
    assert same_structure(structure, resolve(layout, once, 1))
    other = once.copy()
    other[rng.integers(len(other))] ^= True
    changed = canonical(layout, other, step)
    assert (changed == once).all() == same_structure(structure, resolve(layout, other, step))
    assert (layout.digest(changed) == layout.digest(once)) == (changed == once).all()
