"""What to do next after a run has ended, as one sentence."""

from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from ..adapters.stored_files import UNKNOWN_MODEL
from ..errors import counted
from ..settings import default_rate
from ..userpaths import shell_word
from .history import Run
from .state import BAD_BATCH, Progress
from .verdict import (
    Trend,
    Verdict,
    diverged_at,
    ends_too_early,
    fall_of_chosen,
    is_all_ranked,
    ranking_shortfall,
    rose_since,
    shortfall,
)


@dataclass(frozen=True)
class Advice:
    """What to do next.

    Attributes:
        text: The advice, as a sentence without a full stop.
        is_longer: Whether it is to train longer.
    """

    text: str
    is_longer: bool = False

    def after(self, beginning: str) -> "Advice":
        """Return this advice with a text before it."""
        return Advice(beginning + self.text, self.is_longer)


_LONGER = Advice("train longer", is_longer=True)


def give_advice(run: Run, found: Verdict) -> Advice | None:
    """Return what to do next, or None for a run that can be resumed."""
    if found.trend == "diverged" or run.progress.mostly_skipped:
        return Advice(_advice_on_divergence(run, found))
    if not run.finished:
        return None
    if found.before is None or found.after is None:
        return Advice(
            "without validation examples it is unknown whether training helps on other data: add"
            " a valid file, or --valid-split 0.1"
        )

    advised = None
    if found.trend != "not better":
        advised = _advice_on_answers(run, found)
    return advised or _advice_on_trend(run, found)


def _advice_on_answers(run: Run, found: Verdict) -> Advice | None:
    """Return what to do about the answers, which matter more than the loss.

    Return None if the answers give no reason for advice; then the trend of the loss decides.
    """
    # The loss of pairs can fall because both answers become less likely.
    fall = fall_of_chosen(run.history)
    if fall is not None:
        return Advice(f"{fall}: {remedy_for_fall(run.config.objective.objective)}")

    problem = shortfall(run, found)
    if problem is not None:
        return _remedy_for_shortfall(run, found).after(f"{problem}: ")
    if is_all_ranked(run):
        return Advice(
            "all validation answers are ranked right: more steps would lower the loss, and change"
            " the answers little"
        )
    return None


def _remedy_for_shortfall(run: Run, found: Verdict) -> Advice:
    """Return what to do if the loss fell, but the answers or the ranking fall short."""
    judged = "pairs" if run.config.objective.is_paired else "labels"
    condition = f"check that the {judged} are right, and if they are"
    if ranking_shortfall(run, found) is None:
        is_one = found.exact is not None and found.exact[2] == 1
        it, is_wrong = ("it", "it is wrong") if is_one else ("them", "they are wrong")
        condition = f"read {it} before you use the model, and if {is_wrong}"
    return _remedy_by_trend(run, found).after(f"{condition}, ")


def _remedy_by_trend(run: Run, found: Verdict) -> Advice:
    """Return what makes the answers better, as a request."""
    if found.trend == "overfitting":
        since = found.best_step
        return Advice(f"add examples, because the model has been overfitting since step {since}")
    if found.trend == "levelled off":
        return Advice(
            "add examples, or try a higher --learning-rate, because the loss has levelled off"
        )
    if (risen := rose_since(run)) is not None:
        return Advice(f"add examples, because the loss has risen since step {risen}")
    return _LONGER


def _advice_on_trend(run: Run, found: Verdict) -> Advice:
    """Return what to do next by how the validation loss developed."""
    rate = run.config.optimizer.learning_rate or 0.0
    is_full = run.config.adapter.adapter == "full"
    search = "" if is_full else " (mlx_loraplus.sweep finds a rate)"
    kept = "weights are" if is_full else "adapter is"
    advised: dict[Trend | None, Advice] = {
        "not better": Advice(
            "no validation was better than before training: try a lower --learning-rate, such as"
            f" {rate / 4:.1e}, or more examples{search}"
        ),
        "overfitting": Advice(
            f"overfitting since step {found.best_step}, whose {kept} kept: train for about"
            f" {counted(found.best_step or 0, 'step')}, or add examples"
        ),
        "still falling": _LONGER.after("the validation loss is still falling: "),
        "levelled off": Advice(
            "the validation loss has levelled off: more steps would change little"
        ),
        None: _advice_on_few(run, kept),
    }
    return advised[found.trend]


def _advice_on_few(run: Run, kept: str) -> Advice:
    """Return what to do after too few steps or validations to name a trend."""
    unknown, remedy = "the loss has levelled off", _LONGER
    risen = rose_since(run)
    if risen is not None:
        unknown = "it overfits"
        remedy = Advice("train longer, or with a lower --learning-rate", is_longer=True)

    few = "steps"
    if not ends_too_early(run):
        few, remedy = "validations", Advice("lower --steps-per-eval")
    advised = remedy.after(f"too few {few} to say whether {unknown}: ")
    if risen is None:
        return advised
    return advised.after(f"the validation loss has risen since step {risen}, whose {kept} kept; ")


