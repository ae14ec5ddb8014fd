"""Every setting of a training run: its name, meaning, unit, allowed values and default, once.

The command line, YAML files, ``--print-config``, the settings tables and the keyword arguments of
``finetune`` are all generated from these dataclasses. The string below a field is its help text.
Precedence: flag > YAML > default. The settings of other commands are in ``command_config.py``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from .call_checks import names_checked
from .setting_types import (
    AdapterKind,
    Alpha,
    Columns,
    Count,
    Length,
    NotNegative,
    NumLayers,
    Positive,
    Prompts,
    Quantize,
    Rate,
    Rows,
    Seed,
    Switch,
    Trackers,
    UserPath,
    UserPaths,
    Warmup,
    Words,
)

LR_RATIO = 4.0


@dataclass(frozen=True)
class KindFacts:
    """Defaults and limits of one kind of adapter; its layers are in ``adapters/<kind>.py``."""

    rank: int | None = 8  # the default rank; None: there is no rank
    lr_ratio: float = LR_RATIO  # the default lr_ratio
    rate: float | None = None  # the default learning_rate at lr_ratio 1; None: that of ``init``
    own: tuple[str, ...] = ()  # settings that only this kind accepts
    refused: Mapping[tuple[str, ...], str] = field(default_factory=dict[tuple[str, ...], str])
    """Settings that this kind refuses → the message, with flags; {names} stands for those that are
    given, and a setting's own name, such as {init}, for its value."""


KINDS: Mapping[str, KindFacts] = {
    "lora": KindFacts(),
    "dora": KindFacts(own=("magnitude_lr_ratio",)),
    "vera": KindFacts(
        rank=256,
        rate=4e-3,  # VeRA trains two vectors, which need a higher rate than matrices
        refused={
            ("init",): (
                "--adapter vera has no --init {init}: its A and B stay random; use --adapter lora"
                " or dora"
            ),
            ("alpha", "rslora"): "--adapter vera has no scale: leave {names} out",
        },
    ),
    "full": KindFacts(
        rank=None,
        lr_ratio=1.0,
        rate=1e-5,  # the usual rate of full fine-tuning, and mlx-lm's default
        refused={
            (
                "init",
                "rank",
                "alpha",
                "rslora",
                "dropout",
                "target_modules",
                "train_modules",
                "quantize",
                "quantize_group_size",
                "loftq_iters",
                "svd",
            ): (
                "--adapter full trains the weights themselves and has no {names}: leave {names} out"
                " (--num-layers N trains the last N blocks only)"
            ),
            ("resume_adapter_file",): (
                "--adapter full starts from a model, not from an adapter: give as --model the"
                " folder that mlx_loraplus.fuse {resume_adapter_file} writes"
            ),
        },
    ),
}

# Default rates. In scripts/study/evidence the best eta fell as lambda rose: from 5e-3 at lambda 1
# to 1e-3 at 16 on one model, and from 1e-3 to 1e-4 on the other. The default is c / sqrt(lambda),
# with the c given here. It is close to the best rate of the second model, which needed lower rates
# with Init[2] at every lambda. A low rate is safer: doubling the best rate costs far more than
# halving it. PiSSA needs the lowest rate.
RATES = {"init1": 1e-3, "init2": 4e-4, "loftq": 1e-3, "pissa": 4e-5}

# Default rates of the objectives for preferences, as multiples of the rate of sft. In
# scripts/study/preferences, dpo learned its preference at 0.05 and 0.2, with lambda 1 and 16 alike;
# published runs on larger models and harder data use 0.005 to 0.05. Most of orpo's loss is that of
# sft, and it learned the content far better at 2 than at 0.5.
OBJECTIVE_RATE_FACTORS = {"dpo": 0.05, "ipo": 0.05, "orpo": 1.0, "simpo": 0.05, "kto": 0.05}
DIVERGED, DIVERGED_INIT2 = 0.018, 0.002
"""Smallest s * lambda * eta (Init[2]: s * eta) that diverged in scripts/study/evidence (Adam)."""

OLD_NAMES = {
    "answer_rows": "sample_rows",
    "max_skipped_updates": "max_skipped_steps",
    "peer_timeout": "distributed_timeout",
    "whole": "merged",
}
"""Names of settings in 0.1.0, which are still accepted → their present names."""

_MX_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits, weights per scale


