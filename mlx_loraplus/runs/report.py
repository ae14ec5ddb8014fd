"""``report.html``: one page about a run, for a browser or a phone, without external resources.

This file selects the content: a headline, the loss, sample answers, and then questions that the
reader can open. ``pages.py`` renders it.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..device import gb
from ..errors import counted
from ..files import write_atomically
from ..pages.charts import Chart, Curve, Mark, line_chart
from ..pages.pages import HTMLTable, Section, render_card, render_page
from ..settings import settings_of
from .command_line import changed_settings, train_command
from .history import REPORT, Run
from .progress import card, group_name
from .report_answers import answers_section, other_answers
from .report_headline import compare_to_plan, failure_reason, headline, sentence
from .report_weights import change_section
from .state import Event
from .verdict import Trend, divergence, duration, ranked_by_reward, rose_since

REFRESH = 10  # seconds after which the page of a live run loads itself again
# A run that has not reported for this long counts as killed; page.js has the same number.
LIVE_SECONDS = 3600.0
_FRAGMENT = ("steps", "validation loss", "training loss", "spent")  # what a notebook shows
_CHOICES = {"attention": "attention", "cross_entropy": "cross-entropy"}
_LOSSES = {"loss": "training", "valid_loss": "validation"}


def write_report(run: Run, *, live: bool = False) -> None:
    """Write a run's report into its folder: while it trains, at its end, and after a fuse."""
    write_atomically(run.folder / REPORT, report_page(run, live=live), durable=not live)


def report_page(
    run: Run, *, live: bool = False, heard: float | None = None, refresh: int | None = None
) -> bytes:
    """Return a run's report as HTML.

    Args:
        run: The run.
        live: Whether the run is training now, so that the page loads itself again until it ends.
        refresh: Seconds after which the page loads itself again. Default: ``REFRESH`` if the run is
            live, and never if not.
        heard: When the run was last heard from, in seconds since 1970. Default: now.
    """
    sections = [
        Section(charts=_charts(run, [_loss_series(run)])),
        answers_section(run),
        _learning_section(run),
        _stability_section(run),
        _rate_section(run),
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
        refresh=refresh or (REFRESH if live else None),
        wall_time=round(time.time() if heard is None else heard),
    )


def fragment(run: Run) -> str:
    """Return a run as HTML for a notebook: the loss curves and a few metrics."""
    # How the run ended, and how to continue it.
    line = f"{run.folder}: {run.outcome}"
    if run.outcome in ("interrupted", "out of time"):
        line += "; resume=True continues it"

    charts = _charts(run, [_loss_series(run)])
    rows = [(name, text) for name, text in summary(run) if name in _FRAGMENT]
    return render_card(line, charts[0] if charts else None, HTMLTable(rows))


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
        text = f"{first:.4f} before"
        if len(valid) > 1:
            text += f", {best:.4f} at best (step {step:,})"
        rows.append(("validation loss", text))

    # The results of training itself.
    if reports := run.losses("loss"):
        (_, first), (step, last) = reports[0], reports[-1]
        tokens = run.spent([step], "useful_tokens")[0]
        time_in_steps = duration(run.spent([step], "seconds")[0])
        peak = max(value for _, value in run.losses("peak_memory_gb"))
        text = f"{first:.4f}"
        if len(reports) > 1:
            text += f" at first, {last:.4f} at last"
        rows.append(("training loss", text))
        rows.append(("spent", f"{tokens:,.0f} input tokens, {time_in_steps} in steps"))
        rows.append(("peak memory", gb(peak * 1e9)))
    return rows


