"""A run from data to adapter, for the train command and for a notebook's ``finetune``."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.attach import attach_adapters
from ..adapters.trainable import TrainableParams
from ..config import TrainConfig
from ..data.batches import Batches
from ..data.eval_prompts import EvalPrompt
from ..data.load_data import DEMO_NOTE, load_examples
from ..data.model_limits import check_examples, limits_of
from ..data.python_data import store_data
from ..errors import DeviceError
from ..files import locked
from ..kernels.delta_rule import choices_for
from ..keyword_types import TrainOptions
from ..memory.run_sizes import resolve_batch, resolve_length
from ..migration import translate
from ..models.find_model import original_of
from ..models.vocabulary import describe_other_tokenizer, set_vocabulary
from ..python_messages import in_keywords
from ..runs.history import REPORT, Run
from ..runs.progress import Callback, Lines, LivePlot, Log, in_notebook, no_log
from ..runs.start_event import versions
from ..runs.state import Outcome
from ..runs.trackers import check_trackers, tracking
from ..settings import fit_to_length, replace_auto_rate
from .checkpoint import check_folder, find_run, read_checkpoint
from .distributed import World
from .interrupts import describe_cut, interruptible
from .live_files import LiveFiles
from .make_batches import make_batches
from .model_probes import ModelProbes, probe_model, reusable_probes, share_probes
from .optimizer import LoRAPlus
from .rate_search import choose_rate
from .recorder import choose_prompts, record_events, resume_history, start_history
from .reference import add_reference
from .run_checks import (
    check_length,
    check_rates,
    check_validation,
    check_world,
    warn_about_rates,
    with_model_name,
)
from .run_fingerprint import (
    RunFingerprint,
    compare_content,
    identifying_settings,
    keep_first_choices,
    model_config,
    model_fingerprint,
)
from .run_writer import RunWriter, start_folder, with_choices
from .schedule import Schedule, schedule_of
from .self_consistency import check_caches
from .session import Session
from .starting_adapter import continue_adapters, continues, resolve_config
from .step_choices import choose_grad_checkpoint, set_up_step
from .trainer import TrainState, train


@dataclass(frozen=True)
class StartState:
    """What a run has before its first step.

    Attributes:
        identity: What must be equal on all processes and in the checkpoint.
        reference: A digest of the model that answers are compared with, if there is one.
        trainable: The parameters that train.
        train_state: What the training loop works on.
    """

    identity: RunFingerprint
    reference: str | None
    trainable: TrainableParams
    train_state: TrainState


def finetune(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    log: Log | None = None,
    callback: Callback | None = None,
    **settings: Unpack[TrainOptions],
) -> Run:
    """Train LoRA+ adapters on ``model`` in place: y = W x + s B A x, with lr(B) = lr_ratio · lr(A).

    New adapters are attached first. If the model was loaded with an adapter by ``load(name,
    adapter_path)``, that adapter is trained further, and its settings are the defaults. Adapters
    that an earlier ``finetune`` left on the model are refused, unless ``resume`` is on.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        log: Called with each line that a terminal would show, e.g. ``print``. Without it, a
            notebook shows a live plot of the losses, and a script shows only warnings.
        callback: Called with the run and each event of its history, instead of printing the event.
        settings: Any setting of ``TrainConfig``, e.g. ``data="my_folder", lr_ratio=16, iters=100``.
            ``data`` may be rows: a list or an iterator of dicts, a ``datasets.Dataset``, a data
            frame, or a dict of splits. The cache keeps a copy of them.

    Returns:
        The run with its history. Its folder, ``adapter_path``, holds the adapter, settings,
        history and a report.

    Raises:
        ConfigError: A setting is unknown or not allowed.
        DataError: The data can't be trained on; the message lists the problems.
        DeviceError: Memory ran out, or the GPU failed; the message says how to continue.
        OutputError: ``adapter_path`` holds another run, or can't be written.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> run = finetune(model, tokenizer, lr_ratio=16, iters=45)
    """
    # Translate names of other programs, store data from memory in files, and make the config.
    # Settings that are not given are taken from adapters on the model, if it has some.
    given = translate(TrainConfig, dict(settings))
    given = store_data(given)
    given = with_model_name(model, given)
    config = resolve_config(model, given)
    world = World.join(config.parallel)
    log, callback = _choose_outputs(log, callback, world, config)

    with ExitStack() as held:
        with world.sync_errors():
            # Run the fast checks first.
            if world.is_main:
                check_trackers(config)
                check_folder(config)

            # Read the data, and choose the sizes that the settings leave to this machine.
            config = resolve_length(config, model, log)
            if warning := describe_other_tokenizer(model, tokenizer):
                log(warning)
            set_vocabulary(model, tokenizer)
            examples = load_examples(config, tokenizer, log)
            check_examples(limits_of(model), examples, tokenizer, log)
            check_validation(config, examples["valid"])
            config = resolve_batch(config, model, int(examples["train"].lengths.max()), log)
            check_world(config, model, world, log)

            # Once the folder is locked, its checkpoints can't change.
            run = Run(config)
            checkpoint, cut_off = None, None
            if world.is_main:
                # The lock also returns the process that held it and was killed, if there is one.
                cut_off = held.enter_context(locked(run.folder))
                checkpoint = find_run(config, log)
        if checkpoint is not None and cut_off is not None:
            log(f"resume: {describe_cut(cut_off, checkpoint.history)}")

        # The other processes resume from a copy of the main process's checkpoint.
        copy = held.enter_context(world.copied(None if checkpoint is None else checkpoint.folder))
        if copy is not None and not world.is_main:
            checkpoint = read_checkpoint(copy)
        if checkpoint is not None:
            run.progress = checkpoint.progress
            run.config = keep_first_choices(config, checkpoint.identity)

        # Trackers open first, so that their messages appear above a live display.
        callbacks: list[Callback] = []
        if world.is_main:
            trackers = held.enter_context(tracking(run, log))
            callbacks = [LiveFiles(log), *trackers, callback]

        _train(model, Session(run, tokenizer, examples, checkpoint, world, log, callbacks))
    return run


def _choose_outputs(
    log: Log | None, callback: Callback | None, world: World, config: TrainConfig
) -> tuple[Log, Callback]:
    """Return where to show messages and events; only the main process shows them."""
    if not world.is_main:
        return no_log, callback or Lines(no_log)

    # Without a log, a notebook shows a live plot and warnings, and a script shows warnings.
    if log is not None:
        return log, callback or Lines(log)
    shown = Lines(print if in_notebook() else partial(print, file=sys.stderr), "quiet")
    plot = LivePlot() if in_notebook() else Lines(no_log)

    def show_line(line: str) -> None:
        shown.log(in_keywords(line))

    if not (config.data.data or config.resume):
        show_line(f"warning: {DEMO_NOTE}")
    return show_line, callback or plot


def _train(model: nn.Module, session: Session) -> None:
    """Train in the run's folder, from the start or from a checkpoint."""
    # Attach the adapters. Search the learning rate if it is auto; otherwise, nothing changes.
    start = start_state(model, session)
    start = replace(start, train_state=choose_rate(session, start.train_state))

    # From the first write to the folder, Ctrl-C ends the run in order, so that it can be resumed.
    with interruptible() as stop_requested:
        eval_prompts = _start_folder(model, session, start)
        identity = with_choices(start.identity, start.train_state, session.run.config)
        writer = RunWriter(session, start.train_state, identity)
        session.show(session.run.start)
        session.log(f"report: {session.run.folder / REPORT} shows the run while it trains")
        outcome = _run_loop(session, start.train_state, writer, eval_prompts, stop_requested)

    # Write the report and, if the run is complete, its best adapter.
    writer.finish(outcome)


