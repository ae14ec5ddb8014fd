"""One short run: new adapters on a base, trained, scored and taken off again."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..adapters.attach import Census, attach_adapters, find_targets, find_trained
from ..adapters.full import FullyTrained, end_training, own_arrays
from ..config import RunConfig
from ..data.examples import Examples
from ..models.names import original_of
from ..planning import settle_checkpoint
from ..training.loop import Event, Outcome, run_length, score, train
from ..training.optimizer import LoRAPlus
from ..training.progress import quiet
from ..training.run import make_batches
from ..training.split import split_model

DIVERGED = 1.5  # times the untrained model's loss


@dataclass(frozen=True)
class Point:
    """What a trial tries."""

    learning_rate: float
    lr_ratio: float
    rank: int
    alpha: float

    @classmethod
    def of(cls, config: RunConfig) -> "Point":
        """Return a run's."""
        adapter, optimizer = config.adapter, config.optimizer
        return cls(optimizer.learning_rate, optimizer.lr_ratio, adapter.rank, adapter.alpha)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"eta {self.learning_rate:.3g}, lambda {self.lr_ratio:.3g}, rank {self.rank}, alpha {self.alpha:.3g}"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, and how it ended."""

    point: Point
    updates: int  # how long it was to be
    seed: int  # of its adapter's start and its batches
    loss: float  # of the validation at its end; infinite where it diverged
    accuracy: float  # share of validation tokens ranked first
    seconds: float
    done: int  # updates made, fewer where it was cut
    history: list[Event] = field(default_factory=list, repr=False, compare=False)  # reports; validations on the way


class _Diverged(Exception):  # noqa: N818  it is no error
    """A trial is cut."""


@contextmanager
def new_adapters(model: nn.Module, config: RunConfig) -> Generator[Census]:
    """Attach adapters for the length of a block, and leave the model as it was before."""
    adapter = config.adapter
    targets = find_targets(model, adapter.target_modules, adapter.num_layers, adapter.rank or 1)
    trained = find_trained(model, adapter.train_modules, adapter.num_layers)
    before = {path: own_arrays(module) for path, module in trained.items()}
    try:
        yield attach_adapters(model, adapter, original_of(config.model))
    finally:
        model.update_modules(tree_unflatten(list(targets.items())))
        for path, module in trained.items():
            if isinstance(module, FullyTrained):
                end_training(module)
                module.update(tree_unflatten(list(before[path].items())))


def run_trial(
    model: nn.Module,
    config: RunConfig,
    train_examples: Examples,
    valid_examples: Examples,
    *,
    untrained: float,
    rule: type[LoRAPlus] = LoRAPlus,
    on_the_way: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> tuple[Trial, Outcome]:
    """Train new adapters on ``model`` as ``config`` says, score them, and take them off again.

    A trial whose training loss is well above ``untrained``, the base's, has diverged and is cut. For studies there are
    another ``rule`` than LoRA+, scores ``on_the_way`` at every ``steps_per_eval``, and ``finish``, which is called with
    the trained adapters still on ``model``.
    """
    started = time.perf_counter()
    history: list[Event] = []

    def watch(event: Event) -> None:
        history.append(event)
        if "skipped" in event or event.get("loss", 0.0) > DIVERGED * untrained:
            raise _Diverged

    mx.random.seed(config.seed)
    with new_adapters(model, config) as census:
        split = split_model(model)
        batches = make_batches(model, train_examples, config, quiet)
        length = run_length(config, batches.per_epoch)
        rates = rule(config.optimizer, length.updates)
        rates.init(model, census.groups)
        recompute = settle_checkpoint(config, model, batches.largest(), quiet)
        valid = valid_examples if on_the_way else ()
        loss = accuracy = math.nan
        outcome: Outcome = "finished"
        with suppress(_Diverged):
            outcome = train(
                model, split, rates, batches, valid, length, config,
                recompute=recompute, report=watch, save=lambda: None,
            )  # fmt: skip
            if outcome == "finished":
                if on_the_way:
                    last = next(event for event in reversed(history) if "valid_loss" in event)
                    loss, accuracy = last["valid_loss"], last["valid_accuracy"]
                else:
                    found = score(model, split, valid_examples, config.data.batch_size)
                    loss, accuracy = found.loss, found.accuracy
                finish()
    done = int(rates.state["step"].item())
    loss, accuracy = (loss, accuracy) if math.isfinite(loss) else (math.inf, 0.0)
    seconds = time.perf_counter() - started
    return Trial(Point.of(config), length.updates, config.seed, loss, accuracy, seconds, done, history), outcome
