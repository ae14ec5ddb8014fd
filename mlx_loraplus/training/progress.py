"""What a run says while it goes: lines, JSON lines, a card and a picture that moves on a terminal or in a notebook."""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .history import Run, encode_event, numbers
from .loop import Event

Tell = Callable[[str], None]
Watch = Callable[[Run, Event], None]
Verbosity = Literal["silent", "quiet", "normal", "verbose"]
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


def quiet(_: str) -> None:
    """Say nothing."""


class Lines(AbstractContextManager[Any]):
    """Tells a run as plain lines; quiet: warnings and the end; verbose: every number of a report too."""

    def __init__(self, write: Tell, verbosity: Verbosity = "normal"):
        self.write = write
        self.verbosity = verbosity
        self._warned: set[str] = set()

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""

    def tell(self, line: str) -> None:
        """Tell a sentence; a warning only once."""
        warning = line.startswith("warning")
        if line not in self._warned and self._wanted(quiet_too=warning):
            self.write(line)
        if warning:
            self._warned.add(line)

    def __call__(self, run: Run, event: Event) -> None:
        """Tell an event."""
        if self._wanted(quiet_too="outcome" in event):
            self.show(run, event)

    def show(self, run: Run, event: Event) -> None:
        """Tell an event whatever the verbosity."""
        if "schema" in event:
            lines = [f"{name}: {text}" for name, text in card(run)]
        elif "outcome" in event:
            lines = closing(run)
        else:
            lines = [describe(event, run.updates)]
            if self.verbosity == "verbose":
                lines.append("  " + ", ".join(f"{name} {value:.4g}" for name, value in numbers(event).items()))
        for line in lines:
            self.write(line)

    def _wanted(self, *, quiet_too: bool) -> bool:
        return self.verbosity in ("normal", "verbose") or (self.verbosity == "quiet" and quiet_too)


class JSONLines(Lines):
    """Tells a run as JSON lines: its events as ``history.jsonl`` has them, and sentences as {"message": …}."""

    def __init__(self, write: Tell, verbosity: Verbosity = "normal"):
        super().__init__(lambda line: write(json.dumps({"message": line})), verbosity)
        self._write = write

    def show(self, run: Run, event: Event) -> None:  # noqa: ARG002
        """Tell an event as it is."""
        self._write(encode_event(event))


class Terminal(Lines):
    """Tells a run on a terminal: a card before it, then a picture that moves. Enter it as a context."""

    def __init__(self, console: Console, verbosity: Verbosity = "normal"):
        super().__init__(
            lambda line: console.print(Text(line, "yellow" if line.startswith("warning") else "")), verbosity
        )
        self._console, self._run = console, None
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=2, transient=True)

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, run: Run, event: Event) -> None:
        """Show the card, then the picture; lines stay for validations, or all of them where that is asked for."""
        if "outcome" in event:
            self._live.stop()
        if "schema" in event:
            grid = Table.grid("", "", padding=(0, 2))
            for name, text in card(run):
                grid.add_row(Text(name, "bold", overflow="fold"), Text(text, overflow="fold"))
            self._console.print(Panel(grid, title=Text(run.name), border_style="dim"))
            self._run = run
            self._live.start()
        elif "loss" not in event or self.verbosity == "verbose":
            super().show(run, event)

    def _picture(self) -> Any:
        """Return where the run stands at this moment; another thread asks for it."""
        run = self._run
        return Text("") if run is None else moving(run, self._console.options)


