"""``--dry-run``: everything that training checks, and what it would take, without training."""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.text import Text

from ..adapters.attach import attach_adapters, check_targets
from ..adapters.stored_files import adapter_files, recorded_model
from ..adapters.trainable import TrainableParams
from ..config import TrainConfig
from ..data.batches import Batches
from ..data.first_rows import check_rows
from ..data.load_data import DEMO_NOTE
from ..device import gb, on_gpu
from ..errors import ConfigError, LoRAPlusError, counted
from ..inference.generate import load
from ..kernels.trunk_and_head import find_trunk_and_head
from ..memory.estimate import Sizes
from ..memory.plan import memory_plan_of
from ..memory.run_sizes import check_fit
from ..models.find_model import original_of
from ..models.skeleton import config_of, make_skeleton
from ..runs.advice import remedy_for_skipped
from ..runs.progress import Log, describe_full_rates, no_log
from ..runs.state import Event, Progress
from ..runs.trackers import check_trackers
from ..runs.verdict import duration
from ..settings import fit_to_length, replace_auto_rate
from .checkpoint import Checkpoint, check_folder, find_run
from .data_preview import Preview, preview_run
from .make_batches import note_short_epoch, plan_batches
from .optimizer import LoRAPlus
from .run_checks import (
    check_length,
    check_model_name,
    check_rates,
    check_validation,
    warn_about_rates,
)
from .run_fingerprint import keep_first_choices
from .schedule import Schedule, schedule_of
from .starting_adapter import Settings, continue_adapters, resolve_config
from .step_choices import plan_grad_checkpoint
from .trainer import TrainState, train

# Two steps are timed if their matrix products take at most this long; the rest of a step takes as
# long again or more.
_LONGEST = 5.0  # seconds
_MOST_SKIPPED = 5  # steps that are tried at most, if all are skipped
_MEASURED = 0.5  # seconds, for which the speed of matrix products is measured

LoadModel = Callable[[], nn.Module]

Result = TypeVar("Result")


@dataclass
class _Findings:
    """The problems at which training would stop, and warnings."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def check(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Call a function that training calls; if it refuses, keep the problem and return None."""
        try:
            return function(*arguments)
        except LoRAPlusError as problem:
            if str(problem) not in self.problems:
                self.problems.append(str(problem))
            return None


def rehearse(config: TrainConfig, settings: Settings, words: Sequence[str]) -> None:
    """Print a run's data, settings, memory, time and disk space, and the command that starts it.

    Args:
        config: The run's settings.
        settings: Those that were given.
        words: The words of the command with ``--dry-run``.

    Raises:
        ConfigError: Training would stop. The problems have been printed.
    """
    console = Console(soft_wrap=not sys.stdout.isatty())  # a pipe gets whole lines
    found = _Findings()

    # Only what needs the model itself loads it, once.
    load_model = cache(lambda: load(config.model)[0])

    # The checks of training, in its order.
    for check in (check_trackers, check_folder, check_fit):
        found.check(check, config)
    checkpoint = found.check(find_run, config, found.warnings.append) if config.resume else None
    before = len(found.problems)
    found.check(check_model_name, config.model)
    read_data = preview_run if len(found.problems) == before else check_rows
    # A resumed run takes its adapters from its own folder. A run that can't start from an adapter
    # is not described, because its settings are not known.
    starts = True
    if config.resume_adapter_file is not None and not config.resume:
        known = len(found.problems)
        config = _start_from_adapter(config, settings, load_model, found)
        starts = len(found.problems) == known
    data = found.check(read_data, config)

    # The data, and what training on it takes.
    if data is not None:
        problems, data.data.problems = data.data.problems, []
        found.problems += [problem for problem in problems if problem not in found.problems]
        console.print(data)
        if data.plan is not None and starts:
            # Loading a model may write notes, which must not appear between these lines.
            lines = list(_describe_run(data, checkpoint, load_model, found))
            console.print()
            for name, line in lines:
                console.print(Text(f"{name:<10} ", "bold").append(line, "not bold"))

    if not config.data.data:
        console.print(Text(f"note: {DEMO_NOTE}", "yellow"))
    for warning in found.warnings:
        console.print(Text(warning, "yellow"))
    if found.problems:
        console.print(Text(f"\ntraining would stop: {'; '.join(found.problems)}", "bold red"))
        error = ConfigError("; ".join(found.problems))
        error.reported = True
        raise error
    # The terminal itself wraps the command, which is then copied from it as one line.
    console.print(Text(f"\nto start: {_command(words)}"), soft_wrap=True)


def _start_from_adapter(
    config: TrainConfig, settings: Settings, load_model: LoadModel, found: _Findings
) -> TrainConfig:
    """Check the adapter that a run starts from, and return the config with its settings.

    The adapter is compared with the loaded model, unless another problem prevents that.
    """
    assert config.resume_adapter_file is not None
    found.check(_check_adapter, Path(config.resume_adapter_file))
    if found.problems:
        return config
    model = found.check(load_model)
    if model is None:
        return config
    return found.check(resolve_config, model, settings) or config


