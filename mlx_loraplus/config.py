"""Every setting: its name, meaning, unit, allowed values and default, written once.

The command line, YAML files, ``--print-config``, the README's table and the keyword arguments of ``finetune`` are all
made from these dataclasses. A field's help is the string below it. Precedence: flag > YAML > default.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BeforeValidator, Field
from tyro.conf import OmitArgPrefixes

from .errors import ConfigError, join_problems, nearest

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# YAML reads a bare on or off as a truth value, and mlx-lm's grad_checkpoint is one.
Switch = Annotated[
    Literal["auto", "on", "off"], BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value))
]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained: y = W x + (alpha / rank) B A x on every targeted module."""

    rank: Count = 8
    """Rank r of A and B."""
    alpha: Positive = 16.0
    """Scale numerator: the adapter's output is multiplied by s = alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training, in [0, 1)."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """Modules that get an adapter: name suffixes (q_proj), full paths, or all-linear (the blocks' linear layers)."""
    num_layers: int = -1
    """Adapt the last N blocks; -1 for all."""

    @property
    def scale(self) -> float:
        """S = alpha / rank, which mlx-lm stores as ``scale``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class OptimizerConfig:
    """How it learns: A at the rate eta, B at lambda * eta, both on one schedule."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """Update rule."""
    learning_rate: Positive = 2e-4
    """Peak rate eta of the A matrices."""
    lr_ratio: Positive = 16.0
    """LoRA+'s lambda: the B matrices learn at lr_ratio times the rate of A; 1 is plain LoRA."""
    embedding_learning_rate: Positive = 1e-6
    """Peak rate of both matrices of an adapter on an embedding; absolute, not scaled by lr_ratio."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay: A and B alike are multiplied by (1 - rate of A * weight_decay) at every update."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of both rates after the warm-up; cosine and linear end at zero."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Updates over which both rates rise from zero to their peak."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradients' global norm to this; 0 for no clipping."""


@dataclass(frozen=True)
class DataConfig:
    """What it learns from, and how rows become batches."""

    data: str | None = None
    """Folder with train.jsonl and, if there are any, valid.jsonl and test.jsonl; without it, the built-in demo set."""
    batch_size: Count = 8
    """Rows in a batch."""
    max_seq_length: Annotated[int, Field(ge=2)] = 2048
    """Longest row, in tokens; longer rows are cut at their end, and counted."""
    mask_prompt: bool = True
    """Learn completions and assistant turns only; --no-mask-prompt learns every token."""
    pack: bool = False
    """Pack short rows into batch_size rows of one length, at most max_seq_length, each row seeing itself only."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: str = "gemma-3"
    """A name from --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: str = "adapters"
    """The run's folder: adapter, resolved config, history, loss plot."""
    resume_adapter_file: str | None = None
    """Start from the weights of this adapter (a folder) instead of anew; the optimizer starts anew."""
    resume: bool = False
    """Go on with the run in adapter_path from its newest whole checkpoint, as if it had never stopped."""
    iters: Count | None = None
    """Optimizer updates; without it, by --epochs."""
    epochs: Positive | None = None
    """Passes over the training rows instead of --iters; 1 when neither is given."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one update, weighted by their supervised tokens."""
    grad_checkpoint: Switch = "auto"
    """Keep only each block's input and compute the rest again: less memory, more time; auto: where needed."""
    compile: Switch = "auto"
    """Compile the step: auto does where MLX has a GPU."""
    steps_per_report: Count = 10
    """Updates between reports."""
    steps_per_eval: Count = 200
    """Updates between validations; the first comes before the first update, the last after the last."""
    steps_per_save: Count = 100
    """Updates between checkpoints; there is one at each best validation and at the end too."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep, besides the best adapters."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """Where a checkpoint can't be written, as on a full disk: train on with the older one, or stop."""
    patience: Count | None = None
    """Stop after so many validations in a row that are not the best."""
    max_minutes: Positive | None = None
    """Stop after so many minutes, as Ctrl-C does; --resume goes on."""
    max_skipped_updates: Count = 5
    """Stop after so many updates in a row that were skipped because the loss or a gradient was not finite."""
    seed: int = 0
    """Seed of the adapters' start, dropout and the order of rows."""
    overwrite: bool = False
    """Replace the run that adapter_path holds."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)


@dataclass(frozen=True)
class GenerateConfig:
    """One answer from a model, with or without an adapter."""

    prompt: str = "The capital of France is"
    """What to answer; - reads it from standard input."""
    model: str = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: str | None = None
    """Folder of an adapter to attach; none for the model as it is."""
    max_tokens: Count = 256
    """Most tokens to generate."""
    temperature: NotNegative = 0.0
    """0 takes the likeliest token each time; higher samples more freely."""
    seed: int = 0
    """Seed of the sampling."""
    chat: bool = True
    """Wrap the prompt in the model's chat template if it has one, as training does; --no-chat never."""


@dataclass(frozen=True)
class FuseConfig:
    """An adapter folded into its base: a folder that stock mlx_lm loads."""

    model: str = "gemma-3"
    """The base that the adapter was trained on: a name, hub id, folder or .gguf file."""
    adapter_path: str = "adapters"
    """Folder of the adapter."""
    save_path: str = "fused_model"
    """Folder to write."""
    dequantize: bool = False
    """Write a quantized base's weights in full precision."""
    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """Quantize the fused weights to this many bits; without it, as the base is."""
    overwrite: bool = False
    """Replace what save_path holds."""


Part = TypeVar("Part", AdapterConfig, OptimizerConfig)
Config = TypeVar("Config", RunConfig, GenerateConfig, FuseConfig)


def configure(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Make a config of ``kind`` from flat settings, defaults filled in, all problems told together.

    Args:
        kind: RunConfig, GenerateConfig or FuseConfig.
        settings: Setting name to value, e.g. ``{"lr_ratio": 16, "rank": 8}``.

    Raises:
        ConfigError: A name that is no setting, or a value that is not allowed.
    """
    homes = _homes(kind)
    problems = [f"{_shown(name)} is no setting{nearest(name, homes)}" for name in settings if name not in homes]
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if name in homes:
            part = nested.setdefault(homes[name], {}) if homes[name] else nested
            part[name] = value
    try:
        config = pydantic.TypeAdapter(kind).validate_python(nested)
    except pydantic.ValidationError as error:
        problems += [_describe(detail) for detail in error.errors()]
        raise ConfigError(join_problems(problems)) from None
    problems += _conflicts(config)
    if problems:
        raise ConfigError(join_problems(problems))
    return config


def checked(config: Part) -> Part:
    """Return a part made by hand, e.g. ``OptimizerConfig(lr_ratio=4)``, if its values are allowed.

    Raises:
        ConfigError: They are not.
    """
    try:
        return pydantic.TypeAdapter(type(config)).validate_python(dataclasses.asdict(config))  # pyright: ignore
    except pydantic.ValidationError as error:
        raise ConfigError(join_problems([_describe(detail) for detail in error.errors()])) from None


def settings_of(config: Config) -> dict[str, Any]:
    """Return a config's settings as one flat dictionary, the inverse of ``configure``."""
    settings: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        settings.update(value if isinstance(value, dict) else {name: value})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def setting_names(kind: type) -> list[str]:
    """Return the names of a config's settings, those of its parts among them."""
    return list(_homes(kind))


def _homes(kind: type) -> dict[str, str]:
    """Map each setting's name to the part that holds it, "" for the config itself."""
    homes: dict[str, str] = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.default_factory):
            homes |= dict.fromkeys((part.name for part in dataclasses.fields(item.default_factory)), item.name)
        else:
            homes[item.name] = ""
    return homes


def _describe(detail: Any) -> str:
    name = [part for part in detail["loc"] if isinstance(part, str)][-1]
    message = detail["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{name} {message}, not {detail['input']!r:.80}"


def _shown(name: str) -> str:
    """Return a name as it is, or shortened and quoted where a stranger made it up."""
    return name if len(name) <= 64 and name.isprintable() else f"{name!r:.64}"


def _conflicts(config: RunConfig | GenerateConfig | FuseConfig) -> list[str]:
    problems = []
    if isinstance(config, RunConfig):
        if config.iters is not None and config.epochs is not None:
            problems.append("iters and epochs both say how long to train: give one of them")
        if config.resume and config.overwrite:
            problems.append("resume goes on with the run that overwrite removes: give one of them")
        if config.optimizer.optimizer == "adam" and config.optimizer.weight_decay > 0:
            problems.append("adam has no weight_decay: use adamw, which is adam with it")
        if config.adapter.num_layers < -1 or config.adapter.num_layers == 0:
            problems.append(f"num_layers must be -1 (all blocks) or at least 1, not {config.adapter.num_layers}")
    if isinstance(config, FuseConfig) and config.dequantize and config.bits is not None:
        problems.append("dequantize and bits exclude each other: give one of them")
    return problems
