"""The chunked loss at supervised positions is the full loss, and its gradients are the full gradients."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.data.batches import arrays_of, one_per_row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.errors import ConfigError
from mlx_loraplus.kernels import cross_entropy
from mlx_loraplus.kernels.choices import StepChoices
from mlx_loraplus.kernels.cross_entropy import make_loss, make_score
from mlx_loraplus.kernels.elementwise import exp
from mlx_loraplus.kernels.log_probs import make_log_probs
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from tests.conftest import CONFIGS, TinyModel, randomize_adapters
from tests.training.test_self_consistency import family

BASES = [
    (None, "affine"),
    *((bits, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (4, "mxfp4"),
    (4, "nvfp4"),
    (8, "mxfp8"),
]


def example(tokens: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(tokens), bool)
    mask[supervised] = True
    return Example(np.array(tokens, np.int32), mask, "train.jsonl:1")


BATCH = one_per_row(
    [example([1, 5, 2, 7, 3, 9, 11, 100, 50, 3], [3, 4, 8, 9]), example([4, 4, 2, 6, 1], [2, 3, 4])]
)


CHOICES = StepChoices(slice_bytes=4 * 128 * 3)  # a few tokens of the vocabulary


def compare(model: nn.Module, tolerance: float) -> None:
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    arrays = arrays_of(BATCH)
    value, gradients = nn.value_and_grad(model, make_loss(trunk_and_head, CHOICES))(model, *arrays)
    full, expected = nn.value_and_grad(model, make_loss(None))(model, *arrays)
    assert abs(value.item() / full.item() - 1) < tolerance
    logits = model(arrays[0]).flatten(0, 1)[arrays[1]]
    likeliest = (logits.argmax(axis=-1) == arrays[2]) * arrays[3]
    for score in (make_score(trunk_and_head, CHOICES), make_score(None)):
        loss, right = np.array(score(model, *arrays)).tolist()
        assert abs(loss / full.item() - 1) < tolerance
        assert right == likeliest.sum().item()
    for (name, gradient), (_, other) in zip(
        tree_flatten(gradients), tree_flatten(expected), strict=True
    ):
        error = mx.linalg.norm((gradient - other).flatten()) / mx.linalg.norm(other.flatten())
        assert error.item() < tolerance, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients_equal_the_full_logits_path(tiny: TinyModel, kind: str):
    model = tiny(kind)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    compare(model, 1e-5)


@pytest.mark.parametrize(("bits", "mode"), BASES)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_width_and_mode_of_head_tied_and_untied(
    tiny: TinyModel, kind: str, bits: int | None, mode: str
):
    model = tiny(kind, bits=bits, mode=mode)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    compare(model, 1e-5)


@pytest.mark.parametrize(
    ("kind", "target"),
    [("llama", "lm_head"), ("gemma3", "embed_tokens"), ("gemma2", "embed_tokens")],
)
def test_an_adapter_on_the_head_gets_its_gradient(tiny: TinyModel, kind: str, target: str):
    model = tiny(kind)
    attach_adapters(model, AdapterConfig(rank=4, target_modules=("q_proj", target)))
    randomize_adapters(model)
    compare(model, 1e-5)


def test_padding_of_rows_and_targets_changes_nothing(tiny: TinyModel):
    model = tiny("gemma3")
    trunk_and_head = find_trunk_and_head(model)
    single = [make_loss(trunk_and_head, CHOICES)(model, *arrays_of(one_per_row([row]))).item() for row in (
        example([1, 5, 2, 7, 3, 9, 11, 100, 50, 3], [3, 4, 8, 9]), example([4, 4, 2, 6, 1], [2, 3, 4])
    )]  # fmt: skip
    assert make_loss(trunk_and_head, CHOICES)(model, *arrays_of(BATCH)).item() == pytest.approx(
        sum(single), rel=1e-6
    )


def test_a_model_whose_head_is_not_found_still_trains(tiny: TinyModel):
    model = tiny("llama")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        @property
        def layers(self):
            return self.inner.layers

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.inner(tokens)

    assert find_trunk_and_head(Wrapped()) is None
    full = make_loss(None)(Wrapped(), *arrays_of(BATCH)).item()
    assert full == pytest.approx(
        make_loss(find_trunk_and_head(model), CHOICES)(model, *arrays_of(BATCH)).item(), rel=1e-5
    )


def test_a_head_in_half_precision_is_found_in_float32(tiny: TinyModel):
    class Larger(llama.Model):
        def __call__(self, *arguments: Any, **keywords: Any) -> mx.array:
            return 1.004 * super().__call__(*arguments, **keywords)

    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    assert find_trunk_and_head(model) is not None
    model.__class__ = Larger
    assert find_trunk_and_head(model) is None, "bfloat16 rounds by as much"


def test_too_many_logits_for_a_gpu_are_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch):
    """Arrays of 2^31 numbers break on Metal; a model whose head is not found has the most."""
    model, arrays = tiny("llama"), arrays_of(BATCH)
    monkeypatch.setattr(cross_entropy, "MOST_ELEMENTS", 2 * 16 * 128)
    functions = (make_loss(None), make_score(None), make_log_probs(None))
    for function in functions:
        function(model, *arrays)
    monkeypatch.setattr(cross_entropy, "on_gpu", lambda: True)
    for function in functions:
        function(model, *arrays)
    monkeypatch.setattr(cross_entropy, "MOST_ELEMENTS", 2 * 16 * 128 - 1)
    for function in functions:
        with pytest.raises(ConfigError, match="2 rows x 16 tokens needs an array of 4,096 logits"):
            function(model, *arrays)


def test_a_head_that_is_more_than_linear_is_not_mistaken(tiny: TinyModel):
    model = tiny("gemma2")
    model.final_logit_softcapping = 5.0  # the model now caps at 5, its config still says 30
    assert find_trunk_and_head(model) is None


def test_the_exponential_is_accurate_to_its_bound():
    x = -mx.concatenate([mx.linspace(0, 80, 200_001), mx.array([100.0, 1e4, 1e9])])
    expected = np.exp(np.array(x, np.float64))
    got = np.array(exp(x), np.float64)
    close = expected > 1e-34
    assert (
        np.abs(got[close] / expected[close] - 1) < 3e-7 + 9e-8 * np.abs(np.array(x)[close])
    ).all()
    assert got[~close].max() < 1e-34
    assert exp(mx.array(0.0)).item() == 1  # sums are rescaled by it, slice after slice


def test_a_trunk_that_demands_caches_is_called_without_any(tiny: TinyModel):
    model = tiny("llama")
    own = type(model.model)

    class Demanding(own):
        def __call__(
            self, tokens: mx.array, cache: list | None, embeddings: mx.array | None = None
        ) -> mx.array:
            return super().__call__(tokens, cache, embeddings)

    model.model.__class__ = Demanding
    tokens = mx.array([[1, 2, 3]])
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    assert mx.allclose(trunk_and_head.head(trunk_and_head.trunk(tokens)), model(tokens), atol=1e-5)


FAMILIES = [
    "gpt2",
    "mamba",
    "mamba2",
    "internlm2",
    "dbrx",
    "exaone",
    "nemotron_h",
    "rwkv7",
    "stablelm",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_found_under_other_names(name: str):
    """Their trunks and heads have names of their own, and some have other embeddings beside."""
    model, tokens = family(name), mx.array([[1, 2, 3]])
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    assert mx.allclose(trunk_and_head.head(trunk_and_head.trunk(tokens)), model(tokens), atol=1e-4)
