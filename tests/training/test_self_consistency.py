"""A model that computes differently in training and generation is refused before training."""

import json
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import _get_classes

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.kernels import float32_copy
from mlx_loraplus.kernels.trunk_and_head import model_dtype
from mlx_loraplus.settings import configure
from mlx_loraplus.training import self_consistency, step_choices
from mlx_loraplus.training.self_consistency import (
    check_caches,
    is_checkpoint_sound,
    resolve_sound_checkpoint,
)
from tests.conftest import CONFIGS, TinyModel, same
from tests.training.tiny_runs import Place

FAMILIES = json.loads((Path(__file__).parents[1] / "families" / "configs.json").read_text())


def family(name: str) -> nn.Module:
    mx.random.seed(0)
    model_class, args_class = _get_classes(FAMILIES[name])
    model = model_class(args_class.from_dict(FAMILIES[name]))
    mx.eval(model.parameters())
    model.eval()
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2", "qwen3", "cohere"])
def test_sound_models_pass_and_nothing_is_disturbed(tiny: TinyModel, kind: str, dtype: mx.Dtype):
    assert kind in CONFIGS
    model = tiny(kind)
    attach_adapters(model, AdapterConfig(rank=4))
    model.set_dtype(dtype)
    model.train()
    before = mx.random.state[0].tolist()
    check_caches(model)
    assert is_checkpoint_sound(model)
    assert model.training
    assert mx.random.state[0].tolist() == before


def test_a_model_whose_caches_change_its_answers_is_refused():
    with pytest.raises(
        ml.ModelError, match=r"gives other logits with caches.*mlx-lm computes two different models"
    ):
        check_caches(family("gemma3n"))


@pytest.mark.parametrize("name", ["afm7", "kimi_k3"])
def test_blocks_that_share_a_state_are_not_checkpointed(name: str):
    model = family(name)
    attach_adapters(model, AdapterConfig(rank=4))
    assert not is_checkpoint_sound(model)
    told: list[str] = []
    assert (
        resolve_sound_checkpoint(model, configure(TrainConfig, {}), told.append, wanted=True)
        is False
    )
    assert told[0].startswith("warning: gradient checkpointing is off")
    with pytest.raises(
        ml.ConfigError, match=r"^--grad-checkpoint on gives this model wrong gradients"
    ):
        resolve_sound_checkpoint(
            model, configure(TrainConfig, {"grad_checkpoint": "on"}), told.append, wanted=True
        )
    assert (
        resolve_sound_checkpoint(model, configure(TrainConfig, {}), told.append, wanted=False)
        is False
    )


def test_a_model_that_computes_nan_is_refused(tiny: TinyModel):
    model = tiny("llama")
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, mx.nan)
    with pytest.raises(ml.ModelError, match="computes NaN instead of logits"):
        check_caches(model)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.layers.1.mlp.up_proj", mx.nan, "holds NaN"),
        ("model.norm", mx.inf, "holds infinite values"),
        ("model.layers.0.self_attn.v_proj", 1e30, r"holds values above 1e\+12"),
        ("lm_head", 0.0, "holds only zeros"),
        ("model.embed_tokens", 0.0, "holds only zeros"),
    ],
)
def test_the_array_that_is_damaged_is_named_with_its_file(
    place: Place, name: str, value: float, told: str
):
    """Also where no layer of the model has an effect, so that none could be adapted."""
    folder = place.folder / "model"
    file = folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    weights[f"{name}.weight"] = mx.full(weights[f"{name}.weight"].shape, value)
    mx.save_safetensors(str(file), weights)
    model, tokenizer = ml.load(folder)
    told = rf"its array {name}\.weight in \S+model\.safetensors {told}: get the model again"
    settings = {"data": str(place.folder / "data"), "iters": 1, "valid_split": 0}
    with pytest.raises(ml.ModelError, match=told):
        ml.finetune(model, tokenizer, adapter_path=str(place.folder / "run"), **settings)
    with pytest.raises(ml.ModelError, match=told):
        ml.complete(ml.load(folder)[0], tokenizer, "1 + 1 =", max_tokens=1)


