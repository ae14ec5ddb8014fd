"""Adapters in PEFT's format, which transformers and vLLM load: ``adapter_model.safetensors``, ``adapter_config.json``.

PEFT keeps the transposes of what mlx-lm does, ``lora_A.weight`` (rank, in) and ``lora_B.weight``
(out, rank), names modules as transformers does, and keeps experts one by one. What is written has
one rank and one scale for all modules (``lora_alpha`` = s r, ``use_rslora`` off) and no patterns,
so that readers that know no more (vLLM, llama.cpp) read it right: other scales go into B, smaller
ranks are filled with zeros. VeRA becomes the LoRA it is, and PiSSA that of twice the rank. Source:
PEFT 0.21, ``utils/save_and_load.py`` and ``tuners/lora``.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import pydantic
from pydantic import Field

from ..adapters.adapter import Adapter, base_of
from ..adapters.attach import find_adapters, find_fully_trained
from ..adapters.dora import DoRA
from ..adapters.layers import EMBEDDINGS, EXPERTS, LINEARS, base_shape
from ..adapters.storage import StoredConfig, attach_saved, read_adapter_config, read_weights
from ..adapters.unfreeze import own_arrays
from ..errors import AdapterError, join_problems
from ..files import replacing, write_atomically
from .transformers_names import EXPERT_NAMES, expert_parts, has_names, hub_path, missing_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
_LEAVES = {"lora_A.weight": "lora_a", "lora_embedding_A": "lora_a", "lora_B.weight": "lora_b"} | {
    "lora_embedding_B": "lora_b", "lora_magnitude_vector": "m",
}  # fmt: skip
_EXPERT = re.compile(r"(.+\.)(block_sparse_moe|mlp)\.experts\.(\d{1,4})\.(\w+)")
_NOT_TEXT = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|multi_modal_projector|embed_vision|embed_audio)\."
)
_STACKED = (".experts", ".experts.base_layer")
_VLLM_MAX_RANK = 512  # the largest --max-lora-rank, vllm/config/lora.py
_VLLM_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
)


# Types that PEFT merges into the base; the others act beside it, as learned prompts do.
_MERGED = (
    "ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip


class _PEFTType(pydantic.BaseModel):
    """What kind of adapter an ``adapter_config.json`` is of."""

    peft_type: str


class _PEFTConfig(pydantic.BaseModel):
    """PEFT's ``adapter_config.json``, as far as it decides what an adapter computes."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=1 << 20)]
    lora_alpha: Annotated[float, Field(gt=1e-9, lt=1e9)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
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
    alora_invocation_tokens: None = None  # acts only behind these tokens


def write_peft(model: nn.Module, base: str, folder: Path) -> list[str]:
    """Write the adapters of ``model`` into a folder as PEFT does; return what vLLM would refuse of it all the same.

    ``base`` is what transformers calls the base: a hub id or a folder.

    Raises:
        AdapterError: Something that PEFT can't express, told with its names.
        OutputError: The folder can't be written.
    """
    adapters, trained, tied = find_adapters(model), find_fully_trained(model), is_tied(model)
    kind = str(model.model_type)
    if problems := _inexpressible(adapters, trained, kind):
        raise AdapterError(
            f"PEFT can't express this adapter: {join_problems(problems, most=3)}; fold it into the"
            " base instead: mlx_loraplus.fuse"
        )
    first = next(iter(adapters.values()))
    rank = max(adapter.lora_matrices()[0].shape[1] for adapter in adapters.values())
    scale = abs(first.scale) or 1.0  # PEFT's is positive
    tensors: dict[str, mx.array] = {}
    for path, adapter in adapters.items():
        tensors |= _peft_tensors(path, adapter, kind, rank, adapter.scale / scale, tied=tied)
    targets = _targets(model, {name.rpartition(".lora_")[0] for name in tensors})
    for path, module in trained.items():
        tensors |= {
            f"{hub_path(path, kind)}.{name}": array for name, array in own_arrays(module).items()
        }
    saved = [hub_path(path, kind) for path in trained]
    embeddings = [name for name in saved if name.endswith("embed_tokens")]
    if tied and embeddings:
        tensors["lm_head.weight"] = tensors[f"{embeddings[0]}.weight"]
        saved.append("lm_head")
    alpha = scale * rank
    has_experts = any(
        isinstance(adapter.base, EXPERTS) for adapter in adapters.values()
    )  # PEFT has no dropout there
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": round(alpha) if alpha == round(alpha) else alpha,
        "lora_dropout": 0.0 if has_experts else first.dropout.p,
        "use_rslora": False, "use_dora": isinstance(first, DoRA), "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True, "target_modules": targets,
        "modules_to_save": saved or None,
    }  # fmt: skip
    tensors = {_PREFIX + name: mx.contiguous(array) for name, array in tensors.items()}
    with replacing(folder / WEIGHTS) as file:
        mx.save_safetensors(file, tensors)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return vllm_refusals(config, tensors, kind)