class LivePlot:
    """Shows a run in one place of a notebook: a picture of its losses, or a line where the page shows no HTML."""

    def __init__(self) -> None:
        self._place: Any = None

    def __call__(self, run: Run, _: Event) -> None:
        """Show the run as it stands after an event."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        if self._place is None:
            self._place = display(run, display_id=True)
        else:
            self._place.update(run)


def in_notebook() -> bool:
    """Tell whether this runs in a kernel that has a page to show things on."""
    return Console().is_jupyter


def make_view(log_format: Literal["auto", "plain", "json"], verbosity: Verbosity, output: Any) -> Lines:
    """Return what tells a run on ``output``, a text file; auto: a picture that moves, if that is a terminal."""

    def write(line: str) -> None:
        print(line, file=output, flush=True)

    console = Console(file=output, highlight=False)
    if log_format == "json":
        return JSONLines(write, verbosity)
    if log_format == "plain" or not console.is_terminal or console.is_dumb_terminal:
        return Lines(write, verbosity)
    return Terminal(console, verbosity)


def card(run: Run) -> list[tuple[str, str]]:
    """Return what is about to be trained, as (name, text); its rows were told when they were read."""
    start, config = run.start, run.config
    adapter, optimizer = config.adapter, config.optimizer
    rate, ratio = optimizer.learning_rate or 0.0, optimizer.lr_ratio or 1.0
    rates = f"A {rate:.2e}, B {ratio * rate:.2e} (ratio {ratio:g}), {optimizer.schedule}, warm-up {optimizer.warmup}"
    return [
        ("model", f"{start['model']}, {start['memory']['weights_gb']:.2f} GB"),
        ("adapter", f"{adapter.adapter} ({adapter.init}), rank {adapter.rank}: {start['adapter']}"),
        ("rates", rates),
        ("length", f"{start['updates']:,} updates of {config.data.batch_size * config.grad_accumulation_steps} rows"),
    ]


def moving(run: Run, terminal: ConsoleOptions) -> Group:
    """Return the part of a terminal that moves: how far, how long still, losses, speed, memory and rates."""
    done, left = run.progress.update, ""
    if done:
        seconds = (run.updates - done) * run.progress.seconds / done
        if validated := run.losses("valid_seconds"):
            every = run.config.steps_per_eval
            seconds += (-(-run.updates // every) - done // every) * validated[-1][1]  # there is one after the last, too
        left = f"{timedelta(seconds=round(seconds))} left"
    parts: list[Any] = [Text(f"update {done}/{run.updates}  {left}", "bold")]
    for name, label in (("loss", "loss"), ("valid_loss", "validation loss")):
        if values := [value for _, value in run.losses(name)]:
            bars = sparkline(values, width=min(32, terminal.max_width), ascii_only=terminal.ascii_only)
            parts.append(Text(f"{label} {values[-1]:.4f}  {bars}"))
    if last := next((event for event in reversed(run.history) if "loss" in event), None):
        parts.append(Text(_pace(last), "dim"))
    return Group(*parts, ProgressBar(total=run.updates or 1, completed=done))  # the bar last: it ends no line


def describe(event: Event, updates: int) -> str:
    """Return an event of the loop as a line."""
    place = f"update {event['update']:>{len(str(updates))}}/{updates}"
    if "valid_loss" in event:
        return f"{place}  validation loss {event['valid_loss']:.4f}  ({event['valid_seconds']:.1f} s)"
    if "skipped" in event:
        return f"{place}  skipped: {event['reason']}  ({event['skipped']} skipped so far)"
    return f"{place}  loss {event['loss']:.4f}  {_pace(event)}"


def closing(run: Run) -> list[str]:
    """Return what is said at the end: the outcome, the best step, where things are and the next commands."""
    last, these = run.history[-1], shlex.join(["--model", run.config.model, "--adapter-path", str(run.folder)])
    lines = [
        f"{run.outcome} at update {last['update']}",
        f"adapter, checkpoints, run.yaml, history.jsonl, loss.png and report.html are in {run.folder}",
        f"try it:  mlx_loraplus.chat {these}",
        f"fuse it: mlx_loraplus.fuse {these}",
    ]
    if last["best_update"] is not None:
        lines[0] += f", best at update {last['best_update']} (validation loss {last['best_loss']:.4f})"
    if not run.finished:
        lines.insert(2, f"go on: mlx_loraplus.train -c {shlex.quote(str(run.folder / 'run.yaml'))} --resume")
    return lines


def sparkline(values: Sequence[float], *, width: int = 32, ascii_only: bool = False) -> str:
    """Return the last values as bars between the lowest and the highest of them."""
    bars = _ASCII_BARS if ascii_only else _BARS
    shown = [value for value in values if math.isfinite(value)][-width:]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in shown)


def _pace(event: Event) -> str:
    rates = [f"{name.removeprefix('rate_')} {rate:.2e}" for name, rate in event.items() if name.startswith("rate_")]
    speed = f"{event['tokens_per_second']:,.0f} tokens/s  {event['peak_memory_gb']:.2f} GB peak"
    return f"rates {', '.join(rates)}  {speed}"
