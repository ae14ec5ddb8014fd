"""The page of a run, in its text and in a real browser."""

import html
import json
import math
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import mlx_loraplus as ml
from mlx_loraplus import fuse
from mlx_loraplus.adapters.stored_files import UNKNOWN_MODEL
from mlx_loraplus.arguments import command
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.runs.advice import give_advice
from mlx_loraplus.runs.command_line import train_command
from mlx_loraplus.runs.matplotlib_plots import finish_axes
from mlx_loraplus.runs.next_steps import next_commands
from mlx_loraplus.runs.report import report_page
from mlx_loraplus.runs.report_headline import headline
from mlx_loraplus.settings import fit_to_length, settings_of
from tests.export.test_fuse_command import quantized_model
from tests.runs.conftest import with_answers, with_losses
from tests.training.tiny_runs import Place


def text_of(page: bytes) -> str:
    """Return a page without the marks of words that are not divided."""
    return html.unescape(re.sub(r'<span class="word">(.*?)</span>', r"\1", page.decode()))


def test_the_page_holds_everything_and_fetches_nothing(folder: Path):
    page = (folder / "report.html").read_text()
    captions = ("Loss, nats", "Gradient norm", "Learning rates", "Memory, GB", "Speed", "padding")
    assert all(caption in page for caption in (*captions, "‖A‖", "‖B‖", "‖sBA‖ / ‖W‖"))
    assert all(name in page for name in ("mlx-lm", "lr_ratio", "Validation loss", "Peak memory"))
    assert "&lt;b&gt;2 + 2&lt;/b&gt; =" in page
    assert "<b>2 + 2" not in page
    fetched = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", page)
    assert all(address.startswith("data:") for address in fetched)
    assert not re.search(r"@import|url\((?!#|['\"]?data:)", page)


def test_a_run_that_has_only_begun_or_skipped_has_a_page(folder: Path):
    run = ml.Run.load(folder)
    whole = run.history
    run.history = whole[:1]
    assert b"not ended" in report_page(run)
    run.history = [*whole[:4], {"step": 3, "skipped": 1, "reason": "loss nan, gradient norm <1>"}]
    assert b"loss nan, gradient norm &lt;1&gt;" in report_page(run)
    run.history = [*whole[:1], {"step": 2, "seconds": 0.5, "useful_tokens": 0}]
    assert b"<span>Time</span>" in report_page(run)


def test_a_page_is_written_in_milliseconds(folder: Path):
    run = ml.Run.load(folder)
    report_page(run)  # reads the template
    run.history[2:2] = [event for event in run.history if "loss" in event] * 300
    start = time.process_time()
    report_page(run)
    assert time.process_time() - start < 2, "a live page is written after every report"


def test_only_a_live_page_loads_itself_again(folder: Path):
    run = ml.Run.load(folder)
    run.history.pop()
    assert "data-refresh" in report_page(run, live=True).decode()
    page = report_page(run).decode()
    assert "data-refresh" not in page
    assert "<dt>resume</dt><dd><code>mlx_loraplus.train " in page


def test_the_headline_says_how_much_better_and_what_next(folder: Path):
    run = ml.Run.load(folder)
    found = run.verdict
    assert found.before is not None
    assert found.after is not None
    head = headline(with_answers(run, {0: 0, 6: 6}))
    share = 1 - found.after / found.before
    assert f"Better than the base model: the validation loss is {share:.0%} lower." in head.lead
    found = run.verdict
    advice = give_advice(run, found)
    assert advice is not None
    assert head.next_step == f"{advice.text.capitalize()}."
    assert head.tiles[0].value == f"{found.before:.3f} → {found.after:.3f}"
    assert re.fullmatch(r"started \d{4}-\d\d-\d\d \d\d:\d\d UTC", head.date)

    # While it trains, and when the device failed.
    run.history.pop()
    live = headline(run, live=True)
    assert live.next_step == ""
    page = report_page(run, live=True).decode()
    assert re.search(r'<div id="silent" hidden>.*killed.*--resume</span></code>', page, re.DOTALL)
    assert "left" in live.text
    assert live.tiles[0].name == "Best validation loss"
    run.history.append({"step": 6, "outcome": "failed", "reason": "out of memory", "best_step": 6})
    failed = headline(run)
    assert failed.lead == "The run failed: out of memory."
    assert failed.next_step == "Step 6 is saved; the command below continues from there."
    assert [label for label, _ in failed.commands] == ["resume", "try it"], (
        "only what has ended is fused"
    )
    assert failed.commands[0][1].endswith("--resume")
    assert "No step was skipped" in report_page(run).decode()

    # A run that diverged is not to be resumed, however it ended.
    run.history.insert(-1, {"step": 6, "valid_loss": math.nan, "valid_seconds": 0.1})
    diverged = headline(run)
    assert "train from the start with a lower --learning-rate" in diverged.next_step
    assert [label for label, _ in diverged.commands] == ["again"], (
        "the last adapter is not the best"
    )
    assert "The run failed: out of memory." in report_page(run).decode()