def unchecked_names(model: nn.Module) -> str:
    """Return a line that says that the module names were not checked; empty if they were."""
    kind = str(model.model_type)
    if has_names(kind):
        return ""
    return (
        f"the module names were not checked: transformers' names for {kind} are unknown here; load"
        " the adapter in PEFT once to make sure that they match"
    )


def is_tied(model: nn.Module) -> bool:
    """Tell whether the embeddings are the head, too."""
    return not any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules())


def _inexpressible(adapters: Mapping[str, Adapter], trained: Iterable[str], kind: str) -> list[str]:
    """Say what PEFT has no place for."""
    linears = [path for path, adapter in adapters.items() if not isinstance(adapter.base, EXPERTS)]
    problems = missing_modules(
        [*linears, *(path for path in trained if path.endswith("embed_tokens"))], kind
    )
    for path, adapter in adapters.items():
        if adapter.owns_base:
            problems.append(
                f"{path} has a quantized base of its own (--quantize), which belongs to the adapter"
            )
        elif not (adapter.is_plain_lora or adapter.kind == "dora"):
            problems.append(f"{adapter.kind} on {path}")
        elif isinstance(adapter.base, EXPERTS):
            partner = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(path.rpartition(".")[2])
            if isinstance(adapter, DoRA):
                problems.append(f"DoRA on the experts {path}")
            elif expert_parts(path, kind) is None:
                problems.append(f"the experts {path} are no modules there")
            elif partner and f"{path.rpartition('.')[0]}.{partner}" not in adapters:
                problems.append(
                    f"the experts' {path} without its {partner}: transformers keeps both in one"
                )
        elif isinstance(adapter.base, EMBEDDINGS) and isinstance(adapter, DoRA):
            problems.append(
                f"DoRA on the embedding {path}: PEFT has a length for each column, not for each"
                " token"
            )
    return problems


def _peft_tensors(
    path: str, adapter: Adapter, kind: str, rank: int, factor: float, *, tied: bool
) -> dict[str, mx.array]:
    """Return PEFT's tensors of one adapter, filled up to ``rank`` with zeros, its B times ``factor``."""
    a, b = adapter.lora_matrices()
    empty = [
        (0, rank - a.shape[1]),
        (0, 0),
    ]  # where rank is the first of the last two axes; else the other way round
    if isinstance(adapter.base, EXPERTS):
        a, b = mx.pad(a, [(0, 0), *empty]), mx.pad(b, [(0, 0), *empty[::-1]]) * factor
        module, projection = expert_parts(path, kind) or ("", "")
        names = [f"{module}.experts.{expert}.{projection}" for expert in range(len(a))]
        named = {f"{name}.lora_A.weight": a[expert] for expert, name in enumerate(names)}
        return named | {f"{name}.lora_B.weight": b[expert] for expert, name in enumerate(names)}
    a, b, name = mx.pad(a, empty[::-1]), mx.pad(b, empty) * factor, hub_path(path, kind)
    if isinstance(adapter.base, EMBEDDINGS):
        # PEFT adapts a tied head apart from its embeddings: its W + s A B is the same change the
        # other way round
        head = {"lm_head.lora_A.weight": b, "lm_head.lora_B.weight": a} if tied else {}
        return {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T} | head
    lengths = {f"{name}.lora_magnitude_vector": adapter.m} if isinstance(adapter, DoRA) else {}
    return {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T} | lengths


