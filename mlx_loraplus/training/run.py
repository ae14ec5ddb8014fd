"""A run from data to adapter: what the train command and a notebook's ``finetune`` share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import yaml
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.attach import attach_adapters, find_adapters, take_census
from ..adapters.storage import CONFIG, MODULES, WEIGHTS, load_adapter, save_adapter
from ..config import RunConfig, configure, settings_of
from ..data.batches import Batches
from ..data.examples import load_data
from ..data.overlaps import find_overlaps
from ..data.packing import PackedBatches, plan_batches
from ..data.templates import Example
from ..errors import OutputError
from ..models.names import original_of
from ..places import write_atomically
from .loop import Event, run_length, train
from .optimizer import LoRAPlus
from .packing import check_packing
from .plots import plot_losses
from .progress import Tell, quiet, tell_event
from .split import split_model
from .unified_memory import needs_checkpointing

SETTINGS, HISTORY, PLOT, RESIDUALS = "run.yaml", "history.jsonl", "loss.png", "residuals.json"


@dataclass
class Run:
    """What a run was and how it went.

    Attributes:
        config: Every setting.
        history: Events in their order: reports have ``loss``, validations ``valid_loss``, all have ``update``.
        finished: False if it was interrupted.
    """

    config: RunConfig
    history: list[Event] = field(default_factory=list)
    finished: bool = False

    @property
    def folder(self) -> Path:
        """Where the run keeps its adapter, settings, history and plot."""
        return Path(self.config.adapter_path)

    def plot(self) -> Any:
        """Return a matplotlib figure of training and validation loss against updates."""
        return plot_losses(self.history)

    def losses(self, name: str = "loss") -> list[tuple[int, float]]:
        """Return (update, value) for every event that has ``name``: "loss" or "valid_loss"."""
        return [(event["update"], event[name]) for event in self.history if name in event]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{series[0][1]:.3f}</td><td>{series[-1][1]:.3f}</td></tr>"
            for name in ("loss", "valid_loss")
            if (series := self.losses(name))
        )
        state = "finished" if self.finished else "interrupted"
        return f"<p>{self.folder}: {state}</p><table><tr><th></th><th>first</th><th>last</th></tr>{rows}</table>"


def finetune(
    model: nn.Module, tokenizer: TokenizerWrapper, /, *, tell: Callable[[str], None] = quiet, **settings: Any
) -> Run:
    """Train LoRA+ adapters on ``model`` in place: y = W x + s B A x, B at lr_ratio times the rate of A.

    Adapters that are on the model already are trained on; else they are attached first.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        tell: Called with each line a terminal would show, e.g. ``print``; silent by default.
        settings: Any setting of ``RunConfig``, e.g. ``data="my_folder", lr_ratio=16, iters=100``.

    Returns:
        The run, with its history. Its folder, ``adapter_path``, holds the adapter, settings, history and a plot.

    Raises:
        ConfigError: A setting that is unknown or not allowed.
        DataError: Rows that can't be trained on, all told together.
        OutputError: ``adapter_path`` holds another run, or can't be written.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> run = finetune(model, tokenizer, lr_ratio=16, iters=45)
    """
    config = configure(RunConfig, settings)
    check_folder(config)
    train_examples, valid_examples = load_examples(config, tokenizer, tell)
    mx.random.seed(config.seed)
    if config.resume_adapter_file is not None:
        load_adapter(model, config.resume_adapter_file)
    if find_adapters(model):
        census = take_census(model)
    else:
        census = attach_adapters(model, config.adapter, original_of(config.model))
    tell(f"adapter: {census}")
    split = split_model(model)
    if split is None:
        tell("this model's head can't be told from its trunk: training computes full logits, which takes more memory")
    batches = make_batches(model, train_examples, config, tell)
    length = run_length(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, length.updates)
    optimizer.init(model, census.groups)
    if config.optimizer.warmup >= length.updates:
        tell(f"warning: the warm-up of {config.optimizer.warmup} updates outlasts the run of {length.updates}")
    recompute = should_recompute(model, batches, config, tell)

    run = Run(config)
    start_folder(run)
    if census.residuals:
        write_atomically(run.folder / RESIDUALS, json.dumps(census.residuals, indent=1).encode())

    def report(event: Event) -> None:
        run.history.append(event)
        tell_event(event, length.updates, tell)

    def save() -> None:
        save_adapter(model, run.folder)
        write_history(run)

    run.finished = train(
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
    )
    run.plot().savefig(run.folder / PLOT)
    return run


def should_recompute(model: nn.Module, batches: Batches, config: RunConfig, tell: Tell) -> bool:
    """Tell whether to checkpoint; auto does where the largest batch's activations would not fit."""
    if config.grad_checkpoint != "auto":
        return config.grad_checkpoint == "on"
    needed = needs_checkpointing(model, *batches.largest())
    if needed:
        tell("gradient checkpointing is on: the activations of the largest batch would not fit (--grad-checkpoint off)")
    return needed


def check_folder(config: RunConfig) -> None:
    """Refuse a folder that holds a run already, before anything slow has happened.

    Raises:
        OutputError: It holds a run and ``overwrite`` is off, or it is a file.
    """
    folder = Path(config.adapter_path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"adapter_path {folder} is a file: give a folder")
    held = [name for name in (WEIGHTS, CONFIG, HISTORY) if (folder / name).exists()]
    if held and not config.overwrite:
        raise OutputError(f"{folder} holds a run already ({held[0]}): give another --adapter-path, or --overwrite")


def load_examples(
    config: RunConfig, tokenizer: TokenizerWrapper, tell: Tell
) -> tuple[Sequence[Example], Sequence[Example]]:
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


def make_batches(model: nn.Module, examples: Sequence[Example], config: RunConfig, tell: Tell) -> Batches:
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


def start_folder(run: Run) -> None:
    """Clear the run's folder of an earlier run and write the resolved settings, which ``-c run.yaml`` trains again."""
    for name in (WEIGHTS, CONFIG, MODULES, HISTORY, PLOT, RESIDUALS):
        (run.folder / name).unlink(missing_ok=True)
    write_atomically(run.folder / SETTINGS, yaml.safe_dump(settings_of(run.config), sort_keys=False).encode())


def write_history(run: Run) -> None:
    """Write ``history.jsonl``, one event a line."""
    lines = [json.dumps(event) + "\n" for event in run.history]
    write_atomically(run.folder / HISTORY, "".join(lines).encode())
