"""Adapters in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

transformers and vLLM load these files. A written adapter has one rank and one scale for all modules
(``lora_alpha`` = s r, ``use_rslora`` off) and no patterns, because vLLM and llama.cpp do not
support patterns. If a module has another scale, its B is multiplied by the ratio. Smaller ranks are
padded with zeros. VeRA is written as an equivalent LoRA, and PiSSA as a LoRA of twice the rank.
``peft_import_tensors.py`` describes the tensors.

Source: PEFT 0.21, ``utils/save_and_load.py`` and ``tuners/lora``.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.attach_saved import attach_saved
from ..adapters.base_layers import EMBEDDINGS, EXPERTS, LINEARS
from ..adapters.dora import DoRA
from ..adapters.lora import Adapter, base_of
from ..adapters.stored_files import StoredConfig, read_weights
from ..adapters.trainable import find_adapters, find_fully_trained
from ..adapters.unfreeze import own_arrays
from ..errors import AdapterError, join_problems
from ..files import replacing, write_atomically
from .peft_experts import (
    expert_problems,
    expert_projections,
    expert_settings,
    expert_tensors,
    find_experts,
    names_by_parameter,
    stacked_rank,
)
from .peft_import_checks import (
    CONFIG,
    check_peft_base,
    find_unknown_settings,
    read_peft_config,
)
from .peft_import_tensors import (
    MAGNITUDE,
    PREFIX,
    pad_to_one_rank,
    sort_tensors,
    split_stacked_experts,
    untie,
)
from .peft_selection import check_complete, find_unselected
from .transformers_names import (
    has_names,
    has_translated_targets,
    hub_path,
    is_stacked,
    missing_modules,
)
from .vllm_rules import vllm_refusals

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class _Layout:
    """The settings that all tensors of a written adapter share."""

    kind: str  # the model's type
    rank: int
    scale: float
    tied: bool  # whether the embeddings are also the head

    @property
    def alpha(self) -> float:
        """PEFT's ``lora_alpha``: s r."""
        alpha = self.scale * self.rank
        return round(alpha) if alpha == round(alpha) else alpha


def write_peft(model: nn.Module, base: str, folder: Path) -> list[str]:
    """Write the adapters of ``model`` into a folder in PEFT's format.

    Args:
        model: A model with adapters.
        base: The base's name in transformers: a hub id or a folder.
        folder: The folder to write into.

    Returns:
        The parts of the adapter that vLLM refuses or applies differently, although PEFT loads them.

    Raises:
        AdapterError: PEFT can't express the adapter.
        OutputError: The folder can't be written.
    """
    adapters = find_adapters(model)
    trained = find_fully_trained(model)
    kind = str(model.model_type)
    problems = _inexpressible(adapters, trained, kind)
    if problems:
        raise AdapterError(
            f"PEFT can't express this adapter: {join_problems(problems, most=3)}; fold it into the"
            " base instead: mlx_loraplus.fuse"
        )

    # All modules get one rank and one scale. PEFT's scale is positive, so B takes a minus sign.
    experts = find_experts(adapters)
    first = next(iter(adapters.values()))
    ranks = [adapter.lora_matrices()[0].shape[1] for adapter in adapters.values()]
    if experts and is_stacked(kind):
        ranks.append(stacked_rank(experts))
    layout = _Layout(kind, max(ranks), abs(first.scale) or 1.0, is_tied(model))

    # Collect the tensors. The targets are the layers that have tensors, except experts.
    tensors: dict[str, mx.array] = {}
    for path, adapter in adapters.items():
        if path not in experts:
            tensors |= _adapter_tensors(path, adapter, layout)
    targets = _targets(model, {name.rpartition(".lora_")[0] for name in tensors}, experts, layout)
    tensors |= expert_tensors(experts, kind, layout.rank, layout.scale)
    saved = _add_trained(tensors, trained, layout)

    # Write the files.
    config = _peft_config(base, adapters, layout, saved) | targets
    tensors = {PREFIX + name: mx.contiguous(array) for name, array in tensors.items()}
    with replacing(folder / WEIGHTS) as file:
        mx.save_safetensors(file, tensors)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return vllm_refusals(config, tensors, kind, _keys_as_values(model))