def _advice_on_divergence(run: Run, found: Verdict) -> str:
    """Return what to do after losses that are not finite."""
    if failure := find_failure(run):
        reason, remedy = failure
        return remedy if run.progress.mostly_skipped else f"{reason}: {remedy}"

    lower = f"train from the start with a lower --learning-rate, such as {_lower_rate(run)}"
    since = diverged_at(run)
    if since is None:
        return lower
    return (
        f"the validation loss has not been a number since step {since} (the adapter of step"
        f" {found.best_step} is kept): {lower}"
    )


def find_failure(run: Run) -> tuple[str, str] | None:
    """Return why the adapter of a run is of no use, and what to do; None if it may be of use."""
    progress = run.progress
    if progress.mostly_skipped:
        return (
            describe_skipped(progress),
            remedy_for_skipped(progress, last_skipped_rows(run.folder)),
        )
    since = diverged_at(run)
    if since is None or run.verdict.best_step:
        return None
    if since == 0:
        return (
            "the validation loss is not a number even before training",
            "check the model's answers with mlx_loraplus.generate",
        )
    return (
        f"the validation loss has not been a number since step {since}",
        f"train from the start with a lower --learning-rate, such as {_lower_rate(run)}",
    )


def describe_skipped(progress: Progress) -> str:
    """Return how many steps of a run were skipped, and why."""
    why = "skipped because the loss or a gradient was not finite"
    if not progress.took_effect:
        return f"no step took effect: all {progress.step:,} were {why}"
    verb = "was" if progress.skipped == 1 else "were"
    return f"{progress.skipped:,} of {counted(progress.step, 'step')} {verb} {why}"


def last_skipped_rows(folder: Path) -> str:
    """Return where the rows of the last skipped step of a run are."""
    return f"the rows of the last one, in {folder / BAD_BATCH}"


def remedy_for_skipped(progress: Progress, rows: str) -> str:
    """Return what to do if most steps of a run were skipped, as a request.

    Args:
        progress: The progress of the run.
        rows: Where rows of a skipped step are.
    """
    weights = "other weights of the model, such as bfloat16 instead of float16"
    if progress.suspects_rate:
        first = progress.step - progress.skipped + 1
        return (
            f"every step from step {first} on was skipped, so train from the start with a lower"
            f" --learning-rate or --lr-ratio; if that changes nothing, look at {rows}"
        )
    if progress.took_effect:
        return (
            "steps between them were finite, so no other rate helps: correct or remove their rows"
            f" (see {rows}), or try {weights}"
        )
    return (
        f"not even the first step was finite, so no other rate helps: look at {rows}, try"
        f" {weights}, and check the model's answers with mlx_loraplus.generate"
    )


def _lower_rate(run: Run) -> str:
    """Return a rate for a run that diverged: the default one, or less."""
    rate = (run.config.optimizer.learning_rate or 0.0) / 4
    return f"{min(rate, default_rate(run.config)):.1e}"


def lower_rate_command(run: Run) -> str | None:
    """Return the command that trains a run that diverged again, with a lower rate.

    It is None if a lower rate is no remedy, because the losses were not finite for another reason.
    """
    progress = run.progress
    if diverged_at(run) == 0 or (progress.mostly_skipped and not progress.suspects_rate):
        return None
    names = (f"{run.folder}-again{number}" for number in chain([""], count(2)))
    folder = shell_word(next(name for name in names if not Path(name).exists()))
    settings = shell_word(run.folder / "run.yaml")
    model = " --model MODEL" if run.config.model.endswith(UNKNOWN_MODEL) else ""
    rate = _lower_rate(run)
    return f"mlx_loraplus.train -c {settings}{model} --adapter-path {folder} --learning-rate {rate}"


def remedy_for_fall(objective: str) -> str:
    """Return what keeps the chosen answers likely, by objective."""
    if objective == "orpo":
        return "try a lower --learning-rate or --orpo-lambda"
    remedies = "a lower --learning-rate"
    if objective in ("dpo", "ipo", "kto"):
        remedies += ", a higher --beta"
    if objective != "kto":
        remedies += ", or --objective orpo, which also learns the chosen answers"
    return f"try {remedies}"


def longer_command(run: Run) -> str:
    """Return the command that continues a finished run to twice its length."""
    settings = shell_word(run.folder / "run.yaml")
    if run.config.iters is None:
        length = f"--epochs {2 * (run.config.epochs or 1):g}"
    else:
        length = f"--iters {2 * run.steps}"
    return f"mlx_loraplus.train -c {settings} --resume {length}"