def _start_folder(model: nn.Module, session: Session, start: StartState) -> list[EvalPrompt]:
    """Start or resume the history in the run's folder, and return the prompts to answer."""
    world, run, checkpoint = session.world, session.run, session.checkpoint
    state, trainable = start.train_state, start.trainable
    with world.sync_errors(), world.computing():
        eval_prompts = choose_prompts(model, session)
        if checkpoint is None:
            start_history(
                session, state, trainable, eval_prompts, start.reference, start.identity.rows
            )
        else:
            resume_history(session, state, checkpoint)
        if world.is_main:
            start_folder(run, state, anew=checkpoint is None, residuals=trainable.residuals)

    # All processes start from the same parameters.
    world.broadcast(model)
    return eval_prompts


def _run_loop(
    session: Session,
    state: TrainState,
    writer: RunWriter,
    eval_prompts: list[EvalPrompt],
    stop_requested: Callable[[], bool],
) -> Outcome:
    """Train until the end or a stop, and return why training ended; record an error."""
    try:
        return train(
            state,
            session.examples["valid"],
            session.run.config,
            report=record_events(session, state, eval_prompts),
            save=writer.save,
            world=session.world,
            stop_requested=stop_requested,
        )
    except DeviceError as error:
        raise writer.record_failure(error) from error.__cause__
    except Exception as error:
        writer.record_error(error)
        raise


