"""What fuse measures, against the plain formulas; widths follow from it; memory stays near the model's own size."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2
from mlx_lm.utils import load_model

from mlx_loraplus import AdapterError
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import EXPERTS, QUANTIZED, full_weight
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.command_config import FuseConfig
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.export.fuse import fuse_adapter, save_fused, size_of
from mlx_loraplus.export.fuse_quality import (
    MIN_COSINE,
    collect_answers,
    gather_inputs,
    layer_change_table,
    losses,
    sample_examples,
)
from mlx_loraplus.models.loading import load_folder_tokenizer
from mlx_loraplus.settings import configure
from scripts.tiny_model import write_tiny_model
from tests.conftest import CONFIGS, TinyModel, randomize_adapters
from tests.export.test_fuse import TOKENS, Tokenizer

KINDS = [{}, {"adapter": "dora"}, {"adapter": "vera"}, {"init": "pissa"}]


def adapted(
    tiny: TinyModel,
    kind: str,
    size: float,
    bits: int | None = 4,
    mode: str = "affine",
    **settings: Any,
):
    model = tiny(kind, bits=bits, mode=mode)
    attach_adapters(model, AdapterConfig(rank=4, **settings))
    randomize_adapters(model, size=size)
    return model


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_figures_are_the_plain_formulas(tiny: TinyModel, kind: str, settings: dict):
    model = adapted(tiny, kind, 0.1, **settings)
    weights = {}
    for path, adapter in find_adapters(model).items():
        base = full_weight(adapter.base, mx.float32)
        weights[path] = base, adapter.merged(base)
    changes = fuse_adapter(model, bits=4)
    modules = dict(model.named_modules())
    assert {change.path for change in changes} == weights.keys()
    for change in changes:
        base, merged = (np.array(array, np.float64).ravel() for array in weights[change.path])
        wanted, made = (
            merged - base,
            np.array(full_weight(modules[change.path], mx.float32)).ravel() - base,
        )
        assert change.ratio == pytest.approx(
            np.linalg.norm(wanted) / np.linalg.norm(base), rel=1e-4
        )
        size = np.linalg.norm(wanted) * np.linalg.norm(made)
        assert change.cosine == pytest.approx(wanted @ made / size, abs=1e-4)
        assert change.error == pytest.approx(
            np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3
        )
        assert (change.before, change.after) == ("4 bits", "4 bits")
    assert "q_proj" in layer_change_table(changes)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
def test_auto_keeps_every_change(tiny: TinyModel, kind: str, settings: dict, mode: str):
    model = adapted(tiny, kind, 0.03, mode=mode, **settings)
    before, dropped = model(TOKENS), tiny(kind, bits=4, mode=mode)(TOKENS)
    changes = fuse_adapter(model)
    assert all(change.cosine >= MIN_COSINE for change in changes)
    if (
        mode == "affine"
    ):  # the others' embeddings return bfloat16, which costs as much as the change
        assert mx.linalg.norm(model(TOKENS) - before) < 0.5 * mx.linalg.norm(dropped - before)


def test_auto_takes_the_narrowest_width_that_keeps_the_change(tiny: TinyModel, tmp_path: Path):
    model = adapted(tiny, "llama", 0.1, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    for path, adapter in find_adapters(model).items():
        ratio = {"q_proj": 0.0, "k_proj": 0.002, "v_proj": 0.03, "o_proj": 1.0}[
            path.rpartition(".")[2]
        ]
        wanted = ratio * mx.linalg.norm(full_weight(adapter.base, mx.float32))
        adapter["lora_b"] = adapter["lora_b"] * wanted / mx.linalg.norm(adapter.delta())
    changes = {change.path.rpartition(".")[2]: change.after for change in fuse_adapter(model)}
    assert changes == {
        "q_proj": "4 bits",
        "k_proj": "float32",
        "v_proj": "8 bits",
        "o_proj": "4 bits",
    }
    save_fused(model, Tokenizer(), CONFIGS["llama"], tmp_path, tmp_path / "fused")  # pyright: ignore[reportArgumentType]
    loaded, _ = load_model(tmp_path / "fused")
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))


def test_the_narrowest_that_keeps_it_is_not_skipped(tiny: TinyModel):
    for bits in (5, 6):
        model = adapted(tiny, "llama", 0.1, bits=4, target_modules=("v_proj",))
        wide = fuse_adapter(model, bits=bits)[0]
        model = adapted(tiny, "llama", 0.1, bits=4, target_modules=("v_proj",))
        auto = fuse_adapter(model)[0]
        assert (wide.cosine >= MIN_COSINE) == (int(auto.after[0]) <= bits)


def test_loftq_fuses_over_its_own_base(tiny: TinyModel):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4, init="loftq", quantize_group_size=32))
    randomize_adapters(model)
    adapters = find_adapters(model)
    wanted = {
        path: adapter.merged(full_weight(adapter.base, mx.float32))
        for path, adapter in adapters.items()
    }
    changes, modules = fuse_adapter(model), dict(model.named_modules())
    for change in changes:
        assert change.before == "4 bits"
        assert change.cosine >= MIN_COSINE
        off = mx.linalg.norm(
            full_weight(modules[change.path], mx.float32) - wanted[change.path]
        ).item()
        assert off == pytest.approx(change.error * math.sqrt(change.sums[1]), rel=1e-3)


@pytest.mark.parametrize(
    ("b", "scale", "reason"),
    [
        (math.nan, 2.0, "its adapter holds values that are not finite, as after a training that diverged"),
        (1e30, 2.0, r"its adapter holds values up to 1e\+30, multiplied by 2, as after a training that diverged"),
        (1.0, 1e30, r"its adapter holds values up to 1, multiplied by 1e\+30; use a smaller scale"),
    ],
)  # fmt: skip
def test_a_change_that_is_not_finite_is_refused(
    tiny: TinyModel, b: float, scale: float, reason: str
):
    model = adapted(tiny, "llama", 0.1)
    for adapter in find_adapters(model).values():
        adapter["lora_b"] = mx.full(adapter["lora_b"].shape, b)
        adapter.scale = scale
    with pytest.raises(AdapterError, match=rf"the change of .*_proj is not finite: {reason}"):
        fuse_adapter(model)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
def test_losses_are_those_of_whole_logits(tiny: TinyModel, kind: str):
    model = adapted(tiny, kind, 0.3, bits=None)
    examples = examples_of(5, 9, 17)
    rows = [example.tokens for example in examples]
    adapters, logs = collect_answers(model, examples), []
    for _ in range(2):
        logits = [
            nn.log_softmax(model(mx.array(row[None])).astype(mx.float32))[0, 2:-1] for row in rows
        ]
        logs.append(mx.concatenate(logits))
        model.load_weights(
            [(name, 0 * a) for name, a in tree_flatten(model.trainable_parameters())], strict=False
        )
    found = losses({"adapter": adapters, "without": collect_answers(model, examples)})
    targets = mx.array(np.concatenate([row[3:] for row in rows]))[:, None]
    for log, name in zip(logs, ("adapter", "without"), strict=True):
        assert found[name] == pytest.approx(
            -mx.take_along_axis(log, targets, axis=-1).mean().item(), rel=1e-4
        )
    kl = (mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-3)


def examples_of(*sizes: int) -> list[Example]:
    chance = np.random.default_rng(0)
    rows = [chance.integers(0, 128, size) for size in sizes]
    return [Example(row.astype(np.int32), np.arange(len(row)) > 2, "row") for row in rows]


def test_samples_fit_into_a_table_of_positions(tmp_path: Path):
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 96, "vocab_size": 128}
    config = settings | {"model_type": "gpt2", "n_ctx": 96, "layer_norm_epsilon": 1e-5}
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    tokenizer = load_folder_tokenizer(write_tiny_model(tmp_path / "model"))
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"text": "x" * 500}) + "\n")

    run = configure(TrainConfig, {"data": [str(data)], "max_seq_length": 2048})
    sample = sample_examples(run, model, tokenizer, FuseConfig(data=(str(data),)), print)
    assert sample is not None
    assert 32 <= max(map(len, (example.tokens for example in sample[0]))) <= 97
    collect_answers(model, sample[0])


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_inputs_are_what_the_layers_are_given(tiny: TinyModel, kind: str):
    model = adapted(tiny, kind, 0.1, bits=None)
    adapters = find_adapters(model)
    inputs = gather_inputs(model, examples_of(7, 5))
    assert find_adapters(model) == adapters
    assert inputs.keys() == {
        path for path, adapter in adapters.items() if not isinstance(adapter.base, EXPERTS)
    }
    q, k = (inputs[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert [x.shape for x in q] == [(7, 64), (5, 64)]
    assert all(mx.array_equal(a, b) for a, b in zip(q, k, strict=True))
    if kind == "mixtral":
        first = model.layers[0].input_layernorm(
            model.model.embed_tokens(mx.array(examples_of(7, 5)[0].tokens))
        )
        assert mx.allclose(q[0], first, atol=1e-5)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_known_inputs_keep_a_change_at_the_base_s_width(tiny: TinyModel, kind: str, settings: dict):
    kept = []
    for known in (False, True):
        model = adapted(
            tiny, kind, 0.02, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), **settings
        )
        rows = examples_of(*[24] * 40)
        before = collect_answers(model, rows[:8])
        inputs = gather_inputs(model, rows[8:]) if known else None
        changes = fuse_adapter(model, bits=4, inputs=inputs)
        kept.append(losses({"adapter": before, "fused": collect_answers(model, rows[:8])})["kl"])
        for change in changes:
            assert (change.output_cosine is None) == (not known)
            assert change.after == "4 bits"
    assert kept[1] < kept[0]


@pytest.mark.parametrize("fuse", [{}, {"bits": 4}, {"dequantize": True}])
def test_fusing_takes_hardly_more_memory_than_the_larger_model(fuse: dict):
    from mlx_lm.models import llama

    config = CONFIGS["llama"] | {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "intermediate_size": 2048,
        "vocab_size": 8192,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=64, bits=4)
    attach_adapters(model, AdapterConfig(rank=8, target_modules=("all-linear", "embed_tokens")))
    randomize_adapters(model, size=0.01)
    mx.eval(model.parameters())
    whole = sum(
        4 * full_weight(m, mx.float32).size
        for _, m in model.named_modules()
        if isinstance(m, QUANTIZED)
    )
    before, active = size_of(model), mx.get_active_memory()
    mx.reset_peak_memory()
    fuse_adapter(model, **fuse)
    above = mx.get_peak_memory() - active - max(0, size_of(model) - before)
    assert whole > 100e6
    assert above < 60e6
