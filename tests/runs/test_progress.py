"""What a terminal, a pipe and a log show of a run."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest
from rich.console import Console

import mlx_loraplus as ml
from mlx_loraplus.cli import train
from mlx_loraplus.runs.history import encode_history
from mlx_loraplus.runs.next_steps import closing
from mlx_loraplus.runs.progress import (
    JSONLines,
    Lines,
    Terminal,
    event_lines,
    live_display,
    sparkline,
    time_left,
    with_browser,
)
from tests.training.tiny_runs import Place


def words(place: Place, name: str) -> list[str]:
    """The words of a short run."""
    return [
        *(sys.executable, "-m", "mlx_loraplus.train", "--model", str(place.folder / "model")),
        *(
            "--data",
            str(place.folder / "data"),
            "--iters",
            "4",
            "--steps-per-report",
            "1",
            "--warmup",
            "1",
        ),
        *("--adapter-path", str(place.folder / name), "--overwrite"),
    ]


def replay(view: Lines, run: ml.Run) -> None:
    with view:
        view.log("a sentence")
        for _ in range(2):
            view.log("warning: the disk is small")
        for event in run.history:
            view(run, event)


def test_lines(folder: Path):
    run, told = ml.Run.load(folder), []
    replay(Lines(told.append), run)
    assert told[:2] == ["a sentence", "warning: the disk is small"], "a warning is told once"
    assert [line.split(":")[0] for line in told[2:6]] == [
        "model",
        "adapter",
        "rates",
        "length",
    ], "rows and plan were told before"
    assert "A 1.00e-03, B 4.00e-03 (ratio 4)" in told[4]
    assert told[6].startswith("step 0/6  validation loss ")
    assert told[7].startswith("step 1/6  loss ")
    (end,) = [line for line in told if line.startswith("finished at step 6, best at step ")]
    assert told[told.index(end) + 1].startswith("validation loss ")
    assert told[-2] == f"try it:  mlx_loraplus.chat {folder}"


def test_lines_of_preferences_fit_80_columns():
    rewards = {"reward_margin": -1e-6, "reward_accuracy": 1.0}
    answers = {"logp_chosen": -108.55, "logp_rejected": -134.0}
    pairs, labeled = {"preferred": 0.75}, {"kl": 0.0123}
    for kind, ranked, figures in (
        (pairs, "75.0%", "accuracy 100.0%, log p chosen -108.5, rejected -134.0"),
        (labeled, "100.0%", "KL 0.0123, log p chosen -108.5, rejected -134.0"),
    ):
        event = {f"valid_{name}": value for name, value in (rewards | answers | kind).items()}
        event |= {"step": 1000, "valid_loss": 0.5, "valid_seconds": 100.0}
        first, second = event_lines(event, 1000)
        expected = f"validation loss 0.5000, ranked right {ranked}  (100.0 s)"
        assert first == f"step 1000/1000  {expected}"
        assert second == f"  margin 0.0000, {figures}"
        assert max(map(len, (first, second))) <= 80

    # Labeled answers may all be undesirable.
    del event["valid_logp_chosen"], event["valid_reward_margin"]
    assert "KL 0.0123, log p rejected -134.0" in event_lines(event, 1000)[1]


def test_rewards_that_are_zero_rank_nothing():
    event = {"step": 0, "valid_loss": 0.5, "valid_seconds": 1.0, "valid_reward_accuracy": 1.0}
    event |= {"valid_rewards_chosen": -1e-6, "valid_rewards_rejected": -4e-6}
    for kind in ({"valid_preferred": 0.25}, {"valid_kl": 0.0}):
        lines = " ".join(event_lines(event | kind, 10))
        assert "accuracy" not in lines
        assert ("ranked right 25.0%" in lines) == ("valid_preferred" in kind)
        assert "100.0%" in " ".join(event_lines(event | kind | {"valid_rewards_chosen": 0.1}, 10))


def test_verbosity(folder: Path):
    run = ml.Run.load(folder)
    told: dict[str, list[str]] = {}
    for verbosity in ("silent", "quiet", "normal", "verbose"):
        told[verbosity] = []
        replay(Lines(told[verbosity].append, verbosity), run)
    assert told["silent"] == []
    assert told["quiet"] == ["warning: the disk is small", *closing(run)]
    assert [line for line in told["verbose"] if not line.startswith("  ")] == told["normal"]
    assert any("grad_norm" in line and "norm_change" in line for line in told["verbose"])


def test_json_lines_are_the_history(folder: Path):
    run, told = ml.Run.load(folder), []
    replay(JSONLines(told.append), run)
    lines = [json.loads(line) for line in told]
    assert lines[:2] == [{"message": "a sentence"}, {"message": "warning: the disk is small"}]
    assert lines[2:] == run.history


@pytest.mark.parametrize("width", [20, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_of_any_width_and_alphabet(folder: Path, width: int, encoding: str):
    run, raw = ml.Run.load(folder), io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console = Console(
        file=file, width=width, force_terminal=True, legacy_windows=False, color_system=None
    )
    replay(Terminal(console), run)
    console.print(live_display(run, console.options))
    shown = raw.getvalue().decode(encoding)
    messages: list[str] = []
    replay(Lines(messages.append), run)
    for line in shown.replace("\r", "\n").splitlines():
        # All but commands and long words fits. The terminal wraps commands, so that they stay whole.
        assert len(line) <= width or "\x1b" in line or line in messages or " " not in line
    assert any(f"mlx_loraplus.chat {folder}" in line for line in shown.splitlines())
    assert ("▁" in shown) == (encoding == "utf-8")
    assert "finished" in shown


def test_what_moves_tells_the_time_left_and_is_no_wider_than_the_terminal(folder: Path):
    run = ml.Run.load(folder)
    run.history *= 10
    assert len(str(live_display(run, Console(width=46).options).renderables[1]).split()[-1]) == 20
    run.planned, run.progress.seconds = 11, 3720.0
    run.history.append({"step": 6, "valid_loss": 1.0, "valid_seconds": 1.0})
    assert run.config.steps_per_eval == 2
    assert "step 6/11  0:51:43 left" in str(live_display(run, Console().options).renderables[0])


def test_the_time_left_has_the_last_validation(folder: Path):
    run = ml.Run.load(folder)
    every, seconds = run.config.steps_per_eval, 20.0
    last = max(step for step, _ in run.losses("valid_loss"))
    for event in run.history:
        event |= {"valid_seconds": seconds, "answer_seconds": 5.0} if "valid_loss" in event else {}
    assert time_left(run) == "0:00:00 left"

    # All steps are done, and the validation after the last one is not.
    run.history = [event for event in run.history if event["step"] < last or "loss" in event]
    assert last % every == 0
    assert time_left(run) == "0:00:25 left"


def test_the_time_left_of_a_run_that_is_read_while_it_trains(folder: Path, tmp_path: Path):
    """``serve`` and other processes know a run only by its history."""
    shutil.copytree(folder, tmp_path / "live")
    run = ml.Run.load(folder)
    start = run.start | {"steps": 60, "valid": run.start["valid"] | {"examples": 0}}
    reports = [event | {"seconds": 2.0} for event in run.history if "loss" in event]
    skipped = {"step": 9, "skipped": 1, "reason": "loss nan"}
    for events, left in (
        ([start], ""),
        ([start, skipped], ""),
        ([start, *reports], "0:01:48 left"),  # 54 steps of 2 s
        ([start, *reports, skipped], "0:01:42 left"),
    ):
        (tmp_path / "live" / "history.jsonl").write_bytes(encode_history(events))
        assert time_left(ml.Run.load(tmp_path / "live")) == left


def test_open_shows_the_page_once_where_there_is_a_browser(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, told = ml.Run.load(folder), []
    opened = tmp_path / "opened"
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    script.chmod(0o755)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    callback = with_browser(lambda *_: None, told.append)
    for event in run.history:
        callback(run, event)
    assert opened.read_text() == (folder / "report.html").as_uri() + "\n"
    assert told == []

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("BROWSER")
    callback(run, run.start)
    assert told == [f"note: there is no browser here, so open {folder}/report.html yourself"]


def test_the_flag_open_opens_the_page_of_the_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []
    monkeypatch.setenv("BROWSER", "a browser")
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    given = ["--model", str(place.folder / "model"), "--data", str(place.folder / "data")]
    given += ["--iters", "1", "--warmup", "0", "--sample-rows", "0"]
    for name, flags in (("closed", []), ("open", ["--open"])):
        train([*given, "--adapter-path", str(tmp_path / name), *flags])
    assert opened == [(tmp_path / "open" / "report.html").as_uri()]


def test_a_terminal_wraps_messages_between_words_and_commands_not_at_all():
    file = io.StringIO()
    view = Terminal(Console(file=file, width=40, force_terminal=True, color_system=None))
    view.log("a message of several words that does not fit in one line")
    view.log("continue: mlx_loraplus.train -c my_run/run.yaml --resume --iters 100")
    assert file.getvalue().splitlines() == [
        "a message of several words that does not",
        "fit in one line",
        "continue: mlx_loraplus.train -c my_run/run.yaml --resume --iters 100",
    ]


def test_sparklines():
    assert sparkline([1, 2, 3]) == "▁▅█"
    assert sparkline([1, 2, 3], ascii_only=True) == "_=#"
    assert sparkline([5, 5, float("nan")]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(range(100))) == 32


def test_a_real_terminal_shows_a_card_and_a_picture_that_moves(place: Place):
    """The command on a pseudo-terminal."""
    main, side = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        words(place, "pty"), stdout=side, stderr=side, stdin=side, env=environment
    )
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    assert "╭" in text
    assert text.count(" supervised") == 2, "the rows of train and of valid are told once"
    assert " left\x1b" in text, "the part that moves"
    assert "finished at step 4" in text
    assert "\x1b[?25h" in text, "the cursor is back"


def test_json_and_a_closed_pipe(place: Place, capsys: pytest.CaptureFixture[str]):
    train([*words(place, "json")[3:], "--log-format", "json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if "message" not in line] == ml.Run.load(
        place.folder / "json"
    ).history
    with subprocess.Popen(
        words(place, "closed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # nobody reads
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert ml.Run.load(place.folder / "closed").finished


@pytest.mark.parametrize("width", [80, 120])
def test_what_moves_has_the_same_lines_from_the_start_to_the_end(folder: Path, width: int):
    run = ml.Run.load(folder)
    history = run.history * 60

    def lines(events: list[dict]) -> int:
        run.history = events
        console = Console(width=width, file=io.StringIO(), force_terminal=True)
        return len(console.render_lines(live_display(run, console.options)))

    assert lines(history[:1]) == lines(history[:3]) == lines(history) == 5
