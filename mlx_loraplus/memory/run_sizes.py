"""Choose sizes of a run that fit this machine, or refuse a run that does not fit."""

from collections.abc import Callable
from dataclasses import replace

import mlx.nn as nn
from mlx.core.distributed import Group

from ..config import TrainConfig
from ..data.batches import round_up
from ..device import MOST_ELEMENTS, gb
from ..errors import ConfigError, ModelError, counted
from .display_advice import display_advice
from .measured import MeasuredStep
from .plan import MemoryPlan, memory_plan_of


def resolve_length(
    config: TrainConfig, model: nn.Module | None, log: Callable[[str], None] = lambda _: None
) -> TrainConfig:
    """Return the config, with the largest length that fits if ``max_seq_length`` is auto.

    Raises:
        ConfigError: Even short rows do not fit.
    """
    if config.data.max_seq_length != "auto":
        return config

    rows = 1 if config.data.batch_size == "auto" else config.data.batch_size
    rows *= config.objective.rows_per_example
    plan = memory_plan_of(config, model)
    length = plan.longest(rows)
    if length < 2:
        raise ConfigError(_does_not_fit(plan, rows, 64))

    held = counted(rows, "row")
    log(f"--max-seq-length is {length:,}, the longest for {held} at a time in {gb(plan.budget)}")
    return replace(config, data=replace(config.data, max_seq_length=length))


def resolve_batch(
    config: TrainConfig,
    model: nn.Module | None,
    longest: int,
    log: Callable[[str], None] = lambda _: None,
) -> TrainConfig:
    """Return the config, with a batch size that fits if ``batch_size`` is auto.

    Args:
        config: The run's settings.
        model: The loaded model, or None.
        longest: Tokens in the longest example. Packed rows use ``max_seq_length`` instead.
        log: Called with a line that reports the choice.
    """
    if config.data.batch_size != "auto":
        return config

    length = round_up(config.data.max_seq_length if config.data.pack else longest)
    plan = memory_plan_of(config, model)
    size = plan.batch_size(length)
    rows = config.objective.rows_per_example * size
    needed, budget = gb(plan.memory(rows, length).total), gb(plan.budget)
    log(
        f"--batch-size is {size}: with rows of up to {length:,} tokens it takes {needed} of"
        f" {budget}"
    )
    return replace(config, data=replace(config.data, batch_size=size))


def resolve_grad_checkpoint(
    config: TrainConfig,
    model: nn.Module | None,
    batch: tuple[int, int],
    log: Callable[[str], None],
    measured: MeasuredStep | None = None,
    *,
    is_resumed: bool = False,
) -> bool:
    """Return whether to checkpoint a run whose largest batch is ``batch``, (rows, length).

    What a step took in an earlier session corrects the prediction. If the run has already trained
    in the same way on this machine, a batch that does not fit is only reported as a warning.

    Raises:
        ConfigError: The batch does not fit. The message says what can be changed.
    """
    try:
        plan = memory_plan_of(config, model).corrected(measured)
    except ModelError as error:
        log(f"warning: {error}")
        return config.grad_checkpoint == "on"

    checkpoint = plan.checkpoint(*batch)
    problem = plan.problem(*batch)
    if problem and measured is not None and measured.grad_checkpoint == checkpoint:
        log(f"warning: {problem}; the run continues, because it has trained this way before")
    elif problem:
        describe = _does_not_fit_again if is_resumed else _does_not_fit
        raise ConfigError(describe(plan, *batch))

    rows, length = batch
    log(
        f"plan: {gb(plan.memory(*batch).total)} at the peak, for {counted(rows, 'row')} x"
        f" {length:,} tokens, of {gb(plan.budget)}; gradient checkpointing is"
        f" {'on' if checkpoint else 'off'}"
    )
    for line in (shortage(plan, *batch), display_advice(plan.sizes, plan.machine, *batch)):
        if line:
            log(line)
    return checkpoint


def check_fit(config: TrainConfig, group: Group | None = None) -> None:
    """Check, before the model is loaded, that its smallest batch fits.

    Args:
        config: The run's settings.
        group: The processes that divide the model's weights.

    Raises:
        ConfigError: It does not fit. The message suggests up to three changes.
    """
    try:
        plan = memory_plan_of(config, group=group)
    except ModelError:
        # Loading the model raises an error with a better message.
        return
    if not plan.fits(1, 64):
        raise ConfigError(_does_not_fit(plan, 1, 64))


def _does_not_fit(plan: MemoryPlan, rows: int, length: int) -> str:
    """Return the message for a batch that does not fit."""
    suggestions = "; ".join(plan.suggestions(rows, length)[:3])
    return (
        f"{plan.config.model} does not fit: {plan.problem(rows, length)}; the cheapest ways to make"
        f" it fit: {suggestions}"
    )


def _does_not_fit_again(plan: MemoryPlan, rows: int, length: int) -> str:
    """Return the message for a resumed run that does not fit, and can't change its batches."""
    eased = replace(plan, config=replace(plan.config, grad_checkpoint="on"))
    if plan.config.grad_checkpoint == "off" and eased.fits(rows, length):
        advice = "--grad-checkpoint on (a third more time) makes it fit"
    elif plan.largest_array(rows, length) > MOST_ELEMENTS:
        advice = "resume it on the machine that it was trained on"
    elif plan.machine.budget < plan.machine.working_set:
        advice = "close other programs, or resume it on a machine with more memory"
    else:
        advice = "resume it on a machine with more memory"
    return (
        f"the resumed run does not fit: {plan.problem(rows, length)}; its batches must stay the"
        f" same: {advice}"
    )


def shortage(plan: MemoryPlan, rows: int, length: int) -> str | None:
    """Return a warning if a batch fits a Mac, but not in the memory that is free now."""
    needed, machine = plan.memory(rows, length).total, plan.machine
    if machine.backend != "metal" or needed <= machine.free:
        return None
    return (
        f"warning: the run takes {gb(needed)} at the peak, and only {gb(machine.free)} are free"
        " now: macOS makes room by compressing and swapping, which is slow; close other programs"
    )
