"""Check that an adapter in PEFT's format can be read here, and fits its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pydantic

from ..adapters.base_layers import EMBEDDINGS
from ..adapters.stored_files import WEIGHTS as OWN_WEIGHTS
from ..adapters.stored_files import read_adapter_config
from ..errors import AdapterError, counted
from .peft_import_tensors import PEFTConfig, StoredAdapter

CONFIG = "adapter_config.json"

_READS = "; --from peft reads LoRA adapters that PEFT has saved"

# The types of adapters that PEFT can merge into the base. Others, such as learned prompts, do not
# change its weights.
_MERGEABLE = (
    "ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING",
    "LOHA", "LOKR", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
# Initializations that also change the weights of the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that, unless they are off, change an adapter's outputs in a way that can't be read here.
_UNREADABLE = (
    "bias", "fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "megatron_config", "monteclora_config", "kasa_config",
    "arrow_config", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
# Settings without an effect on an adapter that is stored, or whose effect the tensors show.
_NEUTRAL = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "enable_lora", "ensure_weight_tying",
    "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
_NOT_MERGEABLE = ("lora_bias", "megatron_config", "arrow_config", "alora_invocation_tokens")
_ROUNDING = 0.01  # of the largest weight, for a base that is stored in another type
_MERGE = "merge it in PEFT (merge_and_unload), and give the saved model as --model"


class _PEFTType(pydantic.BaseModel, extra="allow"):
    """The adapter type in an ``adapter_config.json``, and its other settings unchecked."""

    peft_type: str


def read_peft_config(folder: Path) -> PEFTConfig:
    """Return the config of a LoRA or DoRA.

    Raises:
        AdapterError: The adapter is of another type, or its initialization changed the base.
    """
    # Refuse other formats and types.
    if (folder / OWN_WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} is an adapter of this package, not of PEFT: every command takes it as it is"
        )
    stored = read_adapter_config(folder / CONFIG, _PEFTType, _READS)
    kind = stored.peft_type
    if kind != "LORA":
        advice = ""
        if kind in _MERGEABLE:
            advice = f"; {_MERGE}"
        raise AdapterError(
            f"{folder} is of PEFT's type {kind!r:.40}, and only LORA can be read{advice}"
        )

    # Refuse an adapter that can't be read, or whose base was changed.
    _check_settings(folder, stored.model_extra or {})
    config = read_adapter_config(folder / CONFIG, PEFTConfig, _READS)
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{folder} was initialized with {init[:20]!r}, which changed its base, so it does not"
            " fit the original one: save it in PEFT with path_initial_model_for_weight_conversion,"
            " or merge it there"
        )
    return config


def check_peft_base(
    found: StoredAdapter, modules: Mapping[str, nn.Module], prefix: str, folder: Path
) -> None:
    """Check that an adapter fits the weights of the model, and has no DoRA on an embedding.

    Args:
        found: The adapter's contents.
        modules: Path → module of the model.
        prefix: The prefix of a module's name in the model.
        folder: The adapter's folder, for messages.

    Raises:
        AdapterError: It has a DoRA of an embedding, or was trained over other weights.
    """
    for name, arrays in found.layers.items():
        if "m" in arrays and isinstance(modules.get(prefix + name), EMBEDDINGS):
            raise AdapterError(
                f"{folder} has a DoRA of the embedding {name}, with one magnitude per column, but"
                f" adapters here have one per token: {_MERGE}"
            )

    # PEFT stores a copy of embeddings and heads below an adapter, which training may have changed.
    for (name, leaf), copy in found.copies.items():
        module = modules.get(prefix + name)
        base = getattr(module, leaf, None)
        is_lost = base is None and module is not None and leaf != "weight"
        if not is_lost and (base is None or base.shape != copy.shape):
            continue  # it is quantized, tied, or refused later
        difference = mx.abs(copy - (0.0 if base is None else base)).max()
        if (difference > _ROUNDING * mx.abs(copy).max()).item():
            raise AdapterError(
                f"{folder} was trained with another {name} than this model's, and holds a copy"
                f" of it: {_MERGE}"
            )


def find_unknown_settings(path: Path) -> str | None:
    """Return a note on settings of an adapter that are on and not known here, or None.

    Args:
        path: The adapter's folder, or the file of its weights.
    """
    folder = path.parent if path.is_file() else path
    stored = read_adapter_config(folder / CONFIG, _PEFTType, _READS).model_extra or {}
    known = {*PEFTConfig.model_fields, *_NEUTRAL}
    unknown = {name: value for name, value in stored.items() if name not in known and value}
    if not unknown:
        return None
    shown = ", ".join(f"{name[:40]} {value!r:.40}" for name, value in list(unknown.items())[:3])
    verb = "is" if len(unknown) == 1 else "are"
    return (
        f"note: {folder / CONFIG} has {counted(len(unknown), 'setting')} that {verb} not known here"
        f" ({shown}); if the adapter's outputs depend on it, {_MERGE}"
    )


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` if a setting of a LoRA changes its outputs in a way not known here."""
    # PEFT's names of variants of LoRA start with use_.
    fields = PEFTConfig.model_fields
    variants = [name for name in settings if name.startswith("use_") and name not in fields]
    for name in (*_UNREADABLE, *variants):
        value = settings.get(name)
        if not value or value == "none":
            continue
        advice = "" if name in _NOT_MERGEABLE else f": {_MERGE}"
        raise AdapterError(
            f"{folder} is a LoRA with {name} {value!r:.40}, which can't be read here{advice}"
        )