def _check_adapter(path: Path) -> None:
    """Check that a path, a folder or the weights file in it, leads to an adapter."""
    folder, _ = adapter_files(path)
    recorded_model(folder)


def _describe_run(
    data: Preview, checkpoint: Checkpoint | None, load_model: LoadModel, found: _Findings
) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for each part of what a run on this data would do and need.

    A run that would be resumed from a checkpoint keeps its first choices.
    """
    assert data.plan is not None

    # Check what depends on the run's length.
    batches = plan_batches(data.data.examples["train"], data.config.data, data.config.seed)
    schedule = schedule_of(data.config, batches.per_epoch)
    config, done = data.config, 0
    if checkpoint is not None:
        config, done = keep_first_choices(config, checkpoint.identity), checkpoint.progress.step
        found.check(check_length, checkpoint.progress, schedule.steps)
    config = fit_to_length(config, schedule.steps)
    found.check(check_validation, config, data.data.examples["valid"])
    warn_about_rates(config, schedule.steps, found.warnings.append)

    # What it starts from, its length and its rates.
    yield "model", config.model
    if config.resume_adapter_file is not None and not config.resume:
        yield "start", f"from the adapter in {config.resume_adapter_file}"
    batch = batches.full_rows * min(schedule.batches_per_step, schedule.batches)
    note_short_epoch(batches, config, found.warnings.append)
    optimizer = config.optimizer
    assert config.steps_per_report is not None
    assert config.steps_per_eval is not None
    so_far = f", of which {done:,} are done" if done else ""
    yield (
        "run",
        f"{counted(schedule.steps, 'step')} of {counted(batch, config.objective.unit)}{so_far};"
        f" reports every {counted(config.steps_per_report, 'step')}, validations every"
        f" {counted(config.steps_per_eval, 'step')}",
    )
    shown = replace_auto_rate(config)
    rates = f"A {shown.optimizer.learning_rate:.2e}, B {optimizer.lr_ratio:g} times that"
    if config.adapter.adapter == "full":
        rates = describe_full_rates(shown)
    if optimizer.learning_rate == "auto":
        rates += " by default (auto searches before the first step)"
    yield "rates", f"{rates}, {optimizer.schedule}, warm-up {optimizer.warmup}"

    # The adapters, from the model's config alone.
    found.check(_check_targets, config)
    plan = found.check(memory_plan_of, config)
    if plan is not None:
        trained = counted(plan.sizes.trainable, "parameter")
        yield "adapter", f"{config.adapter.adapter}, {trained} to train"

    # Memory, time and disk space.
    lines: list[str] = []
    largest = batches.largest()
    checkpoints_blocks = found.check(
        plan_grad_checkpoint, config, None, largest, lines.append, checkpoint
    )
    if checkpoint is not None and checkpoints_blocks is not None and not lines:
        lines = [f"gradient checkpointing stays {'on' if checkpoints_blocks else 'off'}"]
    for line in lines:
        yield "memory", line.removeprefix("plan: ")
    if plan is not None and checkpoints_blocks is not None:
        left = max(0, schedule.steps - done)
        epochs = schedule.batches / batches.per_epoch
        tokens = data.plan.useful_tokens * epochs * left / schedule.steps
        timed = replace(config, grad_checkpoint="on" if checkpoints_blocks else "off")
        measure = partial(_seconds_per_token, timed, batches, load_model, found.warnings.append)
        yield "time", _time(timed, measure, plan.sizes, tokens, left, found)
        saved = plan.sizes.gradients() + plan.sizes.moments(optimizer.optimizer)
        yield "disk", _disk(config, saved * (config.keep_checkpoints + 2), found)
    yield "folder", str(Path(config.adapter_path).absolute())


def _check_targets(config: TrainConfig) -> None:
    """Check the targets and the rank on the model's skeleton."""
    model = make_skeleton(config_of(config.model))
    check_targets(model, config.adapter, {}, original_of(config.model))


def _time(
    config: TrainConfig,
    measure: Callable[[], float | None],
    sizes: Sizes,
    tokens: float,
    steps: int,
    found: _Findings,
) -> str:
    """Return how long a run takes, from two steps if they take only seconds.

    Otherwise, return how long its matrix products take at least, from the speed of one of them.

    Args:
        config: The run's settings.
        measure: Makes two steps, and returns the seconds that one takes for each token.
        sizes: The model's sizes.
        tokens: Tokens of all steps, without padding, which an eager run removes in part.
        steps: Steps of the run.
        found: Receives the problems with the model.
    """
    if found.problems:
        return "unknown, because training would stop"
    if not steps:
        return "none, because the run is finished"

    # Forward through all blocks, backward through the last ones; adapters need no gradients of W.
    backward = 4.0 if config.adapter.adapter == "full" else 2.0
    products = [block.products for block in sizes.blocks]
    learning = products[len(products) - sizes.learning :]
    operations = tokens * (2.0 * sum(products) + backward * sum(learning))
    least = operations / _operations_per_second(sizes.bits)
    if 2 * least / steps > _LONGEST:
        return (
            f"at least {duration(least)} in steps, which this machine needs for the matrix products"
            " alone; the first steps of the run report the time left"
        )

    seconds = found.check(measure)
    if seconds is None:
        return "unknown, because a step was not possible or not finite"
    needed = tokens * seconds
    shown = "less than a minute" if needed < 60 else f"about {duration(needed)}"
    return f"{shown} in steps, plus validations"


