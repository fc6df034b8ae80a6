"""The report as a person uses it: in a real browser, offline."""

import json
import re
import shlex
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from moodistill.genome.layout_file import read_layout, write_layout
from moodistill.pareto.table import read_front
from moodistill.report.page import _page, structure_data, write_report
from moodistill.storage.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def page_data(path):
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>',
        path.read_text("utf-8"),
        re.DOTALL,
    )
    return json.loads(found[1])


def test_the_file_is_whole_and_small(finished):
    path = finished / "report.html"
    assert path.stat().st_size < 2.2e6
    text = path.read_text("utf-8")
    outside = re.findall(
        r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[^>]*", text.split("<script>")[0]
    )
    assert outside == [] and "{{" not in text.split("<script>")[0]
    data = page_data(path)
    assert data["teacher"]["id"] == "teacher" and len(data["students"]) >= 2
    assert data["history"][-1]["evaluations"] == 12 and data["refresh_s"] is None
    assert {s["id"].removesuffix("-int8") for s in data["students"]} == set(data["structures"])
    assert data["provenance"]["config"]["model"] == "digits"


def test_structures_are_those_of_the_genomes(digits, tmp_path):
    layout = digits.layout
    write_layout(tmp_path, layout)
    read = read_layout(tmp_path)
    assert read.slices == layout.slices and read_layout(tmp_path / "none") is None
    genome = layout.teacher()
    whole = structure_data(read, genome)
    assert all(layer["kept"] == layer["full"] for layer in whole["layers"])
    assert all(merge["gone"] == [] for merge in whole["merges"])
    layer = next(n for n in layout.layers if f"block/{n.name}" in layout.slices)
    layout.view(genome, f"block/{layer.name}")[0, 0] = False
    cut = {one["name"]: one for one in structure_data(read, genome)["layers"]}
    assert cut[layer.name]["matrix"][0][0] == 0
    assert np.sum(np.array(cut[layer.name]["matrix"]) == 0) == 1
    bypassable = next(n.name for n in layout.layers if n.bypassable)
    genome = layout.teacher()
    layout.view(genome, f"bypass/{bypassable}")[0] = False
    found = {one["name"]: one for one in structure_data(read, genome)["layers"]}
    assert found[bypassable]["state"] == "bypassed" and found[bypassable]["kept"] == 0
    assert all(layer["thinned"] == "" for layer in found.values())
    genome = layout.teacher()
    layout.view(genome, "kernel/conv3.0")[0] = False
    layout.view(genome, "rank/conv4.0")[2:] = False
    found = {one["name"]: one for one in structure_data(read, genome)["layers"]}
    assert found["conv3.0"]["thinned"] == "1x3" and found["conv4.0"]["thinned"] == "rank 24/64"


def test_data_cannot_end_their_script():
    page = _page({"title": "</title><script>x", "evil": "</script><script>alert(1)</script>"})
    assert page.count("<script>alert") == 0 and "</title><script>" not in page


def test_the_command_names_the_run_from_any_folder(reference, monkeypatch):
    monkeypatch.chdir(reference.parent.parent)
    folder = Path("run")
    with Store.open(folder, readonly=True) as store:
        page = write_report(folder, store, read_front(folder))
    assert page_data(page)["command"][0] == f"moodistill export {reference.parent} "


def test_report_of_a_run_that_goes_on(finished, call, tmp_path):
    folder = tmp_path / "going"
    shutil.copytree(finished, folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "status": "running"}))
    for name in ("pareto.csv", "pareto.json", "confirmed.json", "report.html"):
        (folder / name).unlink()
    before = (folder / "evaluations.sqlite").read_bytes()

    held, shown = threading.Event(), []

    def write():  # a run in another process, as far as the lock can tell
        with Store.open(folder):
            held.set()
            while not (folder / "report.html").exists():
                time.sleep(0.1)
            shown.append(page_data(folder / "report.html")["refresh_s"])

    writer = threading.Thread(target=write)
    writer.start()
    assert held.wait(60)
    call("report", folder, "--watch", "1")
    writer.join()
    assert shown == [1]
    assert page_data(folder / "report.html")["refresh_s"] is None  # the last one stands still
    assert (folder / "evaluations.sqlite").read_bytes() == before
    assert "12 students" in call("report", folder).stdout
    assert "--watch is 0" in call("report", folder, "--watch", "0", code=2).stderr
    with sqlite3.connect(folder / "evaluations.sqlite") as store:
        store.execute("delete from evaluations")
    assert "no scored student yet" in call("report", folder, code=2).stderr


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


def open_page(browser, path, **settings):
    """The page and everything that it complained of."""
    page = browser.new_context(**settings).new_page()
    trouble = []
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: trouble.append(r.url) if r.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("#plot-latency .scatterlayer")
    return page, trouble


def test_a_slider_changes_the_choice(browser, finished):
    page, trouble = open_page(browser, finished / "report.html")
    students = page_data(finished / "report.html")["students"]
    final = [s for s in students if s["stage"] == "distilled"]
    best = max(final, key=lambda s: (s["accuracy"], -s["latency_ms"]))
    assert page.input_value("#pick") == best["id"]
    fast = min(final, key=lambda s: s["latency_ms"])
    page.focus("#latency")  # no mouse: the keyboard moves it
    while page.input_value("#pick") == best["id"] and int(page.input_value("#latency")) > 0:
        page.keyboard.press("PageDown")
    if fast["id"] != best["id"]:
        assert page.input_value("#pick") != best["id"]
    assert "students remain" in page.inner_text("#remaining")
    assert page.locator("#table tr.out").count() >= 1
    page.fill("#latency", "0")
    page.fill("#accuracy", "1000")
    page.fill("#parameters", "0")
    assert "No student keeps all three" in page.inner_text("#remaining")
    assert page.input_value("#pick") == "" and page.inner_text("#command") == ""
    assert trouble == []


