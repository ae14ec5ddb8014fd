"""The keywords of the public functions with their types, so that editors complete and check them.

``scripts/options.py`` generates this file from ``config.py`` and ``command_config.py``, which
explain each setting.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

StrPath = str | os.PathLike[str]

RowsOrNames = StrPath | Iterable[Any]
"""What the setting ``data`` accepts in Python: names of data sets, or rows."""


class SharedOptions(TypedDict, total=False):
    """Adapter, optimizer, objective and data."""

    adapter: Literal["lora", "dora", "vera", "full"]
    init: Literal["init1", "init2", "pissa", "loftq"]
    rank: int | None
    alpha: float
    rslora: bool
    dropout: float
    target_modules: Sequence[str]
    train_modules: Sequence[str]
    num_layers: int
    quantize: int | str | None
    quantize_group_size: Literal[32, 64, 128]
    loftq_iters: int
    svd: Literal["randomized", "exact"]
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"]
    learning_rate: float | Literal["auto"] | None
    lr_ratio: float | None
    magnitude_lr_ratio: float
    embedding_learning_rate: float
    weight_decay: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup: int | None
    max_grad_norm: float
    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"]
    beta: float | None
    label_smoothing: float
    simpo_gamma: float | None
    orpo_lambda: float | None
    kto_weights: Sequence[float]
    reference: Literal["base", "start"]
    data_weights: Sequence[float]
    fields: str | Sequence[str] | Mapping[str, str]
    valid_split: float | None
    on_bad: Literal["error", "drop"]
    on_long: Literal["truncate", "drop", "split", "error"]
    train_on: Literal["turns", "last", "everything"]
    batch_size: int | Literal["auto"]
    max_seq_length: int | Literal["auto"]
    pack: bool


class RunOptions(SharedOptions, total=False):
    """What the keywords of runs share."""

    adapter_path: StrPath
    resume_adapter_file: StrPath | None
    resume: bool
    iters: int | None
    epochs: float | None
    grad_accumulation_steps: int
    grad_checkpoint: bool | Literal["auto", "on", "off"]
    compile: bool | Literal["auto", "on", "off"]
    selfcheck: bool | Literal["auto", "on", "off"]
    steps_per_report: int | None
    steps_per_eval: int | None
    steps_per_save: int
    keep_checkpoints: int
    on_save_error: Literal["continue", "stop"]
    patience: int | None
    max_minutes: float | None
    max_skipped_steps: int
    parallel: Literal["data", "tensor"]
    distributed_timeout: float
    seed: int
    overwrite: bool
    sample_rows: int
    prompts: str | Sequence[str] | Mapping[str, str]
    report_to: Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]


class TrainOptions(RunOptions, total=False):
    """Keywords of ``finetune``."""

    model: StrPath
    data: RowsOrNames


class EvaluateOptions(TypedDict, total=False):
    """Keywords of ``evaluate``."""

    model: StrPath
    data: RowsOrNames
    fields: str | Sequence[str] | Mapping[str, str]
    valid_split: float | None
    on_bad: Literal["error", "drop"]
    on_long: Literal["truncate", "drop", "split", "error"]
    train_on: Literal["turns", "last", "everything"]
    batch_size: int | Literal["auto"]
    max_seq_length: int | Literal["auto"]
    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"]
    seed: int


class PreviewOptions(RunOptions, total=False):
    """Keywords of ``preview``."""

    model: StrPath


class PlanOptions(RunOptions, total=False):
    """Keywords of ``plan_memory``."""

    data: RowsOrNames


class SweepOptions(SharedOptions, total=False):
    """Keywords of ``sweep_rates``."""

    model: StrPath
    adapter_path: StrPath
    resume_adapter_file: StrPath | None
    learning_rates: Sequence[float]
    lr_ratios: Sequence[float]
    ranks: Sequence[int]
    alphas: Sequence[float]
    iters: int
    rounds: int
    seeds: int
    valid_rows: int
    grad_accumulation_steps: int
    max_minutes: float | None
    seed: int
    resume: bool
    overwrite: bool
    data: RowsOrNames