def test_cut_answers_are_marked_and_explained(folder: Path):
    run = ml.Run.load(folder)
    most = run.start["answer_tokens"]
    assert f"At most {most} tokens were generated for each" in report_page(run).decode()
    given = [answer for _, answers in run.losses("answers") for answer in answers]
    assert any(answer.endswith("…") for answer in given), "the base never ends"
    del run.start["answer_tokens"]
    assert "Long answers are cut." in report_page(run).decode(), "an older history has no marks"


def test_logarithmic_axes_say_so(folder: Path):
    run = with_losses(ml.Run.load(folder), {0: 30.0, 2: 2.0, 4: 1.0, 6: 0.5})
    assert "<figcaption>Loss, nats per supervised token (log scale)" in report_page(run).decode()
    assert run.plot().axes[0].get_ylabel() == "loss (nats per token), log scale"


def test_no_line_ends_within_an_option_or_with_a_dangling_dot(folder: Path):
    page = report_page(ml.Run.load(folder)).decode()
    assert "·" not in page
    commands = re.findall(r"<dd><code>(.*?)</code>", page)
    options = [word for command in commands for word in command.split() if word.startswith("--")]
    assert commands
    assert options == [], "each is in an element of its own"


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((2.0, 1.0), "the validation loss is 50% lower"),
        ((2.0, 0.008), "the validation loss is 99.6% lower"),
        ((2.0, 1e-5), "the validation loss is 99.9% lower"),
        ((2.0, 1.998), "the validation loss is 0.1% lower"),
    ],
)
def test_a_share_is_not_rounded_to_all_or_nothing(
    folder: Path, losses: tuple[float, float], words: str
):
    run = with_answers(ml.Run.load(folder), {0: 0, 6: 6})
    for event in run.history:
        if "valid_loss" in event:
            event["valid_loss"] = losses[event["step"] > 0]
            event["valid_accuracy"] = (0.0, 0.9996)[event["step"] > 0]
    head = headline(run)
    assert words in head.lead
    assert head.tiles[1].value == "0% → 99.9%"


def test_pairs_that_are_ranked_as_before(folder: Path):
    run = ml.Run.load(folder)
    objective = replace(run.config.objective, objective="dpo")
    run.config = replace(run.config, objective=objective)
    for event in run.history:
        if "valid_loss" in event:
            event |= {"valid_loss": 1.0 if event["step"] else 2.0, "valid_preferred": 0.25}
    lead = headline(run).lead
    assert lead.startswith(
        "The chosen answers are preferred in 25% of the validation pairs, as by the base model,"
        " but the validation loss is 50% lower."
    )


def test_the_text_above_answers_and_a_single_validation(folder: Path):
    run = ml.Run.load(folder)
    assert "Shaded words" in report_page(run).decode()
    for prompt in run.start["prompts"]:
        prompt["expected"] = None
    assert "Shaded words" not in report_page(run).decode(), "nothing is expected"

    first = dict(run.losses("valid_loss"))[0]
    run.history = [event for event in run.history if not event["step"]]
    assert f"<td>{first:.4f} before</td>" in report_page(run).decode()