def _keys_as_values(model: nn.Module) -> list[str]:
    """Return the names of the k_proj whose outputs are also the values, as in Gemma 4 31B."""
    names: list[str] = []
    for path, module in model.named_modules():
        if getattr(module, "use_k_eq_v", False) and getattr(module, "has_kv", False):
            names.append(hub_path(f"{path}.k_proj", str(getattr(model, "model_type", ""))))
    return names


def _peft_config(
    base: str,
    adapters: Mapping[str, Adapter],
    layout: _Layout,
    saved: list[str],
) -> dict[str, Any]:
    """Return the contents of adapter_config.json, except for the names of the layers."""
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": layout.rank,
        "lora_alpha": layout.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": False,
        "use_dora": isinstance(first, DoRA),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": saved or None,
    }


def unchecked_names(model: nn.Module) -> str:
    """Return a warning if the module names could not be checked, else an empty string."""
    kind = str(model.model_type)
    if has_names(kind):
        return ""
    return (
        f"the module names were not checked: transformers' names for {kind} are unknown here; load"
        " the adapter in PEFT once to make sure that they match"
    )


def is_tied(model: nn.Module) -> bool:
    """Return whether the embeddings are also the head."""
    return not any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules())


def _inexpressible(adapters: Mapping[str, Adapter], trained: Iterable[str], kind: str) -> list[str]:
    """Return a message for each property of the adapters that PEFT can't express."""
    # The names of experts differ more, so ``expert_problems`` checks them.
    paths = [path for path, adapter in adapters.items() if not isinstance(adapter.base, EXPERTS)]
    paths += [path for path in trained if path.endswith("embed_tokens")]
    problems = missing_modules(paths, kind)

    for path, adapter in adapters.items():
        if adapter.owns_base:
            problems.append(
                f"{path} has a quantized base of its own (--quantize), which belongs to the adapter"
            )
        elif not adapter.is_plain_lora and adapter.kind != "dora":
            problems.append(f"{adapter.kind} on {path}")
        elif isinstance(adapter.base, EXPERTS):
            problems += expert_problems(path, adapter, adapters, kind)
        elif isinstance(adapter.base, EMBEDDINGS) and isinstance(adapter, DoRA):
            problems.append(
                f"DoRA on the embedding {path}, because PEFT has one magnitude per column and not"
                " per token"
            )
    return problems