@names_checked
@dataclass(frozen=True)
class AdapterConfig:
    """What is trained: y = W x + s B A x on every targeted module, or a variant of it."""

    adapter: AdapterKind = "lora"
    """lora: A and B; dora: also the lengths of W's rows; vera: two vectors around random, frozen A
    and B; full: no adapter, but all weights."""
    init: Literal["init1", "init2", "pissa", "loftq"] = "init1"
    """init1: A random, B = 0; init2: A = 0, B random; pissa: the best approximation of W; loftq:
    the best approximation of what quantizing W loses."""
    rank: Count | None = None
    """Rank r of A and B. Default: 8, or 256 for vera."""
    alpha: Alpha = 16.0
    """Scale numerator: the adapter's output is multiplied by s = alpha / rank. vera has no
    scale."""
    rslora: bool = False
    """Use s = alpha / sqrt(rank), so that large ranks learn as fast as small ones."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the adapter's inputs set to zero during training, in [0, 1)."""
    target_modules: Annotated[Words, Field(min_length=1)] = ("all-linear",)
    """Modules that get an adapter: name suffixes (q_proj), full paths, or all-linear (the linear
    layers of all blocks)."""
    train_modules: Words = ()
    """Modules to train in full, at embedding_learning_rate: name suffixes (embed_tokens), full
    paths, or norms."""
    num_layers: NumLayers = -1
    """Adapt the last N blocks; -1 for all. With adapter full, -1 also trains what is outside the
    blocks: embeddings, last norm and head."""
    quantize: Quantize = None
    """Bits or mode in which init loftq (default: 4) or pissa (default: off) quantizes the targeted
    modules' weights."""
    quantize_group_size: Literal[32, 64, 128] = 64
    """Weights per scale if quantize is a number of bits; the mx and nv modes have fixed sizes."""
    loftq_iters: Count = 5
    """Number of times that loftq alternates between quantizing and approximating."""
    svd: Literal["randomized", "exact"] = "randomized"
    """How pissa and loftq approximate. randomized takes seconds; exact takes minutes on large
    models and is slightly more accurate."""

    @property
    def scale(self) -> float:
        """The scale s: alpha / rank, or alpha / sqrt(rank); mlx-lm stores it as ``scale``."""
        rank = self.rank or KINDS[self.adapter].rank or 1
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How ``init`` quantizes the base, in the form of config.json; None if it does not."""
        mode = self.quantize
        if mode is None and self.init == "loftq":
            mode = "4"
        if mode is None:
            return None

        if mode in _MX_MODES:
            bits, group_size = _MX_MODES[mode]
            return {"mode": mode, "bits": bits, "group_size": group_size}
        return {"mode": "affine", "bits": int(mode), "group_size": self.quantize_group_size}


@names_checked
@dataclass(frozen=True)
class OptimizerConfig:
    """How it learns: A at the rate eta and B at lambda * eta, both on one schedule."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """Optimization algorithm."""
    learning_rate: Rate | None = None
    """Peak learning rate eta of the A matrices, or of the weights with adapter full; auto: searched
    before the first step, at the cost of 30 steps. Default: by adapter, init and objective (init1
    with sft: 1e-3 / sqrt(lr_ratio))."""
    lr_ratio: Positive | None = None
    """LoRA+'s lambda: B learns at lr_ratio times A's rate; 1 is plain LoRA. Default: 4, or 1 for
    full, which has no B."""
    magnitude_lr_ratio: Positive = 1.0
    """DoRA's magnitudes learn at this many times A's rate. PEFT uses B's rate for them: give
    lr_ratio's value for that."""
    embedding_learning_rate: Positive = 1e-6
    """Peak rate of adapters on embeddings, of train_modules, and of embeddings and head with
    adapter full; not multiplied by lr_ratio."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay: every step multiplies A and B alike, or with adapter full the
    matrices of the blocks, by (1 - eta * weight_decay)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the rates after the warm-up; cosine and linear end at zero."""
    warmup: Warmup | None = None
    """Steps over which the rates rise from zero. Default: 10, at most a tenth of the run."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradients' global norm to this; 0 disables clipping."""


@names_checked
@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimized: the loss of the answers, or one that compares good and bad answers."""

    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"] = "sft"
    """sft: learn the answers; dpo, ipo, orpo, simpo: prefer one of two answers; kto: learn from
    labels."""
    beta: Positive | None = None
    """Weight of the log-probabilities in the loss. Default: 0.1 for dpo, ipo and kto, 2 for
    simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Fraction of dpo's pairs whose answers are assumed to be swapped, in [0, 0.5)."""
    simpo_gamma: NotNegative | None = None
    """Margin of simpo between the rewards of the two answers. Default: 1."""
    orpo_lambda: Positive | None = None
    """Weight of orpo's comparison beside the loss of the chosen answer. Default: 0.1."""
    kto_weights: tuple[Positive, Positive] = (1.0, 1.0)
    """Weights of kto's losses of desirable and of undesirable answers."""
    reference: Literal["base", "start"] = "base"
    """What dpo, ipo and kto compare with: the model without adapters (base), or with the adapters
    that training starts from (start)."""

    @property
    def is_paired(self) -> bool:
        """Whether a row holds two answers."""
        return self.objective in ("dpo", "ipo", "orpo", "simpo")

    @property
    def is_labeled(self) -> bool:
        """Whether a row holds an answer and its label."""
        return self.objective == "kto"

    @property
    def has_preferences(self) -> bool:
        """Whether rows say which answers are preferred; the loss is then a mean over examples."""
        return self.is_paired or self.is_labeled

    @property
    def unit(self) -> str:
        """The word for one example."""
        return "pair" if self.is_paired else "example"

    @property
    def rows_per_example(self) -> int:
        """The number of rows that an example takes in a batch."""
        return 2 if self.is_paired else 1

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return self.objective in ("dpo", "ipo", "kto")