def test_a_single_point_is_a_number_and_no_chart(folder: Path):
    run = ml.Run.load(folder)
    only = next(event for event in run.history if "loss" in event)
    run.history = [run.history[0], only]
    page = report_page(run).decode()
    captions = re.findall(r"<figcaption>(.*)", page)
    assert all(caption.startswith("‖") for caption in captions), "maps of the modules alone"
    assert f"<td>{only['loss']:.4f}</td>" in page
    assert "at first" not in page

    run.history.append(only | {"step": only["step"] + 1, "loss": 0.5})
    page = report_page(run).decode()
    assert "<figcaption>Loss, nats" in page
    assert f"<td>{only['loss']:.4f} at first, 0.5000 at last</td>" in page


def test_how_a_step_is_computed_is_on_the_page(folder: Path):
    run = ml.Run.load(folder)
    assert "choices" in run.start, "a run stores them"
    run.start["memory"] |= {"planned_gb": 1.5, "available_gb": 8.0}
    run.start["choices"] |= {"grad_checkpoint": True, "compiled": False}
    run.start["choices"]["choices"] |= {"attention": "windows", "slice_bytes": 64 * 2**20}
    run.start["self_check"] = "loss and gradients are right"
    (part,) = re.findall(r"<h2>Does it fit\?</h2>.*?</table>", report_page(run).decode(), re.DOTALL)
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', part))
    assert rows["planned peak"] == "1.50 GB"
    assert rows["available"] == "8.00 GB"
    assert rows["attention"] == "windows"
    assert rows["cross-entropy"]
    assert rows["slices of the logits"] == "64 MiB"
    assert rows["gradient checkpointing"] == "on"
    assert rows["compiled"] == "off"
    assert rows["self-check"] == "loss and gradients are right"


def test_a_run_that_was_killed_early_can_only_be_resumed(folder: Path, tmp_path: Path):
    for name in ("history.jsonl", "run.yaml"):
        shutil.copy(folder / name, tmp_path / name)
    run = ml.Run.load(tmp_path)
    run.history = run.history[:2]
    head = headline(run)
    assert "it was killed, or it is training without reporting" in head.text
    assert [label for label, _ in head.commands] == ["resume"]
    assert head.next_step.startswith("No step is saved yet")


def test_the_page_of_a_run_whose_norms_are_not_finite(folder: Path):
    run = ml.Run.load(folder)
    for event in run.history:
        for name in ("norm_a", "norm_b", "norm_change"):
            if name in event:
                event[name] = [math.nan] * len(event[name])
    run.history.insert(-1, {"step": 6, "valid_loss": math.nan, "valid_seconds": 0.1})
    assert "What changed in the model?" not in report_page(run).decode()
    head = headline(run)
    assert head.state == "diverged"
    labels = [label for label, _ in head.commands]
    assert labels == ["again", "try it", "fuse it"], "the best one is kept"
    run.progress.best_step = None
    ((label, command),) = headline(run).commands
    assert label == "again"
    (folder.parent / f"{folder.name}-again").mkdir()
    assert f"{folder}-again " in command
    assert f"{folder}-again2 " in headline(run).commands[0][1]

    # If the base answers nothing that can be measured, a lower rate is no remedy.
    for event in run.history:
        if "valid_loss" in event:
            event["valid_loss"] = math.nan
    assert headline(run).commands == []


def test_a_run_without_effect_is_not_to_be_resumed(folder: Path):
    run = ml.Run.load(folder)
    skipped = {"step": 6, "skipped": 6, "reason": "loss nan"}
    run.history = [run.history[0], skipped, {"step": 6, "outcome": "failed", "reason": "no effect"}]
    run.progress.skipped = 6
    head = headline(run)
    assert head.lead == "The run failed: no effect."
    run.history[-1]["reason"] = f"memory ran out: {'x' * 200}"
    assert headline(run).lead == "The run failed: memory ran out."
    assert "x" * 200 in report_page(run).decode()
    assert "not even the first step was finite, so no other rate helps" in head.next_step.lower()
    assert head.commands == []


