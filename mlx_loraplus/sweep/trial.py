"""One trial: attach new adapters to a base, train them, score them and remove them."""

import math
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..adapters.attach import attach_adapters
from ..adapters.target_modules import find_targets, find_trained
from ..adapters.trainable import TrainableParams
from ..adapters.unfreeze import FullyTrained, end_training, own_arrays
from ..command_config import SweepConfig
from ..config import TrainConfig
from ..data.dataset import Examples
from ..data.labeled import LabeledExamples
from ..data.pairs import Pairs
from ..kernels.choices import default_choices
from ..kernels.trunk_and_head import TrunkAndHead, find_trunk_and_head
from ..memory.run_sizes import resolve_grad_checkpoint
from ..models.find_model import original_of
from ..models.prompt_format import format_of
from ..runs.progress import no_log
from ..runs.state import Event, Outcome
from ..settings import configure, setting_names, settings_of
from ..training.distributed import ALONE
from ..training.interrupts import explain_failure
from ..training.kto import fraction_ranked_right
from ..training.make_batches import make_batches
from ..training.optimizer import LoRAPlus
from ..training.schedule import schedule_of
from ..training.self_consistency import resolve_sound_checkpoint
from ..training.starting_adapter import continue_adapters, continues
from ..training.trainer import TrainState, train
from ..training.validation import validate

# Times the loss before training. The losses of preferences vary far more from pair to pair.
DIVERGED, DIVERGED_PREFERENCES = 1.5, 10.0


def run_config_of(sweep: SweepConfig, flags: Collection[str] = (), **changes: Any) -> TrainConfig:
    """Return a run with a sweep's settings, except for ``changes``.

    Args:
        sweep: The settings.
        flags: The settings that messages write as flags.
        changes: Setting name to value.

    Raises:
        ConfigError: A change is unknown or not allowed.
    """
    names = setting_names(TrainConfig)
    settings = settings_of(sweep)
    shared = {name: settings[name] for name in settings if name in names}
    return configure(TrainConfig, shared | changes, flags=flags)


@dataclass(frozen=True)
class Point:
    """The settings that a trial tries."""

    learning_rate: float
    lr_ratio: float
    rank: int
    alpha: float

    @classmethod
    def of(cls, config: TrainConfig) -> "Point":
        """Return the point of a run's settings."""
        adapter, optimizer = config.adapter, config.optimizer
        return cls(
            optimizer.learning_rate,  # pyright: ignore[reportArgumentType]
            optimizer.lr_ratio,  # pyright: ignore[reportArgumentType]
            adapter.rank,  # pyright: ignore[reportArgumentType]
            adapter.alpha,
        )

    def __str__(self) -> str:
        rates = f"eta {self.learning_rate:.3g}, lambda {self.lr_ratio:.3g}"
        return f"{rates}, rank {self.rank}, alpha {self.alpha:.3g}"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep and its result."""

    point: Point
    steps: int  # planned
    seed: int  # of the initialization and the batches
    loss: float  # of the last validation; infinite if the trial diverged
    accuracy: float | None
    """Fraction of the validation tokens that are ranked first, or of the pairs whose chosen answer
    is preferred, as for ``evaluate``; None if there are no pairs."""
    seconds: float
    done: int  # steps made; fewer than planned if the trial was cut
    history: list[Event] = field(default_factory=list, repr=False, compare=False)
    """Reports and validations."""


@dataclass(frozen=True)
class TrialExamples:
    """The data of a trial."""

    train: Examples
    valid: Examples


class _Diverged(Exception):  # noqa: N818
    """Ends a trial that diverges."""


@contextmanager
def new_adapters(model: nn.Module, config: TrainConfig) -> Generator[TrainableParams]:
    """Attach adapters inside the block, and restore the model at its end.

    They are new, or those of ``resume_adapter_file``.
    """
    adapter = config.adapter
    targets = find_targets(model, adapter.target_modules, adapter.num_layers, adapter.rank or 1)
    trained = find_trained(model, adapter.train_modules, adapter.num_layers)
    before = {path: own_arrays(module) for path, module in trained.items()}
    prompt_format = format_of(model)

    try:
        if continues(model, config, None):
            yield continue_adapters(model, config, None, no_log)
        else:
            yield attach_adapters(model, adapter, original_of(config.model))
    finally:
        model.prompt_format = prompt_format
        # Replace adapters by the layers that they wrap, and restore the arrays of trained modules.
        model.update_modules(tree_unflatten(list(targets.items())))
        for path, module in trained.items():
            if isinstance(module, FullyTrained):
                end_training(module)
                module.update(tree_unflatten(list(before[path].items())))


def trial_state(
    model: nn.Module,
    config: TrainConfig,
    train_examples: Examples,
    trainable: TrainableParams,
    rule: type[LoRAPlus] = LoRAPlus,
) -> TrainState:
    """Return a trial's state before its first step; ``rule`` is the class of the optimizer."""
    batches = make_batches(model, train_examples, config, no_log)
    schedule = schedule_of(config, batches.per_epoch)
    optimizer = rule(config.optimizer, schedule.steps)
    optimizer.init(model, trainable.groups)
    requested = resolve_grad_checkpoint(config, model, batches.largest(), no_log)
    grad_checkpoint = resolve_sound_checkpoint(model, config, no_log, wanted=requested)
    return TrainState(
        model,
        find_trunk_and_head(model),
        optimizer,
        batches,
        schedule,
        grad_checkpoint=grad_checkpoint,
        objective=config.objective,
    )


