"""Every setting: its name, meaning, unit, allowed values and default, written once.

The command line, YAML files, ``--print-config``, the README's table and the keyword arguments of
``finetune`` are all made from these dataclasses. A field's help is the string below it. Precedence:
flag > YAML > default.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from tyro.conf import OmitArgPrefixes, Positional, arg

from .userpaths import user_path

_LIMIT = 1 << 63  # what MLX's arrays and generators take
Count = Annotated[int, Field(ge=1, lt=_LIMIT)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=_LIMIT)]
# YAML reads a bare on or off as a truth value, and mlx-lm's grad_checkpoint is one.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value)),
]


@dataclass(frozen=True)
class KindFacts:
    """The defaults and limits of one kind of adapter; its layers are in ``adapters/<kind>.py``."""

    rank: int = 8  # the default rank
    rate: float | None = (
        None  # the default learning_rate at lr_ratio 1; None: the default of ``init``
    )
    own: tuple[str, ...] = ()  # settings that only this kind accepts
    refused: Mapping[tuple[str, ...], str] = field(default_factory=dict[tuple[str, ...], str])
    """Settings that this kind refuses → the message, in which {name} stands for a setting's value."""


KINDS: Mapping[str, KindFacts] = {
    "lora": KindFacts(),
    "dora": KindFacts(own=("magnitude_lr_ratio",)),
    "vera": KindFacts(
        rank=256,
        rate=4e-3,  # VeRA trains two vectors, which need a higher rate than matrices
        refused={
            ("init",): "vera has no init {init}: its A and B stay random; use adapter lora or dora",
            ("alpha", "rslora"): "vera has no scale: leave alpha and rslora out",
        },
    ),
}
AdapterKind = Literal["lora", "dora", "vera"]

if TYPE_CHECKING:  # auto is settled before anything reads them
    Rows = Any
    Length = Any
else:
    Rows, Length = Count | Literal["auto"], Annotated[int, Field(ge=2)] | Literal["auto"]
Quantize = Literal["2", "3", "4", "5", "6", "8", "mxfp4", "nvfp4", "mxfp8"]
Written = Literal["peft", "gguf", "hub"]
Read = Literal["peft", "gguf"]
Merged = Literal["f16", "q8_0", "f32"]

OLD_NAMES = {
    "answer_rows": "sample_rows",
    "max_skipped_updates": "max_skipped_steps",
    "peer_timeout": "distributed_timeout",
    "whole": "merged",
}
"""Settings that had another name in 0.1.0, which is still accepted → their name now."""

_MODES = {
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}  # bits, and weights that share a scale
# The defaults. In scripts/study/evidence the best eta fell as lambda rose, from 5e-3 at 1 to 1e-3
# at 16 on one model and from 2e-3 to 1e-4 on the other: c / sqrt(lambda) with the c given here is
# near the best of the second, which wanted less with Init[2] at every lambda. Lower is the safer
# side: twice the best rate cost far more than half of it. PiSSA wants less.
LR_RATIO = 4.0
RATES = {"init1": 1e-3, "init2": 4e-4, "loftq": 1e-3, "pissa": 4e-5}
DIVERGED, DIVERGED_INIT2 = 0.018, 0.002
"""The least s * lambda * eta that diverged in scripts/study/evidence (Adam); with Init[2] the least s * eta."""


def _as_names(value: Any) -> Any:
    """Let one name stand without a list, null for none, and a mapping for name=column pairs."""
    if isinstance(value, Mapping):
        return tuple(f"{name}={column}" for name, column in value.items())
    return (value,) if isinstance(value, str | os.PathLike) else value or ()


