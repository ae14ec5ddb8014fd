"""The beginning of a run's report: what trains on what, how far, how much better, what next."""

import math
from datetime import UTC, datetime

from ..device import gb
from ..errors import counted
from ..pages.pages import Headline, Tile
from ..userpaths import public_name
from .advice import give_advice
from .history import Run
from .next_steps import next_commands
from .progress import time_left
from .report_answers import best_step
from .run_folder import newest_step
from .verdict import (
    Verdict,
    answers_shortfall,
    divergence,
    duration,
    fall_of_chosen,
    percent,
    perplexity,
    ranked_right,
    ranking_shortfall,
)

_LONG_REASON = 160  # characters
_MIN_EXCESS = 0.01  # fraction of the planned memory
_MAX_RESUMED = 3  # steps that the title names; of more, the last ones
_ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "vera": "VeRA", "full": "full"}


def headline(run: Run, *, live: bool = False) -> Headline:
    """Return what a reader should know first: what trains on what, how far, and how much better."""
    found = run.verdict

    # How far the run has come.
    done = run.progress.step
    text = f"step {done:,} of {run.steps:,}"
    if live:
        text += f", {left}" if (left := time_left(run)) else ""
    elif run.outcome == "not ended":
        text += "; it was killed, or it is training without reporting"
    elif (best := best_step(run)) is not None:
        kept = "model" if run.config.adapter.adapter == "full" else "adapter"
        text += f"; the {kept} of step {best:,}, the best, is kept"

    tiles = [_loss_tile(run, found), _accuracy_tile(run, found), _exact_tile(found)]
    return Headline(
        title=_title(run),
        state=_state(run, found, live=live),
        text=text,
        lead=_lead(run, found, live=live),
        next_step=_next_step(run, found, live=live),
        commands=next_commands(run),
        date=_started(run),
        tiles=[tile for tile in tiles if tile is not None] + _cost_tiles(run, found),
        progress=done / max(1, run.steps) if live else None,
        is_live=live,
    )


def _title(run: Run) -> str:
    """Return what was trained on what, by which objective, and where it was resumed."""
    data = ", ".join(map(public_name, run.config.data.data)) or "the built-in demo set"
    count = run.start["train"]["examples"]
    objective = run.config.objective
    unit = "pair" if objective.is_paired else "example"
    kind = f"{objective.objective.upper()} ({_name_adapter(run)})"
    title = f"{public_name(run.start['model'])}: {kind} on {counted(count, unit)} from {data}"

    resumed = [f"{step:,}" for step in run.start.get("resumed", [])]
    if not resumed:
        return title
    many = "s" if len(resumed) > 1 else ""
    return f"{title}, resumed from step{many} {', '.join(resumed[-_MAX_RESUMED:])}"


def _name_adapter(run: Run) -> str:
    """Return the name of what trains, as in the literature."""
    kind = run.config.adapter.adapter
    has_ratio = kind == "lora" and (run.config.optimizer.lr_ratio or 1.0) > 1
    return "LoRA+" if has_ratio else _ADAPTERS[kind]


def _state(run: Run, found: Verdict, *, live: bool) -> str:
    """Return the state of a run in a few words."""
    if live:
        return "training"
    has_ended = run.finished or run.outcome == "failed"
    return "diverged" if has_ended and found.trend == "diverged" else run.outcome


