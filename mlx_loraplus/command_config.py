"""The settings of all commands except training; those that they share with it are in ``config.py``.

As there, the string below a field is its help text, and each setting is written once.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from pydantic import Field
from tyro.conf import OmitArgPrefixes, Positional, arg

from .config import AdapterConfig, DataConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from .setting_types import (
    Count,
    Merged,
    NotNegative,
    Positive,
    Prompt,
    Read,
    Seed,
    UserPath,
    UserPaths,
    Written,
)

SHORT_FLAGS = {"config": "-c", "max_tokens": "-m", "prompt": "-p"}
"""Settings and options → the short forms of their flags, which mlx-lm has too."""


@dataclass(frozen=True)
class SweepConfig:
    """A search for the best rates for a model and its data: many short runs, then a few full ones.

    learning_rate, lr_ratio, rank and alpha are the baseline to beat. All other settings apply to
    every run.
    """

    model: UserPath = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf
    file."""
    adapter_path: UserPath = "sweep"
    """Folder of the sweep: its page sweep.html, and best.yaml to train with, among others."""
    resume_adapter_file: UserPath | None = None
    """Start every run from the weights of the adapter in this folder, with a new optimizer."""
    learning_rates: tuple[Positive, ...] = ()
    """Peak rates eta to try. Default: 0.25, 1, 4 and 16 times learning_rate."""
    lr_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 4.0, 16.0)
    """Values of lambda to try; 1 is plain LoRA."""
    ranks: tuple[Count, ...] = ()
    """Ranks to try. Default: rank only."""
    alphas: tuple[Positive, ...] = ()
    """Values of alpha to try. Default: alpha only."""
    iters: Count = 60
    """Optimizer steps of a full run; runs are a third as long in each earlier round."""
    rounds: Count = 3
    """Number of rounds. Each keeps the best third of its trials; the last one makes full runs."""
    seeds: Count = 3
    """Seeds for each trial of the last round and for the baseline; their spread is the noise."""
    valid_rows: Count = 100
    """Maximum number of validation examples to score a trial on; --seed chooses them."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one step, weighted by their supervised tokens, or by their pairs
    or labeled answers."""
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
    objective: OmitArgPrefixes[ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)


@dataclass(frozen=True)
class ChatConfig:
    """A chat with a model, with and without its adapter."""

    model: UserPath | None = None
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf
    file. Default: the model that the adapter names; gemma-3 without an adapter."""
    adapter_path: UserPath | None = None
    """Folder of a run or an adapter to attach. Default: none, the base model alone."""
    max_tokens: Annotated[Count, arg(aliases=[SHORT_FLAGS["max_tokens"]])] = 256
    """Maximum number of tokens to generate."""
    temperature: NotNegative = 0.0
    """Sampling temperature; 0 takes the most likely token each time."""
    system: Prompt | None = None
    """System prompt. Default: that of the training rows if most share one; '' for none."""
    seed: Seed = 0
    """Sampling seed."""


@dataclass(frozen=True)
class GenerateConfig(ChatConfig):
    """One answer from a model, with or without an adapter."""

    prompt: Annotated[Prompt, arg(aliases=[SHORT_FLAGS["prompt"]])] = "The capital of France is"
    """Prompt to answer; - reads it from standard input."""
    chat: bool = True
    """Wrap the prompt in the model's chat template if it has one, as training does."""
    tools: UserPath | None = None
    """JSON file with the list of tools that the model may call, as in the field tools of the
    training rows. The model's chat template renders them in the prompt."""