def plain(value: Any) -> str:
    """Return a setting's value as text."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


# Curves


@dataclass(frozen=True)
class _Series:
    """Curves that share one chart."""

    caption: str
    names: Mapping[str, str]  # event key → label
    log: bool = False


def _loss_series(run: Run) -> _Series:
    """Return the losses, with their unit."""
    objective = run.config.objective
    unit = f"per {objective.unit}" if objective.has_preferences else "nats per supervised token"
    return _Series(f"Loss, {unit}", _LOSSES, True)


_PREFERENCE_SERIES = (
    _Series(
        "Rewards of the validation answers",
        {
            "valid_rewards_chosen": "chosen",
            "valid_rewards_rejected": "rejected",
            "valid_reward_margin": "margin",
        },
    ),
    _Series(
        "Fraction of the validation data that is ranked right",
        {
            "valid_preferred": "chosen is more likely per token",
            "valid_reward_accuracy": "by reward",
        },
    ),
    _Series(
        "Log-probability of the validation answers",
        {"valid_logp_chosen": "chosen", "valid_logp_rejected": "rejected"},
    ),
    _Series("Estimate of the KL divergence from the reference", {"valid_kl": "KL"}),
)


def _charts(run: Run, series: Iterable[_Series]) -> list[Chart]:
    """Return a chart for each series that has at least two points."""
    charts: list[Chart] = []
    for each in series:
        curves = [Curve(label, _points(run, name)) for name, label in each.names.items()]
        finite = [_finite(curve.points) for curve in curves]
        if any(len(points) > 1 for points in finite):
            shown = [curve for curve, points in zip(curves, finite, strict=True) if points]
            charts.append(line_chart(each.caption, shown, "steps", log=each.log))
    return charts


def _points(run: Run, name: str) -> Sequence[tuple[float, float]]:
    return ranked_by_reward(run) if name == "valid_reward_accuracy" else run.losses(name)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _learning_section(run: Run) -> Section | None:
    """Answer whether the model is learning."""
    series = [_Series("Fraction of next tokens predicted right", {"valid_accuracy": "accuracy"})]
    if run.config.objective.has_preferences:
        series = list(_PREFERENCE_SERIES)
    charts = _charts(run, series)
    others = other_answers(run)
    text = _learning_text(run)
    if not (text or charts or others):
        return None
    folded = [others] if others else []
    return Section("Is it learning?", text, charts=charts, folded=folded, is_question=True)


def _learning_text(run: Run) -> str:
    """Return how the validation loss developed."""
    found = run.verdict
    if found.trend == "diverged":
        return divergence(run)
    if found.before is None or found.after is None or found.best_step is None:
        return "There are fewer than two validations, so there is nothing to compare yet."

    texts: dict[Trend | None, str] = {
        "not better": "no validation was better than before training",
        "overfitting": f"it has risen since step {found.best_step:,}: the model overfits",
        "still falling": "it is still falling",
        "levelled off": "it has levelled off",
        None: "there are too few steps or validations to say more",
    }
    if found.trend is None and (risen := rose_since(run)) is not None:
        texts[None] = (
            f"it has risen since step {risen:,}, in too few steps or validations to say more"
        )
    return (
        f"The validation loss was {found.before:.4f} before training and {found.after:.4f} at best"
        f" (step {found.best_step:,}); {texts[found.trend]}."
    )


def _stability_section(run: Run) -> Section:
    """Answer whether training is stable."""
    # The gradient norm, and the rates that the history has.
    gradient = "Gradient norm before clipping, the largest since the last report"
    rates: dict[str, str] = {}
    for event in run.history:
        for name in event:
            if name.startswith("rate_"):
                rates[name] = group_name(name)
    series = [
        _Series(gradient, {"grad_norm": "norm"}, log=True),
        _Series("Learning rates", rates, log=True),
    ]

    # What went wrong.
    skipped = [(event["step"], event["reason"]) for event in run.history if "skipped" in event]
    text = "No step was skipped."
    if skipped:
        verb = "was" if len(skipped) == 1 else "were"
        count = counted(len(skipped), "step")
        text = f"{count} {verb} skipped, because the loss or a gradient was not finite."
    if run.outcome == "failed":
        text += " " + sentence(f"the run failed: {failure_reason(run)}")
    table = HTMLTable(skipped, ("step", "why"), "Skipped steps")
    return Section(
        "Is it stable?",
        text,
        charts=_charts(run, series),
        folded=[table] if skipped else [],
        is_question=True,
    )


def _rate_section(run: Run) -> Section | None:
    """Answer how the learning rate was found, if it was searched."""
    found: Event | None = run.start.get("found_rate")
    if found is None:
        return None

    work = counted(round(found["steps"]), "step")
    text = (
        f"The learning rate {found['rate']:.3g} was found before the first step ({found['method']},"
        f" the work of {work}); the default is {found['default']:.3g}."
    )
    if found["critical"]:
        factor = found["rate"] / found["critical"]
        text += f" It is {factor:.2g} times the critical rate, {found['critical']:.3g}."
    if found["reason"]:
        text = f"The default, {found['rate']:.3g}, is used, because {found['reason']}."

    # A change that was not finite is null in the history.
    tried: list[Event] = found["tried"]
    points = [(each["rate"], each["change"]) for each in tried if each["change"] is not None]
    charts: list[Chart] = []
    if len(points) > 1:
        caption = "Change of the training loss at each rate that was tried; lower is better"
        names = {"rate": "used", "critical": "critical", "default": "default"}
        if found["reason"]:
            names = {"rate": "used"}
        marks = [Mark(found[name], f"{label}: {found[name]:.3g}") for name, label in names.items()]
        curves = [Curve("change", points)]
        charts = [line_chart(caption, curves, "learning rate", log_x=True, marks=marks)]
    return Section("How was the learning rate found?", text, charts=charts, is_question=True)


def _memory_section(run: Run) -> Section | None:
    """Answer whether the run fits the machine, and how fast it is."""
    memory = {f"{kind}_memory_gb": kind for kind in ("peak", "active", "cache")}
    series = [
        _Series("Memory, GB", memory),
        _Series("Speed, useful tokens a second", {"tokens_per_second": "tokens/s"}),
        _Series("Fraction of tokens that are padding", {"padding": "padding"}),
    ]
    reports = [event for event in run.history if "loss" in event]
    if not reports:
        return None

    # A history by another version may lack metrics that are only shown.
    last = reports[-1]
    parts = [f"{gb(last['peak_memory_gb'] * 1e9)} at peak"]
    if "tokens_per_second" in last:
        parts.append(f"{last['tokens_per_second']:,.0f} tokens a second")
    if "padding" in last:
        parts.append(f"{last['padding']:.1%} padding")
    text = f"The last report: {', '.join(parts)}."
    peak = max(report["peak_memory_gb"] for report in reports)
    if found := compare_to_plan(run, peak):
        text += f" The highest peak, {gb(peak * 1e9)}, is {found}."
    return Section(
        "Does it fit?",
        text,
        table=HTMLTable(_step_rows(run)),
        charts=_charts(run, series),
        is_question=True,
    )


def _step_rows(run: Run) -> list[tuple[str, str]]:
    """Return how a step is computed, and what was planned before the first one."""
    memory, chosen = run.start["memory"], run.start.get("choices", {})
    rows: list[tuple[str, str]] = []
    for name, label in (("planned_gb", "planned peak"), ("available_gb", "available")):
        if memory.get(name):
            rows.append((label, gb(memory[name] * 1e9)))

    # What tuning chose, or the defaults of this machine.
    kernels = chosen.get("choices", {})
    for name, label in _CHOICES.items():
        if name in kernels:
            rows.append((label, str(kernels[name])))
    if "slice_bytes" in kernels:
        rows.append(("slices of the logits", f"{kernels['slice_bytes'] // 2**20} MiB"))
    for name, label in (("grad_checkpoint", "gradient checkpointing"), ("compiled", "compiled")):
        if name in chosen:
            rows.append((label, "on" if chosen[name] else "off"))
    if "self_check" in run.start:
        rows.append(("self-check", run.start["self_check"]))
    return rows


# Settings


def _settings_section(run: Run) -> Section:
    """Return what was asked for: the summary, the command, every setting, and the versions."""
    versions: dict[str, str] = run.start.get("versions", {})
    rows = [(name, plain(value)) for name, value in settings_of(run.config).items()]
    changed = frozenset(changed_settings(run))
    tables = [
        HTMLTable(
            rows, title="Settings; those that differ from the default are bold", marked=changed
        ),
        HTMLTable(list(versions.items()), title="Versions"),
    ]
    return Section(
        "What was trained?",
        table=HTMLTable(summary(run)),
        commands=[("train it again", train_command(run))],
        folded=tables,
        is_question=True,
    )


def _describe_split(counts: Event) -> str:
    fraction = "none"
    if counts["examples"]:
        fraction = f"{counts['supervised'] / max(1, counts['tokens']):.0%}"
    examples, tokens = counted(counts["examples"], "example"), counted(counts["tokens"], "token")
    return f"{examples}, {tokens}, {fraction} supervised"


def _finite_loss(point: tuple[float, float]) -> float:
    """Return the sort key of (step, loss): the loss; losses that are not finite come last."""
    _, loss = point
    return loss if math.isfinite(loss) else math.inf
