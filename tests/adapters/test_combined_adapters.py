"""Several weighted adapters: the weighted sum of their changes, for outputs and weights."""

import itertools
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_loraplus import AdapterError, ConfigError, fuse_adapter, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.combined_adapters import load_adapters, parse_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from tests.conftest import TinyModel, make_model, randomize_adapters, same

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
KINDS = [
    {"target_modules": ("all-linear", "embed_tokens")},
    {"adapter": "dora", "train_modules": ("norms",)},
    {"adapter": "vera", "rank": 4},
    {"init": "pissa"},
]


def write(tiny: TinyModel, kind: str, folder: Path, seed: int, **settings) -> dict[str, mx.array]:
    """Save an adapter, and return the merged weights by path."""
    model = tiny(kind)
    attach_adapters(model, AdapterConfig(**{"rank": 3, **settings}))
    randomize_adapters(model, seed=seed)
    save_adapter(model, folder)
    adapters = find_adapters(model)
    return {
        path: adapter.merged(full_weight(adapter.base, mx.float32))
        for path, adapter in adapters.items()
    }


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
@pytest.mark.parametrize("settings", KINDS)
def test_a_mixture_is_the_weighted_sum(
    tiny: TinyModel,
    tmp_path: Path,
    kind: str,
    settings: dict,
):
    first = write(tiny, kind, tmp_path / "a", 1, **settings)
    second = write(tiny, kind, tmp_path / "b", 2, target_modules=("q_proj", "up_proj"))
    model, untouched = tiny(kind), dict(tiny(kind).named_modules())
    load_adapters(model, {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): -0.3})
    before = model(TOKENS)
    fuse_adapter(model)

    assert mx.abs(model(TOKENS) - before).max() < 2e-5 * mx.abs(before).max() + 1e-5

    modules = dict(model.named_modules())
    for path in first | second:
        base = untouched[path].weight
        wanted = base + 0.7 * (first.get(path, base) - base) - 0.3 * (second.get(path, base) - base)
        assert mx.allclose(modules[path].weight, wanted, atol=1e-6)


def test_modules_trained_in_full_are_mixed_too(tiny: TinyModel, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 2)):
        write(tiny, "llama", tmp_path / name, seed, train_modules=("model.norm",))
    alone = []
    for name in ("a", "b"):
        model = tiny("llama")
        load_adapter(model, tmp_path / name)
        alone.append(model.model.norm.weight)
    model = tiny("llama")
    base = model.model.norm.weight
    load_adapters(model, {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 2.0})
    wanted = base + 0.5 * (alone[0] - base) + 2 * (alone[1] - base)

    assert mx.allclose(model.model.norm.weight, wanted, atol=1e-6)


def test_one_adapter_with_weight_one_is_loaded_unmerged(tiny: TinyModel, tmp_path: Path):
    write(tiny, "llama", tmp_path / "a", 1)
    models = tiny("llama"), tiny("llama")
    load_adapter(models[0], tmp_path / "a")
    load_adapters(models[1], {str(tmp_path / "a"): 1.0})
    assert same(models[0].parameters(), models[1].parameters())


def test_an_adapter_with_its_own_base_is_refused(tiny: TinyModel, tmp_path: Path):
    write(tiny, "llama", tmp_path / "a", 1)
    write(tiny, "llama", tmp_path / "b", 2, init="loftq", quantize_group_size=32)
    with pytest.raises(AdapterError, match=r"b brings its own quantized base \(--quantize\)"):
        load_adapters(tiny("llama"), {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})


def test_adapters_and_their_weights_are_parsed(tmp_path: Path):
    odd = tmp_path / "run:2"
    odd.mkdir()

    assert parse_adapters(["a:0.7", "b:-1", "c", "d:e", str(odd)]) == {
        "a": 0.7,
        "b": -1,
        "c": 1,
        "d:e": 1,
        str(odd): 1,
    }

    for words in (["a", "a:0.5"], ["a:0.5", "./a/:0.5"], ["a", "a/adapters.safetensors:2"]):
        with pytest.raises(ConfigError, match="give each folder once"):
            parse_adapters(words)
    for words in (["a:0"], ["a:nan"], ["a:inf"], ["a:1e30"], ["a:-1001"]):
        with pytest.raises(
            ConfigError, match=r"give a weight other than 0, of at most 1000, as a:0\.7"
        ):
            parse_adapters(words)


@pytest.mark.parametrize("weights", [(0.5, -1.0), (1.0, 0.25)])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_mixtures_on_head_and_embeddings_predict_and_fuse(
    tmp_path: Path,
    kind: str,
    weights: tuple,
):
    heads = ("lm_head", "embed_tokens") if kind == "llama" else ("embed_tokens",)
    for name, rank, targets in (("a", 4, ("all-linear", *heads)), ("b", 2, heads)):
        model = make_model(kind)
        attach_adapters(model, AdapterConfig(rank=rank, target_modules=targets))
        randomize_adapters(model)
        save_adapter(model, tmp_path / name)
    mixed = load_adapters(
        make_model(kind),
        dict(zip((str(tmp_path / "a"), str(tmp_path / "b")), weights, strict=True)),
    )
    tokens = mx.array([[1, 5, 2, 7, 3]])
    expected, trunk_and_head = mixed(tokens), find_trunk_and_head(mixed)

    assert trunk_and_head is not None
    assert mx.allclose(trunk_and_head.head(trunk_and_head.trunk(tokens)), expected, atol=1e-4)

    fuse_adapter(mixed)

    assert mx.allclose(mixed(tokens), expected, atol=1e-3)


PARTS = {
    "lora": {}, "lora of rank 1 on the last block": {"rank": 1, "num_layers": 1}, "dora": {"adapter": "dora"},
    "vera": {"adapter": "vera"}, "pissa": {"init": "pissa"}, "norms": {"train_modules": ("norms",)},
    "head": {"target_modules": ("q_proj", "lm_head")}, "embeddings": {"target_modules": ("embed_tokens",), "rank": 2},
    "head of rank 5": {"target_modules": ("lm_head",), "rank": 5},
    "embeddings in full": {"train_modules": ("embed_tokens",)},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "pair", list(itertools.combinations_with_replacement(PARTS, 2)), ids=" + ".join
)
def test_every_mixture_is_fused(
    tmp_path: Path,
    kind: str,
    pair: tuple[str, str],
):
    for number, part in enumerate(pair):
        model = make_model(kind)
        try:
            attach_adapters(model, AdapterConfig(**{"rank": 4, **PARTS[part]}))
        except ConfigError:
            pytest.skip(f"{kind} has no adapter {part}")
        randomize_adapters(model, seed=number + 1)
        save_adapter(model, tmp_path / str(number))
    model = make_model(kind)
    load_adapters(model, {str(tmp_path / "0"): 0.6, str(tmp_path / "1"): -0.4})
    before = model(TOKENS)
    fuse_adapter(model)

    assert not find_adapters(model)
    assert mx.abs(model(TOKENS) - before).max() < 1e-4 * mx.abs(before).max() + 1e-5