@dataclass(frozen=True)
class FuseConfig:
    """An adapter merged into its base: a folder that stock mlx_lm loads."""

    model: UserPath | None = None
    """Base of the adapter: a name, hub id, folder or .gguf file. Default: the one that it names."""
    adapter_path: UserPaths = ("adapters",)
    """Folder of the adapter. Several adapters are added up, each with an optional weight, as in
    a:0.7 b:0.3."""
    save_path: UserPath = "fused_model"
    """Folder to write."""
    bits: Literal["auto", 2, 3, 4, 5, 6, 8] = "auto"
    """Bits of the fused weights; auto: those of the base; a layer whose change rounding would lose
    gets the next larger number that keeps it, or full precision."""
    dequantize: bool = False
    """Write the weights of a quantized base in full precision."""
    keep_vision: bool = False
    """Copy the other parts of a multimodal model, such as its vision tower, unchanged."""
    data: UserPaths = ()
    """Data to compare answers on, given as in training. Default: the data in the adapter's
    run.yaml."""
    sample_tokens: Annotated[int, Field(ge=0)] | None = None
    """Supervised tokens of the training data to compare answers on; 0: no comparison. Default: 2048
    if weights are rounded or data is given, else 0."""
    overwrite: bool = False
    """Replace what save_path holds."""


@dataclass(frozen=True)
class ExportConfig:
    """An adapter converted for other programs (--to), or imported from one (--from)."""

    to: Written | None = None
    """peft: for PEFT, transformers and vLLM; gguf: for llama.cpp, Ollama and LM Studio; hub: all
    formats, uploaded to the model hub."""
    from_: Annotated[Read | None, arg(name="from")] = None
    """Import adapter_path, a folder saved by PEFT (peft) or a LoRA as a GGUF file (gguf), and write
    it to save_path as an adapter of this package."""
    model: UserPath | None = None
    """Base of the adapter: a name, hub id, folder or .gguf file. Default: the one that it names."""
    adapter_path: UserPath = "adapters"
    """Folder of the adapter."""
    save_path: UserPath = "exported"
    """Folder to write."""
    merged: Merged | None = None
    """With --to gguf: write base and adapter as one model of this type, not the adapter alone."""
    repo_id: str = ""
    """With --to hub: the repository, owner/name. A missing repository is created as private."""
    overwrite: bool = False
    """Replace what save_path holds."""


@dataclass(frozen=True)
class CompareConfig:
    """Runs side by side: how their settings and results differ."""

    runs: Annotated[tuple[UserPath, ...], Positional] = ()
    """Folders of the runs."""
    save_path: UserPath | None = None
    """Also write the curves, as a page (.html) or a picture (.png, .svg)."""
    overwrite: bool = False
    """Replace what save_path holds."""


@dataclass(frozen=True)
class ServeConfig:
    """The pages of all runs in a folder, live, for browsers."""

    folder: Annotated[UserPath, Positional] = "."
    """Folder that holds the runs, at any depth up to four."""
    host: str = "127.0.0.1"
    """Address to listen at. With an address that is not a loopback address (127.0.0.1), the pages
    can be reached from the network; they then need a token."""
    port: Annotated[int, Field(ge=0, lt=1 << 16)] = 8765
    """Port to listen at; 0: any free one."""
    token: str | None = None
    """Token that the address of a page must contain. Default: a new random one if host is
    not a loopback address, else none."""


@dataclass(frozen=True)
class DoctorConfig:
    """A check of this machine: versions, correct gradients, and the speed of a training step."""

    model: UserPath | None = None
    """Model to check with, named as in training. Default: gemma-3 if it is stored on this machine,
    else small random models."""
    save_path: UserPath | None = None
    """Also write the tables as a page (.html)."""
    overwrite: bool = False
    """Replace what save_path holds."""


CONFIGS: dict[str, type] = {
    "train": TrainConfig,
    "sweep": SweepConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "fuse": FuseConfig,
    "export": ExportConfig,
    "compare": CompareConfig,
    "serve": ServeConfig,
}
"""Commands → their settings, in the order in which they are searched for a name."""


def positional_words(*parts: type) -> dict[str, str]:
    """Return the settings and options that have no flag, and how a usage line shows them."""
    words: dict[str, str] = {}
    for part in parts:
        for name, hint in get_type_hints(part, include_extras=True).items():
            value, *marks = get_args(hint) or (hint,)
            if Positional in marks:
                is_several = get_origin(value) is tuple
                words[name] = f"[{name.upper()}{' ...' if is_several else ''}]"
    return words
