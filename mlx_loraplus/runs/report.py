"""``report.html``: one page about a run, for a browser or a phone, without external resources.

This file selects the content: a headline, the loss, sample answers, and then four questions that
the reader can open. ``pages.py`` renders it.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..device import gb
from ..files import write_atomically
from ..settings import settings_of
from .charts import Chart, Curve, line_chart
from .history import REPORT, SETTINGS, Run
from .pages import Headline, HTMLTable, Section, Tile, render_card, render_page
from .progress import card, time_left
from .report_answers import answers_section, best_step, count_exact, kept_step, other_answers
from .report_changes import change_section
from .state import Event

REFRESH = 10  # seconds after which the page of a live run loads itself again
_FRAGMENT = ("steps", "validation loss", "training loss", "spent")  # what a notebook shows
_RESUMABLE = ("interrupted", "out of time", "not ended")
_LOSSES = {"loss": "training", "valid_loss": "validation"}


def write_report(run: Run, *, live: bool = False) -> None:
    """Write a run's report into its folder: while it trains, at its end, and after a fuse."""
    write_atomically(run.folder / REPORT, report_page(run, live=live), durable=not live)


def report_page(run: Run, *, live: bool = False) -> bytes:
    """Return a run's report as HTML; a ``live`` page loads itself again until the run ends."""
    sections = [
        Section(charts=_charts(run, [_loss_series(run)])),
        answers_section(run),
        _learning_section(run),
        _stability_section(run),
        _memory_section(run),
        change_section(run),
        _settings_section(run),
    ]
    shown = [section for section in sections if section is not None]
    head = headline(run, live=live)
    return render_page(
        f"{run.name}: {head.state}",
        head,
        shown,
        refresh=REFRESH if live else None,
        wall_time=round(time.time()),
    )


def fragment(run: Run) -> str:
    """Return a run as HTML for a notebook: the loss curves and a few numbers."""
    # How the run ended, and how to continue it.
    line = f"{run.folder}: {run.outcome}"
    if run.outcome in ("interrupted", "out of time"):
        line += "; resume=True continues it"

    charts = _charts(run, [_loss_series(run)])
    rows = [(name, text) for name, text in summary(run) if name in _FRAGMENT]
    return render_card(line, charts[0] if charts else None, HTMLTable(rows))


def headline(run: Run, *, live: bool = False) -> Headline:
    """Return what a reader should know first: what trains on what, how far, and how much better."""
    data = ", ".join(map(_short_name, run.config.data.data)) or "the built-in demo set"
    title = f"{_short_name(run.start['model'])}, trained on {data}"

    # How far the run has come.
    state = "training" if live else run.outcome
    done = run.progress.step
    text = f"step {done:,} of {run.steps:,}"
    if live:
        text += f", {left}" if (left := time_left(run)) else ""
    elif run.outcome in _RESUMABLE:
        text += f"; mlx_loraplus.train -c {run.folder / SETTINGS} --resume continues the run"
    elif (best := best_step(run)) is not None:
        text += f"; the adapter of step {best:,}, the best, is kept"

    tiles = [_loss_tile(run), _accuracy_tile(run), _exact_tile(run), *_cost_tiles(run)]
    return Headline(
        title,
        state,
        text,
        [tile for tile in tiles if tile is not None],
        share=done / max(1, run.steps) if live else None,
        is_live=live,
    )


def summary(run: Run) -> list[tuple[str, str]]:
    """Return a description of the training and its results, as (name, text)."""
    rows = card(run)
    for split in ("train", "valid"):
        rows.append((split, _describe_split(run.start[split])))
    rows.append(("steps", f"{run.progress.step:,} of {run.steps:,}"))

    # The best validation has the lowest loss. A loss that is not finite is never the best.
    if valid := run.losses("valid_loss"):
        first = valid[0][1]
        step, best = min(valid, key=_finite_loss)
        text = f"{first:.4f} before, {best:.4f} at best (step {step:,})"
        rows.append(("validation loss", text))

    # The results of training itself.
    if reports := run.losses("loss"):
        (_, first), (step, last) = reports[0], reports[-1]
        tokens = run.spent([step], "useful_tokens")[0]
        minutes = run.spent([step], "seconds")[0] / 60
        peak = max(value for _, value in run.losses("peak_memory_gb"))
        rows.append(("training loss", f"{first:.4f} at first, {last:.4f} at last"))
        rows.append(("spent", f"{tokens:,.0f} tokens, {minutes:.1f} minutes in steps"))
        rows.append(("peak memory", f"{peak:.2f} GB"))
    return rows