@names_checked
@dataclass(frozen=True)
class DataConfig:
    """What it learns from, and how examples are batched."""

    data: UserPaths = ()
    """Folders with train (valid, test) files, single files (jsonl, json, csv, tsv, parquet, txt) or
    hub ids. Default: a small demo set."""
    data_weights: tuple[Annotated[Positive, Field(le=1000)], ...] = ()
    """One weight for each of several data sets: how often an epoch includes its rows, at most 1000
    times; 0.5 includes half of them."""
    fields: Columns = ()
    """Column mapping, e.g. prompt=query completion=reply, or templates, e.g.
    'prompt={subject}\\n{body}'; rows without these columns are auto-detected."""
    valid_split: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the training rows to validate on; --seed chooses them. Default: 0.1 if there is
    no valid file; 0 trains on all rows."""
    on_bad: Literal["error", "drop"] = "error"
    """Rows that can't be used: report them and stop (error), or drop and count them (drop)."""
    on_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """Examples longer than max_seq_length: cut and count them (truncate), leave out and count them
    (drop), learn them in parts (split), or stop (error)."""
    train_on: Literal["turns", "last", "everything"] = "turns"
    """What is learned: every assistant turn or completion (turns), the last turn of a chat (last),
    or every token (everything)."""
    batch_size: Rows = 8
    """Examples (or pairs of answers) per batch; auto: as many as fit in memory, at most 16."""
    max_seq_length: Length = 2048
    """Length of the longest example, in tokens (see --on-long); auto: the longest that fits in
    memory."""
    pack: bool = False
    """Pack short examples into batch_size rows of one length, at most max_seq_length; each example
    attends only to itself."""


@names_checked
@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: UserPath = "gemma-3"
    """A name from --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath = "adapters"
    """Folder of the run: adapter, checkpoints, settings, history and report."""
    resume_adapter_file: UserPath | None = None
    """Start from the weights of the adapter in this folder, with a new optimizer. Without --model,
    on the model that the adapter names."""
    resume: bool = False
    """Resume the run in adapter_path from its newest complete checkpoint, as if it had never
    stopped."""
    iters: Count | None = None
    """Optimizer steps. Default: as many as --epochs takes."""
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Passes over the training examples, instead of --iters. Default: 1 if neither is given."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one step, weighted by their supervised tokens, or by their pairs
    or labeled answers."""
    grad_checkpoint: Switch = "auto"
    """Store only each block's input and recompute the rest: less memory, more time; auto: only if
    needed."""
    compile: Switch = "auto"
    """Compile the step; auto: if MLX has a GPU."""
    selfcheck: Switch = "auto"
    """Check loss and gradients on this machine and find the fastest step; auto: once per GPU, model
    and versions."""
    steps_per_report: Count | None = None
    """Steps between reports; the first step is reported too. Default: 10; 1 below 50 steps."""
    steps_per_eval: Count | None = None
    """Steps between validations; there is also one before the first step and one after the last.
    Default: a fifth of the run, at most 200."""
    steps_per_save: Count = 100
    """Steps between checkpoints; there is also one at each best validation and one at the end."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, besides the best adapters."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """If a checkpoint can't be written, e.g. on a full disk: keep training with the older one
    (continue), or stop."""
    patience: Count | None = None
    """Stop after this many validations in a row without a new best loss."""
    max_minutes: Positive | None = None
    """Stop after this many minutes, as if by Ctrl-C; --resume continues."""
    max_skipped_steps: Count = 5
    """Stop after this many skipped steps in a row. A step is skipped if the loss or a gradient is
    not finite. A run that skips more than half of its steps fails."""
    parallel: Literal["data", "tensor"] = "data"
    """What several processes (--launch, mlx.launch) divide: each batch's examples (data), or the
    base's weights (tensor)."""
    distributed_timeout: Positive = 600.0
    """Seconds that a process waits for the others before it stops."""
    seed: Seed = 0
    """Seed of initialization, dropout and data order."""
    overwrite: bool = False
    """Replace the run in adapter_path."""
    sample_rows: Annotated[int, Field(ge=0)] = 3
    """Validation examples to answer at every validation, for history.jsonl and report.html; 0 for
    none."""
    prompts: Prompts = ()
    """More prompts to answer at every validation, encoded like the prompts of training rows."""
    report_to: Trackers = ()
    """Experiment trackers to log to; pip install 'mlx_loraplus[NAME]' adds a tracker's library."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    objective: OmitArgPrefixes[ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
