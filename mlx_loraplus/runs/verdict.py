"""The verdict on a run: what training changed, how long it took, and what is not right yet.

Validation losses decide the trend; ``advice.py`` says what to do next. With the best loss b,
reached at step n, and the loss before training f:

- diverged: the last loss is not a finite number, or b ≥ f and skipped steps have ended the run
- not better: b ≥ f
- overfitting: the last loss is more than 1% above b, so the loss has risen since step n
- still falling: the last validation is the best, and since the one before it the loss fell by more
  than 5% of the whole fall f - b, or by more than 1% of it and a tenth of the loss itself
- levelled off: otherwise

Nothing is called overfitting or levelled off in fewer than 30 steps, or with fewer than 3
validations after the first, because such a short history may be chance.

A lower loss is not all that matters. Although the loss fell, the answers fall short if fewer than
half of the sample answers are exact, and the ranking of preferences falls short if at most half of
the validation answers are ranked right. Both also fall short if they were better before training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .state import Event

if TYPE_CHECKING:
    from .history import Run

Trend = Literal["diverged", "not better", "overfitting", "still falling", "levelled off"]

_RISE = 0.01  # fraction of the best loss by which the last one may exceed it
_FALL = 0.05  # fraction of the whole fall
_SMALL_FALL = 0.01  # the same, if the loss itself also fell by this fraction:
_FALL_OF_LOSS = 0.1
_FEWEST_STEPS = 30  # for a verdict that more steps would change little or harm
_FEWEST_VALIDATIONS = 3  # after the one before training, for the same
_CHOSEN_FALL = 0.02  # fraction of the chosen answers' first log-probability by which it may fall
_CHOSEN_FALL_FROM_BEST = 0.1  # the same, for a fall from its best value
_SMALLEST_FALL = 0.1  # nats: answers that are nearly certain stay so
_FEW = 0.5  # fraction of right answers; with fewer, a lower loss is not enough
_CHANCE = 0.5  # fraction of labeled answers that are ranked right by chance
_LOSS_OF_LARGE = 20.0  # nats per token, beyond which a perplexity says nothing


@dataclass(frozen=True)
class Verdict:
    """What a run has reached.

    Attributes:
        before: The validation loss before training, None without validation; its unit is
            described in ``history.py``.
        after: The validation loss of the adapter that the run keeps.
        best_step: The step of that adapter.
        trend: How the validation loss developed; None if there are too few steps or validations to
            say.
        exact: The numbers of exact sample answers before and after, and of sample answers.
        minutes: The duration of all steps and validations.
        tokens_per_second: Tokens without padding per second of all steps; None without reports.
        ranked: The fractions of validation pairs whose chosen answer is more likely per token, or
            of labeled answers on the right side of the KL estimate, before and after; None with
            sft. Where rewards rank nothing yet, the first one is chance (``ranked_by_reward``).
    """

    before: float | None
    after: float | None
    best_step: int | None
    trend: Trend | None
    exact: tuple[int, int, int] | None
    minutes: float
    tokens_per_second: float | None
    ranked: tuple[float, float] | None = None

    def stored(self) -> dict[str, Any]:
        """Return the values for the last event of a history."""
        return {
            "valid_before": self.before,
            "valid_after": self.after,
            "trend": self.trend,
            "minutes": round(self.minutes, 3),
            "mean_tokens_per_second": self.tokens_per_second,
        }

    def summary(self) -> list[str]:
        """Return lines on what training changed and what it took."""
        lines: list[str] = []
        if self.before is not None and self.after is not None:
            change = f"perplexity {perplexity(self.before)} -> {perplexity(self.after)}"
            if self.ranked is not None:
                before, after = map(percent, self.ranked)
                change = f"answers ranked right {before} -> {after}"
            lines.append(f"validation loss {self.before:.4f} -> {self.after:.4f}, {change}")
        if self.exact is not None:
            before, after, count = self.exact
            lines.append(f"exact sample answers {before} of {count} -> {after} of {count}")

        took = f"took {duration(60 * self.minutes)}"
        if self.tokens_per_second is not None:
            took += f", {self.tokens_per_second:,.0f} tokens/s"
        return [*lines, took]


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} seconds"
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def perplexity(loss: float) -> str:
    """Return the perplexity of a loss in nats per token, exp(loss), as text."""
    if loss >= _LOSS_OF_LARGE:
        return "very large"
    value = math.exp(loss)
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """Return a fraction as text; only 0 and 1 are rounded to 0% and 100%."""
    if fraction in (0, 1) or 0.01 <= fraction <= 0.99:
        return f"{fraction:.0%}"
    return f"{min(max(fraction, 0.001), 0.999):.1%}"


def verdict_of(run: "Run") -> Verdict:
    """Return the verdict on a run, from its history."""
    losses = [(step, loss) for step, loss in run.losses("valid_loss") if math.isfinite(loss)]
    first = losses[0][1] if losses and losses[0][0] == 0 else None
    trained = [(loss, step) for step, loss in losses if step > 0]
    after, best_step = min(trained, default=(None, None))
    trend = None
    if first is not None and trained:
        trend = _trend(first, [loss for loss, _ in trained], losses[-1][0])
    is_better = first is not None and after is not None and after < first
    if diverged_at(run) is not None or (_ends_with_skipped_steps(run) and not is_better):
        trend = "diverged"

    reports = [event for event in run.history if "loss" in event]
    seconds = sum(report["seconds"] for report in reports)
    tokens = sum(report["useful_tokens"] for report in reports)
    validating = sum(seconds for _, seconds in run.losses("valid_seconds"))
    return Verdict(
        before=first,
        after=after,
        best_step=best_step,
        trend=trend,
        exact=_exact(run, best_step),
        minutes=(max(seconds, run.progress.seconds) + validating) / 60,
        tokens_per_second=tokens / seconds if seconds else None,
        ranked=_ranked(run, best_step),
    )


def diverged_at(run: "Run") -> int | None:
    """Return the first of the last steps whose validation losses are not finite, if any."""
    since: int | None = None
    for step, loss in run.losses("valid_loss"):
        if math.isfinite(loss):
            since = None
        elif since is None:
            since = step
    return since


def _ends_with_skipped_steps(run: "Run") -> bool:
    """Return whether a run failed because too many steps in a row were skipped."""
    before_the_end = run.history[-2:-1]
    return run.outcome == "failed" and any("skipped" in event for event in before_the_end)


def divergence(run: "Run") -> str:
    """Return a sentence on how a diverged run shows it."""
    sign = "the last steps were skipped, because the loss or a gradient was not finite"
    if diverged_at(run) is not None:
        sign = "the last validation loss is not a number"
    return f"Training has diverged: {sign}."


def ranked_right(run: "Run") -> dict[int, float]:
    """Return the fractions of the validation answers that are ranked right, by step.

    For pairs they are not the accuracies of the rewards: before training, those of dpo and ipo are
    often all zero, so they rank nothing.
    """
    if run.config.objective.is_paired:
        return dict(run.losses("valid_preferred"))
    return dict(ranked_by_reward(run))


def ranked_by_reward(run: "Run") -> list[tuple[int, float]]:
    """Return (step, fraction) of the validation answers that their rewards rank right.

    Rewards compare the model with the reference. If it is the model itself before training, they
    are zero up to rounding, and what rounding ranks right is chance.
    """
    objective = run.config.objective
    is_same = objective.reference == "start" or run.config.resume_adapter_file is None
    points: list[tuple[int, float]] = run.losses("valid_reward_accuracy")
    if objective.has_reference and is_same:
        return [(step, fraction if step else _CHANCE) for step, fraction in points]
    return points


def _ranked(run: "Run", best_step: int | None) -> tuple[float, float] | None:
    """Return the fractions that were ranked right before training and after it."""
    fractions = ranked_right(run)
    if 0 not in fractions or best_step not in fractions:
        return None
    return fractions[0], fractions[best_step]


def _trend(first: float, trained: Sequence[float], steps: int) -> Trend | None:
    """Return how the losses after the first one developed, in this number of steps."""
    best, last = min(trained), trained[-1]
    if best >= first:
        return "not better"
    if len(trained) > 1 and last == best and _is_falling(first, trained[-2], last):
        return "still falling"
    if steps < _FEWEST_STEPS or len(trained) < _FEWEST_VALIDATIONS:
        return None
    return "overfitting" if last > (1 + _RISE) * best else "levelled off"


def _is_falling(first: float, previous: float, last: float) -> bool:
    """Return whether the loss still fell clearly from the previous validation to the last.

    A loss near zero cannot fall by much of the whole fall, so its own size counts too.
    """
    fall, whole = previous - last, first - last
    return fall > _FALL * whole or (fall > _SMALL_FALL * whole and fall > _FALL_OF_LOSS * previous)


def rose_since(run: "Run") -> int | None:
    """Return the step of the best validation if the last one is clearly worse, or None."""
    found = run.verdict
    last = run.losses("valid_loss")[-1:]
    if found.after is None or not last or last[0][1] <= (1 + _RISE) * found.after:
        return None
    return found.best_step


def ends_too_early(run: "Run") -> bool:
    """Return whether the loss fell in too few steps to say whether it has levelled off."""
    found = run.verdict
    is_short = run.history[-1]["step"] < _FEWEST_STEPS
    return is_short and found.trend is None and found.after is not None


def is_all_ranked(run: "Run") -> bool:
    """Return whether the loss still falls, but all validation pairs are ranked right already."""
    found = run.verdict
    is_ranked = run.config.objective.is_paired and found.ranked is not None and found.ranked[1] == 1
    return is_ranked and found.trend == "still falling" and run.history[-1]["step"] >= _FEWEST_STEPS


def _exact(run: "Run", best_step: int | None) -> tuple[int, int, int] | None:
    """Return how many sample answers were exact before training, after it, and their number."""
    answers: dict[int, list[str]] = dict(run.losses("answers"))
    prompts: list[Event] = run.start.get("prompts", [])
    expected = [prompt.get("expected") for prompt in prompts]
    known = [index for index, answer in enumerate(expected) if answer is not None]
    if not known or 0 not in answers or best_step not in answers:
        return None

    def count(given: Sequence[str]) -> int:
        return sum(given[index].strip() == str(expected[index]).strip() for index in known)

    return count(answers[0]), count(answers[best_step]), len(known)


def fall_of_chosen(history: Sequence[Event]) -> str | None:
    """Return a clause saying that the chosen validation answers became less likely, or None.

    An objective can be minimized by making both answers less likely, the rejected ones faster.
    """
    # Labeled answers may all be of one kind, and then have no margin.
    names = {"valid_logp_chosen", "valid_reward_margin"}
    events = [event for event in history if names <= event.keys()]
    if not events:
        return None

    # Look for a fall below the start, and else for one from the best value since then.
    first, last = events[0], events[-1]
    best = max(events, key=lambda event: event["valid_logp_chosen"])
    size = abs(first["valid_logp_chosen"])
    for since, fall in ((first, _CHOSEN_FALL), (best, _CHOSEN_FALL_FROM_BEST)):
        before, after = since["valid_logp_chosen"], last["valid_logp_chosen"]
        gain = last["valid_reward_margin"] - since["valid_reward_margin"]
        if before - after > max(fall * size, _SMALLEST_FALL) and gain > 0:
            when = "before training" if since is first else f"at step {since['step']}"
            return (
                f"the chosen answers are less likely than {when} (log-probability {before:.1f} ->"
                f" {after:.1f}) while the margin grows, so the model moves away from both answers"
            )
    return None


def shortfall(run: "Run", found: Verdict) -> str | None:
    """Return what is not right yet although the validation loss fell, as a phrase, or None."""
    return ranking_shortfall(run, found) or answers_shortfall(found)


def ranking_shortfall(run: "Run", found: Verdict) -> str | None:
    """Return how the ranking of the validation answers falls short, as a clause, or None."""
    if found.ranked is None:
        return None
    before, after = found.ranked
    what = "pairs" if run.config.objective.is_paired else "answers"
    if after < before and percent(after) != percent(before):
        change = f"{percent(before)} -> {percent(after)}"
        return f"fewer validation {what} are ranked right than before training ({change})"
    if after <= _FEW:
        return f"only {percent(after)} of the validation {what} are ranked right"
    return None


def answers_shortfall(found: Verdict) -> str | None:
    """Return how the sample answers fall short, as a clause, or None."""
    if found.exact is None:
        return None
    before, after, count = found.exact
    if after < before:
        if count == 1:
            return "the sample answer was exact before training, and is not now"
        return f"fewer sample answers are exact than before training ({before} -> {after})"
    if after >= _FEW * count:
        return None
    if count == 1:
        return "the sample answer still differs from the expected one"
    every = "both" if count == 2 else f"all {count}"
    wrong = f"{count - after} of {count}" if after else every
    return f"{wrong} sample answers still differ from the expected ones"