def test_a_head_of_zeros_can_be_trained(tiny: TinyModel):
    model = tiny("llama")
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    attach_adapters(model, AdapterConfig(rank=2, target_modules=("lm_head",)))
    check_caches(model)


class WithOtherAnswers(llama.Model):
    """A model whose pass with caches, as in generation, gives other logits."""

    def __call__(self, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:
        logits = super().__call__(inputs, cache=cache, **others)
        return logits if cache is None else -logits


class WithSlightlyOtherAnswers(llama.Model):
    def __call__(self, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:
        logits = super().__call__(inputs, cache=cache, **others)
        return logits if cache is None else 1.1 * logits


def test_half_precision_is_decided_in_float32(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    model.set_dtype(mx.bfloat16)
    check_caches(model)
    before = model.parameters()

    # The gradients with and without checkpointing are compared in float32.
    types: set[mx.Dtype] = set()
    gradients = self_consistency._gradients

    def seen(model: nn.Module, tokens: mx.array) -> mx.array:
        types.add(model_dtype(model))
        return gradients(model, tokens)

    monkeypatch.setattr(self_consistency, "_gradients", seen)
    assert is_checkpoint_sound(model)
    assert types == {mx.float32}

    # Half precision alone allows a tenth.
    model.__class__ = WithSlightlyOtherAnswers
    with pytest.raises(ml.ModelError, match="they differ by 10%"):
        check_caches(model)
    assert same(model.parameters(), before)

    # Without memory for the copy, nothing else is possible.
    monkeypatch.setattr(float32_copy, "room_for_copy", lambda: 0)
    check_caches(model)
    types.clear()
    assert is_checkpoint_sound(model)
    assert types == {mx.bfloat16}


def test_runs_and_sweeps_refuse_it_before_the_first_step(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    model.__class__ = WithOtherAnswers
    data, folder = str(place.folder / "data"), str(place.folder / "new")
    with pytest.raises(ml.ModelError, match="gives other logits with caches"):
        ml.finetune(model, tokenizer, data=data, adapter_path=folder, iters=1, rank=4)
    model, tokenizer = ml.load(str(place.folder / "model"))
    model.__class__ = WithOtherAnswers
    with pytest.raises(ml.ModelError, match="gives other logits with caches"):
        ml.sweep_rates(model, tokenizer, data=data, adapter_path=folder, iters=1, rank=4)


def test_a_run_acts_on_wrong_gradients(place: Place, monkeypatch: pytest.MonkeyPatch):
    """The verdict itself is tested above; no family that has it can read the letters."""
    for module in (step_choices, self_consistency):
        monkeypatch.setattr(module, "is_checkpoint_sound", lambda model: False)
    with pytest.raises(
        ml.ConfigError, match='grad_checkpoint="on" gives this model wrong gradients'
    ):
        place.run("on", iters=1, grad_checkpoint="on")
    place.run("auto", iters=1)


class WithoutLayers(llama.Model):
    """A model whose code fails, as that of some families does if a kind of layer is missing."""

    def __call__(self, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:
        raise IndexError("list index out of range")


def test_a_model_that_mlx_lm_cannot_run_is_one_line(tiny: TinyModel):
    model = tiny("llama")
    model.__class__ = WithoutLayers
    with pytest.raises(ml.ModelError, match=r"can't run this llama model \(IndexError: list"):
        check_caches(model)


def test_evaluation_refuses_a_model_that_answers_as_another(place: Place):
    """Its loss would be that of one model, and its answers those of another."""
    model, tokenizer = ml.load(str(place.folder / "model"))
    model.__class__ = WithOtherAnswers
    with pytest.raises(ml.ModelError, match="gives other logits with caches"):
        ml.evaluate(model, tokenizer, data=str(place.folder / "data"))
