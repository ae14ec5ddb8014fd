"""Experts in PEFT's format: the tensors of an adapter on them, and how its config names them.

transformers 5 keeps all experts of a block in two parameters, ``gate_up_proj`` and ``down_proj``,
which PEFT adapts by ``target_parameters``. An adapter on them is stored in one of two ways:

- one by one (Mixtral, Qwen): A (r, in) and B (out, r) of each expert, under its name in the
  checkpoint. PEFT joins them when it loads them, and vLLM reads them as they are.
- stacked (gpt-oss, Granite MoE): A (E r, in) and B (out, r E) for all E experts, the rows of A
  ordered by expert and the columns of B by rank. Gate and up share one pair, of twice the rank.

Source: PEFT 0.21, ``utils/transformers_weight_conversion.py`` and ``ParamWrapper`` in
``tuners/lora/layer.py``.
"""

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from ..adapters.base_layers import EXPERTS
from ..adapters.dora import DoRA
from ..adapters.lora import Adapter
from .transformers_names import (
    alternates_gate_and_up,
    expert_parameters,
    expert_parts,
    has_translated_targets,
    is_stacked,
)

_PARTNERS = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
JOINED = "gate_up_proj"
"""The parameter of transformers 5 that holds gate and up."""

# PEFT treats layers with these names as experts, even if they are the linear layers of shared
# experts or of dense blocks.
_TAKEN = ("gate_proj", "up_proj", "down_proj")


def expert_problems(path: str, adapter: Adapter, adapters: Collection[str], kind: str) -> list[str]:
    """Return a message for what PEFT can't express of an adapter on experts.

    Args:
        path: The path of the layer of experts.
        adapter: The adapter on it.
        adapters: The paths of all adapters.
        kind: The model's type.
    """
    if isinstance(adapter, DoRA):
        return [f"DoRA on the experts {path}"]
    if expert_parts(path, kind) is None:
        return [f"the experts {path}, whose names in PEFT are not known here for {kind}"]

    # transformers stores gate and up in one matrix.
    block, _, leaf = path.rpartition(".")
    partner = _PARTNERS.get(leaf)
    if partner and f"{block}.{partner}" not in adapters:
        return [f"{path} without its {partner}, because transformers stores both in one matrix"]

    # PEFT looks for these tensors under the names that they have if down_proj is adapted too.
    if partner and not is_stacked(kind) and f"{block}.down_proj" not in adapters:
        return [f"{path} without its down_proj, because PEFT would not find its tensors"]
    return []


def expert_tensors(
    adapters: Mapping[str, Adapter], kind: str, rank: int, scale: float
) -> dict[str, mx.array]:
    """Return PEFT's tensors of the adapters on experts.

    Args:
        adapters: Path → adapter for the layers of experts.
        kind: The model's type.
        rank: The rank of the written adapter. Smaller ranks are padded with zeros.
        scale: The scale of the written adapter.
    """
    if not is_stacked(kind):
        tensors: dict[str, mx.array] = {}
        for path, adapter in adapters.items():
            tensors |= _tensors_one_by_one(path, *_factors(adapter, rank, scale), kind)
        return tensors

    # Collect the layers of each block: module → projection → (A, B).
    modules: dict[str, dict[str, tuple[mx.array, mx.array]]] = {}
    for path, adapter in adapters.items():
        module, projection = expert_parts(path, kind) or ("", "")
        own = adapter.lora_matrices()[0].shape[1]
        modules.setdefault(module, {})[projection] = _factors(adapter, own, scale)

    stacked: dict[str, mx.array] = {}
    for module, layers in modules.items():
        stacked |= _stacked_tensors(module, layers, kind, rank)
    return stacked


