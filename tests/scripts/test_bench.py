"""The benches, small: real students of the digits task, kept and carried on."""

import importlib
import json

import numpy as np
import pytest
from helpers import ROOT
from helpers.small import make_small
from scipy.stats import kendalltau


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(monkeypatch, tmp_path, cache):
    """Runs a script's `main` with options, its results in `tmp_path`; returns its exit code."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    monkeypatch.setenv("MOODISTILL_CACHE", str(cache))
    make_small(monkeypatch)

    def run(module, *options):
        monkeypatch.setattr("sys.argv", [module, "--out", str(tmp_path), *map(str, options)])
        return importlib.import_module(module).main()

    return run


def search(bench, tmp_path, *options):
    common = ("--model", "digits", "--evaluations", 6, "--seeds", 1)
    return bench("search", *common, "--folder", tmp_path / "stores", *options)


def test_the_search_bench_keeps_what_it_has_measured(bench, tmp_path, capsys):
    assert search(bench, tmp_path, "--arms", "random,l1", "--distill-steps", 5) == 0
    records = json.loads((tmp_path / "search-digits.json").read_text())
    assert list(records) == ["random-0", "l1-0"]
    assert len(records["random-0"]["students"]) == 6  # of uniform widths digits has but three
    for record in records.values():
        error, parameters, milliseconds = np.array(record["students"]).T
        assert 0 < len(error) <= 6 and (error >= 0).all() and (error <= 1).all()
        assert (parameters <= record["teacher"][1]).all() and (milliseconds > 0).all()
        quarter = record.get("quarter")
        assert quarter is None or 0 <= quarter["distilled"]["5"] <= 1
    assert "| random | 1 |" in capsys.readouterr().out
    assert (tmp_path / "search-digits.png").stat().st_size > 1000
    # Nothing is measured twice.
    assert search(bench, tmp_path, "--arms", "random,l1", "--distill-steps", 5) == 0
    assert json.loads((tmp_path / "search-digits.json").read_text()) == records


def test_a_limited_bench_is_kept_apart(bench, tmp_path, capsys):
    assert search(bench, tmp_path, "--arms", "l1") == 0
    limited = ("--arms", "ours", "--min-accuracy", 0.5)
    assert search(bench, tmp_path / "limited", *limited) == 0
    (record,) = json.loads((tmp_path / "search-digits-limited.json").read_text()).values()
    assert record["min_accuracy"] == 0.5
    assert list(json.loads((tmp_path / "search-digits.json").read_text())) == ["l1-0"]
    assert search(bench, tmp_path, "--arms", "ours", "--min-accuracy", 0.6) == 2
    assert "--min-accuracy 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--arms", "ours,theirs"), "'theirs'"), (("--table-only",), "no records")],
)
def test_bad_options_of_the_search_bench(bench, tmp_path, capsys, options, named):
    assert search(bench, tmp_path, *options) == 2
    assert named in capsys.readouterr().err


def test_the_proxy_bench(bench, tmp_path, capsys, monkeypatch):
    """Scores and what a distillation reaches, of students that are kept one by one."""
    monkeypatch.setattr("proxy.SHORT", (1, 2))
    options = ("--model", "digits", "--students", 6, "--steps", 4)
    assert bench("proxy", *options) == 0
    first = json.loads((tmp_path / "proxy-digits.json").read_text())
    assert len(first) == 6
    for record in first.values():
        assert set(record["seconds"]) < set(record["scores"])
        assert all(0 <= score <= 1 for score in [*record["scores"].values(), record["reached"]])
    text = (tmp_path / "proxy-digits.md").read_text()
    assert "closed form, whole patches" in text and "6 students, 4 steps" in text
    assert bench("proxy", *options, "--table-only") == 0
    assert json.loads((tmp_path / "proxy-digits.json").read_text()) == first
    assert bench("proxy", *options, "--table-only", "--steps", 5) == 2
    assert "has 0 of these students" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_scores_foretell_what_distillation_reaches(model):
    """Of the bench's students, by the solve at single pixels: tau, and what a seed is worth."""
    records = json.loads((ROOT / f"results/bench/proxy-{model}.json").read_text()).values()
    reached = [record["reached"] for record in records]
    names = ("closed form, student's channels", "other seed")
    found, again = ([r["scores"][name] for r in records] for name in names)
    assert len(reached) >= 24
    assert kendalltau(found, reached).statistic >= 0.8
    apart = np.abs(np.subtract(found, again))
    assert np.median(apart) <= 0.005 and apart.max() <= 0.0125  # we wanted 0.005 of all


def test_taus_of_the_proxy_bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from proxy import MODES, table

    usual = list(MODES)[-1]
    records = [
        {
            "macs": place + 1,
            "scores": {"plain slicing": -place, usual: place, "other seed": place},
            "seconds": {"plain slicing": 0.1, usual: 0.2},
            "steps": 10,
            "reached": place / 10,
        }
        for place in range(9)
    ]
    lines = table(records, 10).splitlines()
    assert lines[2].startswith("| its size alone (multiplications) | 1.00 |")
    assert lines[3].startswith("| plain slicing | -1.00 | -1.00 |")
    assert lines[4].startswith(f"| {usual} | 1.00 | 1.00 |") and "10.0% to 30.0%" in lines[0]