def plain(value: Any) -> str:
    """Return a setting's value as text."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


# The headline's numbers


def _short_name(name: str) -> str:
    """Return the last part of a path; names of the model hub, such as org/name, stay whole."""
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith(".") or path.suffix else name


def _loss_tile(run: Run) -> Tile | None:
    """Return the validation loss before training and now.

    Without validations, it is the training loss.
    """
    name = "Validation loss"
    points = [point for point in run.losses("valid_loss") if math.isfinite(point[1])]
    if not points:
        name, points = "Training loss", run.losses("loss")
    if not points:
        return None

    first, last = points[0][1], points[-1][1]
    if name == "Validation loss" and run.finished:
        last = min(loss for _, loss in points)
    if len(points) == 1:
        return Tile(name, f"{first:.3f}", _note(run, f"perplexity {_perplexity(first)}"))
    note = _note(run, f"perplexity {_perplexity(first)} → {_perplexity(last)}")
    return Tile(name, f"{first:.3f} → {last:.3f}", note)


def _note(run: Run, perplexity: str) -> str:
    """Return the note on a loss; that of pairs of answers has no perplexity."""
    return "per pair of answers" if run.config.objective.is_paired else perplexity


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3g}" if loss < 20 else "very large"


def _accuracy_tile(run: Run) -> Tile | None:
    paired = run.config.objective.is_paired
    points = run.losses("valid_reward_accuracy" if paired else "valid_accuracy")
    if not points:
        return None
    by_step = dict(points)
    first, last = points[0][1], by_step[kept_step(run, by_step)]
    change = f"{first:.0%}" if len(points) == 1 else f"{first:.0%} → {last:.0%}"
    if paired:
        return Tile("Chosen answers preferred", change, "of the validation pairs")
    return Tile("Next tokens predicted right", change, "of the validation examples' answers")


def _exact_tile(run: Run) -> Tile | None:
    """Return how many sample answers equal the expected ones."""
    answers = dict(run.losses("answers"))
    expected = [prompt["expected"] for prompt in run.start.get("prompts", [])]
    count = sum(each is not None for each in expected)
    if not answers or not count:
        return None

    columns = list(dict.fromkeys((min(answers), kept_step(run, answers))))
    exact = [str(count_exact(answers[step], expected)) for step in columns]
    return Tile("Exact sample answers", f"{' → '.join(exact)} of {count}", "answers below")


def _cost_tiles(run: Run) -> list[Tile]:
    """Return the time and the memory that training has taken."""
    reports = run.losses("seconds")
    if not reports:
        return []
    step = reports[-1][0]
    minutes = run.spent([step], "seconds")[0] / 60
    tokens = run.spent([step], "useful_tokens")[0]
    if minutes < 1:
        spent = f"{60 * minutes:.1f} seconds"
    elif minutes < 90:
        spent = f"{minutes:.1f} minutes"
    else:
        spent = f"{minutes / 60:.1f} hours"

    tiles = [Tile("Time in steps", spent, f"{tokens:,.0f} tokens")]

    # If all steps were skipped, no memory was reported.
    peaks = [value for _, value in run.losses("peak_memory_gb")]
    if peaks:
        planned = run.start["memory"].get("planned_gb")
        note = f"planned: {gb(planned * 1e9)}" if planned else ""
        tiles.append(Tile("Peak memory", gb(max(peaks) * 1e9), note))
    return tiles


# Curves


@dataclass(frozen=True)
class _Series:
    """Curves that share one chart."""

    caption: str
    names: Mapping[str, str]  # event key → label
    log: bool = False


def _loss_series(run: Run) -> _Series:
    """Return the losses, with their unit."""
    unit = "per pair of answers" if run.config.objective.is_paired else "nats per supervised token"
    return _Series(f"Loss, {unit}", _LOSSES, True)


_PAIR_SERIES = (
    _Series(
        "Rewards of the validation pairs' answers",
        {
            "valid_rewards_chosen": "chosen",
            "valid_rewards_rejected": "rejected",
            "valid_reward_margin": "margin",
        },
    ),
    _Series(
        "Share of validation pairs whose chosen answer is preferred",
        {"valid_reward_accuracy": "accuracy"},
    ),
    _Series(
        "Log-probability of the validation pairs' answers",
        {"valid_logp_chosen": "chosen", "valid_logp_rejected": "rejected"},
    ),
)


def _charts(run: Run, series: Iterable[_Series]) -> list[Chart]:
    """Return a chart for each series that has at least two points."""
    charts: list[Chart] = []
    for each in series:
        curves = [Curve(label, run.losses(name)) for name, label in each.names.items()]
        finite = [_finite(curve.points) for curve in curves]
        if any(len(points) > 1 for points in finite):
            shown = [curve for curve, points in zip(curves, finite, strict=True) if points]
            charts.append(line_chart(each.caption, shown, "steps", log=each.log))
    return charts


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _learning_section(run: Run) -> Section | None:
    """Answer whether the model is learning."""
    series = [_Series("Share of next tokens predicted right", {"valid_accuracy": "accuracy"})]
    if run.config.objective.is_paired:
        series = list(_PAIR_SERIES)
    charts = _charts(run, series)
    others = other_answers(run)
    text = _learning_text(run)
    if not (text or charts or others):
        return None
    folded = [others] if others else []
    return Section("Is it learning?", text, charts=charts, folded=folded, is_question=True)


def _learning_text(run: Run) -> str:
    """Return a sentence about the validations."""
    valid = _finite(run.losses("valid_loss"))
    if len(valid) < 2:
        return "There are fewer than two validations, so there is nothing to compare yet."

    (_, first), (last_step, last) = valid[0], valid[-1]
    step, best = min(valid, key=_finite_loss)
    if best >= first:
        return f"No validation was better than {first:.4f}, the loss before training."
    if step == last_step:
        return f"The validation loss fell from {first:.4f} to {last:.4f}; the last one is the best."
    return (
        f"The validation loss fell from {first:.4f} to {best:.4f} at step {step:,}, and was"
        f" {last:.4f} at step {last_step:,}: training past step {step:,} did not help."
    )


def _stability_section(run: Run) -> Section:
    """Answer whether training is stable."""
    gradient = "Gradient norm before clipping, the largest since the last report"
    rates: dict[str, str] = {}
    for event in run.history:
        for name in event:
            if name.startswith("rate_"):
                rates[name] = name.removeprefix("rate_")
    series = [
        _Series(gradient, {"grad_norm": "norm"}, log=True),
        _Series("Learning rates", rates, log=True),
    ]

    skipped = [(event["step"], event["reason"]) for event in run.history if "reason" in event]
    text = "No step was skipped."
    if skipped:
        text = (
            f"{len(skipped):,} steps were skipped, because the loss or a gradient was not finite."
        )
    table = HTMLTable(skipped, ("step", "why"), "Skipped steps")
    return Section(
        "Is it stable?",
        text,
        charts=_charts(run, series),
        folded=[table] if skipped else [],
        is_question=True,
    )


def _memory_section(run: Run) -> Section | None:
    """Answer whether the run fits the machine, and how fast it is."""
    memory = {f"{kind}_memory_gb": kind for kind in ("peak", "active", "cache")}
    series = [
        _Series("Memory, GB", memory),
        _Series("Speed, useful tokens a second", {"tokens_per_second": "tokens/s"}),
        _Series("Share of tokens that are padding", {"padding": "padding"}),
    ]
    reports = [event for event in run.history if "loss" in event]
    if not reports:
        return None

    # A history by another version may lack numbers that are only shown.
    last = reports[-1]
    parts = [f"{gb(last['peak_memory_gb'] * 1e9)} at peak"]
    if "tokens_per_second" in last:
        parts.append(f"{last['tokens_per_second']:,.0f} tokens a second")
    if "padding" in last:
        parts.append(f"{last['padding']:.1%} padding")
    text = f"The last report: {', '.join(parts)}."
    return Section("Does it fit?", text, charts=_charts(run, series), is_question=True)


# Settings


def _settings_section(run: Run) -> Section:
    """Return what was asked for: the summary, every setting, and the versions."""
    versions: dict[str, str] = run.start.get("versions", {})
    defaults = settings_of(TrainConfig())
    settings = settings_of(run.config)
    rows = [(name, plain(value)) for name, value in settings.items()]
    changed = frozenset(name for name, value in settings.items() if value != defaults[name])
    tables = [
        HTMLTable(
            rows, title="Settings; those that differ from the default are bold", marked=changed
        ),
        HTMLTable(list(versions.items()), title="Versions"),
    ]
    return Section(
        "What was trained?", table=HTMLTable(summary(run)), folded=tables, is_question=True
    )


def _describe_split(counts: Event) -> str:
    share = "none"
    if counts["examples"]:
        share = f"{counts['supervised'] / max(1, counts['tokens']):.0%}"
    return f"{counts['examples']:,} examples, {counts['tokens']:,} tokens, {share} supervised"


def _finite_loss(point: tuple[float, float]) -> float:
    """Return the sort key of (step, loss): the loss; losses that are not finite come last."""
    _, loss = point
    return loss if math.isfinite(loss) else math.inf