def _targets(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return ``target_modules``: the last parts of the names where all such modules are adapted, else whole names."""
    kind = str(model.model_type)
    leaves = {name.rpartition(".")[2] for name in names}
    alike = {
        hub_path(path, kind)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in leaves
        and isinstance(base_of(module), (*LINEARS, *EMBEDDINGS))
    }
    has_tower = any("language_model." in name for name in names)
    if has_tower or not alike <= set(names):  # a vision tower has a q_proj, too
        return sorted(
            {name if ".experts." not in name else name.rpartition(".")[2] for name in names}
        )
    return sorted(leaves)


def vllm_refusals(config: Mapping[str, Any], names: Iterable[str], model_type: str) -> list[str]:
    """Say what vLLM would refuse of a PEFT adapter, by its documented rules and the checks in vllm/lora.

    ``names`` are the tensors', ``model_type`` is the base's. ``r`` may be any number up to the
    server's ``--max-lora-rank``, which has its own list: 1, 8, 16, 32, 64, 128, 256, 320, 512.
    """
    odd = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
    problems = [
        f"{key} is {json.dumps(config[key])[:80]}, and vLLM has none"
        for key in odd
        if config.get(key)
    ]
    if config["r"] > _VLLM_MAX_RANK:
        problems.append(f"r is {config['r']}, allowed are up to {_VLLM_MAX_RANK}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, allowed is 'none'")
    if not isinstance(config["target_modules"], list):
        problems.append("target_modules is a pattern, allowed is a list of names")
    ends = tuple(leaf for leaf in _LEAVES if leaf != "lora_magnitude_vector")
    known = (
        _VLLM_MODULES
        if model_type.startswith("gemma")
        else (*_VLLM_MODULES, "embed_tokens", "lm_head")
    )
    for name in names:
        module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        if not name.startswith(_PREFIX) or not name.endswith(ends):
            problems.append(f"the tensor {name} is no lora_A or lora_B")
        elif module.rpartition(".")[2] not in known:
            problems.append(f"{module} is none of the modules that its {model_type} can adapt")
    return problems


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Put an adapter that PEFT has saved in a folder on its base; it can be used, trained on, saved or fused.

    The file of its weights may be named in place of the folder.

    Raises: AdapterError where it is no LoRA or DoRA of PEFT's, does not fit the model, or wants a
    changed base.
    """
    folder = folder.parent if folder.name == WEIGHTS and folder.is_file() else folder
    kind = read_adapter_config(
        folder / CONFIG, _PEFTType, "; --from peft reads a LoRA by PEFT"
    ).peft_type
    if kind != "LORA":
        merge = (
            "; merge it in PEFT (merge_and_unload) and give what that saves as --model"
            if kind in _MERGED
            else ""
        )
        raise AdapterError(
            f"{folder} is of PEFT's type {kind!r:.40}, and only LORA can be read{merge}"
        )
    config = read_adapter_config(folder / CONFIG, _PEFTConfig, "; --from peft reads a LoRA by PEFT")
    start, path = str(config.init_lora_weights).lower(), folder / WEIGHTS
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"{folder} started by {start[:20]!r}, which changed its base: it means nothing on the"
            " base as it was; save it in PEFT with path_initial_model_for_weight_conversion, or"
            " merge it there"
        )
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} holds a pickle (adapter_model.bin), which is not read: save it as"
            " safetensors"
        )
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    layers, learned = _sort(read_weights(path), config, scale, path)
    _split_experts(layers, model, config, scale)
    if is_tied(model):
        _untie(layers, learned, folder)
    prefix = "language_model." if hasattr(model, "language_model") else ""
    weights = {
        f"{prefix}{name}.{leaf}": array
        for name, arrays in layers.items()
        for leaf, array in arrays.items()
    }
    learned = {prefix + name: array for name, array in learned.items()}
    stored = StoredConfig.model_validate({
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "lora_parameters": {"scale": scale, "dropout": config.lora_dropout},
        "train_modules": sorted({name.rpartition(".")[0] for name in learned}),
    })  # fmt: skip
    return attach_saved(model, stored, weights, learned, folder)


def _sort(
    tensors: Mapping[str, mx.array], config: _PEFTConfig, scale: float, file: Path
) -> tuple[dict[str, dict[str, mx.array]], dict[str, mx.array]]:
    """Return module → our name → array, in our orientation, and the arrays of modules saved in full by their names.

    A module's scale, where it is not ``scale``, goes into its B.
    """
    layers: dict[str, dict[str, mx.array]] = {}
    learned: dict[str, mx.array] = {}
    experts: dict[tuple[str, str], dict[int, mx.array]] = {}
    for name, stored in tensors.items():
        path = _core(name.removeprefix(_PREFIX))
        if _NOT_TEXT.search(path):
            raise AdapterError(
                f"{file} adapts {path[:120]}, a part for images or sound, which mlx-lm's models"
                " leave out: only an adapter of the language model alone can be read"
            )
        if ".lora_" not in path:
            if ".base_layer." not in path:  # PEFT's copy of what is in the base
                learned[path] = stored
            continue
        leaf = next((leaf for leaf in _LEAVES if path.endswith(f".{leaf}")), None)
        if (
            leaf is None
            or not stored.size
            or stored.ndim != (1 if leaf == "lora_magnitude_vector" else 2)
        ):
            raise AdapterError(
                f"{file} is no LoRA that can be read here: {name[:200]} is not known"
            )
        module = path.removesuffix(f".{leaf}")
        is_b = _LEAVES[leaf] == "lora_b" and not module.endswith(_STACKED)
        whole = name.removeprefix(_PREFIX).removesuffix(f".{leaf}")  # as PEFT sees it
        array = stored * (_scale_of(whole, stored.shape[1], config) / scale) if is_b else stored
        if match := _EXPERT.fullmatch(module):
            ours = next(
                (ours for ours, theirs in EXPERT_NAMES.items() if theirs == match[4]), match[4]
            )
            experts.setdefault((f"{match[1]}{match[2]}.switch_mlp.{ours}", _LEAVES[leaf]), {})[
                int(match[3])
            ] = array
        else:
            layers.setdefault(module, {})[_LEAVES[leaf]] = mx.contiguous(array.T)
    for (module, leaf), group in experts.items():
        if (
            sorted(group) != list(range(len(group)))
            or len({array.shape for array in group.values()}) > 1
        ):
            raise AdapterError(f"{file}: {module} does not have every expert in one shape")
        layers.setdefault(module, {})[leaf] = mx.stack(
            [group[expert] for expert in range(len(group))]
        )
    return layers, learned


