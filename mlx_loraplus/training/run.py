"""A run from data to adapter: what the train command and a notebook's ``finetune`` share."""

import io
import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.attach import attach_adapters, find_adapters, take_census
from ..adapters.storage import load_adapter, save_adapter
from ..config import RunConfig
from ..data.batches import Batches
from ..data.examples import Examples
from ..data.loading import load_data
from ..data.overlaps import find_overlaps
from ..data.packing import PackedBatches, plan_batches
from ..errors import AdapterError, ConfigError, OutputError
from ..models.names import original_of
from ..places import locked, write_atomically
from ..planning import compare_with_plan, settle_batch, settle_checkpoint, settle_length
from ..settings import configure, settings_of
from .checkpoint import (
    Checkpoint,
    Identity,
    check_identity,
    checkpoint_folder,
    load_best,
    model_fingerprint,
    restore,
    save_best,
    save_checkpoint,
)
from .folder import check_folder, describe_cut, find_run, start_folder, write_history
from .history import PLOT, RESIDUALS, Run
from .loop import Event, Progress, run_length, train
from .norms import measure_norms
from .opening import Questions, start_event, versions
from .optimizer import LoRAPlus
from .packing import check_packing
from .progress import Lines, LivePlot, Tell, Watch, in_notebook, quiet
from .report import write_report
from .split import split_model
from .trackers import check_trackers, tracking


