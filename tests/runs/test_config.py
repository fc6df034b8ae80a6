"""What `run.json` says of a run, read back; damaged, unknown and older ones."""

import copy
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from helpers import ROOT

from moodistill.config import (
    RunConfig,
    changed_settings,
    new_config,
    refuse_older,
)
from moodistill.data.images import fraction_right
from moodistill.errors import UserError
from moodistill.io.fields import convert, missing_fields, nearest
from moodistill.runs.compatibility import check_data
from moodistill.settings import Settings
from moodistill.storage.folder import read_run
from moodistill.teacher.task import OwnTask

OWN = OwnTask("w.pt", "pictures", (16, 20), 1, (0.5,), (0.25,))
CONFIG = new_config(
    "mine:build",
    Settings(simd_step=4, keep=("a",), min_width={"b": 3}, max_macs=1e6, connections=()),
    OWN,
)


def stored():
    """As `run.json` has it."""
    return json.loads(json.dumps(asdict(CONFIG)))


def test_a_configuration_comes_back_as_it_was():
    assert RunConfig.from_dict(stored()) == CONFIG
    assert RunConfig.from_dict(asdict(CONFIG)) == CONFIG
    assert CONFIG.search.simd_step == 4
    assert not missing_fields(stored(), RunConfig)


def test_the_simd_step_is_stored_once(tmp_path):
    assert json.dumps(stored()).count('"simd_step": 4') == 1
    older = stored()
    older["recipe"]["simd_step"] = 4  # earlier versions said it a second time
    assert RunConfig.from_dict(older) == CONFIG
    refuse_older(older, tmp_path)
    older["recipe"]["simd_step"] = 8
    with pytest.raises(UserError, match="unknown key 'recipe.simd_step'"):
        RunConfig.from_dict(older)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("search.population", "x", "search.population is 'x'; expected int"),
        ("search.population", 6.5, "search.population is 6.5; expected int"),
        ("search.population", True, "search.population is True; expected int"),
        ("search.population", 3, "population 3 is too small"),
        ("search.objectives", "accuracy", "search.objectives is 'accuracy'; expected list"),
        ("search.objectives", ["accuracy", 1], "search.objectives[1] is 1; expected str"),
        ("search.limits.max_macs", "many", "search.limits.max_macs is 'many'; expected float"),
        ("search.limits", None, "search.limits is None; expected object"),
        ("search.algorithm", "nsga9", "unknown algorithm 'nsga9'"),
        ("recipe.inherit.mode", "guess", "recipe.inherit.mode: invalid enum value 'guess'"),
        ("rules.least", {"b": "x"}, "rules.least is {'b': 'x'}; expected int"),
        ("own.size", [16], "own.size is [16]; expected list of length 2"),
        ("distill.lr", -1, "distill.lr is -1.0; expected a number above 0 and below 1e15"),
        ("distill.momentum", float("nan"), "distill.momentum is nan; expected a number from 0"),
        ("finalists", 10**30, "finalists is 1"),
        ("distill.stpes", 3, "unknown key 'distill.stpes'; did you mean distill.steps?"),
        ("search.limits.max_mac", 3, "did you mean search.limits.max_macs?"),
        ("serach", {}, "unknown key 'serach'; did you mean search?"),
    ],
)
def test_a_damaged_field_is_named_with_its_file(path, value, words):
    damaged = stored()
    owner = damaged
    *parts, last = path.split(".")
    for part in parts:
        owner = owner[part]
    owner[last] = value
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(damaged, "results/x/run.json")
    message = str(caught.value)
    assert message.startswith("results/x/run.json: ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize("whole", [[], None, 3, {}])
def test_no_configuration_at_all(whole):
    with pytest.raises(UserError, match="run.json: (the whole file is|model is missing)"):
        RunConfig.from_dict(whole)


def test_a_run_of_an_earlier_version_opens_and_is_not_carried_on(recorded_run, call, tmp_path):
    older = stored()
    del older["search"]["connections"]
    # Earlier versions searched all kinds; such a run can be carried on.
    assert RunConfig.from_dict(older).search.connections == ("blocks", "merges", "bypasses")
    refuse_older(older, tmp_path)
    folder = shutil.copytree(recorded_run, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    complete = copy.deepcopy(run)
    del run["config"]["search"]["screen"], run["config"]["distill"]["views"]
    (folder / "run.json").write_text(json.dumps(run))
    assert RunConfig.read(folder) == RunConfig.from_dict(complete["config"])  # those are defaults
    call("choose", folder)
    call("report", folder)
    before = (folder / "run.json").read_bytes()
    error = call("run", "--resume", folder, code=2).stderr
    assert "search.screen, distill.views" in error and "start a new run" in error
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_the_reference_runs_open(name):
    folder = ROOT / "results" / "reference" / name
    config = RunConfig.read(folder)
    assert config.model == name and config.search.simd_step == 16
    with pytest.raises(UserError, match="recipe.inherit.widest.* cannot be carried on"):
        refuse_older(read_run(folder)["config"], folder)
    assert changed_settings(config, Settings(seed=1)) == ["seed 0, not 1"]
    assert not changed_settings(config, Settings(seed=0, generations=99))


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_the_metric_of_the_reference_runs_is_still_theirs(name):
    folder = ROOT / "results" / "reference" / name
    stored = read_run(folder)

    def check(metric):
        data = SimpleNamespace(digest=stored["data_digest"], metric=metric, heads=None, table=None)
        check_data(folder, stored, data)

    check(fraction_right)
    with pytest.raises(UserError, match="metric"):
        check(len)


def test_conversion_says_what_is_missing_and_near():
    with pytest.raises(UserError, match="file: own.data is missing"):
        convert({**stored(), "own": {"weights": "w"}}, RunConfig, "file")
    assert nearest("zzz", ["one", "two"]) == "expected one of one, two"
