"""Show a run while it trains.

The output is plain lines, JSON lines, or a live display in a terminal or a notebook.
"""

import json
import math
import os
import sys
import webbrowser
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

from ..config import TrainConfig
from ..device import gb
from ..errors import counted
from ..rich_display import wrap_words
from .history import REPORT, Run, encode_event, metrics
from .next_steps import closing
from .state import Event

Log = Callable[[str], None]
Callback = Callable[[Run, Event], None]
Verbosity = Literal["silent", "quiet", "normal", "verbose"]
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-:=+*#"
_MIN_BARS, _MAX_BARS = 10, 32
_ZERO_REWARD = 5e-5  # the margin is printed with four decimals
_LABEL_WIDTH = 26  # of the label and the number beside a sparkline


def no_log(_: str) -> None:
    """Print nothing."""


class Lines(AbstractContextManager[Any]):
    """Prints a run as plain lines.

    Args:
        write: Called with each line.
        verbosity: quiet prints warnings and the end; verbose adds every number of a report.
    """

    def __init__(self, write: Log, verbosity: Verbosity = "normal"):
        self.write = write
        self.verbosity = verbosity
        self._warned: set[str] = set()

    def __exit__(self, *_: object) -> None:
        """Do nothing; ``Terminal`` stops its live display."""

    def log(self, line: str) -> None:
        """Print a message; a warning is printed only the first time."""
        # Warnings are repeated at every step that causes them.
        warning = line.startswith("warning")
        if line not in self._warned and self._prints(important=warning):
            self.write(line)

        if warning:
            self._warned.add(line)

    def __call__(self, run: Run, event: Event) -> None:
        """Print an event if the verbosity allows it."""
        if self._prints(important="outcome" in event):
            self.show(run, event)

    def show(self, run: Run, event: Event) -> None:
        """Print an event at any verbosity."""
        for line in self._lines_of(run, event):
            self.write(line)

    def _lines_of(self, run: Run, event: Event) -> list[str]:
        if "schema" in event:
            return [f"{name}: {text}" for name, text in card(run)]
        if "outcome" in event:
            return closing(run)

        lines = event_lines(event, run.steps)
        if "loss" in event and event["step"] < run.steps:
            lines[0] += f"  {time_left(run)}"
        if self.verbosity == "verbose":
            values = [f"{name} {value:.4g}" for name, value in metrics(event).items()]
            lines.append("  " + ", ".join(values))
        return lines

    def _prints(self, *, important: bool) -> bool:
        """Return whether a message is printed at this verbosity."""
        if self.verbosity == "quiet":
            return important
        return self.verbosity != "silent"


class JSONLines(Lines):
    """Prints a run as JSON lines.

    Events are written as in ``history.jsonl``, messages as {"message": …}.
    """

    def __init__(self, write: Log, verbosity: Verbosity = "normal"):
        super().__init__(lambda line: write(json.dumps({"message": line})), verbosity)
        self._write = write

    def show(self, run: Run, event: Event) -> None:  # noqa: ARG002
        """Print an event unchanged."""
        self._write(encode_event(event))


class Terminal(Lines):
    """Shows a run in a terminal: a card, then a live display. Use it as a context manager."""

    def __init__(self, console: Console, verbosity: Verbosity = "normal"):
        super().__init__(self._print_message, verbosity)
        self._console = console
        self._run: Run | None = None
        self._live = Live(
            console=console, get_renderable=self._display, refresh_per_second=2, transient=True
        )

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, run: Run, event: Event) -> None:
        """Show an event: the start as a card, a report in the display, all others as lines.

        If verbose, a report is printed as a line too.
        """
        if "schema" in event:
            self._show_card(run)
            self._run = run
            self._live.start()
            return

        # Reports appear in the live display; all other events stay as lines above it.
        if "outcome" in event:
            self._live.stop()
        if "loss" not in event or self.verbosity == "verbose":
            super().show(run, event)

    def _show_card(self, run: Run) -> None:
        grid = Table.grid("", "", padding=(0, 2))
        for name, text in card(run):
            grid.add_row(Text(name, "bold", overflow="fold"), Text(text, overflow="fold"))

        self._console.print(Panel(grid, title=Text(run.name), border_style="dim"))

    def _print_message(self, line: str) -> None:
        style = "yellow" if line.startswith("warning") else ""
        self._console.print(Text(wrap_words(line, self._console.width), style), soft_wrap=True)

    def _display(self) -> Any:
        """Return the current state of the run; rich calls this from another thread."""
        run = self._run
        return Text("") if run is None else live_display(run, self._console.options)