def finetune(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    tell: Tell | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Run:
    """Train LoRA+ adapters on ``model`` in place: y = W x + s B A x, B at lr_ratio times the rate of A.

    Adapters that are on the model already are trained on; else they are attached first.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        tell: Called with each line a terminal would show, e.g. ``print``. Without it, a notebook shows a picture of the
            losses that moves, and a script nothing.
        watch: Called with the run and each event of its history in place of the lines that tell them.
        settings: Any setting of ``RunConfig``, e.g. ``data="my_folder", lr_ratio=16, iters=100``.

    Returns:
        The run, with its history. Its folder, ``adapter_path``, holds the adapter, settings, history and a report.

    Raises:
        ConfigError: A setting that is unknown or not allowed.
        DataError: Rows that can't be trained on, all told together.
        OutputError: ``adapter_path`` holds another run, or can't be written.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> run = finetune(model, tokenizer, lr_ratio=16, iters=45)
    """
    config = configure(RunConfig, settings)
    if watch is None:
        watch = LivePlot() if tell is None and in_notebook() else Lines(tell or quiet)
    tell = tell or (Lines(print, "quiet").tell if in_notebook() else quiet)
    check_trackers(config)
    check_folder(config)
    config = settle_length(config, model, tell)
    train_examples, valid_examples = load_examples(config, tokenizer, tell)
    check_validation(config, valid_examples)
    longest = config.data.max_seq_length if config.data.pack else int(train_examples.lengths.max())
    config = settle_batch(config, model, longest, tell)
    run = Run(config)
    with locked(run.folder) as cut_off:
        checkpoint = find_run(config, tell)
        if checkpoint is not None and cut_off is not None:
            tell(f"resume: {describe_cut(cut_off, checkpoint.history)}")
        with tracking(run, tell) as trackers:
            _train(run, model, tokenizer, train_examples, valid_examples, checkpoint, tell, [watch, *trackers])
    return run


def _train(
    run: Run,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    train_examples: Examples,
    valid_examples: Examples,
    checkpoint: Checkpoint | None,
    tell: Tell,
    watchers: Sequence[Watch],
) -> None:
    """Train in the run's folder, which is locked, from the start or from a checkpoint."""
    config = run.config
    fingerprint = model_fingerprint(model)  # before adapters: some kinds start by changing the base
    rows = f"{train_examples.fingerprint()} {valid_examples.fingerprint()}"
    if checkpoint is not None:
        for line in check_identity(checkpoint, config.model, fingerprint, rows, versions()):
            tell(f"resume: {line}")
    mx.random.seed(config.seed)
    begin = config.resume_adapter_file if checkpoint is None else checkpoint.folder
    if begin is not None and (checkpoint is None or not find_adapters(model)):
        load_adapter(model, begin)
    if find_adapters(model):
        census = take_census(model)
    else:
        census = attach_adapters(model, config.adapter, original_of(config.model))
    if "language_model" in model:
        tell("only the text part of this multimodal model is loaded and trains (mlx_loraplus.fuse --keep-vision)")
    split = split_model(model)
    if split is None:
        tell("this model's head can't be told from its trunk: training computes full logits, which takes more memory")
    batches = make_batches(model, train_examples, config, tell)
    length = run_length(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, length.updates)
    optimizer.init(model, census.groups)
    if config.optimizer.warmup >= length.updates:
        tell(f"warning: the warm-up of {config.optimizer.warmup} updates outlasts the run of {length.updates}")
    if checkpoint is not None and config.grad_checkpoint == "auto":
        recompute = checkpoint.identity.recompute  # not chosen again: it changes the last bits
    else:
        recompute = settle_checkpoint(config, model, batches.largest(), tell)
    identity = Identity(settings_of(config), fingerprint, rows, recompute, versions())

    questions = Questions.choose(valid_examples, config, tokenizer)
    if checkpoint is not None:
        restore(checkpoint, model, optimizer)
        run.progress, run.history = checkpoint.progress, checkpoint.history
        tell(f"resume: from update {run.progress.update} of {length.updates}")
    progress, run.planned = run.progress, length.updates
    if not run.history or "schema" not in run.history[0]:  # there is none in a checkpoint of an older version
        splits = {"train": train_examples, "valid": valid_examples}
        start = start_event(model, config, length, splits, census, batches, questions, recompute=recompute)
        run.history.insert(0, start)
    run.history[0]["updates"] = length.updates  # which may be another number after a resume
    start_folder(config, run.history, anew=checkpoint is None)
    if census.residuals:
        write_atomically(run.folder / RESIDUALS, json.dumps(census.residuals, indent=1).encode())
    unsaved: list[OutputError] = []
    best: dict[str, mx.array] = {}  # the best adapter, as long as it is not on the disk

    before: list[float] = []  # peaks until the first report of updates: it is compared with the plan
    measure = measure_norms(model)

    def show(event: Event) -> None:
        for watcher in watchers:
            watcher(run, event)

    def report(event: Event) -> None:
        if "loss" in event:
            event |= measure()
        if "valid_loss" in event and questions.prompts:
            event["answers"] = questions.ask(model, tokenizer)
        run.history.append(event)
        show(event)
        before.append(mx.get_peak_memory())
        if "loss" in event and sum("loss" in past for past in run.history) == 1:
            shapes = [batches.shape_of(batches.rows_of(n)) for n in range(event["update"] * length.window)]
            compare_with_plan(config, model, shapes, before, tell, checkpoint=recompute)

    def save() -> None:
        unsaved.clear()
        if progress.best_update == progress.update:
            best.update(tree_flatten(model.trainable_parameters()))
        try:
            if not run.folder.is_dir():
                tell(f"warning: {run.folder} has vanished: making it again")
                start_folder(config, run.history, anew=False)
            if best and progress.best_update is not None:
                save_best(run.folder, model, best, progress.best_update)
                best.clear()
            save_checkpoint(run.folder, model, optimizer, progress, identity, run.history, config.keep_checkpoints)
            save_adapter(model, run.folder)
            write_history(run.folder, run.history)
        except OutputError as error:
            if config.on_save_error == "stop":
                raise OutputError(f"{error}; then --resume goes on from the checkpoint before") from None
            tell(f"warning: update {progress.update} is not saved, an older checkpoint is: {error}")
            unsaved.append(error)

    show(run.start)
    outcome = train(
        model,
        split,
        optimizer,
        batches,
        valid_examples,
        length,
        config,
        recompute=recompute,
        report=report,
        save=save,
        progress=progress,
    )
    if unsaved:
        raise OutputError(f"the last updates are not saved: {unsaved[0]}; then --resume goes on from before them")
    run.history.append(
        {
            "update": progress.update, "outcome": outcome, "best_update": progress.best_update,
            "best_loss": progress.best_loss, "seconds": progress.seconds,
        }
    )  # fmt: skip
    if run.finished:
        keep_best(run, model, progress, tell)
        save_adapter(model, run.folder)
    write_history(run.folder, run.history)
    picture = io.BytesIO()
    run.plot().savefig(picture, format="png")
    write_atomically(run.folder / PLOT, picture.getvalue())
    write_report(run)
    show(run.history[-1])


def check_validation(config: RunConfig, valid: Examples) -> None:
    """Raise ConfigError where ``patience`` or ``prompts`` wait for validations that never come."""
    if config.patience is not None and not valid:
        raise ConfigError("patience needs validation rows: add a valid.jsonl, or leave --patience off")
    if config.prompts and not valid:
        raise ConfigError("prompts are answered at validations, which need rows: add a valid.jsonl, or --valid-split")


def keep_best(run: Run, model: nn.Module, progress: Progress, tell: Tell) -> None:
    """Put the adapter of the best validation back on the model, if that was not the last."""
    best, losses = progress.best_update, run.losses("valid_loss")
    if best and progress.best_loss is not None and losses[0][0] == 0 and losses[0][1] < progress.best_loss:
        tell(
            f"warning: no validation was better than {losses[0][1]:.4f}, the loss before training "
            f"(best {progress.best_loss:.4f}): try a lower --learning-rate, or more rows"
        )
    if best is None or best == progress.update:
        return
    place = f"the best validation loss, {progress.best_loss:.4f}, was at update {best}"
    try:
        load_best(run.folder, model, best)
    except AdapterError as problem:
        tell(f"warning: {place}, but that adapter is lost, so the last is kept: {problem}")
        return
    tell(f"{place}: its adapter is kept (the last is in {checkpoint_folder(run.folder, progress.update)})")


def load_examples(config: RunConfig, tokenizer: TokenizerWrapper, tell: Tell) -> tuple[Examples, Examples]:
    """Return the training and validation examples, and tell what became of their rows."""
    if not config.data.data:
        tell("data: no --data given, so the built-in demo set: requests in plain English to JSON commands")
    data = load_data(config, tokenizer, "train", "valid", tell=tell)
    for split, report in data.reports.items():
        if not report.rows:
            tell(f"{split}: no rows, so no validation loss (add a valid file, or --valid-split)")
            continue
        tell(f"{split}: {report} ({report.of_kinds()})")
        for note in report.notes:
            tell(f"{split}: {note}")
    for overlap in find_overlaps(data.examples):
        if overlap.leak and overlap.count:
            tell(f"warning: {overlap}")
    return data.examples["train"], data.examples["valid"]


def make_batches(model: nn.Module, examples: Examples, config: RunConfig, tell: Tell) -> Batches:
    """Put the training examples into batches, packed where ``pack`` asks for it and ``model`` allows it.

    Raises:
        ConfigError: The model can't be packed.
    """
    if config.data.pack:
        check_packing(model)
    batches = plan_batches(examples, config.data, config.seed)
    if isinstance(batches, PackedBatches):
        tell(f"train: {batches}")
    return batches
