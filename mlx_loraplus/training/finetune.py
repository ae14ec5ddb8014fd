"""A run from data to adapter: what the train command and a notebook's ``finetune`` share."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.attach import TrainableParams, attach_adapters, find_adapters, trainable_summary
from ..adapters.storage import load_adapter
from ..adapters.tensor_parallel import is_sharded
from ..config import DIVERGED, DIVERGED_INIT2, RunConfig
from ..data.batches import Batches
from ..data.dataset import Examples
from ..data.eval_prompts import choose_eval_prompts, choose_format, own_eval_prompts
from ..data.limits import check_examples, limits_of
from ..data.overlaps import find_overlaps
from ..data.packing import PackedBatches, plan_batches
from ..data.sources import SplitName
from ..data.splits import load_data
from ..errors import ConfigError
from ..files import locked, write_atomically
from ..kernels.head import split_model
from ..kernels.packed_rows import check_packing
from ..memory.plan import resolve_batch, resolve_grad_checkpoint, resolve_length
from ..models.registry import original_of
from ..runs.events import start_event, versions
from ..runs.history import RESIDUALS, Run
from ..runs.progress import Callback, Lines, LivePlot, Log, in_notebook, quiet
from ..runs.trackers import check_trackers, tracking
from ..settings import settings_of
from .checkpoint import (
    Checkpoint,
    RunFingerprint,
    check_fingerprint,
    check_folder,
    find_run,
    model_fingerprint,
    read_checkpoint,
    restore,
)
from .continuing import set_dropout, take_over
from .distributed import World
from .interrupts import describe_cut
from .optimizer import LoRAPlus
from .recorder import RunRecorder, start_folder
from .soundness import check_caches, resolve_sound_checkpoint
from .trainer import schedule_of, train

# Settings that may differ on the processes of a run: fingerprints stand for what they name, and
# only the first writes.
LOCAL = {"model", "data", "adapter_path", "resume_adapter_file", "report_to"}


def finetune(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    log: Log | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Run:
    """Train LoRA+ adapters on ``model`` in place: y = W x + s B A x, B at lr_ratio times the rate of A.

    New adapters are attached first. Those of ``load(name, adapter_path)`` are trained on, and their
    settings hold where none are given; those that an earlier ``finetune`` left are not, unless
    ``resume`` goes on with its run.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        log: Called with each line a terminal would show, e.g. ``print``. Without it, a notebook
            shows a picture of the losses that moves, and a script nothing.
        callback: Called with the run and each event of its history in place of the lines that tell
            them.
        settings: Any setting of ``RunConfig``, e.g. ``data="my_folder", lr_ratio=16, iters=100``.

    Returns:
        The run, with its history. Its folder, ``adapter_path``, holds the adapter, settings,
        history and a report.

    Raises:
        ConfigError: A setting that is unknown or not allowed.
        DataError: Rows that can't be trained on, all told together.
        OutputError: ``adapter_path`` holds another run, or can't be written.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> run = finetune(model, tokenizer, lr_ratio=16, iters=45)
    """
    config = take_over(model, named(model, settings))
    world = World.join(config.parallel)
    if not world.is_main:
        log = quiet
    if callback is None:
        callback = LivePlot() if log is None and in_notebook() else Lines(log or quiet)
    log = log or (Lines(print, "quiet").log if in_notebook() else quiet)
    with ExitStack() as held:
        with world.sync_errors():
            if world.is_main:
                check_trackers(config)
                check_folder(config)
            check_fresh(model, config)
            config = resolve_length(config, model, log)
            examples = load_examples(config, tokenizer, log)
            check_examples(limits_of(model), examples, tokenizer, log)
            check_validation(config, examples["valid"])
            config = resolve_batch(config, model, int(examples["train"].lengths.max()), log)
            check_team(config, model, world)
            run = Run(config)
            cut_off = held.enter_context(locked(run.folder)) if world.is_main else None
            checkpoint = find_run(config, log) if world.is_main else None
        if checkpoint is not None and cut_off is not None:
            log(f"resume: {describe_cut(cut_off, checkpoint.history)}")
        copy = held.enter_context(world.copied(None if checkpoint is None else checkpoint.folder))
        if copy is not None and not world.is_main:
            checkpoint = read_checkpoint(copy)
        # trackers first: what they say as they open stands above a terminal's picture
        callbacks = [*held.enter_context(tracking(run, log)), callback] if world.is_main else []
        _train(run, model, tokenizer, examples, checkpoint, world, log, callbacks)
    return run


def _train(
    run: Run,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    examples: dict[SplitName, Examples],
    checkpoint: Checkpoint | None,
    world: World,
    log: Log,
    callbacks: Sequence[Callback],
) -> None:
    """Train in the run's folder, which is locked, from the start or from a checkpoint."""
    config = run.config
    with world.computing():
        fingerprint = model_fingerprint(
            model
        )  # before adapters: some kinds start by changing the base
    rows = " ".join(split.fingerprint() for split in examples.values())
    identity = RunFingerprint(settings_of(config), fingerprint, rows, versions())
    world.check_same(facts_of(identity))
    with world.sync_errors():
        if checkpoint is not None:
            for line in check_fingerprint(checkpoint, identity):
                log(f"resume: {line}")
        if checkpoint is None and (config.resume_adapter_file or find_adapters(model)):
            log(
                "the run starts from"
                f" {config.resume_adapter_file or 'the adapters that are on the model'}"
            )
        trainable = start_adapters(model, config, checkpoint)
        model.trained_in = str(run.folder)
    with world.sync_errors(), world.computing():  # from here on the model is run
        if "language_model" in model:
            log(
                "only the text part of this multimodal model is loaded and trains"
                " (mlx_loraplus.fuse --keep-vision)"
            )
        check_caches(model)
        split = split_model(model)
        if split is None:
            log(
                "this model's head can't be told from its trunk: full logits are computed, which"
                " takes more memory"
            )
        batches = make_batches(model, examples["train"], config, log, world.data_shards)
        length = schedule_of(config, batches.per_epoch)
        optimizer = LoRAPlus(config.optimizer, length.steps)
        optimizer.init(model, trainable.groups)
        warn_of_rates(config, length.steps, log)
        if checkpoint is not None and config.grad_checkpoint == "auto":
            grad_checkpoint = (
                checkpoint.identity.grad_checkpoint
            )  # not chosen again: it changes the last bits
            if grad_checkpoint:
                resolve_sound_checkpoint(
                    model, replace(config, grad_checkpoint="on"), log, wanted=True
                )
        else:
            wanted = resolve_grad_checkpoint(config, model, batches.largest(), log)
            grad_checkpoint = resolve_sound_checkpoint(model, config, log, wanted=wanted)
        eval_prompts = choose_eval_prompts(examples["valid"], config, tokenizer, config.sample_rows)
        form, note = choose_format(examples["train"], tokenizer)
        model.prompt_format = (
            form  # so that it is stored with the adapter, and asked so from now on
        )
        if note:
            log(f"note: {note}")
        eval_prompts += own_eval_prompts(config, tokenizer, form)
        if checkpoint is None:
            run.history.append(
                start_event(
                    model,
                    config,
                    length.steps,
                    examples,
                    trainable,
                    batches,
                    eval_prompts,
                    grad_checkpoint=grad_checkpoint,
                )
            )
        else:
            restore(checkpoint, model, optimizer)
            run.progress, run.history = checkpoint.progress, checkpoint.history
            log(f"resume: from step {run.progress.step} of {length.steps}")
        run.planned = run.history[0]["steps"] = (
            length.steps
        )  # which may be another number after a resume
        if world.is_main:
            start_folder(run, anew=checkpoint is None)
            if trainable.residuals:
                write_atomically(
                    run.folder / RESIDUALS, json.dumps(trainable.residuals, indent=1).encode()
                )
    (grad_checkpoint,) = world.any_rank([grad_checkpoint])
    world.broadcast(model)
    identity = replace(identity, grad_checkpoint=grad_checkpoint)
    record = RunRecorder(
        run, model, tokenizer, optimizer, batches, identity, eval_prompts, world, log, callbacks
    )
    record.show(run.start)
    outcome = train(
        model, split, optimizer, batches, examples["valid"], length, config, grad_checkpoint=grad_checkpoint,
        report=record.report, save=record.save, progress=run.progress, world=world,
    )  # fmt: skip
    record.close(outcome)