def _as_path(value: Any) -> Any:
    """Return a path as the system takes it; what is no text is refused by its type."""
    if not isinstance(value, str | os.PathLike):
        return value
    try:
        return user_path(value)
    except ValueError as problem:
        raise PydanticCustomError("path", "{problem}", {"problem": str(problem)}) from None


Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
UserPath = Annotated[str, BeforeValidator(_as_path)]
"""A path, or a name that may be one: the one place where ~ becomes the home folder."""
UserPaths = Annotated[tuple[UserPath, ...], BeforeValidator(_as_names)]


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained: y = W x + s B A x on every targeted module, or one of its siblings."""

    adapter: AdapterKind = "lora"
    """lora: A and B; dora: also the lengths of W's rows; vera: two vectors around random, shared A and B."""
    init: Literal["init1", "init2", "pissa", "loftq"] = "init1"
    """A random, B = 0; A = 0, B random; the best approximation of W; or that of what quantizing W loses."""
    rank: Count | None = None
    """Rank r of A and B; without it 8, and 256 for vera."""
    alpha: Positive = 16.0
    """Scale numerator: the adapter's output is multiplied by s = alpha / rank; vera has no scale."""
    rslora: bool = False
    """Make it s = alpha / sqrt(rank), so that large ranks learn as fast as small ones."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training, in [0, 1)."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """Modules that get an adapter: name suffixes (q_proj), full paths, or all-linear (the blocks' linear layers)."""
    train_modules: tuple[str, ...] = ()
    """Modules that train in full, at embedding_learning_rate: name suffixes (embed_tokens), full paths, or norms."""
    num_layers: int = -1
    """Adapt the last N blocks; -1 for all."""
    quantize: Annotated[
        Quantize | None, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)
    ] = None
    """Bits or mode to which loftq (4 without it), and pissa if asked, quantizes the targeted modules' weights."""
    quantize_group_size: Literal[32, 64, 128] = 64
    """Weights of a row that share a scale, where quantize is a number of bits; the mx and nv modes have their own."""
    loftq_iters: Count = 5
    """Turns of loftq between quantizing and approximating."""
    svd: Literal["randomized", "exact"] = "randomized"
    """How pissa and loftq approximate: randomized takes seconds, exact minutes on large models, for a little more."""

    @property
    def scale(self) -> float:
        """S = alpha / rank, or alpha / sqrt(rank), which mlx-lm stores as ``scale``."""
        rank = self.rank or KINDS[self.adapter].rank
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How ``init`` quantizes the base, as config.json has it; None if it does not."""
        to = self.quantize or ("4" if self.init == "loftq" else None)
        if to is None:
            return None
        bits, size = _MODES.get(to) or (int(to), self.quantize_group_size)
        return {"mode": to if to in _MODES else "affine", "bits": bits, "group_size": size}


@dataclass(frozen=True)
class OptimizerConfig:
    """How it learns: A at the rate eta, B at lambda * eta, both on one schedule."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """Update rule."""
    learning_rate: Positive | None = None
    """Peak rate eta of the A matrices; without it, what suits adapter and init (init1: 1e-3 / sqrt(lr_ratio))."""
    lr_ratio: Positive | None = None
    """LoRA+'s lambda: B learns at lr_ratio times A's rate, 1 is plain LoRA; without it 4."""
    magnitude_lr_ratio: Positive = 1.0
    """DoRA's magnitudes learn at this times A's rate; PEFT gives them B's, that is lr_ratio."""
    embedding_learning_rate: Positive = 1e-6
    """Peak rate of adapters on embeddings and of train_modules; absolute, not scaled by lr_ratio."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay: A and B alike are multiplied by (1 - rate of A * weight_decay) at every step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of both rates after the warm-up; cosine and linear end at zero."""
    warmup: Annotated[int, Field(ge=0, lt=_LIMIT)] = 10
    """Steps over which both rates rise from zero to their peak."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradients' global norm to this; 0 for no clipping."""