class LivePlot:
    """Shows a run in one notebook cell: its loss curves, or a line if the page shows no HTML."""

    def __init__(self) -> None:
        self._place: Any = None

    def __call__(self, run: Run, _: Event) -> None:
        """Show the run after an event."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        # The first event creates the display, the others change it in place.
        if self._place is None:
            self._place = display(run, display_id=True)
        else:
            self._place.update(run)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return Console().is_jupyter


def make_view(
    log_format: Literal["auto", "plain", "json"], verbosity: Verbosity, output: Any
) -> Lines:
    """Return the view that shows a run on ``output``, a text file.

    auto is a live display if ``output`` is a terminal, and plain lines otherwise.
    """

    def write(line: str) -> None:
        print(line, file=output, flush=True)

    # Output that is redirected, or a terminal without cursor control, gets plain lines.
    console = Console(file=output, highlight=False)
    if log_format == "json":
        return JSONLines(write, verbosity)
    if log_format == "plain" or not console.is_terminal or console.is_dumb_terminal:
        return Lines(write, verbosity)
    return Terminal(console, verbosity)


def with_browser(show: Callback, log: Log) -> Callback:
    """Return a callback that also opens the run's page in the browser when the run starts."""

    def show_and_open(run: Run, event: Event) -> None:
        show(run, event)
        if "schema" not in event:
            return

        # Without a screen, a browser for terminals could start and take this one.
        variables = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
        has_screen = sys.platform == "darwin" or any(map(os.environ.get, variables))
        page = (run.folder / REPORT).absolute()
        if not has_screen or not webbrowser.open(page.as_uri()):
            log(f"note: there is no browser here, so open {page} yourself")

    return show_and_open


def card(run: Run) -> list[tuple[str, str]]:
    """Return a description of the training, as (name, text).

    It does not include the examples, which are reported when they are read.
    """
    start, config = run.start, run.config
    adapter, optimizer = config.adapter, config.optimizer

    rate = optimizer.learning_rate or 0.0
    ratio = optimizer.lr_ratio or 1.0
    rates = f"A {rate:.2e}, B {ratio * rate:.2e} (ratio {ratio:g})"
    kind = f"{adapter.adapter} ({adapter.init}), rank {adapter.rank}"
    if adapter.adapter == "full":
        rates, kind = describe_full_rates(config), "full, no adapter"
    rows = start.get("batch_rows", config.data.batch_size) * config.grad_accumulation_steps
    unit = "packed row" if config.data.pack else config.objective.unit

    return [
        ("model", f"{start['model']}, {gb(start['memory']['weights_gb'] * 1e9)}"),
        ("adapter", f"{kind}: {start['adapter']}"),
        ("rates", f"{rates}, {optimizer.schedule}, warm-up {optimizer.warmup}"),
        ("length", f"{counted(start['steps'], 'step')} of {counted(rows, unit)}"),
    ]


def describe_full_rates(config: TrainConfig) -> str:
    """Return the rates of a run with adapter full, as text."""
    rates = f"weights {config.optimizer.learning_rate:.2e}"
    if config.adapter.num_layers == -1:
        rates += f", embeddings and head {config.optimizer.embedding_learning_rate:.2e}"
    return rates


def live_display(run: Run, terminal: ConsoleOptions) -> Group:
    """Return the live display: position, time left, losses, speed, memory and rates.

    It has the same lines from the first step to the last, so that nothing below it moves.
    """
    done = run.progress.step
    lines = [Text(f"step {done}/{run.steps}  {time_left(run)}", "bold")]

    # One sparkline for each kind of loss that the run has; it fits beside the label and the number.
    width = min(_MAX_BARS, max(_MIN_BARS, terminal.max_width - _LABEL_WIDTH))
    kinds = {"loss": "loss"}
    if run.start["valid"]["examples"]:
        kinds["valid_loss"] = "validation loss"
    for name, label in kinds.items():
        values = [value for _, value in run.losses(name)]
        line = label
        if values:
            bars = sparkline(values, width=width, ascii_only=terminal.ascii_only)
            line = f"{label:<15} {values[-1]:8.4f}  {bars}"
        lines.append(Text(line))

    reports = [event for event in run.history if "loss" in event]
    lines.append(Text(_pace(reports[-1]) if reports else "", "dim"))

    # A line that is too long is cut, because the display would jump if it were wrapped.
    if terminal.max_width >= _LABEL_WIDTH + _MIN_BARS:
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"

    # The bar comes last, because it does not end its line.
    return Group(*lines, ProgressBar(total=run.steps or 1, completed=done))


