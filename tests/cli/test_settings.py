"""Every setting is said once: signature, options, keys of a file, configuration and table agree."""

import argparse
import inspect
import json
import os
import signal
from dataclasses import asdict, fields
from functools import reduce
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest
from helpers import ROOT

import moodistill
from moodistill.api import search
from moodistill.cli import main, run_tool
from moodistill.cli.options import given_settings, with_flags
from moodistill.cli.program import COMMANDS, _signals
from moodistill.cli.run import run_arguments
from moodistill.cluster.client import ClusterConfig
from moodistill.config import RunConfig, new_config
from moodistill.errors import UserError
from moodistill.runs.backend import Places
from moodistill.settings import (
    GROUPS,
    PARTS,
    SETTINGS,
    Settings,
    flat,
    markdown_table,
    read_settings,
    without_none,
)
from moodistill.teacher.task import OwnTask

# What `search` takes beside the settings: what to search in, which a problem file gives elsewhere.
DATA = {"teacher", "train", "validation", "test", "labels", "mean", "std", "metric",
        "preparation", "heads", "inputs"}  # fmt: skip
# And what belongs to this machine.
HERE = {"device", "images_in_memory"}
NOT_IN_CONFIG = {"own": OwnTask, "places": Places, "cluster": ClusterConfig}
# One value of each type, as options and as TOML.
VALUES = {
    int: (["3"], "3", 3),
    float: (["0.5"], "0.5", 0.5),
    str: (["x"], '"x"', "x"),
    Path: (["a/b"], '"a/b"', Path("a/b")),
    tuple[str, ...]: (["a,b"], '["a", "b"]', ("a", "b")),
    tuple[int, ...]: (["3", "4"], "[3, 4]", (3, 4)),
    tuple[float, ...]: (["0.5", "1"], "[0.5, 1]", (0.5, 1.0)),
    dict[str, int]: (["a.b=8"], '{ "a.b" = 8 }', {"a.b": 8}),
}


def parser():
    made = argparse.ArgumentParser()
    run_arguments(made)
    return made


def in_config(one):
    return one.path and one.path.split(".")[0] not in NOT_IN_CONFIG


def part_of(one):
    """The keyword of `search` that a setting lies in, if it is no keyword of its own."""
    owner = one.path.rpartition(".")[0]
    return next((name for name, path in PARTS.items() if path == owner), None)


def test_search_takes_every_setting_of_a_run():
    known = inspect.signature(search).parameters
    wanted = {part_of(one) or one.name for one in SETTINGS.values() if in_config(one)}
    assert set(known) == wanted | DATA | {"out", "progress", *HERE}
    hints = get_type_hints(search)
    for name in wanted:
        assert known[name].default is None
        if name in SETTINGS and get_origin(SETTINGS[name].type) is None:
            assert hints[name] == SETTINGS[name].type | None, name


def test_the_command_line_has_an_option_for_every_setting_and_no_other():
    actions = parser()._actions
    assert {one.dest for one in actions} == {*SETTINGS, "help", "resume", "config", "student"}
    titles = {group.title: group for group in parser()._action_groups}
    assert set(GROUPS) <= set(titles)
    for one in actions:
        if one.dest in SETTINGS:
            assert one.default is None and one.help
            assert set(SETTINGS[one.dest].flags) <= set(one.option_strings) or (
                one.dest == "progress"
            )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_leads_to_a_field_of_its_type_and_default(name):
    one = SETTINGS[name]
    if not one.path:
        assert name in ("model", "teacher", "out", "progress", "tensorboard")
        return
    owner, *rest = one.path.split(".")
    cls, names = (NOT_IN_CONFIG[owner], rest) if owner in NOT_IN_CONFIG else (
        RunConfig, [owner, *rest])  # fmt: skip
    *parts, last = names
    for part in parts:
        cls = without_none(get_type_hints(cls)[part])
    hint = without_none(get_type_hints(cls)[last])
    if get_origin(one.type) is not None:  # sequences of several kinds
        assert get_origin(hint).__name__.lower() in ("tuple", "mapping"), hint
    elif one.type is not Path or owner != "own":  # kept as text in run.json
        assert hint is one.type
    if isinstance(one.default, str) and one.type is not str:
        return  # decided by something else, in words
    if owner in NOT_IN_CONFIG:
        default = {f.name: f.default for f in fields(cls)}.get(last)
        found = None if default is None or name == "data" else default
    else:
        found = reduce(getattr, names, new_config("digits", Settings()))
    assert (found or None) == (one.default or None), found


