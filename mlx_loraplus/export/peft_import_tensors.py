"""Translate PEFT's tensors to ours: names, orientation, scales, experts and tied heads.

PEFT stores the transposes of mlx-lm's matrices: A (rank, in) and B (out, rank). It names modules as
transformers does. It stores experts either separately or all together in two matrices.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import pydantic
from pydantic import Field

from ..adapters.base_layers import EXPERTS, base_shape
from ..adapters.stored_files import check_floating
from ..errors import AdapterError
from ..setting_types import LARGEST_ALPHA, Scale
from .transformers_names import EXPERT_NAMES, alternates_gate_and_up

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
LEAVES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    MAGNITUDE: "m",
}
"""The ending of a PEFT tensor's name → our name."""

_EXPERT = re.compile(r"(.+\.)(block_sparse_moe|mlp)\.experts\.(\d{1,4})\.(\w+)")
_BLOCK_OF = re.compile(r"(?:\.(?:mlp|block_sparse_moe)|(?<=\d))\.experts")
_STACKED = (".experts", ".experts.base_layer")  # modules that contain all experts
_COPY = ".base_layer."  # in the name of a copy, before that of its array
_NOT_TEXT = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|multi_modal_projector|embed_vision|embed_audio)\."
)

# Limits for the keys of patterns, because some patterns take very long to match.
_LONGEST_PATTERN = 200
_NESTED_REPEAT = re.compile(r"[+*}]\)[+*{]")
_REPEAT = re.compile(r"[+*}]")
_MOST_REPEATS = 6


class PEFTConfig(pydantic.BaseModel):
    """The part of PEFT's ``adapter_config.json`` that affects an adapter's outputs."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=1 << 20)]
    lora_alpha: Annotated[float, Field(gt=1e-9, lt=LARGEST_ALPHA)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    alpha_pattern: dict[str, Scale] | None = None
    rank_pattern: dict[str, int] | None = None
    init_lora_weights: bool | str | None = True
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] = False
    lora_bias: Literal[False] = False
    layer_replication: None = None
    use_qalora: Literal[False] = False
    trainable_token_indices: None = None
    megatron_config: None = None
    velora_config: Any = None
    monteclora_config: None = None
    kasa_config: None = None
    arrow_config: None = None
    use_bdlora: Literal[False] | None = None
    alora_invocation_tokens: None = None  # if set, the adapter acts only after these tokens

    # What was adapted; the tensors show it, so these only show whether some are missing.
    target_modules: Any = None
    target_parameters: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None

    @property
    def scale(self) -> float:
        """The scale s of modules that no pattern matches."""
        return self._scale(self.lora_alpha, self.r)

    def scale_of(self, name: str, rank: int) -> float:
        """Return the scale of one module.

        Args:
            name: PEFT's name of the module.
            rank: The module's rank.

        Raises:
            AdapterError: The config gives the module another rank, so its scale is not known; or a
                key of a pattern is not a regular expression, or may take very long to match.
        """
        stated = _first_match("rank_pattern", self.rank_pattern, name)
        if rank != (self.r if stated is None else stated):
            setting = f"r {self.r}" if stated is None else f"rank_pattern {stated}"
            raise AdapterError(
                f"the adapter's {name[:200]} is stored with rank {rank}, but adapter_config.json"
                f" has {setting} for it, so its scale is not known: correct the config, or save the"
                " adapter again"
            )
        alpha = _first_match("alpha_pattern", self.alpha_pattern, name)
        return self._scale(self.lora_alpha if alpha is None else alpha, rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def may_take_long(pattern: str, longest: int) -> bool:
    """Return whether a regular expression is too long, or may take very long to match."""
    is_slow = _NESTED_REPEAT.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS
    return len(pattern) > longest or bool(is_slow)


def _first_match(setting: str, patterns: Mapping[str, float] | None, name: str) -> float | None:
    """Return the value of the first key that applies to a module, as PEFT's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if may_take_long(pattern, _LONGEST_PATTERN):
            raise AdapterError(
                f"the {setting} {pattern[:80]!r} may take very long to match: shorten it, nest no"
                f" repetitions, and use at most {_MOST_REPEATS} of them"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as problem:
            raise AdapterError(
                f"the {setting} {pattern[:80]!r} is not a regular expression: {problem}"
            ) from None
    return None


@dataclass
class StoredAdapter:
    """The contents of an adapter's file, with our names and in our orientation.

    Attributes:
        layers: Module → our name → array.
        learned: Name → array, for the modules that were saved in full.
        copies: Module and name → the copy of its base's array that PEFT stored beside the adapter.
        full_names: Module → its name in PEFT, with the prefixes of multimodal models.
    """

    layers: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    learned: dict[str, mx.array] = field(default_factory=dict)
    copies: dict[tuple[str, str], mx.array] = field(default_factory=dict)
    full_names: dict[str, str] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, mx.array], config: PEFTConfig, file: Path) -> StoredAdapter:
    """Return PEFT's tensors with our names.

    The adapter has one scale, ``config.scale``. If a module has another scale, its B is multiplied
    by the ratio of the two.

    Args:
        tensors: PEFT's names → arrays.
        config: The adapter's config.
        file: The file that the tensors were read from, for messages.

    Raises:
        AdapterError: A tensor is unknown, belongs to a part for images or sound, or has a shape
            that does not fit the others.
    """
    found = StoredAdapter()
    experts: dict[tuple[str, str], dict[int, mx.array]] = {}

    for name, stored in tensors.items():
        path = _without_tower(name.removeprefix(PREFIX))
        check_floating(file, name, stored)
        if _NOT_TEXT.search(path):
            raise AdapterError(
                f"{file} adapts {path[:120]}, a part for images or sound, which mlx-lm's models"
                " leave out: only an adapter of the language model alone can be read"
            )

        # This module was saved in full, or it is a copy of the base below an adapter.
        if ".lora_" not in path:
            module, is_copy, leaf = path.partition(_COPY)
            if is_copy:
                found.copies[module, leaf] = stored
            else:
                found.learned[path] = stored
            continue

        leaf = _leaf_of(path, stored)
        if leaf is None:
            raise AdapterError(
                f"{file} is not a LoRA that can be read here: {name[:200]} is not known"
            )
        ours = LEAVES[leaf]
        module = path.removesuffix(f".{leaf}")

        # The scale of stacked experts is applied when they are split.
        array = stored
        theirs = found.full_names[module] = name.removeprefix(PREFIX).removesuffix(f".{leaf}")
        if ours == "lora_b" and not module.endswith(_STACKED):
            array = stored * (config.scale_of(theirs, stored.shape[1]) / config.scale)

        match = _EXPERT.fullmatch(module)
        if match:
            block, kind, number, projection = match.groups()
            module = f"{block}{kind}.switch_mlp.{_our_projection(projection)}"
            experts.setdefault((module, ours), {})[int(number)] = array
        else:
            found.layers.setdefault(module, {})[ours] = mx.contiguous(array.T)

    for (module, ours), group in experts.items():
        found.layers.setdefault(module, {})[ours] = _stack_experts(group, module, file)
    _check_saved(found, config, file)
    return found