def _operations_per_second(bits: int) -> float:
    """Return the speed of a matrix product with a weight of this type on this machine."""
    rows, size = (2048, 4096) if on_gpu() else (128, 1024)
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    layer: Any = nn.Linear(size, size, bias=False)
    layer.set_dtype(dtype)
    if bits in (2, 3, 4, 5, 6, 8):
        layer = layer.to_quantized(64, bits)
    inputs = mx.ones((rows, size), dtype)

    # The fastest product counts: the first one also starts the device, and other programs disturb.
    fastest = math.inf
    end = time.perf_counter() + _MEASURED
    while (started := time.perf_counter()) < end:
        mx.eval(layer(inputs))
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * rows * size * size / fastest


def _seconds_per_token(
    config: TrainConfig, batches: Batches, load_model: LoadModel, warn: Log
) -> float | None:
    """Return how many seconds a step takes for each token, or None if steps were skipped.

    The tokens are those without padding; the time includes padding.

    Raises:
        ConfigError: As many steps were skipped as training would skip before it stops.
    """
    model = load_model()
    trainable = _start_adapters(model, config)
    optimizer = LoRAPlus(replace_auto_rate(config).optimizer, 2)
    check_rates(config, trainable.groups)
    optimizer.init(model, trainable.groups)

    # Make two steps, because the first one also compiles; and more if steps are skipped.
    run_steps = schedule_of(config, batches.per_epoch).steps
    most = min(config.max_skipped_steps, run_steps, _MOST_SKIPPED)
    steps, per_step = max(2, most), config.grad_accumulation_steps
    state = TrainState(
        model,
        find_trunk_and_head(model),
        optimizer,
        batches,
        Schedule(steps=steps, batches=steps * per_step, batches_per_step=per_step),
        grad_checkpoint=config.grad_checkpoint == "on",
        objective=config.objective,
    )
    events: list[Event] = []
    timed = replace(config, steps_per_report=1, max_skipped_steps=steps + 1, max_minutes=None)
    train(
        state,
        (),
        timed,
        report=events.append,
        save=lambda: None,
        stop_requested=lambda: sum("loss" in event for event in events) > 1,
    )

    # Every step has one event. A resumed run starts with later steps than these.
    if "skipped" in events[0] and not config.resume:
        why = f"because the loss or a gradient is not finite ({events[0]['reason']})"
        if all("skipped" in event for event in events[:most]):
            places = ", ".join(batches[0].places)
            remedy = remedy_for_skipped(Progress(1, skipped=1), f"its rows ({places:.200})")
            first = "the first step" if most == 1 else f"the first {counted(most, 'step')}"
            raise ConfigError(f"{first} would be skipped, {why}; {remedy}")
        warn(f"warning: the first step would be skipped, {why}")
    reports = [event for event in events if "loss" in event]
    if reports and "skipped" in events[-1] and not config.resume:
        raise ConfigError(
            f"step {len(reports) + 1} would be skipped, because the loss or a gradient is not"
            f" finite ({events[-1]['reason']}): give a lower --learning-rate or --lr-ratio"
        )
    if len(reports) < 2:
        return None
    return reports[-1]["seconds"] / reports[-1]["useful_tokens"]


def _start_adapters(model: nn.Module, config: TrainConfig) -> TrainableParams:
    """Attach the adapters that a run starts with, new ones or those of an earlier run."""
    if config.resume_adapter_file is not None and not config.resume:
        return continue_adapters(model, config, None, no_log)
    return attach_adapters(model, config.adapter, original_of(config.model))


def _disk(config: TrainConfig, needed: float, found: _Findings) -> str:
    """Return the disk space that a run's folder takes, and warn if there is less."""
    folder = Path(config.adapter_path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        found.warnings.append(
            f"warning: the run's folder takes up to {gb(needed)}, but only {gb(free)} are free:"
            " give another --adapter-path, or a smaller --keep-checkpoints"
        )
    result = "model" if config.adapter.adapter == "full" else "adapter"
    return f"up to {gb(needed)} for the {result} and its checkpoints, of {gb(free)} free"


def _command(words: Sequence[str]) -> str:
    """Return the command without ``--dry-run``, ready to paste."""
    kept = [word for word in words if word not in ("--dry-run", "--dry_run")]
    return shlex.join(["mlx_loraplus.train", *kept])