def sample(one):
    """Options, TOML and value of a setting."""
    if one.name == "progress":
        return ["--progress", "json"], "json", "json"
    if one.type is bool:
        return [one.flags[0]], "true", True
    words, text, value = VALUES[one.type]
    if one.repeated and get_origin(one.type) is tuple:
        return [one.flags[0], "a", one.flags[0], "b"], text, value
    return [one.flags[0], *words], text, value


@pytest.mark.parametrize("name", SETTINGS)
def test_option_and_key_give_the_same(name, tmp_path):
    options, text, value = sample(SETTINGS[name])
    text = '"json"' if name == "progress" else text
    (tmp_path / "x.toml").write_text(f"{name} = {text}\n")
    found = given_settings(parser().parse_args(options))
    assert found == read_settings(tmp_path / "x.toml") == Settings(**{name: value})


def test_both_words_for_yes_and_no_and_old_names():
    parse = parser().parse_args
    for words, settings in (
        (["--no-int8"], Settings(int8_twins=False)),
        (["--no-flip"], Settings(flip=False)),
        (["--quiet"], Settings(progress="quiet")),
        (["--json"], Settings(progress="json")),
        (["--max-params", "1e6"], Settings(max_parameters=1e6)),
        (["--connections", "none"], Settings(connections=())),
        (["--min-width", "a=1", "--min-width", "b=2"], Settings(min_width={"a": 1, "b": 2})),
    ):
        assert given_settings(parse(words)) == settings


def test_the_table_is_in_the_documentation():
    table = markdown_table()
    for one in SETTINGS.values():
        assert table.count(f"\n| `{one.name}` |") == 1
    assert table in (ROOT / "docs" / "settings.md").read_text()


