"""A kind of layer that a family's code in mlx-lm does not know is refused, and no other."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import _get_classes
from transformers import CONFIG_MAPPING

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.known_models import KNOWN
from mlx_loraplus.models.layer_kind_names import check_kind_names
from mlx_loraplus.models.loading import load_base
from mlx_loraplus.models.skeleton import make_skeleton
from tests.families.walk import CONFIGS, write_folder


def is_known(kind: str) -> bool:
    """Return whether mlx-lm has a family; some need a package that may not be installed."""
    try:
        _get_classes({"model_type": kind})
    except (Exception, SystemExit):  # noqa: BLE001
        return False
    return True


def with_list(config: dict[str, Any], setting: str, kinds: list[Any]) -> dict[str, Any]:
    """Return a copy of a config whose language model has a list of kinds."""
    changed = copy.deepcopy(config)
    changed.get("text_config", changed)[setting] = kinds
    return changed


@pytest.mark.parametrize("name", [*filter(is_known, CONFIGS)])
def test_every_family_refuses_a_kind_that_it_does_not_know(name: str):
    check_kind_names(CONFIGS[name])
    for setting in ("layer_types", "layers_block_type", "mlp_layer_types"):
        for kind in ("mystery_attention", 3, None, ["full_attention"]):
            with pytest.raises(
                ModelError, match=rf"in layer 0 \({setting}\), a type that mlx-lm's"
            ):
                check_kind_names(with_list(CONFIGS[name], setting, [kind]))


@pytest.mark.parametrize("name", [*filter(is_known, CONFIG_MAPPING)])
def test_the_kinds_that_transformers_lists_are_accepted(name: str):
    config = CONFIG_MAPPING[name]().to_dict()
    if name == "minimax":  # mlx-lm computes full attention in every layer, as in MiniMax M2
        with pytest.raises(ModelError, match="linear_attention"):
            check_kind_names(config)
        return
    check_kind_names(config)


def test_the_kinds_of_all_named_models_are_accepted():
    for known in KNOWN.values():
        check_kind_names(known.config)


@pytest.mark.parametrize(
    ("name", "kind", "is_accepted"),
    [
        ("qwen3", "sliding_attention", True),
        ("qwen3", "linear_attention", False),
        ("qwen3_next", "linear_attention", True),
        ("llama", "conv", False),
        ("lfm2", "conv", True),
        ("gemma3_text", "chunked_attention", False),
        ("llama4", "chunked_attention", True),
        ("granite", "attention", True),
        ("granite", "mamba", False),
        ("granitemoehybrid", "mamba", True),
        ("granitemoehybrid", "linear_attention", True),
        ("gemma4_text", "mamba", False),
    ],
)
def test_a_kind_belongs_to_families(name: str, kind: str, is_accepted: bool):
    config = with_list(CONFIGS[name], "layer_types", [kind])
    if is_accepted:
        check_kind_names(config)
        return
    with pytest.raises(ModelError, match=f'its config.json has "{kind}" in layer 0'):
        check_kind_names(config)


def test_entries_beyond_the_layers_are_not_read():
    layers = CONFIGS["llama"]["num_hidden_layers"]
    kinds = ["full_attention"] * layers
    check_kind_names(with_list(CONFIGS["llama"], "layer_types", [*kinds, "mystery_attention"]))


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3", "gemma4_text", "llama"])
def test_a_folder_and_a_skeleton_are_refused(name: str, tmp_path: Path):
    config = CONFIGS[name]
    part = config.get("text_config", config)
    write_folder(name, tmp_path)
    kinds = ["mystery_attention"] * part["num_hidden_layers"]
    changed = with_list(config, "layer_types", kinds)
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"can't be used: .*mystery_attention.*does not know"):
        load_base(tmp_path)
    with pytest.raises(ModelError, match=r"mystery_attention.*does not know"):
        make_skeleton(changed)
