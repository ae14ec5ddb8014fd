"""A fused model has the names, shapes and types of its base's files, whatever mlx-lm makes of them."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export.base_tensor_names import has_base_form, in_base_form, stored_tensors
from mlx_loraplus.export.fuse import fuse_adapter, save_fused
from mlx_loraplus.export.fuse_command import renamed_weights_note
from mlx_loraplus.models.loading import load_base, stored_dtypes
from tests.conftest import CONFIGS, make_model, randomize_adapters
from tests.families.walk import CONFIGS as FAMILIES

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
Tensors = dict[str, mx.array]


class Tokenizer:
    """What save_fused asks of a tokenizer."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def split_experts(weights: Tensors, rename: dict[str, str]) -> Tensors:
    """Return a checkpoint with a tensor for each expert."""
    tensors: Tensors = {}
    for name, array in weights.items():
        found = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name)
        if found is None:
            tensors[name] = array
            continue
        for number, weight in enumerate(array):
            leaf = rename.get(found[2], found[2])
            tensors[f"{found[1]}.experts.{number}.{leaf}.weight"] = weight
    return tensors


def join_latent(weights: Tensors) -> Tensors:
    """Return a checkpoint with one projection for the keys and values of latent attention."""
    tensors: Tensors = {}
    for name, array in weights.items():
        if name.endswith("embed_q.weight"):
            values = weights[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            tensors[name.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            tensors[name] = array
    return tensors


def join_gate_and_up(weights: Tensors) -> Tensors:
    """Return a checkpoint with the stacked experts of Granite."""
    tensors: Tensors = {}
    for name, array in weights.items():
        if "switch_mlp.gate_proj" in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            joined = mx.concatenate([array, up], axis=1)
            tensors[name.replace("switch_mlp.gate_proj", "input_linear")] = joined
        elif "switch_mlp.up_proj" not in name:
            tensors[name.replace("switch_mlp.down_proj", "output_linear")] = array
    return tensors


CHECKPOINTS = {  # type → how its checkpoint differs from mlx-lm's weights
    "mixtral": lambda weights: split_experts(weights, W),
    "qwen3_moe": lambda weights: split_experts(weights, {}),
    "olmoe": lambda weights: split_experts(weights, {}),
    "qwen2_moe": lambda weights: split_experts(weights, {}),
    "granitemoe": join_gate_and_up,
    "deepseek_v3": lambda weights: join_latent(split_experts(weights, {})),
}


def write_base(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: mx.contiguous(array.astype(mx.bfloat16)) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def weights_of_family(kind: str) -> tuple[dict[str, Any], Tensors]:
    from mlx_lm.utils import _get_classes

    mx.random.seed(0)
    config = FAMILIES[kind]
    model_class, args_class = _get_classes(config)
    return config, dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_fused_folder_has_the_tensors_of_its_base(tmp_path: Path, kind: str):
    config, weights = weights_of_family(kind)
    base = write_base(tmp_path / "base", config, CHECKPOINTS[kind](weights))
    model, config = load_base(base)
    attach_adapters(model, AdapterConfig(rank=2))
    randomize_adapters(model)
    fuse_adapter(model, dtypes=stored_dtypes(base))
    save_fused(model, Tokenizer(), config, base, tmp_path / "fused")  # pyright: ignore[reportArgumentType]

    before, after = stored_tensors(base), stored_tensors(tmp_path / "fused")
    assert {name: (array.shape, array.dtype) for name, array in after.items()} == {
        name: (array.shape, array.dtype) for name, array in before.items()
    }
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert any("expert" in name or "_linear" in name for name in changed)
    assert not any("norm" in name or "embed" in name for name in changed)
    assert renamed_weights_note(base, tmp_path / "fused") is None

    # mlx-lm alone computes what the fused model computes.
    stock, _ = load_model(tmp_path / "fused")
    stock.set_dtype(mx.float32)
    expected = model(TOKENS)
    assert mx.abs(stock(TOKENS) - expected).max() < 1e-5 * mx.abs(expected).max()


def test_a_quantized_fuse_keeps_the_names_of_mlx_lm(tmp_path: Path):
    base = write_base(
        tmp_path / "base",
        CONFIGS["mixtral"],
        split_experts(dict(tree_flatten(make_model("mixtral").parameters())), W),
    )
    model, config = load_base(base)
    attach_adapters(model, AdapterConfig(rank=2))
    fuse_adapter(model, bits=4)
    save_fused(model, Tokenizer(), config, base, tmp_path / "fused")  # pyright: ignore[reportArgumentType]
    names = stored_tensors(tmp_path / "fused")
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj.scales" in names
    load_model(tmp_path / "fused")


class Odd(nn.Module):
    """A model whose ``sanitize`` does everything that those of mlx-lm do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.q, self.k = nn.Linear(4, 6, bias=False), nn.Linear(4, 2, bias=False)
        self.conv = nn.Conv1d(1, 4, 3, bias=False)
        self.plain = nn.Linear(4, 4)
        self.rates = mx.ones((4,))
        self.unit = nn.Linear(4, 3, bias=False)

    def sanitize(self, weights: Tensors) -> Tensors:
        weights = {name.removeprefix("model."): array for name, array in weights.items()}
        weights.pop("lm_head.weight", None)
        if "qk.weight" not in weights:
            return weights
        weights["q.weight"], weights["k.weight"] = mx.split(weights.pop("qk.weight"), [6])
        weights["conv.weight"] = weights["conv.weight"].moveaxis(2, 1)
        weights["norm.weight"] = weights["norm.weight"] + 1.0
        lengths = mx.linalg.norm(weights["unit.weight"], axis=1, keepdims=True)
        weights["unit.weight"] = weights["unit.weight"] / lengths
        weights["rates"] = -mx.exp(weights.pop("log_rates").astype(mx.float32))
        return weights


def odd(folder: Path) -> tuple[Odd, Path]:
    """Return a model and its base."""
    folder.mkdir(exist_ok=True)
    mx.random.seed(0)
    sizes = {
        "model.norm.weight": (4,), "model.qk.weight": (8, 4), "model.conv.weight": (4, 1, 3),
        "model.plain.weight": (4, 4), "model.plain.bias": (4,), "model.log_rates": (4,),
        "model.unit.weight": (3, 4), "lm_head.weight": (9, 4),
    }  # fmt: skip
    tensors = {name: 0.1 * mx.random.normal(size) for name, size in sizes.items()}
    base = write_base(folder / "base", {"model_type": "odd"}, tensors)
    model = Odd()
    model.load_weights(list(model.sanitize(stored_tensors(base)).items()))
    mx.eval(model.parameters())
    return model, base


def test_renamed_split_transposed_and_shifted_tensors_are_inverted(tmp_path: Path):
    model, base = odd(tmp_path)
    model.q.weight, model.plain.weight = 2 * model.q.weight, 3 * model.plain.weight
    model.conv.weight, model.norm.weight = 4 * model.conv.weight, 5 * model.norm.weight
    assert has_base_form(model, base)

    written, before = in_base_form(model, base), stored_tensors(base)
    assert list(written) == [name for name in before if name != "lm_head.weight"]
    assert mx.array_equal(written["model.qk.weight"][:6], 2 * before["model.qk.weight"][:6])
    assert mx.array_equal(written["model.qk.weight"][6:], before["model.qk.weight"][6:])
    assert mx.array_equal(written["model.conv.weight"], 4 * before["model.conv.weight"])
    assert mx.array_equal(written["model.plain.weight"], 3 * before["model.plain.weight"])
    for name in ("model.log_rates", "model.unit.weight"):
        assert mx.array_equal(written[name], before[name])
    again = model.sanitize(written)
    assert mx.allclose(again["norm.weight"], model.norm.weight, rtol=0.01)


def test_what_can_not_be_inverted_is_not_written_in_another_form(tmp_path: Path):
    model, base = odd(tmp_path)
    model.rates = 2 * model.rates
    assert not has_base_form(model, base)

    model, base = odd(tmp_path / "unit")
    model.unit.weight = 2 * model.unit.weight
    assert not has_base_form(model, base)

    model, base = odd(tmp_path / "again")
    model.more = mx.ones((3,))
    assert not has_base_form(model, base)


def test_weights_under_other_names_or_shapes_are_noted(tmp_path: Path):
    _, base = odd(tmp_path)
    tensors = stored_tensors(base)
    assert renamed_weights_note(base, base) is None
    other = tensors | {"model.conv.weight": mx.zeros((4, 3, 1)), "q.weight": mx.zeros((6, 4))}
    fused = write_base(tmp_path / "fused", {}, other)
    note = renamed_weights_note(base, fused)
    assert note is not None
    assert "reshaped 2 weights of it, such as model.conv.weight; for" in note


def test_experts_of_a_dequantized_model_are_noted(tmp_path: Path):
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    quantized = write_base(
        tmp_path / "base", {}, {f"{name}.{leaf}": mx.ones((2, 2)) for leaf in ("weight", "scales")}
    )
    assert renamed_weights_note(quantized, quantized) is None
    plain = write_base(
        tmp_path / "fused", {}, {f"{name}.weight": mx.ones((2, 2)), "norm": mx.ones((2,))}
    )
    assert "1 weight of" in (renamed_weights_note(quantized, plain) or "")
