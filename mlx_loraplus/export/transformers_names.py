"""The names of mlx-lm's modules in transformers 5, and which of them PEFT can adapt.

For each model type, ``transformers_names.json`` lists the linear layers and embeddings of the class
that AutoModelForCausalLM selects. scripts/judges/transformers_names writes this file.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# Our names of the experts' projections → the names in block_sparse_moe (Mixtral).
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# Multimodal models for which AutoModelForCausalLM selects only the text part. Its modules have the
# names of a text model.
_TEXT_ALONE = ("llama4", "qwen3_5", "qwen3_5_moe")

# Model types whose experts have tensors of their own in a checkpoint. PEFT joins such tensors; see
# scripts/judges/check_peft.
_ONE_BY_ONE = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite",
)  # fmt: skip

# Those of them for which PEFT also translates the names of experts and routers in target_modules.
_TRANSLATED = tuple(kind for kind in _ONE_BY_ONE if kind != "qwen2_moe")

# Model types whose experts are stacked in a checkpoint → whether the rows of gate and up alternate.
_STACKED = {
    "granitemoe": False, "granitemoehybrid": False, "gemma4": False, "gemma4_text": False,
    "gpt_oss": True,
}  # fmt: skip

# The modules of mlx-lm that hold a block's experts. The second one is Gemma 4's.
_HOLDERS = (".switch_mlp", ".switch_glu")


def hub_path(path: str, kind: str) -> str:
    """Return the name that transformers uses for a module in a model of type ``kind``."""
    core = path.removeprefix("language_model.")
    is_text_model = core in (path, "lm_head") or kind in _TEXT_ALONE
    return core if is_text_model else f"model.language_model.{core.removeprefix('model.')}"


def expert_parts(path: str, kind: str) -> tuple[str, str] | None:
    """Return (module, projection) of an expert layer, or None if PEFT can't adapt it.

    PEFT's name of a single expert is ``module.<number>.<projection>``, and that of all experts is
    ``module``.
    """
    block, _, leaf = path.rpartition(".")
    module = block
    for ending in (*_HOLDERS, ".experts"):
        module = module.removesuffix(ending)
    if module == block or leaf not in EXPERT_NAMES or kind not in (*_ONE_BY_ONE, *_STACKED):
        return None

    projection = EXPERT_NAMES[leaf] if kind == "mixtral" else leaf
    return f"{hub_path(module, kind)}.experts", projection


def expert_parameters(path: str, kind: str) -> str:
    """Return the module whose parameters are the experts of a layer, in transformers 5."""
    module, _ = expert_parts(path, kind) or ("", "")
    return module.replace(".block_sparse_moe.", ".mlp.") if kind == "mixtral" else module


def is_stacked(kind: str) -> bool:
    """Return whether the experts of a model type are stacked in a checkpoint."""
    return kind in _STACKED


def alternates_gate_and_up(kind: str) -> bool:
    """Return whether the rows of gate and up alternate in the stacked experts of a model type."""
    return _STACKED.get(kind, False)


def has_translated_targets(kind: str) -> bool:
    """Return whether PEFT translates the names of experts in target_modules for a model type."""
    return kind in _TRANSLATED


def has_names(kind: str) -> bool:
    """Return whether transformers' module names are known for a model type."""
    return kind in _names()


def missing_modules(paths: Iterable[str], kind: str) -> list[str]:
    """Return a message for each module that is not a linear layer or embedding in transformers.

    The list is empty if the names of the model type are not known.
    """
    known = _names().get(kind)
    if known is None:
        return []

    # PEFT converts routers, so their names in transformers do not matter.
    routers = ("block_sparse_moe.gate", "mlp.gate") if kind in _TRANSLATED else ()

    problems: list[str] = []
    for path in paths:
        name = hub_path(path, kind)
        pattern = re.sub(r"\.\d+(?=\.)", ".N", name)
        if pattern not in known and not path.endswith(routers):
            problems.append(f"transformers has no layer {name} in {kind}")
    return problems


@cache
def _names() -> dict[str, list[str]]:
    """Return model type → module names, where N stands for the number of a layer."""
    return json.loads((Path(__file__).parent / "transformers_names.json").read_text())["names"]
