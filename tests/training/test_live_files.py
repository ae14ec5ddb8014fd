"""The history and the report while a run trains."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus.runs.history import read_history
from mlx_loraplus.runs.report import report_page
from mlx_loraplus.runs.state import Event
from mlx_loraplus.training import live_files
from tests.training.tiny_runs import Place, without_times


def test_files_are_current_after_every_event(place: Place):
    seen: list[tuple[int, str]] = []

    def look(run: ml.Run, event: Event) -> None:
        if "schema" not in event and "outcome" not in event:
            stored = read_history(run.folder)
            assert without_times(stored) == without_times(run.history)
            seen.append((len(stored), (run.folder / "report.html").read_text()))

    run = place.run("live", callback=look, steps_per_report=1)
    assert len(seen) == len(run.history) - 2
    assert all("data-refresh" in page for _, page in seen)
    assert "data-refresh" not in (run.folder / "report.html").read_text()


def test_the_page_has_every_report_and_validation(place: Place, monkeypatch: pytest.MonkeyPatch):
    """It is written again at each, while that takes at most its share of the time."""
    monkeypatch.setattr(live_files, "REPORT_FRACTION", math.inf)
    pages: list[bytes] = []

    def look(run: ml.Run, event: Event) -> None:
        if "outcome" not in event:
            page = (run.folder / "report.html").read_bytes()
            assert without_time(page) == without_time(report_page(run, live=True))
            pages.append(without_time(page))

    run = place.run("live", callback=look, steps_per_report=1)
    assert len(pages) == len(run.history) - 1
    assert all(before != after for before, after in pairwise(pages))


def without_time(page: bytes) -> bytes:
    return re.sub(rb'data-written="\d+"', b"", page)


@pytest.mark.parametrize(("step", "writes_all"), [(0.1, False), (5.0, True)])
def test_rewriting_the_page_takes_one_percent_of_the_time(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: float, writes_all: bool
):
    """A page that takes 0.04 s is written at each event of 5 s, and every 4 s at events of 0.1 s.

    The first page takes longer, and does not delay the next ones.
    """
    run = place.run("timed")
    clock, written = [0.0], []

    def write(run: ml.Run, *, live: bool) -> None:
        clock[0] += 0.04 if written else 0.7
        written.append(clock[0])

    monkeypatch.setattr(live_files, "write_report", write)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    live = live_files.LiveFiles(lambda _: None)
    live(run, run.history[0])
    events = 1000
    for number in range(events):
        clock[0] += step
        live(run, {"step": number, "loss": 1.0})
    assert 0.04 * (len(written) - 1) <= 0.01 * clock[0] + 0.04
    assert max(later - earlier for earlier, later in pairwise(written)) <= max(4.2, step + 0.1)
    assert (len(written) == events + 1) == writes_all


def test_the_start_says_where_the_page_is(place: Place):
    run = place.run("told")
    assert any(str(run.folder / "report.html") in line for line in place.told)


def test_a_killed_run_has_every_event_and_a_resume_has_those_of_an_undisturbed_run(place: Place):
    whole = place.run("one", steps_per_report=1, iters=8, steps_per_save=4)
    code = f"""
import os, signal, yaml
import mlx_loraplus as ml
def stop(run, event):
    if event["step"] == 6 and "loss" in event:
        os.kill(os.getpid(), signal.SIGKILL)
settings = yaml.safe_load(open({str(whole.folder / "run.yaml")!r})) | {{"adapter_path": {str(place.folder / "two")!r}}}
model, tokenizer = ml.load(settings["model"])
ml.finetune(model, tokenizer, callback=stop, **settings)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = place.folder / "two"
    assert read_history(folder)[-1]["step"] == 6

    # A kill within the last line loses only that line.
    history = folder / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-20])
    assert read_history(folder)[-1]["step"] == 5
    assert ml.Run.load(folder).outcome == "not ended"

    resumed = place.run("two", steps_per_report=1, iters=8, steps_per_save=4, resume=True)
    assert without_times(resumed.history) == without_times(whole.history)
    assert without_times(read_history(folder)) == without_times(whole.history)


def test_a_damaged_line_that_is_complete_is_an_error(place: Place):
    run = place.run("damaged")
    history = run.folder / "history.jsonl"
    history.write_bytes(history.read_bytes() + b'{"step": 3, "lo\n')
    with pytest.raises(ml.OutputError, match="is not an event"):
        ml.Run.load(run.folder)


def test_a_full_disk_is_reported_once_and_made_up_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    opened = os.open
    refused: list[Any] = []

    def full(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_APPEND and Path(os.fspath(path)).name == "history.jsonl" and not refused:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", full)
    seen: list[bool] = []

    def look(run: ml.Run, event: Event) -> None:
        if "schema" not in event and "outcome" not in event:
            seen.append(len(read_history(run.folder)) == len(run.history))

    place.run("full", callback=look, steps_per_report=1)
    assert refused
    assert seen[0] is False
    assert all(seen[1:])
    assert sum("can't be written now" in line for line in place.told) == 1
