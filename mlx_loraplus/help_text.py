"""The text of ``--help`` and ``--help-all``, written from the configs.

``--help`` shows the settings that most people change, and ``--help-all`` shows all of them, under
plain titles. docs/settings.md has the same groups.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .command_config import SHORT_FLAGS, SweepConfig, positional_words
from .config import TrainConfig
from .settings import Config, configure, settings_of
from .spelling import flag_of

_IN_SWEEPS = {
    "adapter": " Not full in a sweep, which searches rates for A and B.",
    "learning_rate": " Not auto in a sweep, where it is the baseline.",
}
"""Settings of training that accept fewer values in a sweep → what their help adds there."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "model": (
        "family", "model", "adapter_path", "resume_adapter_file", "resume", "overwrite",
        "list_models",
    ),
    "data": (
        "data", "data_weights", "fields", "system", "valid_split", "on_bad", "on_long", "train_on",
        "max_seq_length", "batch_size", "pack", "dry_run",
    ),
    "adapter": (
        "adapter", "rank", "alpha", "rslora", "dropout", "target_modules", "num_layers",
        "train_modules", "init", "quantize", "quantize_group_size", "loftq_iters", "svd",
    ),
    "objective": (
        "objective", "beta", "label_smoothing", "simpo_gamma", "orpo_lambda", "kto_weights",
        "reference",
    ),
    "search": (
        "learning_rates", "lr_ratios", "ranks", "alphas", "rounds", "seeds", "valid_rows",
    ),
    "optimizer": (
        "optimizer", "learning_rate", "lr_ratio", "magnitude_lr_ratio", "embedding_learning_rate",
        "weight_decay", "max_grad_norm", "max_skipped_steps",
    ),
    "schedule and length": (
        "iters", "epochs", "schedule", "warmup", "grad_accumulation_steps", "patience",
        "max_minutes", "seed",
    ),
    "memory": ("grad_checkpoint", "compile", "selfcheck", "memory"),
    "output": (
        "steps_per_report", "steps_per_eval", "steps_per_save", "keep_checkpoints",
        "on_save_error", "sample_rows", "prompts", "report_to", "test", "log_format", "verbosity",
        "open", "config", "print_config",
    ),
    "several machines": ("launch", "parallel", "distributed_timeout"),
}  # fmt: skip
"""Title → the settings and options of train, sweep and plan below it."""

COMMON = (
    "family", "model", "adapter_path", "resume", "overwrite", "data", "fields", "max_seq_length",
    "batch_size", "objective", "dry_run", "adapter", "rank", "alpha", "target_modules",
    "learning_rate", "lr_ratio", "iters", "epochs", "grad_checkpoint", "test", "config", "memory",
    "learning_rates", "lr_ratios", "seeds",
)  # fmt: skip
"""The settings and options of ``--help``; commands with few settings show all of them."""

_WIDTH, _INDENT = 80, 22

_Options = Mapping[str, tuple[str, Any, str]]
"""Name → its flag, its default and its help."""


def help_text(kind: type[Config], switches: type, command: str, *, everything: bool) -> str:
    """Return the help of a command.

    Args:
        kind: The config of the command.
        switches: The command's options that are not settings.
        command: The command as it is typed.
        everything: Show all settings, for ``--help-all``.
    """
    options = _options_of(kind, switches)
    purpose = getattr(switches, "purpose", "") or " ".join(str(inspect.getdoc(kind)).split())
    words = positional_words(kind, switches)
    usage = " ".join([f"usage: {command}", *words.values(), "[--setting value ...]"])
    lines = [usage, "", *textwrap.wrap(purpose, _WIDTH)]

    # Commands with few settings show all of them in one list, words without a flag first.
    has_groups = kind in (TrainConfig, SweepConfig)
    groups = GROUPS if has_groups else {"settings": tuple(dict.fromkeys((*words, *options)))}
    only_common = has_groups and not everything
    for title, names in groups.items():
        shown = [name for name in names if name in options]
        if only_common:
            shown = [name for name in shown if name in COMMON]
        if not shown:
            continue
        lines += ["", f"{title}:"] if everything else [f"{title}:"]
        for name in shown:
            lines += _entry(*options[name])

    if only_common:
        lines.append(f"All {len(options)} settings: {command} --help-all")
    return "\n".join(lines)


def _options_of(kind: type[Config], switches: type) -> _Options:
    """Return the settings and options of a command by name."""
    options: dict[str, tuple[str, Any, str]] = {}
    parts: list[Any] = [field.default_factory for field in dataclasses.fields(kind)]
    texts: dict[str, str] = {}
    types: dict[str, Any] = {}
    for part in (kind, switches, *parts):
        if not dataclasses.is_dataclass(part):
            continue
        texts |= field_helps(part)
        types |= typing.get_type_hints(part)

    defaults = settings_of(configure(kind, {}, whole=False)) | settings_of(switches())
    for name, default in defaults.items():
        text = texts[name]
        values = _literal_values(types[name])
        if not all(value in text for value in values):
            text += f" One of {', '.join(values)}."
        if kind is SweepConfig:
            text += _IN_SWEEPS.get(name, "")
        if default is True:
            text += f" Default: on; --no-{name.replace('_', '-')} turns it off."
        short = f"{SHORT_FLAGS[name]}, " if name in SHORT_FLAGS else ""
        options[name] = (short + flag_of(name), default, text)
    return options | {
        name: (name.upper(), *options[name][1:]) for name in positional_words(kind, switches)
    }


def field_helps(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, read from its source.

    Dataclasses do not keep these strings. Those of base classes are included.
    """
    helps: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                helps[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return helps


def _literal_values(annotation: Any) -> list[str]:
    """Return the words that a setting accepts, or an empty list if it accepts others too."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return []


def _entry(flag: str, default: Any, text: str) -> list[str]:
    """Return the lines about a setting: its flag, its help and its default."""
    shown = _default(default)
    if shown and "Default:" not in text:
        text = f"{text} [{shown}]"
    body = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False)

    indent = " " * _INDENT
    if len(flag) + 3 > _INDENT:
        return [f"  {flag}", *(indent + line for line in body)]
    first, *rest = body
    return [f"  {flag}".ljust(_INDENT) + first, *(indent + line for line in rest)]


def _default(value: Any) -> str:
    """Return a default as it is typed, or "" if it is None or off."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return ""
    return f"{value:g}" if isinstance(value, float) else f"{value}"
