"""Kernel and rank genes: what their bits say, when they have no effect, what older files hold."""

import json

import numpy as np
import pytest

from moodistill.genome.canonical import canonical, settled, summary
from moodistill.genome.kernels import read_kernel, write_kernel
from moodistill.genome.layout import CONNECTIONS, INPUT, GenomeLayout, Group, Node
from moodistill.genome.layout_file import read_layout, write_layout
from moodistill.genome.ranks import nearest_rank, rank_levels, read_rank, saves, write_rank
from moodistill.genome.resolve import resolve


def bits(text):
    return np.array([one == "1" for one in text])


@pytest.mark.parametrize(
    ("text", "kernel", "rings", "taps"),
    [
        ("11", (3, 3), (1, 1), (3, 3)),
        ("01", (3, 3), (1, 1), (1, 3)),
        ("10", (3, 3), (1, 1), (3, 1)),
        ("111110", (7, 7), (3, 3), (7, 5)),
        ("010001", (7, 7), (3, 3), (3, 3)),  # wherever they stand
        ("0000000000", (11, 11), (5, 5), (1, 1)),
        ("100", (7, 5), (2, 1), (5, 3)),  # not all rings may go
        ("1", (1, 3), (0, 1), (1, 3)),
        ("0", (4, 3), (0, 1), (4, 1)),
    ],
)
def test_the_number_of_bits_says_the_kernel(text, kernel, rings, taps):
    assert read_kernel(bits(text), kernel, rings) == taps
    made = ~bits(text)
    write_kernel(made, kernel, rings, taps)
    assert read_kernel(made, kernel, rings) == taps
    start = 0
    for count in rings:  # the canonical form: True bits first
        part = made[start : start + count]
        assert (np.sort(part)[::-1] == part).all()
        start += count


def test_ranks_that_a_gene_offers():
    assert rank_levels(576, 64) == (8, 16, 24, 32, 40, 48, 56)  # 57.6 would save nothing
    assert rank_levels(64, 64) == (8, 16, 24)  # 32 is no smaller
    assert rank_levels(27, 64) == (8, 16) and rank_levels(512, 10) == (8,)
    assert rank_levels(8, 8) == ()
    wide = rank_levels(4608, 512)
    assert wide == (*range(8, 65, 8), 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448)
    for inputs, outputs in ((576, 64), (4608, 512), (64, 64), (300, 7)):
        levels = rank_levels(inputs, outputs)
        assert all(saves(r, inputs, outputs) for r in levels)
        assert all(r * inputs + r * outputs < inputs * outputs for r in levels)


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32, 12])
def test_ranks_are_whole_steps(step):
    levels = rank_levels(4608, 512)
    for count in range(len(levels) + 1):
        made = np.arange(len(levels)) < count
        rank = read_rank(made[::-1], levels, step)
        if count == len(levels):
            assert rank is None
            continue
        assert rank in levels and rank % step == 0
        apart = abs(rank - levels[count])
        assert all(abs(r - levels[count]) >= apart for r in levels if r % step == 0)
        write_rank(made, levels, rank)
        assert read_rank(made, levels) == rank and (np.sort(made)[::-1] == made).all()
    assert nearest_rank(20, (8, 16, 24), 7) is None
    assert read_rank(bits("000"), (8, 16, 24), 32) is None  # no whole step saves anything


