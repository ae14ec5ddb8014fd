"""The verdict on a run: what training changed, how long it took, and what to do next.

Validation losses decide. With the best loss b, reached at step n, and the loss before training f:

- diverged: the last loss is not a finite number, or b ≥ f and skipped steps have ended the run
- not better: b ≥ f
- overfitting: the last loss is more than 1% above b, so the loss has risen since step n
- still falling: the last validation is the best, and since the one before it the loss fell by more
  than 5% of the whole fall f - b
- levelled off: otherwise

Nothing is called overfitting or levelled off in fewer than 30 steps, or with fewer than 3
validations after the first: so little can be chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..settings import default_rate
from ..userpaths import shell_word
from .state import Event

if TYPE_CHECKING:
    from .history import Run

Trend = Literal["diverged", "not better", "overfitting", "still falling", "levelled off"]

_RISE = 0.01  # share of the best loss by which the last one may exceed it
_FALL = 0.05  # share of the whole fall
_FEWEST_STEPS = 30  # for a verdict that more steps would change little or harm
_FEWEST_VALIDATIONS = 3  # after the one before training, for the same
_CHOSEN_FALL = 0.02  # share of the chosen answers' log-probability by which it may fall


@dataclass(frozen=True)
class Verdict:
    """What a run has reached.

    Attributes:
        before: The validation loss before training, in nats per token; None without validation.
        after: The validation loss of the adapter that the run keeps.
        best_step: The step of that adapter.
        trend: How the validation loss developed; None if there are too few steps or validations to
            say.
        exact: The numbers of exact sample answers before and after, and of sample answers.
        minutes: The duration of all steps and validations.
        tokens_per_second: Tokens without padding per second of all steps; None without reports.
        ranked: The shares of validation pairs whose chosen answer is more likely per token, or of
            labeled answers on the right side of the KL estimate, before and after; None with sft.
            The first is None if it means nothing (``starts_at_reference``).
    """

    before: float | None
    after: float | None
    best_step: int | None
    trend: Trend | None
    exact: tuple[int, int, int] | None
    minutes: float
    tokens_per_second: float | None
    ranked: tuple[float | None, float] | None = None

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
            change = f"perplexity {_perplexity(self.before)} -> {_perplexity(self.after)}"
            if self.ranked is not None:
                before, after = self.ranked
                was = "" if before is None else f"{before:.1%} -> "
                change = f"answers ranked right {was}{after:.1%}"
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


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.4g}"


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
    if _diverged_at(run) is not None or (_ends_with_skipped_steps(run) and not is_better):
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


def _diverged_at(run: "Run") -> int | None:
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
    if _diverged_at(run) is not None:
        sign = "the last validation loss is not a number"
    return f"Training has diverged: {sign}."


def ranking_of(run: "Run") -> str:
    """Return the name of the share of validation answers that are ranked right.

    For pairs it is not the accuracy of the rewards: before training, those of dpo and ipo are often
    all zero, so they rank nothing.
    """
    return "valid_preferred" if run.config.objective.is_paired else "valid_reward_accuracy"


def starts_at_reference(run: "Run") -> bool:
    """Return whether labeled answers are ranked by chance before training.

    Their rewards compare the model with the reference. If it is the model itself, they are zero up
    to rounding.
    """
    objective = run.config.objective
    is_same = objective.reference == "start" or run.config.resume_adapter_file is None
    return objective.is_labeled and is_same


def _ranked(run: "Run", best_step: int | None) -> tuple[float | None, float] | None:
    """Return the shares that were ranked right before training and after it."""
    shares: dict[int, float] = dict(run.losses(ranking_of(run)))
    if 0 not in shares or best_step not in shares:
        return None
    before = None if starts_at_reference(run) else shares[0]
    return before, shares[best_step]


def _trend(first: float, trained: Sequence[float], steps: int) -> Trend | None:
    """Return how the losses after the first one developed, in this number of steps."""
    best, last = min(trained), trained[-1]
    if best >= first:
        return "not better"
    if len(trained) > 1 and last == best and trained[-2] - last > _FALL * (first - last):
        return "still falling"
    if steps < _FEWEST_STEPS or len(trained) < _FEWEST_VALIDATIONS:
        return None
    return "overfitting" if last > (1 + _RISE) * best else "levelled off"


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


def _advice_on_few(run: "Run", kept: str) -> str:
    """Return what to do after too few steps or validations to name a trend."""
    unknown, remedy = "the loss has levelled off", "train longer"
    risen = rose_since(run)
    if risen is not None:
        unknown, remedy = "it overfits", "train longer, or with a lower --learning-rate"

    few = "steps"
    if not ends_too_early(run):
        few, remedy = "validations", "lower --steps-per-eval"
    advised = f"too few {few} to say whether {unknown}: {remedy}"
    if risen is None:
        return advised
    return f"the validation loss has risen since step {risen}, whose {kept} kept; {advised}"


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


def advice(run: "Run", found: Verdict) -> str | None:
    """Return a sentence on what to do next, or None for a run that can be resumed."""
    if found.trend == "diverged" or not took_effect(run):
        return _advice_on_divergence(run, found)
    if not run.finished:
        return None
    if found.before is None or found.after is None:
        return (
            "without validation examples it is unknown whether training helps on other data: add"
            " a valid file, or --valid-split 0.1"
        )

    # The loss of pairs can fall because both answers become less likely.
    fall = fall_of_chosen(run)
    if fall is not None and found.trend != "not better":
        return f"{fall}: {remedy_for_fall(run)}"
    if is_all_ranked(run):
        return (
            "all validation answers are ranked right: more steps would lower the loss, and change"
            " the answers little"
        )

    rate = run.config.optimizer.learning_rate or 0.0
    is_full = run.config.adapter.adapter == "full"
    can_sweep = not is_full and not run.config.objective.is_paired
    search = " (mlx_loraplus.sweep finds a rate)" if can_sweep else ""
    kept = "weights are" if is_full else "adapter is"
    texts: dict[Trend | None, str] = {
        "not better": (
            "no validation was better than before training: try a lower --learning-rate, such as"
            f" {rate / 4:.1e}, or more examples{search}"
        ),
        "overfitting": (
            f"overfitting since step {found.best_step}, whose {kept} kept: train for about"
            f" {found.best_step} steps, or add examples"
        ),
        "still falling": "the validation loss is still falling: train longer",
        "levelled off": "the validation loss has levelled off: more steps would change little",
        None: _advice_on_few(run, kept),
    }
    return texts[found.trend]


def took_effect(run: "Run") -> bool:
    """Return whether any step changed the model; a step that is not finite is skipped."""
    skipped = max((count for _, count in run.losses("skipped")), default=0)
    return not skipped or skipped < run.progress.step


def _advice_on_divergence(run: "Run", found: Verdict) -> str:
    """Return what to do after losses that are not finite."""
    since = _diverged_at(run)
    rate = min((run.config.optimizer.learning_rate or 0.0) / 4, default_rate(run.config))
    lower = f"a lower --learning-rate, such as {rate:.1e}"
    if since is None and took_effect(run):
        return f"train from the start with {lower}"
    if since is None:
        return (
            "nothing was learned, because the loss or a gradient was never finite: train from the"
            f" start with {lower}"
        )
    if since == 0:
        return (
            "the validation loss is not a number even before training: check the model's answers"
            " with mlx_loraplus.generate"
        )
    kept = f" (the adapter of step {found.best_step} is kept)" if found.best_step else ""
    return (
        f"the validation loss is not a number since step {since}{kept}: train from the start with"
        f" {lower}"
    )


def fall_of_chosen(run: "Run") -> str | None:
    """Return that training has made the chosen validation answers less likely, or None.

    An objective can be minimized by making both answers less likely, the rejected ones faster.
    """
    # Labeled answers may all be of one kind, and then have no margin.
    names = {"valid_logp_chosen", "valid_reward_margin"}
    events = [event for event in run.history if names <= event.keys()]
    if not events:
        return None

    first, last = (event["valid_logp_chosen"] for event in (events[0], events[-1]))
    gain = events[-1]["valid_reward_margin"] - events[0]["valid_reward_margin"]
    if first - last <= _CHOSEN_FALL * abs(first) or gain <= 0:
        return None
    return (
        f"the chosen answers are less likely than before training (log-probability {first:.1f} ->"
        f" {last:.1f}) while the margin grows, so the model moves away from both answers"
    )


def remedy_for_fall(run: "Run") -> str:
    """Return what keeps the chosen answers likely, by objective."""
    objective = run.config.objective.objective
    if objective == "orpo":
        return "try a lower --learning-rate or --orpo-lambda"
    remedies = "a lower --learning-rate"
    if objective in ("dpo", "ipo", "kto"):
        remedies += ", a higher --beta"
    if objective != "kto":
        remedies += ", or --objective orpo, which also learns the chosen answers"
    return f"try {remedies}"


def longer(run: "Run") -> str:
    """Return the command that continues a finished run to twice its length."""
    settings = shell_word(run.folder / "run.yaml")
    if run.config.iters is None:
        length = f"--epochs {2 * (run.config.epochs or 1):g}"
    else:
        length = f"--iters {2 * run.steps}"
    return f"mlx_loraplus.train -c {settings} --resume {length}"
