"""The page of a run, in its text and in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import mlx_loraplus as ml
from mlx_loraplus import fuse
from mlx_loraplus.runs.plots import finish_axes
from mlx_loraplus.runs.report import report_page
from tests.export.test_fuse_command import quantized_model
from tests.training.tiny_runs import Place


def browser() -> str | None:
    """Where Chromium is, if it is installed."""
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


def test_the_page_holds_everything_and_fetches_nothing(folder: Path):
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 9  # loss, rates, gradient, speed, memory, padding and three norms
    assert "&lt;b&gt;2 + 2&lt;/b&gt; =" in page
    assert "<b>2 + 2" not in page
    assert all(
        caption in page
        for caption in ("Gradient norm", "‖sBA‖ / ‖W‖", "padding", "mlx-lm version", "lr_ratio")
    )
    fetched = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", page)
    assert all(address.startswith("data:") for address in fetched)
    assert not re.search(r"<script|@import|url\((?!#|['\"]?data:)", page)


def test_a_run_that_has_only_begun_or_skipped_has_a_page(folder: Path):
    run = ml.Run.load(folder)
    whole = run.history
    run.history = whole[:1]
    assert b"not ended" in report_page(run)
    run.history = [*whole[:4], {"step": 3, "skipped": 1, "reason": "loss nan, gradient norm <1>"}]
    assert b"loss nan, gradient norm &lt;1&gt;" in report_page(run)


def test_every_group_has_its_rate_on_the_page(folder: Path):
    run = ml.Run.load(folder)
    for event in run.history:
        if "loss" in event:
            event |= {
                f"rate_{name}": event["rate_a"] for name in ("magnitude", "embedding", "full")
            }
    page = report_page(run).decode()
    assert all(
        re.search(f">{name}</text>", page) for name in ("a", "b", "magnitude", "embedding", "full")
    )


@pytest.mark.parametrize(
    ("outcome", "head"),
    [("finished", "step 2, the best: kept"), ("interrupted", "step 6, the last")],
)
def test_the_answers_are_those_of_the_adapter_that_is_kept(folder: Path, outcome: str, head: str):
    run = ml.Run.load(folder)
    run.progress.best_step, run.history[-1]["outcome"] = 2, outcome
    for event in run.history:
        if "answers" in event:
            event["answers"] = [f"said at {event['step']}"] * 4
    shown, others = (
        report_page(run).decode().split("Answers to fixed prompts")[1].split("Other answers")
    )
    kept = int(head.split(",")[0].split()[1])
    assert f"<th>prompt</th><th>expected</th><th>base</th><th>{head}</th>" in shown
    assert set(re.findall(r"said at (\d)", shown)) == {"0", str(kept)}
    assert set(re.findall(r"said at (\d)", others)) == {"2", "4", "6"} - {str(kept)}
    run.history = run.history[:2]
    assert "<th>expected</th><th>base</th></tr>" in report_page(run).decode()


@pytest.mark.parametrize("highest", [0.5, 1.4, 4.9, 20.0, 100.0, 1e5])
def test_a_log_axis_has_a_few_plain_numbers(highest: float):
    axes = Figure(figsize=(4.4, 2.9), layout="constrained").subplots()
    axes.plot([1, 2, 3], [0.041, 0.2, highest])
    finish_axes(axes, "steps", log=True)
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = [
        tick
        for tick in [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        if low <= tick.get_loc() <= high
    ]
    labels = [label for tick in ticks if (label := tick.label1.get_text())]
    assert 3 <= len(labels) <= 6
    assert all(re.fullmatch(r"\d+(\.\d+)?", label) for label in labels)


def test_what_quantizing_lost_is_on_the_page(place: Place):
    run = place.run("loftq", init="loftq", quantize_group_size=32, num_layers=1, iters=1)
    page = (run.folder / "report.html").read_text()
    assert "What quantizing lost" in page
    assert page.count("self_attn.q_proj") >= 1


def test_what_fusing_kept_is_on_the_page_until_the_run_goes_on(place: Place, tmp_path: Path):
    settings = {"model": str(quantized_model(place.folder / "four-bits")), "iters": 2}
    run = place.run("fused", **settings)
    page, saved = run.folder / "report.html", tmp_path / "saved"
    assert page.read_text().count("<svg") == 9
    fuse.main(
        ["--model", settings["model"], "--adapter-path", str(run.folder), "--save-path", str(saved)]
    )
    text, kept = page.read_text(), json.loads((saved / "fuse.json").read_text())
    assert text.count("<svg") == 9 + 2, "maps of the weights' and the outputs' cosine"
    for name, label in (
        ("base", "base"),
        ("base + adapter", "base + adapter"),
        ("fused", "the fused model"),
    ):
        assert re.search(
            f"loss of [a-z ]*{re.escape(label)}</td><td>{kept['answers'][name]:.4f}<", text
        )
    assert f"KL(base + adapter ‖ fused)</td><td>{kept['answers']['kl']:.4f}<" in text
    path, layer = next(iter(kept["layers"].items()))
    stored = " → ".join(dict.fromkeys((layer["before"], layer["after"])))
    assert (
        f"<td>{path}</td><td>{stored}</td><td>{layer['ratio']:.2%}</td><td>{layer['cosine']:.3f}</td>"
        in text
    )
    place.run("fused", resume=True, **settings | {"iters": 3})
    assert page.read_text().count("<svg") == 9, "the adapter is another one now"


@pytest.mark.skipif(browser() is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(folder: Path, tmp_path: Path, scheme: str, width: int):
    sync_api = pytest.importorskip("playwright.sync_api")
    image = pytest.importorskip("matplotlib.image")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        view = opened.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        problems: list[str] = []
        view.on("console", lambda message: problems.append(message.text))
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on(
            "request",
            lambda request: problems.append(request.url) if request.url[:4] == "http" else None,
        )
        view.goto((folder / "report.html").as_uri())
        view.screenshot(path=tmp_path / "page.png", full_page=True)
        wide = view.evaluate("document.documentElement.scrollWidth")
        opened.close()
    assert problems == []
    assert wide <= width, "nothing sticks out of a phone's screen"
    pixels = image.imread(tmp_path / "page.png")[..., :3]
    assert np.median(pixels) > 0.9 if scheme == "light" else np.median(pixels) < 0.2
    assert pixels.std() > 0.05, "the page is not blank"