@dataclass(frozen=True)
class DataConfig:
    """What it learns from, and how rows become batches."""

    data: UserPaths = ()
    """Folders with train (valid, test) files, files (jsonl, json, csv, parquet, txt) or hub ids; none: the demo set."""
    data_weights: tuple[Positive, ...] = ()
    """For each of several data sets, how often its rows are seen in an epoch; 0.5 sees half of them."""
    fields: Names = ()
    """What the rows call their fields, as in prompt=query completion=reply; other rows are recognised as ever."""
    valid_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows to validate on, where there is no valid file; a choice by --seed."""
    on_bad: Literal["error", "drop"] = "error"
    """What to do with rows that can't be used: tell them and stop, or drop and count them."""
    on_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What to do with rows longer than max_seq_length: cut and count, drop and count, learn in parts, or stop."""
    train_on: Literal["turns", "last", "everything"] = "turns"
    """What is learned: every assistant turn or completion, the last turn of a chat, or every token."""
    batch_size: Rows = 8
    """Rows in a batch; auto: as many as fit, 16 at most."""
    max_seq_length: Length = 2048
    """Longest example, in tokens; --on-long says what becomes of longer rows; auto: the longest that fits."""
    pack: bool = False
    """Pack short rows into batch_size rows of one length, at most max_seq_length, each row seeing itself only."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: UserPath = "gemma-3"
    """A name from --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath = "adapters"
    """The run's folder: adapter, resolved config, history, loss plot."""
    resume_adapter_file: UserPath | None = None
    """Start from the weights of this adapter (a folder) instead of anew; the optimizer starts anew."""
    resume: bool = False
    """Go on with the run in adapter_path from its newest whole checkpoint, as if it had never stopped."""
    iters: Count | None = None
    """Optimizer steps; without it, by --epochs."""
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Passes over the training rows instead of --iters; 1 when neither is given."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one step, weighted by their supervised tokens."""
    grad_checkpoint: Switch = "auto"
    """Keep only each block's input and compute the rest again: less memory, more time; auto: where needed."""
    compile: Switch = "auto"
    """Compile the step: auto does where MLX has a GPU."""
    steps_per_report: Count = 10
    """Steps between reports."""
    steps_per_eval: Count = 200
    """Steps between validations; the first comes before the first step, the last after the last."""
    steps_per_save: Count = 100
    """Steps between checkpoints; there is one at each best validation and at the end too."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep, besides the best adapters."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """Where a checkpoint can't be written, as on a full disk: train on with the older one, or stop."""
    patience: Count | None = None
    """Stop after so many validations in a row that are not the best."""
    max_minutes: Positive | None = None
    """Stop after so many minutes, as Ctrl-C does; --resume goes on."""
    max_skipped_steps: Count = 5
    """Stop after so many steps in a row that were skipped because the loss or a gradient was not finite."""
    parallel: Literal["data", "tensor"] = "data"
    """What several processes (--launch, mlx.launch) share: each batch's rows, or the base's weights."""
    distributed_timeout: Positive = 600.0
    """Seconds that a process waits for the others before it stops."""
    seed: Seed = 0
    """Seed of the adapters' start, dropout and the order of rows."""
    overwrite: bool = False
    """Replace the run that adapter_path holds."""
    sample_rows: Annotated[int, Field(ge=0)] = 3
    """Validation rows to answer at every validation, for history.jsonl and report.html; 0 for none."""
    prompts: Names = ()
    """Prompts to answer there too, each encoded as a training row's prompt is."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers to log to by their own libraries, the extras of the same names."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)


@dataclass(frozen=True)
class SweepConfig:
    """A search for the best rates for a model and its data: many short runs, then a few full ones.

    learning_rate, lr_ratio, rank and alpha are the baseline to beat. All other settings apply to
    every run.
    """

    model: UserPath = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath = "sweep"
    """Folder of the sweep: trials.jsonl, sweep.yaml, heatmap.png, and best.yaml to train with."""
    learning_rates: tuple[Positive, ...] = ()
    """Peak rates eta to try. Default: 0.25, 1, 4 and 16 times learning_rate."""
    lr_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 4.0, 16.0)
    """Values of lambda to try; 1 is plain LoRA."""
    ranks: tuple[Count, ...] = ()
    """Ranks to try. Default: rank only."""
    alphas: tuple[Positive, ...] = ()
    """Values of alpha to try. Default: alpha only."""
    iters: Count = 60
    """Optimizer steps of a full run; each earlier round's runs are a third as long."""
    rounds: Count = 3
    """Rounds. Each keeps the best third of its trials for the next; the last are full runs."""
    seeds: Count = 3
    """Seeds for each trial of the last round and for the baseline; their spread is the noise."""
    valid_rows: Count = 100
    """Maximum validation examples to score a trial on; --seed chooses them."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one step, weighted by their supervised tokens."""
    max_minutes: Positive | None = None
    """Stop after this many minutes, as if by Ctrl-C; --resume continues."""
    seed: int = 0
    """Seed of initialization, dropout and data order; the last round also uses the next seeds."""
    resume: bool = False
    """Continue the sweep in adapter_path; trials that have ended are not repeated."""
    overwrite: bool = False
    """Replace the sweep in adapter_path."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)


@dataclass(frozen=True)
class ChatConfig:
    """A talk with a base and its adapter, side by side."""

    model: UserPath = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath | None = None
    """Folder of an adapter to attach; none for the model as it is."""
    max_tokens: Count = 256
    """Most tokens to generate."""
    temperature: NotNegative = 0.0
    """0 takes the likeliest token each time; higher samples more freely."""
    seed: Seed = 0
    """Seed of the sampling."""


@dataclass(frozen=True)
class GenerateConfig(ChatConfig):
    """One answer from a model, with or without an adapter."""

    prompt: str = "The capital of France is"
    """What to answer; - reads it from standard input."""
    chat: bool = True
    """Wrap the prompt in the model's chat template if it has one, as training does; --no-chat never."""