def test_the_copied_command_runs(browser, finished, call, tmp_path):
    page, trouble = open_page(
        browser, finished / "report.html", permissions=["clipboard-read", "clipboard-write"]
    )
    page.locator("#table button").first.click()
    page.click("#copy")
    copied = page.evaluate("navigator.clipboard.readText()")
    program, command, run, student, option, _ = shlex.split(copied)
    assert (program, command, option) == ("moodistill", "export", "--out")
    assert student == page.input_value("#pick")
    call("export", run, student, option, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").exists() and trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_themes_and_phone_width(browser, finished, scheme, width):
    page, trouble = open_page(
        browser, finished / "report.html", color_scheme=scheme,
        viewport={"width": width, "height": 844},
    )  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = sum(map(int, re.findall(r"\d+", page.evaluate(
        "getComputedStyle(document.body).backgroundColor"))[:3])) < 200  # fmt: skip
    assert dark == (scheme == "dark")
    assert page.locator("#structure .layer").count() == 10
    assert trouble == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The page of the reference run of VGG16, with INT8 twins: five kinds in the legend."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    shutil.copytree(ROOT / "results" / "reference" / "vgg16", folder)
    with Store.open(folder, readonly=True) as store:
        return write_report(folder, store, read_front(folder))


PARTS = """() => [...document.querySelectorAll(".plot")].map(plot => {
  const box = e => e && (({left, right, top, bottom}) => ({left, right, top, bottom}))(e.getBoundingClientRect());
  const all = query => [...plot.querySelectorAll(query)].map(box);
  return {card: box(plot), drawing: box(plot.querySelector(".main-svg")), bar: box(plot.querySelector(".modebar-group")),
    legend: box(plot.querySelector(".legend")), axes: box(plot.querySelector(".nsewdrag")),
    labels: [...all(".xtick text"), ...all(".ytick text"), ...all(".g-xtitle"), ...all(".g-ytitle")],
    ticks: all(".xtick text"), points: all(".scatterlayer .point")};
})"""


def apart(one, other):
    return (
        one["right"] <= other["left"] or other["right"] <= one["left"]
        or one["bottom"] <= other["top"] or other["bottom"] <= one["top"]
    )  # fmt: skip


def within(one, other):
    return (
        other["left"] - 1 <= one["left"] and one["right"] <= other["right"] + 1
        and other["top"] - 1 <= one["top"] and one["bottom"] <= other["bottom"] + 1
    )  # fmt: skip


@pytest.mark.parametrize("start", [390, 768, 1280])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_of_a_chart_is_cut_off_or_covered(browser, reference, start, width):
    """As opened at that width, and as the window becomes that wide."""
    page, trouble = open_page(browser, reference, viewport={"width": start, "height": 844})
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(plot =>"
        " plot.querySelector('.main-svg').getBoundingClientRect().width === plot.clientWidth)"
    )
    charts = page.evaluate(PARTS)
    assert len(charts) == 3 and len(charts[0]["points"]) > 130
    for chart in charts:
        assert chart["drawing"]["right"] <= chart["card"]["right"] + 1 <= width
        parts = [chart["bar"], *chart["labels"], *chart["points"]]
        assert all(within(part, chart["card"]) for part in parts)
        others = [chart["axes"], *chart["labels"]]
        if chart["legend"]:
            assert within(chart["legend"], chart["card"]) and apart(chart["legend"], chart["bar"])
            assert all(apart(chart["legend"], other) for other in others)
        assert all(apart(chart["bar"], other) for other in others)
        ticks = sorted(chart["ticks"], key=lambda tick: tick["left"])
        assert all(map(apart, ticks, ticks[1:]))  # no label on another
    assert trouble == []


@pytest.mark.parametrize("damage", ["delete window.DecompressionStream",
                                    "window.atob = () => 'no gzip'"])  # fmt: skip
def test_a_browser_that_cannot_unpack_the_charts_says_so(browser, reference, damage):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    trouble = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.add_init_script(damage)
    page.goto(reference.as_uri())
    page.wait_for_selector("#plot-history.none")
    for text in page.locator(".plot").all_inner_texts():
        assert "cannot be drawn" in text and "in the tables" in text and "Firefox 113" in text
    students = page_data(reference)["students"]
    assert page.locator("#table tr[data-id]").count() == len(students)
    before = page.input_value("#pick")
    page.fill("#latency", "400")
    assert page.input_value("#pick") != before  # all but the charts works
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert trouble == []


def test_a_click_in_the_figure_chooses(browser, finished):
    page, trouble = open_page(browser, finished / "report.html")
    students = page_data(finished / "report.html")["students"]
    other = min(students, key=lambda s: s["accuracy"])["id"]
    page.wait_for_function("document.querySelector('#plot-latency').on !== undefined")
    page.evaluate(
        "id => document.getElementById('plot-latency').emit('plotly_click',"
        " {points: [{customdata: id}]})", other,
    )  # fmt: skip
    assert page.input_value("#pick") == other and "in the figure" in page.inner_text("#reason")
    assert page.inner_text("#command").endswith(f"--out {other}") and trouble == []