def chain(rings=(1, 1), ranks=(), width=16, shared=False):
    """Two 3x3 convolutions and a linear layer; or one that is called twice in their place."""
    groups = {
        INPUT: Group(INPUT, np.zeros(3, int), np.ones(3), frozen=True),
        "a": Group("a", np.zeros(width, int), np.ones(width)),
        "b": Group("b", np.zeros(width, int), np.ones(width)),
        "o": Group("o", np.zeros(2, int), np.ones(2), frozen=True),
    }
    conv = {"kernel": (3, 3), "rings": rings, "ranks": ranks, "lanes": (1,), "shared": shared}
    last = "a" if shared else "b"
    nodes = (
        Node("x", "input", (), (INPUT,), lanes=(1,)),
        Node("a", "layer", ("x",), ("a",), (INPUT,), kernel=(3, 3), lanes=(1,)),
        Node("b", "layer", ("a",), (last,), ("a",), module="b", **conv),
        Node("add", "merge", ("a", "b"), (last,), lanes=(1,)),
        Node("b (1)", "layer", ("add",), (last,), (last,), module="b", **conv),
        Node("o", "layer", ("b (1)",), ("o",), (last,), lanes=(1,)),
        Node("output", "output", ("o",), ("o",), lanes=(1,)),
    )
    if not shared:
        nodes = tuple(n for n in nodes if n.name not in ("b (1)", "add"))
        nodes = (*nodes[:3], Node("o", "layer", ("b",), ("o",), ("b",), lanes=(1,)), nodes[-1])
    return GenomeLayout(groups, nodes)


@pytest.mark.parametrize("ranks", [(), (8,), tuple(range(8, 200, 8))])
def test_what_was_packed_before_is_read_with_all_taps_and_full_ranks(ranks):
    """Also where the new bits fit into the last byte of the old ones."""
    layout = chain(ranks=ranks, width=17)
    rng = np.random.default_rng(0)
    for _ in range(20):
        genome = rng.random(layout.length) < 0.5
        assert (layout.unpack(layout.pack(genome)) == genome).all()
        old = np.packbits(genome[: layout.former_length]).tobytes()
        found = layout.unpack(old)
        assert (found[: layout.former_length] == genome[: layout.former_length]).all()
        assert found[layout.former_length :].all() and found.shape == genome.shape
    assert layout.former_length == 34 and layout.length == 34 + 2 + len(ranks)


def test_a_shared_layer_has_one_gene_for_all_its_calls():
    layout = chain(ranks=(8,), shared=True, width=32)
    assert "kernel/b" in layout.slices and "rank/b" in layout.slices
    assert not [name for name in layout.slices if "(1)" in name or name.startswith("block/")]
    genome = layout.teacher()
    layout.view(genome, "kernel/b")[0] = False
    layout.view(genome, "rank/b")[:] = False
    found = resolve(layout, genome)
    assert found.kernels == {"b": (1, 3)} and found.ranks == {"b": 8}
    # Without its first call it is still there.
    layout.view(genome, "merge/add")[1] = False
    found = resolve(layout, genome)
    assert "b" not in found.live and "b (1)" in found.live
    assert found.kernels == {"b": (1, 3)} and found.ranks == {"b": 8}
    assert (canonical(layout, genome) == genome).all()


def test_ranks_that_save_nothing_are_full(vgg16):
    layout = vgg16.layout
    name, levels = "features.7", vgg16.layout.ranked["features.7"].ranks

    def rank_of(rank, outputs=128, inputs=64, taps=(3, 3), step=1):
        genome = layout.teacher()
        layout.view(genome, "mask/features.7")[outputs:] = False
        layout.view(genome, "mask/features.3")[inputs:] = False
        node = layout.kernels[name]
        write_kernel(layout.view(genome, f"kernel/{name}"), node.kernel, node.rings, taps)
        write_rank(layout.view(genome, f"rank/{name}"), levels, rank)
        found, structure = settled(layout, genome, step)
        assert (structure.ranks.get(name) is None) == layout.view(found, f"rank/{name}").all()
        return structure.ranks.get(name)

    assert levels[-1] == 96 and rank_of(96) == 96  # 576 * 128 / 704 is 104.7
    assert rank_of(48) == 48 and rank_of(48, step=16) == 48
    assert rank_of(56, step=16) in (48, 64) and rank_of(8, step=16) == 16
    assert rank_of(48, outputs=64) == 48 and rank_of(56, outputs=64) == 56
    assert rank_of(64, outputs=64) is None  # it has no more outputs
    assert rank_of(48, outputs=64, inputs=16) is None  # 144 * 64 / 208 is 44.3
    assert rank_of(40, outputs=64, inputs=16) == 40
    assert rank_of(40, outputs=64, inputs=64, taps=(1, 1)) is None  # 32
    assert rank_of(24, outputs=64, inputs=64, taps=(1, 1)) == 24
    assert rank_of(40, outputs=64, inputs=64, taps=(1, 3)) == 40  # 48