def sentence(text: str) -> str:
    """Return a phrase as a sentence: with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _lead(run: Run, found: Verdict, *, live: bool) -> str:
    """Return whether the adapter is better than what it started from, in one or two sentences."""
    if found.trend == "diverged" and run.outcome != "failed":
        return divergence(run)
    if run.outcome == "failed":
        # Of a long reason, the first clause says what happened; a question below has all of it.
        reason = failure_reason(run)
        if len(reason) > _LONG_REASON:
            reason = reason.partition(": ")[0]
        return sentence(f"the run failed: {reason}")
    if found.before is None:
        if not live:
            return "Whether training helps is unknown: nothing was validated."
        # The first page of a run is written before its first number.
        begins = bool(run.start["valid"]["examples"]) and not run.losses()
        return "Training begins with a validation of what it starts from." if begins else ""
    if found.after is None:
        return "Nothing was validated since training began, so there is no result yet."

    start = "the base model"
    if run.config.resume_adapter_file is not None:
        start = "the adapter that it started from"
    if found.after >= found.before:
        text = f"No validation was better than {start}" + (" so far." if live else ".")
    else:
        lower = percent(1 - found.after / found.before)
        text = _result(run, found, start, lower)
    if found.exact is not None:
        text += f" {_describe_answers(*found.exact)}"
    return text


def _describe_answers(before: int, after: int, count: int) -> str:
    """Return how many sample answers are exact, as a sentence."""
    was = ", as before training"
    if count == 1:
        if before != after:
            was = f"; before training, it was{'' if before else ' not'}"
        return f"The sample answer is {'' if after else 'not '}exact{was}."
    if before != after:
        was = f"; before training, {before} {'was' if before == 1 else 'were'}"
    return f"{after} of {count} sample answers {'is' if after == 1 else 'are'} exact{was}."


def _result(run: Run, found: Verdict, start: str, lower: str) -> str:
    """Return whether a run whose validation loss fell is better than its start.

    Only a run with better answers is.

    Args:
        run: The run.
        found: Its verdict.
        start: What it started from.
        lower: By how much the validation loss fell.
    """
    if found.ranked is not None and run.config.objective.is_paired:
        text = _describe_ranking(found.ranked, start, lower)
    else:
        text = f"Better than {start}: the validation loss is {lower} lower."
        problem = ranking_shortfall(run, found)
        if problem is None and answers_shortfall(found) is not None:
            is_one = found.exact is not None and found.exact[2] == 1
            problem = "the answers still differ from the expected ones"
            if is_one:
                problem = "the answer differs from the expected one"
        if problem is not None:
            text = f"The validation loss is {lower} lower than that of {start}, but {problem}."

    if fall_of_chosen(run.history) is not None:
        text += " But the chosen answers have become less likely."
    return text


def _describe_ranking(ranked: tuple[float, float], start: str, lower: str) -> str:
    """Return in how many validation pairs the chosen answer is preferred."""
    before, after = map(percent, ranked)
    text = f"The chosen answers are preferred in {after} of the validation pairs"
    if before == after:
        return f"{text}, as by {start}, but the validation loss is {lower} lower."
    if ranked[1] < ranked[0]:
        return f"{text}, and by {start} in {before}, although the validation loss is {lower} lower."
    return f"{text}, and by {start} in {before}."


def failure_reason(run: Run) -> str:
    """Return why a run failed, as a phrase."""
    return str(run.history[-1].get("reason") or "the device failed").rstrip(".")


def _next_step(run: Run, found: Verdict, *, live: bool) -> str:
    """Return the advice for a finished run, or from where another one can be resumed."""
    if live:
        return ""
    if advice := give_advice(run, found):
        return sentence(advice.text)
    saved = newest_step(run.folder)
    if saved is None:
        return "No step is saved yet, so the command below starts from the beginning."
    return f"Step {saved:,} is saved; the command below continues from there."


def _started(run: Run) -> str:
    """Return when the run started; a run of version 0.1.0 has no date."""
    try:
        started = datetime.fromisoformat(run.start["started"]).astimezone(UTC)
    except (KeyError, TypeError, ValueError):
        return ""
    return f"started {started:%Y-%m-%d %H:%M} UTC"


def _loss_tile(run: Run, found: Verdict) -> Tile | None:
    """Return the validation loss before and after training; the training loss if there is none."""
    if found.before is not None and found.after is None:
        note = _loss_note(run, perplexity(found.before))
        return Tile("Validation loss", f"{found.before:.3f}", note)
    if found.before is not None and found.after is not None:
        name = "Validation loss" if run.finished else "Best validation loss"
        first, last = found.before, found.after
    else:
        losses = [loss for _, loss in run.losses() if math.isfinite(loss)]
        if not losses:
            return None
        name, first, last = "Training loss", losses[0], losses[-1]

    note = _loss_note(run, f"{perplexity(first)} → {perplexity(last)}")
    return Tile(name, f"{first:.3f} → {last:.3f}", note)


def _loss_note(run: Run, shown: str) -> str:
    """Return the note on a loss; that of preferences has no perplexity."""
    objective = run.config.objective
    return f"per {objective.unit}" if objective.has_preferences else f"perplexity {shown}"


def _accuracy_tile(run: Run, found: Verdict) -> Tile | None:
    """Return the fraction of right answers or tokens, before and after training."""
    objective = run.config.objective
    by_step: dict[int, float] = dict(run.losses("valid_accuracy"))
    if objective.has_preferences:
        by_step = ranked_right(run)
    if 0 not in by_step:
        return None

    steps = [step for step in (0, found.best_step) if step in by_step]
    change = " → ".join(percent(by_step[step]) for step in steps)
    if objective.is_paired:
        return Tile("Chosen answers preferred", change, "of the validation pairs")
    if objective.is_labeled:
        return Tile("Answers ranked right", change, "of the validation answers; chance is 50%")
    return Tile("Next-token accuracy", change, "on the validation answers")


def _exact_tile(found: Verdict) -> Tile | None:
    """Return how many sample answers equal the expected ones."""
    if found.exact is None:
        return None
    before, after, count = found.exact
    return Tile("Exact sample answers", f"{before} → {after} of {count}", "answers below")


def _cost_tiles(run: Run, found: Verdict) -> list[Tile]:
    """Return the time and the memory that training has taken, or before that, the plan."""
    reports = run.losses("seconds")
    if not reports:
        memory = run.start["memory"]
        planned, available = memory.get("planned_gb"), memory.get("available_gb")
        if not planned or not available:
            return []
        return [Tile("Planned memory", gb(planned * 1e9), f"of {gb(available * 1e9)}")]
    tokens = run.spent([reports[-1][0]], "useful_tokens")[0]
    tiles = [Tile("Time", duration(60 * found.minutes), f"for {tokens:,.0f} input tokens")]

    # If all steps were skipped, no memory was reported.
    peaks = [value for _, value in run.losses("peak_memory_gb")]
    if peaks:
        peak = max(peaks)
        tiles.append(Tile("Peak memory", gb(peak * 1e9), compare_to_plan(run, peak)))
    return tiles


def compare_to_plan(run: Run, peak: float) -> str:
    """Return whether the peak, in GB, is above the planned memory; empty without a plan."""
    planned = run.start["memory"].get("planned_gb")
    if not planned:
        return ""
    above, shown = peak / planned - 1, gb(planned * 1e9)
    if above >= _MIN_EXCESS:
        return f"{above:.0%} above the planned {shown}"
    if above <= 0:
        return f"within the planned {shown}"
    return "as planned" if gb(peak * 1e9) == shown else f"about the planned {shown}"