def _factors(adapter: Adapter, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """Return A (E, rank, in) and B (E, out, rank) of an adapter, for a given scale."""
    a, b = adapter.lora_matrices()
    missing = rank - a.shape[1]
    a = mx.pad(a, [(0, 0), (0, missing), (0, 0)])
    return a, mx.pad(b, [(0, 0), (0, 0), (0, missing)]) * (adapter.scale / scale)


def _tensors_one_by_one(path: str, a: mx.array, b: mx.array, kind: str) -> dict[str, mx.array]:
    """Return the tensors of each expert of a layer."""
    module, projection = expert_parts(path, kind) or ("", "")
    tensors: dict[str, mx.array] = {}
    for expert in range(len(a)):
        name = f"{module}.{expert}.{projection}"
        tensors[f"{name}.lora_A.weight"] = a[expert]
        tensors[f"{name}.lora_B.weight"] = b[expert]
    return tensors


def _stacked_tensors(
    module: str, layers: Mapping[str, tuple[mx.array, mx.array]], kind: str, rank: int
) -> dict[str, mx.array]:
    """Return the tensors of all experts of a block.

    PEFT wraps a module once for each parameter, so the tensors of gate_up_proj are those of the
    inner layer if there are two.
    """
    pairs: dict[str, tuple[mx.array, mx.array]] = {}
    if "down_proj" in layers:
        pairs[module] = layers["down_proj"]
    if "gate_proj" in layers:
        inner = f"{module}.base_layer" if pairs else module
        alternate = alternates_gate_and_up(kind)
        pairs[inner] = _join(layers["gate_proj"], layers["up_proj"], alternate=alternate)

    tensors: dict[str, mx.array] = {}
    for name, (a, b) in pairs.items():
        missing = rank - a.shape[1]
        whole_a = mx.pad(a, [(0, 0), (0, missing), (0, 0)])
        whole_b = mx.pad(b, [(0, 0), (0, 0), (0, missing)])
        tensors[f"{name}.lora_A.weight"] = whole_a.reshape(-1, a.shape[2])
        tensors[f"{name}.lora_B.weight"] = whole_b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    return tensors


def _join(
    gate: tuple[mx.array, mx.array], up: tuple[mx.array, mx.array], *, alternate: bool
) -> tuple[mx.array, mx.array]:
    """Return one (A, B) for gate and up, of the sum of their ranks.

    Args:
        gate: A (E, r, in) and B (E, out, r).
        up: The same for up.
        alternate: Whether the rows of gate and up alternate, or those of gate come first.
    """
    a = mx.concatenate([gate[0], up[0]], axis=1)

    # Each projection has its own columns of B.
    gate_b = mx.pad(gate[1], [(0, 0), (0, 0), (0, up[1].shape[2])])
    up_b = mx.pad(up[1], [(0, 0), (0, 0), (gate[1].shape[2], 0)])
    if not alternate:
        return a, mx.concatenate([gate_b, up_b], axis=1)
    experts, rows, rank = gate_b.shape
    return a, mx.stack([gate_b, up_b], axis=2).reshape(experts, 2 * rows, rank)


def stacked_rank(adapters: Mapping[str, Adapter]) -> int:
    """Return the rank that stacked tensors need: that of gate and up together."""
    ranks: dict[str, int] = {}
    for path, adapter in adapters.items():
        block, _, leaf = path.rpartition(".")
        name = f"{block}.{JOINED}" if leaf in _PARTNERS else path
        ranks[name] = ranks.get(name, 0) + adapter.lora_matrices()[0].shape[1]
    return max(ranks.values())


def find_experts(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return path → adapter for the adapters on experts."""
    return {
        path: adapter for path, adapter in adapters.items() if isinstance(adapter.base, EXPERTS)
    }


def expert_projections(experts: Collection[str], kind: str) -> set[str]:
    """Return the names of the experts' projections, such as ``w1``, for ``target_modules``."""
    return {(expert_parts(path, kind) or ("", ""))[1] for path in experts}


def names_by_parameter(names: Collection[str], kind: str) -> set[str]:
    """Return the linear layers that PEFT would treat as experts if ``target_modules`` named them.

    Their weights can be named in ``target_parameters`` instead.

    Args:
        names: The names of linear layers and embeddings in transformers.
        kind: The model's type.
    """
    if not has_translated_targets(kind):
        return set()
    return {name for name in names if name.rpartition(".")[2] in _TAKEN}


def expert_settings(
    experts: Collection[str], taken: Collection[str], kind: str, rank: int, alpha: float
) -> dict[str, Any]:
    """Return the settings of an adapter's config that name experts, and their ranks.

    Args:
        experts: The paths of the layers of experts with an adapter.
        taken: The linear layers from ``names_by_parameter``.
        kind: The model's type.
        rank: The rank of the written adapter.
        alpha: Its ``lora_alpha``.
    """
    parameters = {f"{name}.weight" for name in taken}
    for path in experts:
        leaf = path.rpartition(".")[2]
        parameter = JOINED if leaf in _PARTNERS else leaf
        parameters.add(f"{expert_parameters(path, kind)}.{parameter}")
    settings: dict[str, Any] = {"target_parameters": sorted(parameters)}

    # PEFT joins gate and up of single experts into one pair of twice the rank.
    has_joined = any(name.endswith(f".{JOINED}") for name in parameters)
    if has_joined and not is_stacked(kind):
        settings["rank_pattern"] = {JOINED: 2 * rank}
        settings["alpha_pattern"] = {JOINED: 2 * alpha}
    return settings