def start_adapters(
    model: nn.Module, config: RunConfig, checkpoint: Checkpoint | None
) -> TrainableParams:
    """Put the checkpoint's adapters on the model, those of ``resume_adapter_file`` or new ones, if it has none."""
    mx.random.seed(config.seed)
    begin = config.resume_adapter_file if checkpoint is None else checkpoint.folder
    if begin is not None and (checkpoint is None or not find_adapters(model)):
        load_adapter(model, begin)
    if find_adapters(model):
        set_dropout(model, config.adapter.dropout)
        return trainable_summary(model)
    return attach_adapters(model, config.adapter, original_of(config.model))


def facts_of(identity: RunFingerprint) -> dict[str, Any]:
    """Return what has to be the same on all processes: names of places may differ, what they hold may not."""
    settings = {name: value for name, value in identity.settings.items() if name not in LOCAL}
    train, valid = identity.rows.split()
    prints = {"the model": identity.model, "the training data": train, "the validation data": valid}
    return {
        **identity.versions,
        **settings,
        **{name: digest[:12] for name, digest in prints.items()},
    }


def check_team(config: RunConfig, model: nn.Module, world: World) -> None:
    """Raise ConfigError where so many processes can't train so.

    Raises:
        ConfigError: There are fewer rows in a batch than processes, or the model was not loaded for
            ``parallel``.
    """
    if is_sharded(model) != world.is_tensor_parallel:
        raise ConfigError(
            "parallel tensor and a model loaded by load(name, group=mx.distributed.init()) need"
            " each other, and more than one process"
        )
    if config.data.batch_size < world.data_shards:
        raise ConfigError(
            f"batch_size {config.data.batch_size} leaves some of {world.data_shards} processes"
            f" without a row: give --batch-size {world.data_shards} or more (it is that of all"
            " processes together), or start fewer"
        )