def _check_saved(found: StoredAdapter, config: PEFTConfig, file: Path) -> None:
    """Raise ``AdapterError`` if a module in ``modules_to_save`` has no arrays in the file."""
    for name in config.modules_to_save or ():
        path = f".{_without_tower(name)}."
        if not any(path in f".{learned}" for learned in found.learned):
            raise AdapterError(
                f"{file} is incomplete: {name[:80]} is in modules_to_save, but its weights are"
                " missing; save the adapter again with save_pretrained"
            )


def _without_tower(path: str) -> str:
    """Return a module's name without the prefixes that multimodal models add."""
    for prefix in ("model.language_model.", "language_model.model."):
        if path.startswith(prefix):
            return f"model.{path.removeprefix(prefix)}"
    return path.removeprefix("language_model.")


def _leaf_of(path: str, array: mx.array) -> str | None:
    """Return the ending of a tensor's name; None if unknown or if the array has a wrong shape."""
    for leaf in LEAVES:
        if path.endswith(f".{leaf}"):
            dimensions = 1 if leaf == MAGNITUDE else 2
            return leaf if array.size and array.ndim == dimensions else None
    return None


def _our_projection(theirs: str) -> str:
    """Return our name of an expert's projection."""
    for ours, name in EXPERT_NAMES.items():
        if name == theirs:
            return ours
    return theirs


def _stack_experts(group: Mapping[int, mx.array], module: str, file: Path) -> mx.array:
    """Stack the arrays of all experts, given as number → array."""
    is_complete = sorted(group) == list(range(len(group)))
    shapes = {array.shape for array in group.values()}
    if not is_complete or len(shapes) > 1:
        raise AdapterError(f"{file}: {module} does not have every expert in one shape")
    return mx.stack([group[number] for number in range(len(group))])


def split_stacked_experts(found: StoredAdapter, model: nn.Module, config: PEFTConfig) -> None:
    """Replace the two matrices for all experts of a block by the arrays of our layers, in place.

    PEFT stores such matrices for ``target_parameters``: A (E r, in) and B (out, r E), with gate and
    up in one matrix. Matrices that do not fit the model are kept. They are refused later, because
    the model has no layer of that name.
    """
    layers = found.layers
    alternate = alternates_gate_and_up(str(getattr(model, "model_type", "")))
    expert_layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, EXPERTS):
            expert_layers[_without_tower(path)] = module

    for name in [name for name in layers if name.endswith(_STACKED)]:
        block = _BLOCK_OF.split(name)[0]
        paths: dict[str, str] = {}
        for path in expert_layers:
            if path.startswith(f"{block}."):
                paths[path.rpartition(".")[2]] = path
        if not {"gate_proj", "up_proj", "down_proj"} <= paths.keys():
            continue

        gate = expert_layers[paths["gate_proj"]]
        full_name = found.full_names[name]
        parts = _split_experts(layers[name], gate, full_name, config, alternate=alternate)
        if parts:
            del layers[name]
            layers.update({paths[projection]: arrays for projection, arrays in parts.items()})


