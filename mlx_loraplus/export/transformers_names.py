"""What transformers 5 calls the modules of mlx-lm's models, and which of its modules PEFT can adapt.

``transformers_names.json`` has, for every type of model, the linear layers and embeddings of the
class that AutoModelForCausalLM takes; scripts/judges/transformers_names writes it.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

EXPERT_NAMES = {
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}  # in block_sparse_moe (Mixtral)
# Models of text and images whose text part alone AutoModelForCausalLM takes, by the names of a text
# model.
_TEXT_ALONE = ("llama4", "qwen3_5", "qwen3_5_moe")
# Types whose experts and routers PEFT itself converts from the names in checkpoints; see
# scripts/judges/check_peft.
_CONVERTED = ("mixtral", "qwen3_moe", "olmoe")


def hub_path(path: str, kind: str) -> str:
    """Return what transformers 5 calls a module of a model of type ``kind``."""
    core = path.removeprefix("language_model.")
    return (
        core
        if core in (path, "lm_head") or kind in _TEXT_ALONE
        else f"model.language_model.{core[6:]}"
    )


def expert_parts(path: str, kind: str) -> tuple[str, str] | None:
    """Return (module, projection) of an expert's name, for ``module.experts.<number>.<projection>``."""
    module, found, leaf = path.rpartition(".switch_mlp.")
    if not found or leaf not in EXPERT_NAMES or kind not in _CONVERTED:
        return None
    return hub_path(module, kind), (
        EXPERT_NAMES[leaf] if module.endswith("block_sparse_moe") else leaf
    )


def missing_modules(paths: Iterable[str], kind: str) -> list[str]:
    """Say which modules transformers does not have as linear layers or embeddings, where it has this type."""
    known = _names().get(kind)
    if known is None:
        return []
    named = {path: hub_path(path, kind) for path in paths}
    found = {path: re.sub(r"\.\d+(?=\.)", ".N", name) for path, name in named.items()}
    routers = ("block_sparse_moe.gate", "mlp.gate") if kind in _CONVERTED else ()
    return [
        f"transformers has no layer {named[path]} in {kind}"
        for path, name in found.items()
        if name not in known and not path.endswith(routers)
    ]


@cache
def _names() -> dict[str, list[str]]:
    return json.loads((Path(__file__).parent / "transformers_names.json").read_text())["names"]
