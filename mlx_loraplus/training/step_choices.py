"""Choose how a run computes its step, after checking that this machine computes it correctly.

A resumed run keeps what its checkpoint stores. Otherwise the check and the tuning decide. Their
result is stored in the cache, once for each machine, model and set of versions.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pydantic

from ..adapters.tensor_parallel import is_sharded
from ..config import TrainConfig
from ..data.batches import Batches
from ..device import gb, on_gpu, this_machine
from ..errors import DeviceError, ModelError, OutputError, counted
from ..failures import failures_in_one_line
from ..files import cache_folder, read_bounded, write_atomically
from ..kernels.choices import StepChoices
from ..kernels.delta_rule import has_delta_rule
from ..memory.measured import MeasuredStep
from ..memory.plan import MemoryPlan, memory_plan_of
from ..memory.run_sizes import resolve_grad_checkpoint
from ..runs.progress import Log
from ..runs.start_event import versions
from ..settings import settings_of
from .checkpoint import Checkpoint
from .fastest_step import (
    OpenChoices,
    StepTiming,
    StepWay,
    TuningResult,
    largest_batch,
    tune_step,
    way_of,
)
from .model_probes import ModelProbes
from .self_consistency import is_checkpoint_sound, resolve_sound_checkpoint
from .selfcheck import check_step, refuse_if_wrong
from .session import Session
from .trainer import TrainState

FOLDER = "selfcheck"  # in the cache
_HARDWARE = ("chip", "memory", "device")
_BUDGET_FRACTION = 0.9  # of this machine's budget, for a model that can't be planned


@dataclass(frozen=True)
class StoredCheck:
    """What the cache stores for a machine, a model and versions that passed the check.

    Attributes:
        key: The machine, the model and the versions, as in ``key_of``.
        best: The best timing, or None if nothing was timed.
        run: A digest of what the timing depends on besides the key.
        found: The result of the check, as text.
    """

    key: dict[str, str]
    best: StepTiming | None = None
    run: str = ""
    found: str = ""


def choose_grad_checkpoint(
    model: nn.Module, session: Session, probes: ModelProbes, batches: Batches
) -> tuple[ModelProbes, bool]:
    """Return the probes, with a verdict on checkpointing, and whether to checkpoint gradients."""
    config, log = session.config, session.log
    wanted = plan_grad_checkpoint(config, model, batches.largest(), log, session.checkpoint)

    # The gradients are tested at most once in a run.
    if wanted and probes.checkpoint_sound is None and not is_sharded(model):
        probes = replace(probes, checkpoint_sound=is_checkpoint_sound(model))
    grad_checkpoint = resolve_sound_checkpoint(
        model, config, log, wanted=wanted, sound=probes.checkpoint_sound
    )
    return probes, grad_checkpoint


def plan_grad_checkpoint(
    config: TrainConfig,
    model: nn.Module | None,
    batch: tuple[int, int],
    log: Log,
    checkpoint: Checkpoint | None,
) -> bool:
    """Return whether a new or resumed run should checkpoint gradients, by its plan of memory.

    Args:
        config: The run's settings.
        model: The model, or None to plan from its config alone.
        batch: The run's largest batch, (rows, length).
        log: Called with each line to show.
        checkpoint: The checkpoint of a resumed run.

    Raises:
        ConfigError: The batch does not fit. The message says what can be changed.
    """
    if checkpoint is None:
        return resolve_grad_checkpoint(config, model, batch, log)

    # A resumed run keeps the choice of its first session, because the choice changes the last bits
    # of the results.
    stored = checkpoint.identity
    if config.grad_checkpoint == "auto":
        return stored.grad_checkpoint

    # What a step took on another machine says nothing about this one.
    measured = stored.measured if is_this_machine(stored.machine) else None
    return resolve_grad_checkpoint(config, model, batch, log, measured, is_resumed=True)


def set_up_step(session: Session, state: TrainState, base: str) -> TrainState:
    """Check this machine and choose how a run computes its step, the same on all processes.

    Args:
        session: The run's session.
        state: The run's state, with the defaults.
        base: The fingerprint of the base model.

    Returns:
        The state with the choices.

    Raises:
        LoRAPlusError: This machine computes wrong results.
    """
    world, config = session.world, session.config
    with world.sync_errors(), world.computing():
        if session.checkpoint is not None:
            state = _as_stored(state, session.checkpoint, config)
        if should_check(config.selfcheck):
            state = _check_and_tune(session, state, base)

    # All processes use the main process's choices.
    measured = None if state.measured is None else asdict(state.measured)
    mine = json.dumps([asdict(way_of(state, config)), measured])
    shared = json.loads(world.gather(mine)[0])
    kinds = pydantic.TypeAdapter(tuple[StepWay, MeasuredStep | None])
    return _with_way(state, *kinds.validate_python(shared))


def _check_and_tune(session: Session, state: TrainState, base: str) -> TrainState:
    """Check this machine and, on the main process, time steps, unless the cache has the results."""
    config, log = session.config, session.log
    if is_sharded(state.model):
        log("self-check: not possible with --parallel tensor")
        return state

    # Check once, unless asked to do it again.
    key = key_of(base, config.adapter.adapter)
    stored = read_stored(key) if config.selfcheck == "auto" else None
    if stored is None:
        assert state.probes is not None
        ways = ways_to_check(state, config)
        with _advice_if_lost("checked"):
            result = check_step(state.model, state.probes, config.adapter, ways)
        refuse_if_wrong(result)
        stored = StoredCheck(key, found=str(result))
        log(f"self-check: {result}")
    else:
        log("self-check: passed before with this machine, model and versions")
    state = replace(state, self_check=stored.found or "passed")

    # Time steps once. A resumed run has its choices already.
    if session.checkpoint is None and session.world.is_main:
        stored, state = _tune(session, state, stored)
    write_stored(stored, log)
    return state


def should_check(selfcheck: str) -> bool:
    """Return whether to check this machine: if asked or, with auto, on a GPU."""
    return selfcheck == "on" or (selfcheck == "auto" and on_gpu())


def ways_to_check(state: TrainState, config: TrainConfig) -> list[tuple[StepChoices, bool]]:
    """Return the ways to check: each kernel that a run can use, eager and compiled."""
    modes = [False]
    if way_of(state, config).compiled:
        modes.append(True)

    start = state.choices
    choices = [start, start.other_attention(), start.other_cross_entropy()]
    if has_delta_rule(state.model):
        choices.append(start.other_delta_rule())
    return [(each, compiled) for compiled in modes for each in choices]


def _as_stored(state: TrainState, checkpoint: Checkpoint, config: TrainConfig) -> TrainState:
    """Return the state with the choices of a checkpoint; version 0.1.0 stored none."""
    stored = checkpoint.identity
    compiled = stored.compiled if config.compile == "auto" else None
    # What a step took counts only on the same machine, and with the same checkpointing.
    measured = stored.measured if is_this_machine(stored.machine) else None
    if measured is not None and measured.grad_checkpoint != state.grad_checkpoint:
        measured = None
    choices = stored.choices or state.choices
    return replace(state, choices=choices, compiled=compiled, measured=measured)


def _with_way(state: TrainState, way: StepWay, measured: MeasuredStep | None) -> TrainState:
    """Return the state with a way and what its step took."""
    return replace(
        state,
        choices=way.choices,
        grad_checkpoint=way.grad_checkpoint,
        compiled=way.compiled,
        measured=measured,
    )


def _tune(
    session: Session, state: TrainState, stored: StoredCheck
) -> tuple[StoredCheck, TrainState]:
    """Return the stored or the new timing, and the state with its choices."""
    config, log = session.config, session.log
    batch = largest_batch(state.batches, session.world.row_slice)
    rows, length = batch.tokens.shape
    run = _digest_of_run(config, rows, length)

    # What depends on the run's size is reused only for a run of the same size.
    if stored.best is not None:
        way = stored.best.way
        if stored.run == run:
            log(f"tuning: {stored.best} (stored)")
            return stored, _with_way(state, way, _measured(stored.best, rows, length))
        state = replace(state, choices=way.choices)
        log(f"tuning: {way_of(state, config)} (the kernels' choices are stored)")
        return stored, state

    # Time the ways that the settings leave open.
    plan = _plan_of(config, state.model)
    budget = int(_BUDGET_FRACTION * this_machine().budget) if plan is None else plan.budget
    start = way_of(state, config)
    freedom = _freedom(session, state, plan, rows, length)
    with _advice_if_lost("timed"):
        result = tune_step(state, batch, start, freedom, budget)

    best = result.best
    if best.peak is None:
        log(f"warning: tuning: every way failed, so none is chosen; {best}")
        return stored, state
    log(f"tuning: {best}{_notes_on(result, plan)}")
    return replace(stored, best=best, run=run), _with_way(
        state, best.way, _measured(best, rows, length)
    )


def _measured(timing: StepTiming, rows: int, length: int) -> MeasuredStep | None:
    """Return what a timing measured, or None if its way failed."""
    if timing.seconds is None or timing.peak is None:
        return None
    checkpointed = timing.way.grad_checkpoint
    return MeasuredStep(rows, length, checkpointed, timing.seconds, timing.peak)


@contextmanager
def _advice_if_lost(work: str) -> Generator[None]:
    """If the GPU fails while ways are checked or timed, say how to train without this.

    Args:
        work: What is done with the ways: "checked" or "timed".

    Raises:
        DeviceError: The GPU failed.
    """
    try:
        with failures_in_one_line():
            yield
    except DeviceError as error:
        raise DeviceError(
            f"{error}; this happened while ways to compute a step were {work}: --selfcheck off"
            " trains in the default way, without the check and the timing"
        ) from error.__cause__


def _freedom(
    session: Session, state: TrainState, plan: MemoryPlan | None, rows: int, length: int
) -> OpenChoices:
    """Return the choices that the settings leave open."""
    config, world = session.config, session.world
    compiled = (True, False) if config.compile == "auto" and on_gpu() else ()
    kinds = OpenChoices(compiled=compiled, delta_rule=has_delta_rule(state.model))

    # Another machine of the run may have less memory than this one.
    if config.grad_checkpoint != "auto" or world.size > 1 or plan is None:
        return kinds

    # Try it without checkpointing only if the plan, which keeps a reserve, says that it fits.
    if state.grad_checkpoint:
        needed = plan.memory(rows, length, checkpoint=False).total
        without = (False,) if needed <= plan.machine.budget else ()
        return replace(kinds, grad_checkpoint=without)

    # Try it with checkpointing only if that gives the right gradients.
    sound = is_checkpoint_sound(state.model)
    return replace(kinds, grad_checkpoint=(True,) if sound else ())


def _notes_on(result: TuningResult, plan: MemoryPlan | None) -> str:
    """Return what to add to the best timing: the prediction, and whether all ways were tried."""
    notes = ""
    if plan is not None:
        checkpoint = result.best.way.grad_checkpoint
        predicted = plan.memory(result.rows, result.length, checkpoint=checkpoint).total
        notes = f" (predicted: {gb(predicted)})"
    if not result.is_complete:
        notes += f"; there was only time for {counted(len(result.timings), 'way')}"
    return notes


def _plan_of(config: TrainConfig, model: nn.Module) -> MemoryPlan | None:
    """Return the memory plan, or None for a model that can't be planned."""
    try:
        return memory_plan_of(config, model)
    except ModelError:
        return None