def check_fresh(model: nn.Module, config: RunConfig) -> None:
    """Raise ConfigError where a run would go on, unasked, with the adapters that an earlier one left on the model."""
    before = getattr(model, "trained_in", None)
    if before is not None and find_adapters(model) and not config.resume:
        raise ConfigError(
            f"the model still has the adapters of an earlier run ({before}), which this one would"
            f" train on: load the model again for a run of its own, or with adapter_path={before!r}"
            " to train them on"
        )


def named(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the name that ``model`` was loaded by, or its kind where it was not loaded by us.

    Raises:
        ConfigError: They name another model.
    """
    name = getattr(model, "loaded_as", None)
    if name is None:
        return {
            "model": (
                f"a {getattr(model, 'model_type', type(model).__name__)} model loaded elsewhere"
            ),
            **settings,
        }
    asked = settings.get("model", name)
    if asked != name and Path(asked).absolute() != Path(name).absolute():
        raise ConfigError(
            f"model {asked!r:.80} is not the model given, which is {name!r:.80}: leave model out"
        )
    return {**settings, "model": name}


def warn_of_rates(config: RunConfig, steps: int, log: Log) -> None:
    """Tell of rates that a run is unlikely to stand, and of a warm-up that it does not outlast."""
    optimizer, adapter = config.optimizer, config.adapter
    if optimizer.warmup >= steps:
        log(f"warning: the warm-up of {optimizer.warmup} steps outlasts the run of {steps}")
    if optimizer.optimizer not in ("adam", "adamw") or adapter.adapter not in ("lora", "dora"):
        return
    pace = adapter.scale * (optimizer.learning_rate or 0.0)
    if (
        adapter.init == "init2"
    ):  # B does not start at zero, so A's rate alone tells how fast the output moves at first
        limit, what, cure = DIVERGED_INIT2, "s x eta", "--learning-rate or --alpha"
    else:
        pace *= optimizer.lr_ratio or 1.0
        limit, what, cure = DIVERGED, "s x lambda x eta", "--learning-rate, --lr-ratio or --alpha"
    if pace >= limit:
        log(f"warning: {what} is {pace:.2g}, and runs with {limit:g} have diverged: lower {cure}")


def check_validation(config: RunConfig, valid: Examples) -> None:
    """Raise ConfigError where ``patience`` or ``prompts`` wait for validations that never come."""
    if config.patience is not None and not valid:
        raise ConfigError(
            "patience needs validation rows: add a valid.jsonl, or leave --patience off"
        )
    if config.prompts and not valid:
        raise ConfigError(
            "prompts are answered at validations, which need rows: add a valid.jsonl, or"
            " --valid-split"
        )


def load_examples(
    config: RunConfig, tokenizer: TokenizerWrapper, log: Log
) -> dict[SplitName, Examples]:
    """Return the examples, "train" and "valid", and tell what became of their rows."""
    if not config.data.data:
        log(
            "data: no --data given, so the built-in demo set: requests in plain English to JSON"
            " commands"
        )
    data = load_data(config, tokenizer, "train", "valid", log=log)
    for split, report in data.reports.items():
        if not report.rows:
            log(f"{split}: no rows, so no validation loss (add a valid file, or --valid-split)")
            continue
        log(f"{split}: {report} ({report.of_kinds()})")
        for note in report.notes:
            log(f"{split}: {note}")
    for overlap in find_overlaps(data.examples):
        if overlap.leak and overlap.count:
            log(f"warning: {overlap}")
    return data.examples


def make_batches(
    model: nn.Module, examples: Examples, config: RunConfig, log: Log, shares: int = 1
) -> Batches:
    """Put the training examples into batches, packed where ``pack`` asks for it and ``model`` allows it.

    Raises:
        ConfigError: The model can't be packed.
    """
    if config.data.pack:
        check_packing(model)
    batches = plan_batches(examples, config.data, config.seed, shares)
    if isinstance(batches, PackedBatches):
        log(f"train: {batches}")
    return batches