def start_state(model: nn.Module, session: Session) -> StartState:
    """Attach a run's adapters to the model, test it, and choose how a step is computed.

    Nothing is written into the run's folder.
    """
    world = session.world

    # Identify the base before it gets adapters: some kinds change it when they are attached.
    identity = _identify(model, session)
    # Objectives with a reference need its log-probabilities in the examples.
    reference = add_reference(model, session, identity.model)
    with world.sync_errors(), world.computing():
        trainable = _start_adapters(model, session)
        # If another run is started on this model, its error names this folder.
        model.trained_in = str(session.run.folder)

    # Test how the model can be trained. All processes use the main process's verdicts, because a
    # borderline verdict may differ between machines.
    with world.sync_errors(), world.computing():
        probes = _probe(model, session)
    probes = share_probes(probes, world)

    # Make the batches, each of which the processes share. Their number gives the length of the run,
    # on which the defaults of some settings depend.
    with world.sync_errors(), world.computing():
        batches = make_batches(
            model,
            session.examples["train"],
            session.config,
            session.log,
            world.data_shards,
            packable=probes.takes_caches,
        )
        schedule = schedule_of(session.config, batches.per_epoch)
        check_length(session.run.progress, schedule.steps)
        session.run.config = fit_to_length(session.config, schedule.steps)

    # Create the loop's state. If one process needs gradient checkpointing, all processes use it.
    with world.sync_errors(), world.computing():
        state = _make_state(model, session, trainable, probes, batches, schedule)
    (grad_checkpoint,) = world.any_rank([state.grad_checkpoint])
    state = replace(state, grad_checkpoint=grad_checkpoint)

    # Check this machine, and choose how a step is computed, in the same way on all processes.
    state = set_up_step(session, state, identity.model)
    return StartState(identity, reference, trainable, train_state=state)


def _start_adapters(model: nn.Module, session: Session) -> TrainableParams:
    """Attach new adapters to the model, or continue with those that exist."""
    config, checkpoint = session.config, session.checkpoint

    # New adapters start from random numbers.
    mx.random.seed(config.seed)
    if continues(model, config, checkpoint):
        trainable = continue_adapters(model, config, checkpoint, session.log)
    else:
        trainable = attach_adapters(model, config.adapter, original_of(config.model))
    check_rates(config, trainable.groups)
    return trainable


def _identify(model: nn.Module, session: Session) -> RunFingerprint:
    """Return the run's fingerprint, after comparing it across processes and with the checkpoint."""
    world, checkpoint = session.world, session.checkpoint
    with world.sync_errors(), world.computing():
        fingerprint = model_fingerprint(model)
    rows = " ".join(split.fingerprint() for split in session.examples.values())
    settings = identifying_settings(model, session.config)
    config = model_config(model)
    identity = RunFingerprint(settings, fingerprint, rows, versions(), base_config=config)

    # Compare the processes with each other, then with the checkpoint.
    world.check_same(identity.comparable())
    with world.sync_errors():
        if checkpoint is not None:
            for line in compare_content(checkpoint.identity, identity, str(checkpoint.folder)):
                session.log(f"resume: {line}")
    return identity


def _probe(model: nn.Module, session: Session) -> ModelProbes:
    """Test how the model can be trained, or return the verdicts in the checkpoint."""
    if "language_model" in model:
        session.log(
            "only the text part of this multimodal model is loaded and trained"
            " (mlx_loraplus.fuse --keep-vision copies the other parts)"
        )
    check_caches(model)

    # Reuse the verdicts that the run has stored.
    probes = None
    if session.checkpoint is not None:
        stored = session.checkpoint.identity
        probes = reusable_probes(stored.probes, model, then=stored.versions, now=versions())
    if probes is None:
        probes = probe_model(model, pack=session.config.data.pack)

    if probes.head is None:
        session.log(
            "could not locate this model's output head: computing full logits, which uses more"
            " memory"
        )
    return probes


def _make_state(
    model: nn.Module,
    session: Session,
    trainable: TrainableParams,
    probes: ModelProbes,
    batches: Batches,
    schedule: Schedule,
) -> TrainState:
    """Return the loop's state, with a new optimizer."""
    config = session.config
    optimizer = LoRAPlus(replace_auto_rate(config).optimizer, schedule.steps)
    optimizer.init(model, trainable.groups)
    warn_about_rates(config, schedule.steps, session.log)

    probes, grad_checkpoint = choose_grad_checkpoint(model, session, probes, batches)
    return TrainState(
        model=model,
        optimizer=optimizer,
        progress=session.run.progress,
        batches=batches,
        schedule=schedule,
        trunk_and_head=probes.trunk_and_head(model),
        probes=probes,
        grad_checkpoint=grad_checkpoint,
        choices=choices_for(model),
        objective=config.objective,
    )