def _split_experts(
    layers: dict[str, dict[str, mx.array]], model: nn.Module, config: _PEFTConfig, scale: float
) -> None:
    """Split what PEFT keeps of all experts in two matrices (``target_parameters``): A (E r, in) and B (out, r E).

    Gate and up are one there. What does not fit stays, and is refused as no layer of the model.
    """
    for name in [name for name in layers if name.endswith(_STACKED)]:
        block, arrays = name.partition(".mlp.experts")[0], layers[name]
        ours = {
            _core(path): module
            for path, module in model.named_modules()
            if isinstance(module, EXPERTS)
        }
        found = {path.rpartition(".")[2]: path for path in ours if path.startswith(f"{block}.")}
        if (
            arrays.keys() != {"lora_a", "lora_b"}
            or not {"gate_proj", "up_proj", "down_proj"} <= found.keys()
        ):
            continue
        (rows, columns), count = (
            base_shape(ours[found["gate_proj"]]),
            ours[found["gate_proj"]].weight.shape[0],
        )
        a, b = arrays["lora_a"].T, arrays["lora_b"]  # (E r, in), (r E, out)
        parts = {
            (columns, 2 * rows): ("gate_proj", "up_proj"),
            (rows, columns): ("down_proj",),
        }.get((a.shape[1], b.shape[1]))
        if parts is None or a.shape[0] != b.shape[0] or a.shape[0] % count:
            continue
        rank = a.shape[0] // count
        factor = (
            _scale_of(
                f"{block}.mlp.experts.{'gate_up_proj' if parts[1:] else 'down_proj'}", rank, config
            )
            / scale
        )
        b = b.reshape(rank, count, -1).transpose(1, 2, 0) * factor  # (E, out, r)
        for leaf, part in zip(parts, mx.split(b, len(parts), axis=1), strict=True):
            layers[found[leaf]] = {"lora_a": a.reshape(count, rank, -1), "lora_b": part}
        del layers[name]


def _core(path: str) -> str:
    """Return a name without the prefixes that models of text and images have."""
    for prefix in ("model.language_model.", "language_model.model."):
        if path.startswith(prefix):
            return f"model.{path.removeprefix(prefix)}"
    return path.removeprefix("language_model.")


def _scale_of(name: str, rank: int, config: _PEFTConfig) -> float:
    """Return a module's scale; the first key of ``alpha_pattern`` that matches, by PEFT's own rule, decides."""
    alpha = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if len(pattern) > 200 or re.search(r"[+*}]\)[+*{]", pattern):  # may take for ever
            raise AdapterError(
                f"its alpha_pattern {pattern[:80]!r} repeats what repeats, or is long: simplify it"
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)  # peft.utils.other.get_pattern_key
        except re.error as problem:
            raise AdapterError(
                f"its alpha_pattern {pattern[:80]!r} is no regular expression: {problem}"
            ) from None
        if found:
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _untie(
    layers: dict[str, dict[str, mx.array]], learned: dict[str, mx.array], folder: Path
) -> None:
    """Drop what is said of a tied head if it is what is said of the embeddings; nothing else fits one matrix.

    Raises: AdapterError where it is something else.
    """
    head, turned = layers.pop("lm_head", {}), {"lora_a": "lora_b", "lora_b": "lora_a"}
    wanted = {
        turned.get(name, name): array.T
        for name, array in layers.get("model.embed_tokens", {}).items()
    }
    same = head.keys() == wanted.keys() and all(
        mx.array_equal(head[name], wanted[name]).item() for name in head
    )
    weights = [
        learned[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in learned
    ]
    learned.pop("lm_head.weight", None)
    if not same or (
        weights and not (len(weights) == 2 and mx.array_equal(weights[0], weights[1]).item())
    ):
        raise AdapterError(
            f"{folder} changes the embeddings and the head differently, which are one matrix in"
            " this model: merge it in PEFT, untied, instead"
        )