def test_a_run_without_validations_or_date_has_a_headline(folder: Path):
    run = ml.Run.load(folder)
    del run.history[0]["started"]
    run.history = [event for event in run.history if "valid_loss" not in event]
    head = headline(run)
    assert head.date == ""
    assert head.lead == "Whether training helps is unknown: nothing was validated."
    assert "add a valid file" in head.next_step
    assert head.tiles[0].name == "Training loss"


def test_the_command_of_a_run_trains_the_same_again(folder: Path, place: Place, tmp_path: Path):
    run = ml.Run.load(folder)
    program, *words = shlex.split(train_command(run))
    assert program == "mlx_loraplus.train"
    with command(program, TrainConfig, words) as (config, _):
        again = fit_to_length(config, run.steps)
    assert settings_of(again) == settings_of(run.config) | {
        "resume": False,
        "overwrite": False,
        "adapter_path": f"{run.config.adapter_path}-again",
    }
    assert "--lr-ratio" not in words, "4 is the default"
    assert train_command(run) in text_of(report_page(run))

    # A folder whose name begins with a dash is not read as a flag
    dashed = replace(run, config=replace(run.config, adapter_path="-run"))
    with command(program, TrainConfig, shlex.split(train_command(dashed))[1:]) as (config, _):
        assert config.adapter_path == "-run-again"
    for _, line in next_commands(dashed):
        assert " ./-run" in line

    described = replace(run.config, model=f"a llama {UNKNOWN_MODEL}")
    described = replace(described, data=replace(described.data, pack=True, data_weights=(1.0, 2.0)))
    words = shlex.split(train_command(ml.Run(described, planned=6)))
    assert words[words.index("--model") + 1] == "MODEL"
    assert "--pack" in words
    assert words[words.index("--data-weights") + 1 :][:2] == ["1.0", "2.0"]


def test_every_group_has_its_rate_on_the_page(folder: Path):
    run = ml.Run.load(folder)
    names = ("magnitude", "embedding", "full")
    for event in run.history:
        if "loss" in event:
            event |= {f"rate_{name}": event["rate_a"] for name in names}
    page = report_page(run).decode()
    assert all(re.search(f"</svg> {name}</span>", page) for name in ("A", "B", *names))


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
    page = report_page(run).decode()
    shown, others = page.split("Answers to fixed prompts")[1].split("Other answers")
    kept = int(head.split(",")[0].split()[1])
    assert set(re.findall(r"<div><b>(.+?)</b>", shown)) == {"expected", "base", head}
    assert set(re.findall(r"said at (\d)", shown)) == {"0", str(kept)}
    assert set(re.findall(r"said at (\d)", others)) == {"2", "4", "6"} - {str(kept)}
    run.history = run.history[:2]
    assert set(re.findall(r"<div><b>(.+?)</b>", report_page(run).decode())) == {"expected", "base"}


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
    assert "after fusing" not in page.read_text()
    fuse.main(
        ["--model", settings["model"], "--adapter-path", str(run.folder), "--save-path", str(saved)]
    )
    text, kept = page.read_text(), json.loads((saved / "fuse.json").read_text())
    assert all(f"<figcaption>{what} after fusing" in text for what in ("Weights", "Outputs"))
    for name, label in (
        ("base", "base"),
        ("base + adapter", "base + adapter"),
        ("fused", "the fused model"),
    ):
        assert re.search(
            f"loss of [a-z ]*{re.escape(label)}</th><td>{kept['answers'][name]:.4f}<", text
        )
    assert f"KL(base + adapter ‖ fused)</th><td>{kept['answers']['kl']:.4f}<" in text
    path, layer = next(iter(kept["layers"].items()))
    stored = " → ".join(dict.fromkeys((layer["before"], layer["after"])))
    cells = [path, stored, f"{layer['ratio']:.2%}", f"{layer['cosine']:.3f}"]
    assert re.search(".*".join(f">{re.escape(cell)}</t[hd]>" for cell in cells), text)
    place.run("fused", resume=True, **settings | {"iters": 3})
    assert "after fusing" not in page.read_text(), "the adapter is another one now"