def test_layers_that_are_cut_into_blocks_have_no_rank(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    for name in ("features.24", "features.27", "features.30"):
        write_rank(layout.view(genome, f"rank/{name}"), layout.ranked[name].ranks, 64)
    assert set(resolve(layout, genome).ranks) == {"features.24", "features.27", "features.30"}
    layout.view(genome, "block/features.27")[0, 1] = False
    # The layer itself, and the one whose outputs it reads in parts.
    assert set(resolve(layout, genome).ranks) == {"features.30"}
    once = canonical(layout, genome)
    assert layout.view(once, "rank/features.24").all()
    assert not layout.view(once, "rank/features.30").all()


def test_bypassed_layers_lose_both_and_readers_past_them_keep_them(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    for name in ("features.27", "features.30"):
        layout.view(genome, f"kernel/{name}")[0] = False
        write_rank(layout.view(genome, f"rank/{name}"), layout.ranked[name].ranks, 64)
    layout.view(genome, "bypass/features.27")[0] = False
    found = resolve(layout, genome)
    assert set(found.ranks) == set(found.kernels) == {"features.30"}
    assert found.through == {"features.30"} and found.full_ranks == {"features.30": 512}


def test_a_flatten_counts_with_its_positions(digits):
    """`hidden` reads several features for each channel, past a bypass as well."""
    layout = digits.layout
    node = layout.by_name["hidden"]
    source = layout.by_name[node.inputs[0]]
    assert source.repeat > 1
    channels = sum(layout.groups[g].size for g in node.reads)
    outputs = sum(layout.groups[g].size for g in node.groups)
    assert node.ranks == rank_levels(channels * source.repeat, outputs)


def test_a_reader_sees_taps_and_ranks(vgg16):
    layout = vgg16.layout
    genome = layout.teacher()
    layout.view(genome, "kernel/features.7")[0] = False
    layout.view(genome, "kernel/features.10")[:] = False
    write_rank(layout.view(genome, "rank/features.10"), layout.ranked["features.10"].ranks, 48)
    text = summary(layout, genome)
    assert text.endswith("; thinned features.7 1x3, features.10 1x1 rank 48/128")
    assert summary(layout, resolve(layout, genome)) == text
    assert "thinned" not in summary(layout, layout.teacher())


def test_layout_files_hold_the_genes_and_older_ones_have_none(vgg16, tmp_path):
    layout = vgg16.layout
    write_layout(tmp_path, layout)
    read = read_layout(tmp_path)
    assert read.slices == layout.slices and read.kernels.keys() == layout.kernels.keys()
    genome = layout.teacher()
    layout.view(genome, "kernel/features.7")[1] = False
    write_rank(layout.view(genome, "rank/features.10"), layout.ranked["features.10"].ranks, 48)
    assert summary(read, genome) == summary(layout, genome)
    # As an earlier version wrote it.
    content = json.loads((tmp_path / "layout.json").read_text())
    for node in content["nodes"]:
        for key in ("shared", "module", "lanes", "repeat", "kernel", "rings", "ranks"):
            del node[key]
    (tmp_path / "layout.json").write_text(json.dumps(content))
    old = read_layout(tmp_path)
    assert old.length == layout.former_length == old.former_length
    packed = old.pack(genome[: old.length])
    assert layout.unpack(packed).all() and summary(old, old.unpack(packed)) == (
        summary(layout, layout.teacher())
    )


@pytest.mark.parametrize("kinds", [(), ("kernels",), ("ranks", "merges"), tuple(CONNECTIONS)])
def test_what_is_not_searched_stays(resnet18, kinds):
    layout = resnet18.layout
    kept = layout.unsearched(kinds)
    for name, place in layout.slices.items():
        searched = name.startswith(("mask/", *(CONNECTIONS[kind] for kind in kinds)))
        assert kept[place].any() != searched and kept[place].all() != searched