def run_trial(
    model: nn.Module,
    config: TrainConfig,
    examples: TrialExamples,
    *,
    untrained: float,
    rule: type[LoRAPlus] = LoRAPlus,
    validate_during: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> tuple[Trial, Outcome]:
    """Attach new adapters to ``model``, train and score them, and remove them again.

    Args:
        model: The base.
        config: The run's settings.
        examples: The training and validation examples.
        untrained: The loss before training. A trial counts as diverged and is cut if its training
            loss exceeds ``DIVERGED`` times this loss (for preferences, ``DIVERGED_PREFERENCES``
            times), or if a step is skipped.
        rule: The class of the optimizer; studies use others than LoRA+.
        validate_during: Validate every ``steps_per_eval`` steps too, not only at the end.
        finish: Called after training, while the adapters are still attached.
    """
    started = time.perf_counter()
    history: list[Event] = []
    highest = DIVERGED_PREFERENCES if config.objective.has_preferences else DIVERGED

    def callback(event: Event) -> None:
        history.append(event)
        if "skipped" in event or event.get("loss", 0.0) > highest * untrained:
            raise _Diverged

    # The seed determines everything random, so all trials of a seed see the same batches.
    mx.random.seed(config.seed)
    with new_adapters(model, config) as trainable:
        state = trial_state(model, config, examples.train, trainable, rule)

        # A trial that does not end normally keeps these values.
        loss: float = math.nan
        accuracy: float | None = 0.0
        outcome: Outcome = "finished"
        with suppress(_Diverged), explain_failure([], config, can_checkpoint=False):
            valid = examples.valid if validate_during else ()
            outcome = train(state, valid, config, report=callback, save=lambda: None)
            if outcome == "finished":
                if not validate_during:
                    scores = score_trial(model, state.trunk_and_head, examples.valid, config)
                    history.append({"step": state.schedule.steps, **scores})
                scores = [event for event in history if "valid_loss" in event][-1]
                loss = scores["valid_loss"]
                accuracy = _accuracy(state, examples.valid, config, scores)
                finish()

    # A loss that is not finite counts as infinite.
    if not math.isfinite(loss):
        loss, accuracy = math.inf, 0.0
    trial = Trial(
        point=Point.of(config),
        steps=state.schedule.steps,
        seed=config.seed,
        loss=loss,
        accuracy=accuracy,
        seconds=time.perf_counter() - started,
        done=int(state.optimizer.state["step"].item()),
        history=history,
    )
    return trial, outcome


def score_trial(
    model: nn.Module, trunk_and_head: TrunkAndHead | None, valid: Examples, config: TrainConfig
) -> Event:
    """Return the scores of a model on the validation examples, as a run does."""
    _, scores = validate(
        model,
        trunk_and_head,
        valid,
        config.data.batch_size,
        config.objective,
        ALONE,
        default_choices(),
    )
    return scores


def _accuracy(
    state: TrainState, valid: Examples, config: TrainConfig, scores: Event
) -> float | None:
    """Return a trial's accuracy; see ``Trial``."""
    if isinstance(valid, LabeledExamples):
        size = config.data.batch_size
        return fraction_ranked_right(state.model, state.trunk_and_head, valid, size)
    return scores["valid_preferred" if isinstance(valid, Pairs) else "valid_accuracy"]