def test_parts_of_a_configuration_are_settings():
    limits, rules = moodistill.Limits(max_macs=5.0), moodistill.LayerRules(least={"a": 3})
    found = Settings(**flat(limits=limits, rules=rules, latency=None))
    assert found == Settings(
        max_macs=5.0, keep=(), opaque=(), min_width={"a": 3}, max_width={}
    )  # fmt: skip
    config = new_config("digits", Settings(simd_step=4, max_macs=5.0, min_width={"a": 3}))
    assert config.search.limits == limits and config.rules == rules
    assert config.search.simd_step == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", "unknown key 'sed'; did you mean seed?"),
        ("max_params = 1", "unknown key 'max_params'; did you mean max_parameters?"),
        ("distill-steps = 1", "did you mean distill_steps?"),
        ('seed = "x"', "seed is 'x'; expected int"),
        ("seed = 1.5", "seed is 1.5; expected int"),
        ("seed = true", "seed is True; expected int"),
        ("objectives = ['accuracy', 3]", "objectives[1] is 3; expected str"),
        ("min_width = { a = 'x' }", "min_width is {'a': 'x'}; expected int"),
        ("out = 3", "out is 3; expected Path"),
        ("population = 0", "population is 0; expected a whole number of at least 1"),
        ("progress = 'loud'", "progress is 'loud'; expected one of auto"),
        ("[search]\nseed = 1", "unknown key 'search'"),
        ("seed = ", "is no TOML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(call, tmp_path, text, words):
    path = tmp_path / "x.toml"
    path.write_text(text)
    error = call(
        "run", "--config", path, "--model", "digits", "--out", tmp_path / "r", code=2
    ).stderr
    assert str(path) in error and words in error and not (tmp_path / "r").exists()


def test_a_file_that_is_none(call, tmp_path):
    assert "cannot be read" in call("run", "--config", tmp_path / "no.toml", code=2).stderr
    assert "expected a .toml" in call("run", "--config", tmp_path / "x.yaml", code=2).stderr
    error = call("run", "--resume", tmp_path, "--config", tmp_path / "run.json", code=2).stderr
    assert "starts its run anew" in error


@pytest.fixture
def started(monkeypatch):
    """What a run would be started with."""
    found = {}

    def start(config, out, places, reporter, task, cluster):
        found.update(config=config, out=out, places=places)
        return out

    monkeypatch.setattr("moodistill.runs.run.start_run", start)
    return found


def test_options_win_over_the_file(call, started, tmp_path):
    (tmp_path / "x.toml").write_text(
        f'model = "digits"\nout = "{tmp_path}/one"\nseed = 3\npopulation = 8\nsimd_step = 4\n'
        'int8_twins = false\npreset = "standard"\ntorch_threads = 1\nkeep = ["hidden"]\n'
    )
    call("run", "--config", tmp_path / "x.toml", "--seed", "5", "--int8", "--finalists", "2")
    config = started["config"]
    assert config.search.seed == 5 and config.search.population == 8
    assert config.int8.wanted and config.finalists == 2 and config.search.generations == 13
    assert config.rules.keep == ("hidden",) and config.distill.steps == 500
    assert started["out"] == tmp_path / "one" and started["places"].threads == 1


def test_a_run_is_started_anew_from_its_record(call, started, recorded_run, tmp_path):
    """With all that it says, of which some is no setting."""
    stored = json.loads((recorded_run / "run.json").read_text())["config"]
    assert stored["calibration"]["images"] == 96  # not the default
    call("run", "--config", recorded_run / "run.json", "--out", tmp_path / "again")
    assert json.loads(json.dumps(asdict(started["config"]))) == stored
    call("run", "--config", recorded_run / "run.json", "--seed", "7", "--out", tmp_path / "again")
    stored["search"]["seed"] = 7
    assert json.loads(json.dumps(asdict(started["config"]))) == stored
    out = call("run", "--config", recorded_run / "run.json", "--out", tmp_path / "again",
               "--preset", "standard")  # fmt: skip
    assert started["config"].search.generations == 13 and "again" in out.stdout


def test_pictures_of_an_own_network_have_moved(call, started, tmp_path, monkeypatch):
    monkeypatch.setattr("moodistill.config.load_task", lambda model, own, *loading: None)
    own = OwnTask("w.pt", "old", (16, 16), 1)
    (tmp_path / "run.json").write_text(
        json.dumps({"config": asdict(new_config("mine:build", Settings(), own))})
    )
    call("run", "--config", tmp_path / "run.json", "--data", tmp_path / "new", "--out", "r")
    assert started["config"].own == OwnTask("w.pt", str(tmp_path / "new"), (16, 16), 1)
    assert started["config"].model == "mine:build"


def test_a_run_that_was_timed_elsewhere_is_not_timed_here(call, tmp_path):
    stored = {"config": asdict(new_config("digits", Settings())), "latency_on": "board,phone"}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    error = call("run", "--config", tmp_path / "run.json", "--out", tmp_path / "r", code=2).stderr
    assert "latencies of board,phone" in error and "--latency-on" in error


def test_a_run_by_a_file(call, tmp_path):
    (tmp_path / "x.toml").write_text(
        f'model = "digits"\nout = "{tmp_path}/run"\npopulation = 4\ngenerations = 1\n'
        "finalists = 1\ndistill_steps = 2\nint8_twins = false\nsimd_step = 8\n"
        'objectives = ["macs", "accuracy"]\n'
    )
    call("run", "--config", tmp_path / "x.toml")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished" and run["config"]["search"]["objectives"] == [
        "accuracy", "macs"
    ]  # fmt: skip


def test_what_is_for_an_own_network_is_not_ignored(call):
    error = call("run", "--model", "digits", "--size", "20", code=2).stderr
    assert "--size is for a network of your own" in error and "--teacher" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_program_that_was_called(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    installed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_tool(name, ["--help"])
    alone = capsys.readouterr().out
    example = COMMANDS[name].examples[0]
    assert f"  moodistill {name} {example}\n" in installed
    script = COMMANDS[name].script
    program = f"python scripts/{script}" if script else f"moodistill {name}"
    assert f"  {program} {example}\n" in alone and alone.startswith(f"usage: {program} ")
    assert not script or (ROOT / "scripts" / script).is_file()
    if name in ("run", "resume"):
        assert all(f"\n{title}:\n" in installed for title in GROUPS)


def test_messages_name_settings_and_the_command_line_its_options():
    assert with_flags("give `max_parameters` or `nothing`") == "give --max-parameters or `nothing`"
    with pytest.raises(UserError, match="`distill_steps` is 0"):
        Settings(distill_steps=0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has none")
def test_a_closing_terminal_interrupts_once_and_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with _signals():
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGHUP)
                signal.pause()
            os.kill(os.getpid(), signal.SIGHUP)  # the results are being written
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with _signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