def _digest_of_run(config: TrainConfig, rows: int, length: int) -> str:
    """Return a digest of the settings and sizes that a timing depends on."""
    facts = {
        "adapter": settings_of(config.adapter),
        "optimizer": settings_of(config.optimizer),
        "objective": settings_of(config.objective),
        "choices": (config.compile, config.grad_checkpoint, config.data.pack),
        "size": (rows, length, config.grad_accumulation_steps),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def key_of(base: str, adapter: str) -> dict[str, str]:
    """Return what a check depends on: the machine, the versions, the model and the adapter."""
    return {**machine_facts(), **versions(), "model": base, "adapter": adapter}


def machine_facts() -> dict[str, str]:
    """Return the chip, the memory and the system, and the kind of device that MLX computes on."""
    facts = mx.device_info()
    return {
        "chip": str(facts.get("device_name", platform.processor() or platform.machine())),
        "memory": gb(this_machine().memory),
        "system": platform.platform(),
        "device": "GPU" if on_gpu() else "CPU",
    }


def is_this_machine(facts: Mapping[str, str] | None) -> bool:
    """Return whether facts are those of this machine, whatever the version of its system."""
    mine = machine_facts()
    return facts is not None and all(facts.get(name) == mine[name] for name in _HARDWARE)


def read_stored(key: dict[str, str]) -> StoredCheck | None:
    """Return what the cache holds for a key, or None if it holds nothing that can be used."""
    try:
        content = json.loads(read_bounded(_file_of(key)))
        stored = pydantic.TypeAdapter(StoredCheck).validate_python(content)
    except (OSError, ValueError, RecursionError):
        return None
    return stored if stored.key == key else None


def write_stored(stored: StoredCheck, log: Callable[[str], None]) -> None:
    """Write a result into the cache; a failure is reported, because the run does not need it."""
    try:
        write_atomically(_file_of(stored.key), json.dumps(asdict(stored), indent=1).encode())
    except OutputError as problem:
        log(f"warning: the self-check is not stored: {problem}")


def _file_of(key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / FOLDER / f"{digest[:32]}.json"