def _adapter_tensors(path: str, adapter: Adapter, layout: _Layout) -> dict[str, mx.array]:
    """Return PEFT's tensors of one adapter, padded to the common rank and scale."""
    # Here A is (in, rank), and B is (rank, out).
    a, b = adapter.lora_matrices()
    missing = layout.rank - a.shape[1]
    a = mx.pad(a, [(0, 0), (0, missing)])
    b = mx.pad(b, [(0, missing), (0, 0)]) * (adapter.scale / layout.scale)
    name = hub_path(path, layout.kind)

    if not isinstance(adapter.base, EMBEDDINGS):
        tensors = {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
        if isinstance(adapter, DoRA):
            tensors[f"{name}.{MAGNITUDE}"] = adapter.m
        return tensors

    tensors = {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T}
    if layout.tied:
        # PEFT adapts a tied head and its embeddings separately. The head's change is the transpose
        # of the embeddings' change.
        tensors |= {"lm_head.lora_A.weight": b, "lm_head.lora_B.weight": a}
    return tensors


def _add_trained(
    tensors: dict[str, mx.array], trained: Mapping[str, nn.Module], layout: _Layout
) -> list[str]:
    """Add the modules that were trained in full to the tensors, and return ``modules_to_save``."""
    saved: list[str] = []
    for path, module in trained.items():
        name = hub_path(path, layout.kind)
        saved.append(name)
        for leaf, array in own_arrays(module).items():
            tensors[f"{name}.{leaf}"] = array

    # PEFT saves a tied head and its embeddings separately.
    embeddings = [name for name in saved if name.endswith("embed_tokens")]
    if layout.tied and embeddings:
        tensors["lm_head.weight"] = tensors[f"{embeddings[0]}.weight"]
        saved.append("lm_head")
    return saved


def _targets(
    model: nn.Module, names: set[str], experts: Mapping[str, Adapter], layout: _Layout
) -> dict[str, Any]:
    """Return the settings that name the layers of an adapter.

    Args:
        model: The model.
        names: The names of the linear layers and embeddings in transformers.
        experts: Path → adapter for the layers of experts.
        layout: The settings that all tensors share.
    """
    taken = names_by_parameter(names, layout.kind)
    settings: dict[str, Any] = {"target_modules": _target_modules(model, names - taken)}
    if not experts and not taken:
        return settings

    # PEFT does not support dropout on parameters.
    settings["lora_dropout"] = 0.0
    if has_translated_targets(layout.kind) and not taken:
        settings["target_modules"] += sorted(expert_projections(experts, layout.kind))
        return settings
    return settings | expert_settings(experts, taken, layout.kind, layout.rank, layout.alpha)


def _target_modules(model: nn.Module, names: set[str]) -> list[str]:
    """Return ``target_modules``: the last parts of the names, or whole names where needed."""
    kind = str(model.model_type)
    leaves = {name.rpartition(".")[2] for name in names}

    # Find all modules that the last parts would match. A vision tower, which mlx-lm leaves out, has
    # modules with the same names.
    matched: set[str] = set()
    for path, module in model.named_modules():
        is_leaf = path.rpartition(".")[2] in leaves
        if is_leaf and isinstance(base_of(module), (*LINEARS, *EMBEDDINGS)):
            matched.add(hub_path(path, kind))
    has_tower = any("language_model." in name for name in names)
    return sorted(leaves if matched <= names and not has_tower else names)


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Apply an adapter that PEFT has saved to its base.

    The model can then be used, trained, saved or fused.

    Args:
        model: The base.
        folder: The adapter's folder, or the file of its weights.

    Raises:
        AdapterError: The adapter is not a LoRA or DoRA, does not fit the model, or has an
            initialization that changed the base.
    """
    folder = _folder_of(folder)
    config = read_peft_config(folder)
    file = folder / WEIGHTS
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} holds a pickle (adapter_model.bin), which is not read: save it as"
            " safetensors"
        )

    # Translate PEFT's tensors to our names.
    found = sort_tensors(read_weights(file), config, file)
    split_stacked_experts(found, model, config)
    if is_tied(model):
        untie(found, folder)

    prefix = "language_model." if hasattr(model, "language_model") else ""
    check_peft_base(found, dict(model.named_modules()), prefix, folder)
    check_complete(found, config, model, folder)
    pad_to_one_rank(found)

    # Attach it like an adapter in our own format.
    weights: dict[str, mx.array] = {}
    for name, arrays in found.layers.items():
        for leaf, array in arrays.items():
            weights[f"{prefix}{name}.{leaf}"] = array
    learned = {prefix + name: array for name, array in found.learned.items()}

    stored = StoredConfig.model_validate({
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "lora_parameters": {"scale": config.scale, "dropout": config.lora_dropout},
        "train_modules": sorted({name.rpartition(".")[0] for name in learned}),
    })  # fmt: skip
    return attach_saved(model, stored, weights, learned, folder)


def find_doubts(path: Path) -> list[str]:
    """Return notes on an adapter that PEFT may compute in another way than this package.

    Args:
        path: The adapter's folder, or the file of its weights; ``load_peft`` has read it.
    """
    folder = _folder_of(path)
    config, tensors = read_peft_config(folder), read_weights(folder / WEIGHTS)
    notes = find_unknown_settings(folder), find_unselected(config, tensors, folder)
    return [note for note in notes if note]


def _folder_of(path: Path) -> Path:
    """Return an adapter's folder, which may be given as the file of its weights."""
    return path.parent if path.name == WEIGHTS and path.is_file() else path
