"""Tiny models with adapters, and the arrays around them, for the optimizer's tests."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, mixtral

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
Arrays = dict[str, mx.array]


def plain_config(**settings) -> OptimizerConfig:
    """A constant rate of 1e-3, B at 16 times it, with no warm-up and no clipping, but for what is given."""
    plain = {
        "learning_rate": 1e-3,
        "lr_ratio": 16.0,
        "schedule": "constant",
        "warmup": 0,
        "max_grad_norm": 0.0,
    }
    return OptimizerConfig(**plain | settings)


def tiny_llama(hidden: int = 16, layers: int = 2) -> llama.Model:
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=2 * hidden,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=20,
            tie_word_embeddings=False,
        )
    )


def tiny_mixtral() -> mixtral.Model:
    mx.random.seed(0)
    return mixtral.Model(
        mixtral.ModelArgs(
            model_type="mixtral",
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
    )


def attached(
    model: nn.Module, *targets: str, alpha: float = 8.0, **settings
) -> tuple[nn.Module, dict[str, str]]:
    """The model with rank-4 adapters whose A always start from the same numbers, and its groups."""
    mx.random.seed(1)
    targets = targets or ("all-linear",)
    trainable = attach_adapters(
        model, AdapterConfig(rank=4, alpha=alpha, target_modules=targets, **settings)
    )
    return model, dict(trainable.groups)


def trainables(model: nn.Module) -> Arrays:
    return dict(tree_flatten(model.trainable_parameters()))


def random_like(arrays: Arrays, seed: int) -> dict:
    """A tree of gradients drawn for every array."""
    keys = mx.random.split(mx.random.key(seed), len(arrays))
    return tree_unflatten(
        [
            (name, mx.random.normal(a.shape, key=key))
            for (name, a), key in zip(arrays.items(), keys, strict=True)
        ]
    )


def equal_bits(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        mx.array_equal(one[name], other[name]).item() for name in one
    )