def time_left(run: Run) -> str:
    """Return the time left at the present pace, with validations; empty if it is unknown."""
    done = run.progress.step
    if not done or not run.progress.seconds:
        return ""

    seconds = (run.steps - done) * run.progress.seconds / done

    # Validations, with their answers, come every steps_per_eval steps and after the last step.
    validations = [event for event in run.history if "valid_seconds" in event]
    if validations:
        last = validations[-1]
        every = run.config.steps_per_eval or run.steps
        left = math.ceil(run.steps / every) - last["step"] // every
        seconds += left * (last["valid_seconds"] + last.get("answer_seconds", 0.0))
    return f"{timedelta(seconds=round(seconds))} left"


def event_lines(event: Event, steps: int) -> list[str]:
    """Return a report, a validation or a skipped step as a line; preferences add a second one."""
    width = len(str(steps))
    position = f"step {event['step']:>{width}}/{steps}"

    if "skipped" in event:
        count = event["skipped"]
        return [f"{position}  skipped: {event['reason']}  ({count} skipped so far)"]
    if "valid_loss" in event:
        figures = _preference_figures(event, "valid_")
        loss = f"validation loss {event['valid_loss']:.4f}{_ranked(event, 'valid_')}"
        return [f"{position}  {loss}  ({event['valid_seconds']:.1f} s)", *figures]
    loss = f"loss {event['loss']:.4f}{_ranked(event)}"
    return [f"{position}  {loss}  {_pace(event)}", *_preference_figures(event)]


def _ranked(event: Event, prefix: str = "") -> str:
    """Return how many of the compared answers are ranked right; empty without preferences."""
    if prefix + "preferred" in event:
        return f", ranked right {event[prefix + 'preferred']:.1%}"
    if prefix + "reward_accuracy" in event and not _rewards_are_zero(event, prefix):
        return f", ranked right {event[prefix + 'reward_accuracy']:.1%}"
    return ""


def _rewards_are_zero(event: Event, prefix: str) -> bool:
    """Return whether all rewards are zero up to rounding, so that they rank nothing.

    This is the case before the first step, if the model is its own reference.
    """
    names = (prefix + "rewards_chosen", prefix + "rewards_rejected")
    rewards = [event[name] for name in names if name in event]
    return bool(rewards) and max(map(abs, rewards)) < _ZERO_REWARD


def _preference_figures(event: Event, prefix: str = "") -> list[str]:
    """Return the rewards and log-probabilities of compared answers as a line; none without them.

    A batch of labeled answers may have none of one kind, and then lacks its figures.
    """
    forms = {
        "reward_margin": "margin {:.4f}",
        "reward_accuracy": "accuracy {:.1%}",
        "kl": "KL {:.4f}",
        "logp_chosen": "log p chosen {:.1f}",
        "logp_rejected": "rejected {:.1f}",
    }
    if prefix + "preferred" not in event or _rewards_are_zero(event, prefix):
        del forms["reward_accuracy"]  # the first line has it, or it means nothing
    if prefix + "logp_chosen" not in event:
        forms["logp_rejected"] = "log p rejected {:.1f}"

    figures: list[str] = []
    for name, form in forms.items():
        if prefix + name in event:
            value = round(event[prefix + name], 4) + 0.0  # -0.0 becomes 0.0
            figures.append(form.format(value))
    return [f"  {', '.join(figures)}"] if figures else []


def sparkline(values: Sequence[float], *, width: int = _MAX_BARS, ascii_only: bool = False) -> str:
    """Return the last ``width`` finite values as bars between their minimum and maximum."""
    bars = _ASCII_BARS if ascii_only else _BARS
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""

    # Scale to the bars' heights.
    low, high = min(shown), max(shown)
    if low == high:
        return bars[0] * len(shown)

    scale = (len(bars) - 1) / (high - low)
    return "".join(bars[round((value - low) * scale)] for value in shown)


def group_name(key: str) -> str:
    """Return the name of the parameters that the rate ``key`` of a report belongs to."""
    group = key.removeprefix("rate_")
    return group.upper() if group in ("a", "b") else group


def _pace(event: Event) -> str:
    """Return a report's learning rates, speed and peak memory."""
    rates: list[str] = []
    for name, rate in event.items():
        if name.startswith("rate_"):
            rates.append(f"{group_name(name)} {rate:.2e}")

    speed = f"{event['tokens_per_second']:,.0f} tokens/s"
    memory = f"{gb(event['peak_memory_gb'] * 1e9)} peak"
    return f"rates {', '.join(rates)}  {speed}  {memory}"
