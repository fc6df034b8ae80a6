"""Layers to leave alone, and bounds of widths."""

import json

import numpy as np
import pytest
import torch
from helpers import random_genome

from moodistill.errors import UserError
from moodistill.evolution.operators import DensitySampling
from moodistill.genome.canonical import canonical
from moodistill.genome.layout import Group
from moodistill.genome.layout_file import read_layout, write_layout
from moodistill.genome.resolve import _round_widths, resolve
from moodistill.pareto.table import read_front
from moodistill.storage.store import Store
from moodistill.student.builder import build_student
from moodistill.student.file import load_student, save_student
from moodistill.teacher.blocks import LayerRules, build_layout
from moodistill.teacher.task import load_task

RULES = LayerRules(("conv3.0",), {"conv4.0": 48, "hidden": 20}, {"block1a.0": 16, "hidden": 40})


@pytest.fixture(scope="module")
def layout(digits):
    return build_layout(digits.graph, digits.samples, RULES)


def test_a_layer_left_alone_has_no_genes(layout):
    for kind in ("mask", "block", "bypass", "kernel", "rank"):
        assert f"{kind}/conv3.0" not in layout.slices
    for kind in ("mask", "block", "kernel", "rank"):
        assert f"{kind}/conv4.0" in layout.slices


@pytest.mark.parametrize("step", [1, 8])
def test_widths_stay_within_bounds(layout, step):
    rng = np.random.default_rng(0)
    genomes = [random_genome(layout, rng, bypass=True) for _ in range(150)]
    genomes += list(DensitySampling(layout, step)._do(None, 40, random_state=rng)[1:])
    seen = set()
    for genome in genomes:
        repaired = canonical(layout, genome, step)
        assert np.array_equal(canonical(layout, repaired, step), repaired)
        kept = {
            name: int(mask.sum()) for name, mask in resolve(layout, repaired, step).kept.items()
        }
        assert kept["conv3.0"] == 64
        if "conv4.0" in kept:
            assert kept["conv4.0"] >= 48
        if "hidden" in kept:
            assert 20 <= kept["hidden"] <= 40
            seen.add(kept["hidden"])
        if "block1a.0" in kept:
            assert kept["block1a.0"] <= 16
    assert len(seen) > 1


def test_bounds_of_parts_of_which_one_is_nearly_gone():
    """Rounding may empty a part while the others are still more than the bound allows."""
    group = Group("g", np.arange(64) // 16, np.arange(64.0), most=20)
    for counts in ([14, 12, 2, 12], [16, 1, 1, 16], [2, 2, 2, 16], [16, 16, 16, 16]):
        kept = np.concatenate([np.arange(16) < count for count in counts])
        _round_widths(group, kept, 8, split=True)
        assert 0 < kept.sum() <= 20
        again = kept.copy()
        assert not _round_widths(group, again, 8, split=True) and np.array_equal(again, kept)


def test_bounds_of_layers_that_share_a_width_must_fit(resnet18):
    rules = LayerRules(least={"conv1": 48}, most={"layer1.0.conv2": 16})
    with pytest.raises(UserError, match="share their width .* at least 48 and at most 16"):
        build_layout(resnet18.graph, resnet18.samples, rules)


@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize(("least", "most"), [(1, 4), (10, 12), (33, 35)])
def test_bounds_that_whole_steps_cannot_meet_hold_too(digits, step, least, most, tmp_path):
    names = ("conv3.0", "conv4.0", "hidden")
    rules = LayerRules((), dict.fromkeys(names, least), dict.fromkeys(names, most))
    layout = build_layout(digits.graph, digits.samples, rules)
    rng = np.random.default_rng(0)
    for place in range(15):
        genome = canonical(layout, random_genome(layout, rng), step)
        assert np.array_equal(canonical(layout, genome, step), genome)
        kept = resolve(layout, genome, step).kept
        assert all(least <= kept[name].sum() <= most for name in names if name in kept)
        if place < 3:  # what is built is what the genome says
            student = build_student(digits.graph, layout, genome)
            save_student(student, layout, genome, tmp_path / "s.safetensors", "digits")
            found = load_student(tmp_path / "s.safetensors", digits.task.build(), (1, 32, 32))[1]
            assert np.array_equal(found, genome)


def test_files_know_the_rules(layout, digits, tmp_path):
    genome = canonical(layout, random_genome(layout, np.random.default_rng(3)), 8)
    student = build_student(digits.graph, layout, genome)
    save_student(student, layout, genome, tmp_path / "s.safetensors", "digits")
    again, found = load_student(tmp_path / "s.safetensors", digits.task.build(), (1, 32, 32))
    assert np.array_equal(found, genome)
    images = torch.randn(3, 1, 32, 32)
    assert torch.equal(again.module(images), student.module(images))
    write_layout(tmp_path, layout)
    read = read_layout(tmp_path)
    assert read.slices == layout.slices
    assert np.array_equal(canonical(read, genome, 8), genome)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (LayerRules(("conv9",)), "unknown layer 'conv9'"),
        (LayerRules(least={"hidden": 65}), "65 and 64 of its 64"),
        (LayerRules(least={"hidden": 30}, most={"hidden": 20}), "30 and 20"),
        (LayerRules(most={"hidden": 0}), "expected 1 <="),
    ],
)
def test_impossible_rules_are_refused(digits, rules, words):
    with pytest.raises(UserError, match=words):
        build_layout(digits.graph, digits.samples, rules)


def test_rules_from_the_shell(call, tmp_path):
    budget = ["--population", "4", "--generations", "1", "--finalists", "1", "--distill-steps", "2"]
    rules = ["--keep", "conv3.0", "--keep", "conv4.0", "--min-width", "hidden=32"]
    rules += ["--max-width", "block2a.0=48"]
    folder = tmp_path / "run"
    call("run", "--model", "digits", "--out", folder, *budget, *rules, "--no-int8")
    teacher, *rows = read_front(folder)
    whole = sum(p.numel() for p in load_task("digits").build().parameters())
    assert teacher.student == "teacher" and teacher.parameters == whole
    assert json.loads((folder / "run.json").read_text())["config"]["distill"]["flip"] is False
    read = read_layout(folder)
    with Store.open(folder) as store:
        for one in store.all()[1:]:
            kept = resolve(read, read.unpack(one.genome), 8).kept
            assert kept.get("block2a.0", np.ones(0)).sum() <= 48
    layout = read_layout(folder)
    assert layout.groups["conv3.0"].frozen and layout.groups["hidden"].least == 32
    student = next((folder / "students").glob("s*")).name
    call("export", folder, student, "--out", tmp_path / "out")
    call("run", "--resume", folder, "--keep", "conv3.0", "--keep", "conv4.0", "--no-int8")
    done = call("run", "--resume", folder, "--keep", "hidden", code=2)
    assert "keep conv3.0,conv4.0, not hidden" in done.stderr
    bad = ["--model", "digits", "--out", tmp_path / "other"]
    assert "unknown layer" in call("run", *bad, "--keep", "nothing", code=2).stderr
    with pytest.raises(SystemExit):
        call("run", *bad, "--min-width", "hidden")
