"""What to do next after a run has ended, as one sentence."""

from ..settings import default_rate
from ..userpaths import shell_word
from .history import Run
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
    took_effect,
)

_LONGER = "train longer"


def advice(run: Run, found: Verdict) -> str | None:
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

    advised = None
    if found.trend != "not better":
        advised = _advice_on_answers(run, found)
    return advised or _advice_on_trend(run, found)


def _advice_on_answers(run: Run, found: Verdict) -> str | None:
    """Return what to do about the answers, which matter more than the loss; None if it decides."""
    # The loss of pairs can fall because both answers become less likely.
    fall = fall_of_chosen(run)
    if fall is not None:
        return f"{fall}: {remedy_for_fall(run)}"

    problem = shortfall(run, found)
    if problem is not None:
        return f"{problem}: {_remedy_for_shortfall(run, found)}"
    if is_all_ranked(run):
        return (
            "all validation answers are ranked right: more steps would lower the loss, and change"
            " the answers little"
        )
    return None


def _remedy_for_shortfall(run: Run, found: Verdict) -> str:
    """Return what to do before a model is used whose loss fell, but whose answers are not right."""
    judged = "pairs" if run.config.objective.is_paired else "labels"
    condition = f"check that the {judged} are right, and if they are"
    if ranking_shortfall(run, found) is None:
        condition = "read them before you use the model, and if they are wrong"
    return f"{condition}, {_remedy_by_trend(run, found)}"


def _remedy_by_trend(run: Run, found: Verdict) -> str:
    """Return what makes the answers better, as a request."""
    if found.trend == "overfitting":
        return f"add examples, because the model overfits since step {found.best_step}"
    if found.trend == "levelled off":
        return "add examples, or try a higher --learning-rate, because the loss has levelled off"
    if (risen := rose_since(run)) is not None:
        return f"add examples, because the loss has risen since step {risen}"
    return _LONGER


def _advice_on_trend(run: Run, found: Verdict) -> str:
    """Return what to do next by how the validation loss developed."""
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


def _advice_on_few(run: Run, kept: str) -> str:
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


def _advice_on_divergence(run: Run, found: Verdict) -> str:
    """Return what to do after losses that are not finite."""
    since = diverged_at(run)
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


def remedy_for_fall(run: Run) -> str:
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


def should_be_longer(run: Run) -> bool:
    """Return whether the advice is to train longer."""
    found = run.verdict
    if not run.finished or found.after is None or fall_of_chosen(run) is not None:
        return False
    if found.trend != "not better" and shortfall(run, found) is not None:
        return _remedy_by_trend(run, found) == _LONGER
    return (found.trend == "still falling" and not is_all_ranked(run)) or ends_too_early(run)


def longer(run: Run) -> str:
    """Return the command that continues a finished run to twice its length."""
    settings = shell_word(run.folder / "run.yaml")
    if run.config.iters is None:
        length = f"--epochs {2 * (run.config.epochs or 1):g}"
    else:
        length = f"--iters {2 * run.steps}"
    return f"mlx_loraplus.train -c {settings} --resume {length}"