@dataclass(frozen=True)
class FuseConfig:
    """An adapter folded into its base: a folder that stock mlx_lm loads."""

    model: UserPath = "gemma-3"
    """The base that the adapter was trained on: a name, hub id, folder or .gguf file."""
    adapter_path: UserPaths = ("adapters",)
    """Folder of the adapter; several are added up, each with a weight if it is not 1, as in a:0.7 b:0.3."""
    save_path: UserPath = "fused_model"
    """Folder to write."""
    bits: Literal["auto", 2, 3, 4, 5, 6, 8] = "auto"
    """Bits of the fused weights; auto: the base's, but where the change would be lost the next that keep it, or all."""
    dequantize: bool = False
    """Write a quantized base's weights in full precision."""
    keep_vision: bool = False
    """Put a multimodal model's other parts, such as its vision tower, beside the fused text weights, untouched."""
    data: UserPaths = ()
    """What to compare the answers on, as in training; without it, the rows that the adapter's run.yaml names."""
    sample_tokens: Annotated[int, Field(ge=0)] = 2048
    """Supervised tokens of the training rows to compare the answers on; 0 for none."""
    overwrite: bool = False
    """Replace what save_path holds."""


@dataclass(frozen=True)
class ExportConfig:
    """An adapter for other programs (--to), or one of another program for this one (--from)."""

    to: Written | None = None
    """What to write: for PEFT, transformers and vLLM; for llama.cpp, Ollama and LM Studio; or all of it, on the hub."""
    from_: Annotated[Read | None, arg(name="from")] = None
    """What adapter_path is instead: a folder that PEFT saved, or a LoRA's GGUF file; save_path becomes an adapter."""
    model: UserPath = "gemma-3"
    """The base that the adapter was trained on: a name, hub id, folder or .gguf file."""
    adapter_path: UserPath = "adapters"
    """Folder of the adapter."""
    save_path: UserPath = "exported"
    """Folder to write."""
    merged: Merged | None = None
    """With --to gguf: write base and adapter as one model of this type, not the adapter alone."""
    repo_id: str = ""
    """With --to hub: the repository, owner/name; if it is not there, it is made, private."""
    overwrite: bool = False
    """Replace what save_path holds."""


@dataclass(frozen=True)
class CompareConfig:
    """Runs side by side: how they differ, and what came of it."""

    runs: Annotated[tuple[UserPath, ...], Positional] = ()
    """The runs' folders."""
    save_path: UserPath | None = None
    """Write the curves too: a page (.html) or a picture (.png, .svg)."""
    overwrite: bool = False
    """Replace what save_path holds."""
