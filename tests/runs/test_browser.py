"""Every kind of page in a real browser, at two widths, light and dark."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.kernels.choices import StepChoices
from mlx_loraplus.pages.pages import PageLink, render_index
from mlx_loraplus.runs.report import report_page
from mlx_loraplus.runs.report_headline import headline
from mlx_loraplus.sweep.sweep_page import sweep_page
from mlx_loraplus.sweep.sweep_result import Sweep
from mlx_loraplus.sweep.trial import Point, Trial
from mlx_loraplus.training.doctor import describe_machine
from mlx_loraplus.training.doctor_page import ModelExamination, doctor_page
from mlx_loraplus.training.fastest_step import StepTiming, StepWay, TuningResult
from mlx_loraplus.training.model_probes import ModelProbes
from mlx_loraplus.training.selfcheck import STOCK, CheckResult, Deviation
from tests.runs.page_checks import check_in_browser
from tests.training.tiny_runs import Place, write_pairs


def browser() -> str | None:
    """Where Chromium is, if it is installed."""
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


OUTCOMES = {
    "3 steps": 3,
    "30 steps": 30,
    "3000 steps": 3000,
    "live": 120,
    "failed": 60,
    "interrupted": 90,
    "diverged": 40,
}
CHAT = "<bos><start_of_turn>user\nTurn off the heating, please<end_of_turn>\n<start_of_turn>model\n"
ANSWER = '{"action": "heating", "on": false, "room": "' + "kitchen " * 12 + '"}'


def long_run(folder: Path, name: str) -> ml.Run:
    """Return a run whose history is made from the events of a real one."""
    run, steps = ml.Run.load(folder), OUTCOMES[name]
    start, report = run.history[0], next(event for event in run.history if "loss" in event)
    valid = next(event for event in run.history if "valid_loss" in event)
    start["prompts"] = [{"prompt": CHAT, "expected": ANSWER}, {"prompt": CHAT, "expected": None}]
    run.history = [start]
    for step in range(0, steps + 1, max(1, steps // 300)):
        if step % max(1, steps // 10) == 0:
            answers = [ANSWER[: 20 + step], "<b>&" * 30]
            run.history.append(
                valid | {"step": step, "valid_loss": 5 / (step + 1), "answers": answers}
            )
        if step:
            run.history.append(report | {"step": step, "loss": 6 / step})
    if name == "diverged":
        for event in run.history:
            if "valid_loss" in event and event["step"] > 10:
                event["valid_loss"] = math.nan
    if name == "failed":
        run.history.append({"step": steps, "skipped": 1, "reason": "loss nan, gradient norm nan"})
    run.progress.step, run.planned = steps, steps
    if name != "live":
        outcome = name if name in ("failed", "interrupted") else "finished"
        run.history.append(
            {"step": steps, "outcome": outcome, "best_step": steps, "best_loss": 1.0}
        )
    return run


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A real browser."""
    if browser() is None:
        pytest.skip("Chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_browser_shows_the_page_of_a_run(folder: Path, tmp_path: Path, chromium: Any, name: str):
    page = tmp_path / "report.html"
    page.write_bytes(report_page(long_run(folder, name), live=name == "live"))
    texts = check_in_browser(chromium, page)
    assert {"h1", "h2", "p", "th", "td", "b", "code", "dt", "summary", "text", "ins"} <= texts


def test_a_browser_shows_a_resumed_run(place: Place, chromium: Any):
    place.run("resumed", iters=3)
    run = place.run("resumed", resume=True, iters=6)
    assert [event["step"] for event in run.history if "loss" in event][-1] == 6
    assert "resumed from step 3</h1>" in (run.folder / "report.html").read_text()
    check_in_browser(chromium, run.folder / "report.html")


def test_a_browser_shows_a_run_of_pairs_and_a_full_one(place: Place, chromium: Any):
    write_pairs(place.folder / "pairs")
    pairs = place.run("dpo", data=[str(place.folder / "pairs")], objective="dpo", sample_rows=2)
    full = place.run("full", adapter="full", dropout=0.0, lr_ratio=1.0)
    page = (pairs.folder / "report.html").read_text()
    assert "Chosen answers preferred" in page
    assert "Rewards of the validation answers" in page
    for run in (pairs, full):
        check_in_browser(chromium, run.folder / "report.html")


def test_a_browser_shows_the_list_of_runs_and_a_comparison(
    place: Place, tmp_path: Path, chromium: Any
):
    runs = {name: ml.Run.load(place.folder / name) for name in ("plain", "plus")}
    links = [PageLink(name, f"/runs/{name}", headline(run)) for name, run in runs.items()]
    listed, compared = tmp_path / "index.html", tmp_path / "compared.html"
    listed.write_bytes(render_index("Runs in sums", links, 60))
    ml.compare_runs(*runs.values()).save(compared)
    assert "a" in check_in_browser(chromium, listed)
    check_in_browser(chromium, compared)


def test_a_browser_shows_plans(tmp_path: Path, chromium: Any):
    for length in (1024, 16384):
        page = tmp_path / f"{length}.html"
        plan = ml.plan_memory("gemma-3-4b", memory="16GB", batch_size=4, max_seq_length=length)
        plan.save(page)
        check_in_browser(chromium, page)


def test_a_browser_shows_the_doctor(tmp_path: Path, chromium: Any):
    probes = ModelProbes({}, None, takes_caches=False)
    deviation = Deviation(1e-7, 2e-6, {"mlp.down_proj.lora_a": 3e-6})
    check = CheckResult((1e-3, 1e-2), {STOCK: deviation, "ours, compiled": deviation})
    way = StepWay(StepChoices(), grad_checkpoint=False, compiled=True)
    timings = (StepTiming(way, 0.25, 10**9), StepTiming(way, failure="out of memory"))
    tuned = TuningResult(timings[0], timings, 4, 512, is_complete=False)
    skipped = ModelExamination("a model", probes, CheckResult(skipped="too large"), tuned)
    wrong = replace(check, deviations={STOCK: replace(deviation, loss=math.nan)})
    facts = describe_machine()
    for name, found in (
        ("correct", [ModelExamination("gemma-3", probes, check, tuned)]),
        ("not checked", [skipped]),
        ("wrong", [ModelExamination("gemma-3", probes, wrong, tuned), skipped]),
    ):
        page = tmp_path / "doctor.html"
        page.write_bytes(doctor_page(facts, found))
        text = page.read_text()
        assert f">{name}</span>" in text
        assert re.search(r"checked \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
        advice = "or return to the versions that worked. Please report what this page shows."
        assert (advice in text) == (name == "wrong")
        check_in_browser(chromium, page)


@pytest.mark.parametrize("outcome", ["finished", "interrupted"])
def test_a_browser_shows_a_sweep(tmp_path: Path, chromium: Any, outcome: Any):
    points = [Point(rate, ratio, 8, 16.0) for rate in (1e-4, 4e-4, 1.6e-3) for ratio in (1.0, 16.0)]
    trials = [Trial(point, 6, 0, 1 + number, 0, 1.0, 6) for number, point in enumerate(points)]
    trials += [Trial(points[0], 60, seed, 0.5 + seed / 100, 0, 1.0, 60) for seed in range(3)]
    trials += [Trial(points[5], 60, seed, 0.6, 0, 1.0, 60) for seed in range(3)]
    trials[3] = replace(trials[3], loss=math.inf)
    sweep = Sweep(SweepConfig(iters=60), points[5], trials, outcome)
    page = tmp_path / "sweep.html"
    page.write_bytes(sweep_page(sweep))
    offered = re.findall(r"<dt>(.*?)</dt>", page.read_text())
    assert offered == (["try wider", "train"] if outcome == "finished" else ["resume"])
    check_in_browser(chromium, page)


def test_notebooks_show_the_same_parts(place: Place, tmp_path: Path, chromium: Any):
    plan = ml.plan_memory("gemma-3-1b", memory="16GB", batch_size=4)
    point = Point(1e-4, 4.0, 8, 16.0)
    sweep = Sweep(SweepConfig(iters=6), point, [Trial(point, 6, 0, 1.0, 0, 1.0, 6)], "interrupted")
    runs = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    cells = [each._repr_html_() for each in (plan, sweep, runs, runs.runs[0])]
    assert all('<div class="mlx_loraplus"' in cell for cell in cells)

    # A notebook's own style has no colour scheme; its cells are narrower than the page.
    page = tmp_path / "notebook.html"
    head = '<!doctype html><html lang="en" style="color-scheme: light dark"><title>cells</title>'
    page.write_text(head + "".join(cells))
    check_in_browser(chromium, page)


def test_tables_are_cards_on_a_phone(view: Any):
    """Each cell has the whole width and says what it is; on a wide screen they are rows."""
    view.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    measure = """(table) => {
      const cells = [...table.querySelectorAll("tbody tr:first-child > *")];
      const boxes = cells.map((each) => each.getBoundingClientRect());
      const labels = cells.slice(1).map((each) => getComputedStyle(each, "::before").content);
      const share = Math.min(...boxes.map((each) => each.width)) / table.getBoundingClientRect().width;
      const head = table.querySelector("thead").checkVisibility();
      return [boxes[1].top > boxes[0].top + 5, share, head, labels];
    }"""
    table = view.locator("table.headed").first
    heads = table.locator("thead th").all_text_contents()
    view.set_viewport_size({"width": 390, "height": 900})
    stacked, share, has_head, labels = table.evaluate(measure)
    assert (stacked, has_head) == (True, False)
    assert share > 0.9
    assert labels == [f'"{head}"' for head in heads[1:]]

    view.set_viewport_size({"width": 1280, "height": 900})
    stacked, share, has_head, _ = table.evaluate(measure)
    assert (stacked, has_head) == (False, True)


def test_answers_are_beside_each_other_and_below_each_other_on_a_phone(view: Any):
    answers = """(card) => [...card.querySelectorAll(".answers > div")].map((each) => {
      const box = each.getBoundingClientRect();
      return [box.left, box.top, box.width];
    })"""
    card = view.locator("article.card").first
    view.set_viewport_size({"width": 1280, "height": 900})
    assert len({top for _, top, _ in card.evaluate(answers)}) == 1
    view.set_viewport_size({"width": 390, "height": 900})
    boxes = card.evaluate(answers)
    assert len({left for left, _, _ in boxes}) == 1
    assert all(width > 250 for _, _, width in boxes)


def test_charts_of_a_notebook_are_in_columns(place: Place, tmp_path: Path, chromium: Any):
    """Six pictures of a comparison, in a cell that is narrower than a page."""
    runs = ml.compare_runs(place.folder / "plain", place.folder / "plus")
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><title>cell</title>{runs._repr_html_()}")
    view = chromium.new_page()
    view.goto(page.as_uri())
    breaks = """[...document.querySelectorAll(".key")].filter(
      (each) => each.getClientRects().length > 1).length"""
    lefts = """[...document.querySelectorAll(".charts figure")].map(
      (each) => Math.round(each.getBoundingClientRect().left))"""
    for width, columns in ((900, 2), (390, 1)):
        view.set_viewport_size({"width": width, "height": 900})
        found = view.evaluate(lefts)
        assert len(found) == 6
        assert len(set(found)) == columns
        assert view.evaluate(breaks) == 0, "a label stays with the sample of its line"
    view.close()


def test_a_live_page_shows_the_newest_state_and_stops_at_the_end(
    folder: Path, tmp_path: Path, chromium: Any
):
    run, place = long_run(folder, "live"), tmp_path / "report.html"
    page = re.sub(r'data-refresh="\d+"', 'data-refresh="0.2"', report_page(run, live=True).decode())
    place.write_text(page)
    view = chromium.new_page()
    view.goto(place.as_uri())
    assert "s ago" in view.inner_text("#heard")
    view.click("text=Is it stable?")
    view.wait_for_timeout(100)

    # Nothing was heard for an hour, so the run was killed.
    silent = tmp_path / "silent.html"
    silent.write_text(re.sub(r'data-written="\d+"', 'data-written="1"', page))
    other = chromium.new_page()
    other.goto(silent.as_uri())
    assert other.inner_text(".state") == "not ended"
    assert "--resume" in other.inner_text("#silent")

    # The computer slept, and the run goes on.
    silent.write_bytes(report_page(long_run(folder, "30 steps")))
    other.wait_for_selector(".state.finished", timeout=5000)
    other.close()
    assert not view.is_visible("#silent")

    finished = report_page(long_run(folder, "30 steps"))
    place.write_bytes(finished)
    view.wait_for_selector(".state.finished", timeout=5000)
    # What was open stays open, once the page's script has run.
    view.locator("#is-it-stable[open]").wait_for(timeout=5000)
    assert view.locator("#heard").count() == 0
    view.close()


def test_a_block_that_the_reader_opened_stays_open_when_answers_are_added(
    folder: Path, tmp_path: Path, chromium: Any
):
    run, place = long_run(folder, "live"), tmp_path / "report.html"
    run.start["prompts"] = [{"prompt": f"Question {n}?", "expected": "Yes."} for n in (1, 2)]
    for event in run.history:
        if "answers" in event:
            event["answers"] = ["<think>Hm.</think>Yes."] * 2
    base = [event for event in run.history if event["step"] == 0]
    history, run.history = run.history, base
    place.write_bytes(report_page(run))
    view = chromium.new_page()
    view.goto(place.as_uri())
    opened = "details => details.map(each => each.open)"
    view.evaluate("document.querySelectorAll('.thought')[1].open = true")
    view.wait_for_timeout(100)
    assert view.locator(".thought").evaluate_all(opened) == [False, True]

    # The base's thoughts about the second question are the third block now.
    run.history = history
    place.write_bytes(report_page(run))
    view.reload()
    assert view.locator(".thought").evaluate_all(opened) == [False, False, True, False]
    view.close()


def test_paper_is_white_and_keeps_the_marks_of_what_differs(view: Any):
    view.emulate_media(media="print", color_scheme="dark")
    style = "getComputedStyle(document.querySelector({!r})).{}"
    assert view.evaluate(style.format("body", "color")) == "rgb(0, 0, 0)"
    assert view.evaluate(style.format("ins", "backgroundColor")) == "rgb(255, 226, 184)"
    assert view.evaluate(style.format("ins", "printColorAdjust")) == "exact"


@pytest.fixture
def view(folder: Path, tmp_path: Path, chromium: Any) -> Iterator[Any]:
    """The page of a finished run of 30 steps, in a browser."""
    place = tmp_path / "report.html"
    place.write_bytes(report_page(long_run(folder, "30 steps")))
    view = chromium.new_page()
    view.goto(place.as_uri())
    yield view
    view.close()


def test_keyboard_and_screen_reader(view: Any):
    assert view.evaluate("document.documentElement.lang") == "en"

    # The questions are opened with the keyboard alone, and the focus is visible.
    opened = []
    for _ in range(8):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.tagName") != "SUMMARY":
            continue
        assert view.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        view.keyboard.press("Enter")
        opened.append(view.evaluate("document.activeElement.parentElement.open"))
    assert opened.count(True) >= 3

    # What a screen reader gets: headings in order, pictures and tables with names.
    tree = view.locator("body").aria_snapshot()
    levels = [int(level) for level in re.findall(r"heading .*\[level=(\d)\]", tree)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert 'img "Loss, nats per supervised token: training from' in tree
    assert "rowheader" in tree


def test_a_page_prints_with_everything_open(view: Any):
    assert view.pdf().startswith(b"%PDF")
    assert view.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