def _split_experts(
    arrays: Mapping[str, mx.array], gate: Any, name: str, config: PEFTConfig, *, alternate: bool
) -> dict[str, dict[str, mx.array]]:
    """Return projection → our arrays; an empty dictionary if the matrices do not fit.

    Args:
        arrays: The two matrices in our orientation.
        gate: The block's layer of gate projections.
        name: PEFT's full name of the layer.
        config: The adapter's config.
        alternate: Whether the rows of gate and up alternate.
    """
    if set(arrays) != {"lora_a", "lora_b"}:
        return {}
    rows, columns = base_shape(gate)
    experts = gate.weight.shape[0]
    a = arrays["lora_a"].T  # (E r, in)
    b = arrays["lora_b"]  # (r E, out)

    # Recognize the projections by the shapes.
    shape = (a.shape[1], b.shape[1])
    if shape == (columns, 2 * rows):
        projections, theirs = ("gate_proj", "up_proj"), "gate_up_proj"
    elif shape == (rows, columns):
        projections, theirs = ("down_proj",), "down_proj"
    else:
        return {}
    if a.shape[0] != b.shape[0] or a.shape[0] % experts:
        return {}

    # The rows of A are ordered by expert, then rank; those of B by rank, then expert.
    rank = a.shape[0] // experts
    module = name.removesuffix(".base_layer")
    ratio = config.scale_of(f"{module}.{theirs}", rank) / config.scale
    a = a.reshape(experts, rank, -1)
    b = b.reshape(rank, experts, -1).transpose(1, 2, 0) * ratio  # (E, out, r)

    count = len(projections)
    parts: dict[str, dict[str, mx.array]] = {}
    for number, projection in enumerate(projections):
        part = b[:, number::count] if alternate else mx.split(b, count, axis=1)[number]
        parts[projection] = {"lora_a": a, "lora_b": part}
    return parts


def pad_to_one_rank(found: StoredAdapter) -> None:
    """Pad all matrices with zeros to the largest rank, because stock mlx-lm needs one rank."""
    complete = [arrays for arrays in found.layers.values() if {"lora_a", "lora_b"} <= arrays.keys()]
    rank = max((arrays["lora_a"].shape[1] for arrays in complete), default=0)
    for arrays in complete:
        a, b = arrays["lora_a"], arrays["lora_b"]
        missing = (0, rank - a.shape[1])
        if a.ndim != b.ndim:
            continue  # it is refused later

        # Of experts, A is (experts, rank, in) and B (experts, out, rank).
        if a.ndim == 3:
            arrays["lora_a"] = mx.pad(a, [(0, 0), missing, (0, 0)])
            arrays["lora_b"] = mx.pad(b, [(0, 0), (0, 0), missing])
        else:
            arrays["lora_a"] = mx.pad(a, [(0, 0), missing])
            arrays["lora_b"] = mx.pad(b, [missing, (0, 0)])


def untie(found: StoredAdapter, folder: Path) -> None:
    """Drop the change of a tied head, after checking that it equals that of the embeddings.

    PEFT adapts the two separately, but our model has one matrix for both.

    Args:
        found: The adapter; it is changed in place.
        folder: The adapter's folder, for messages.

    Raises:
        AdapterError: The two changes differ.
    """
    # The head is the transpose of the embeddings, so its A is the embeddings' B.
    head = found.layers.pop("lm_head", {})
    embeddings = found.layers.get("model.embed_tokens", {})
    swapped = {"lora_a": "lora_b", "lora_b": "lora_a"}
    expected = {swapped.get(name, name): array.T for name, array in embeddings.items()}
    same_change = head.keys() == expected.keys() and all(
        mx.array_equal(head[name], expected[name]).item() for name in head
    )

    # The head or the embeddings may also have been saved in full.
    names = ("lm_head.weight", "model.embed_tokens.weight")
    weights = [found.learned[name] for name in names if name in found.learned]
    found.learned.pop("lm_head.weight", None)
    same_weight = not weights or (
        len(weights) == 2 and bool(mx.array_equal(weights[0], weights[1]).item())
    )

    if not same_change or not same_weight:
        raise AdapterError(
            f"{folder} changes the embeddings and the head differently, but they are one matrix in"
            " this model: merge the adapter in PEFT, with the two untied"
        )
