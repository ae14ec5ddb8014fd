"""LoRA layers over every kind of base that mlx-lm's models have: linear, embedding and expert (switch) layers.

y = W x + s B A x, with A random and B = 0 at the start, so that attaching changes nothing (Hu et al., arXiv 2106.09685;
the start is the LoRA+ paper's Init[1], arXiv 2402.12354 §3). The base stays a child and stays frozen. A and B are
float32 whatever the base is, and are cast to the activations' type where they meet them.

The names and shapes of the parameters are mlx-lm's, so what is saved loads there:

=====================  ====================  =====================
layer                  ``lora_a``            ``lora_b``
=====================  ====================  =====================
LoRALinear             (in, rank)            (rank, out)
LoRAEmbedding          (vocabulary, rank)    (rank, hidden)
LoRASwitchLinear       (experts, rank, in)   (experts, out, rank)
=====================  ====================  =====================
"""

import math
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .dropout import Dropout


@mx.custom_function
def add_product(y: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return y + x A B: y (..., out), x (..., in), A (in, rank), B (rank, out).

    MLX's own gradient goes over the wide arrays several times more.
    """
    return mx.addmm(y, x @ a, b)


@add_product.vjp
def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
    _, x, a, b = primals
    tokens, d = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    dz = d @ b.T  # (tokens, rank)
    return cotangent, (dz @ a.T).reshape(x.shape), tokens.T @ dz, (tokens @ a).T @ d


class LoRALinear(nn.Module):
    """y = x Wᵀ + s (x A) B over a Linear or QuantizedLinear, A (in, rank), B (rank, out).

    Args:
        linear: The frozen base.
        rank: r, at most min(in, out).
        scale: s = alpha / rank.
        dropout: Share of x set to zero on its way to A while training.
    """

    groups: ClassVar = {"lora_a": "lora_a", "lora_b": "lora_b"}

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        out_dims, in_dims = _shape(linear)
        self.linear = linear
        self.scale = scale
        self.rank = rank
        self.dropout = Dropout(dropout)
        self.lora_a = _uniform((in_dims, rank), in_dims)
        self.lora_b = mx.zeros((rank, out_dims))

    def __call__(self, x: mx.array) -> Any:
        """Return y: (..., in) → (..., out)."""
        b = self.scale * self.lora_b
        return add_product(self.linear(x), self.dropout(x), self.lora_a.astype(x.dtype), b.astype(x.dtype))

    @property
    def base(self) -> nn.Module:
        """The layer below the adapter."""
        return self.linear

    def delta(self) -> mx.array:
        """Return s (A B)ᵀ, the change of the base's weight: (out, in), float32."""
        return self.scale * (self.lora_a @ self.lora_b).T


class LoRAEmbedding(nn.Module):
    """y = W[x] + s A[x] B over an Embedding or QuantizedEmbedding, A (vocabulary, rank), B (rank, hidden).

    Args:
        embedding: The frozen base. Where the model ties its head to it, the head gets the same change.
        rank: r, at most min(vocabulary, hidden).
        scale: s = alpha / rank.
        dropout: Share of the adapter's output (as embedding) or input (as head) set to zero while training.
    """

    groups: ClassVar = {"lora_a": "embedding", "lora_b": "embedding"}

    def __init__(self, embedding: nn.Embedding | nn.QuantizedEmbedding, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        vocabulary, hidden = _shape(embedding)
        self.embedding = embedding
        self.scale = scale
        self.rank = rank
        self.dropout = Dropout(dropout)
        self.lora_a = _uniform((vocabulary, rank), vocabulary)
        self.lora_b = mx.zeros((rank, hidden))

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        y = self.embedding(x)
        z = self.dropout(self.lora_a[x] @ self.lora_b)
        return y + (self.scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits, x Wᵀ + s (x Bᵀ) Aᵀ: (..., hidden) → (..., vocabulary)."""
        z = self.dropout(x) @ self.lora_b.T.astype(x.dtype)
        return mx.addmm(self.embedding.as_linear(x), z, self.lora_a.T.astype(x.dtype), alpha=self.scale)

    @property
    def base(self) -> nn.Module:
        """The layer below the adapter."""
        return self.embedding

    def delta(self) -> mx.array:
        """Return s A B, the change of the base's weight: (vocabulary, hidden), float32."""
        return self.scale * (self.lora_a @ self.lora_b)


class LoRASwitchLinear(nn.Module):
    """One LoRA for each expert of a SwitchLinear or QuantizedSwitchLinear: y = x W[e]ᵀ + s (x A[e]ᵀ) B[e]ᵀ.

    Args:
        linear: The frozen base, weights (experts, out, in).
        rank: r, at most min(in, out).
        scale: s = alpha / rank.
        dropout: Share of x set to zero on its way to A while training.
    """

    groups: ClassVar = {"lora_a": "lora_a", "lora_b": "lora_b"}

    def __init__(self, linear: SwitchLinear | QuantizedSwitchLinear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        experts, out_dims, in_dims = linear.num_experts, linear.output_dims, linear.input_dims
        self.linear = linear
        self.scale = scale
        self.rank = rank
        self.dropout = Dropout(dropout)
        self.lora_a = _uniform((experts, rank, in_dims), in_dims)
        self.lora_b = mx.zeros((experts, out_dims, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's output from its expert: (..., in) and its expert's index → (..., out)."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = self.dropout(x)
        for matrix in (self.lora_a, self.lora_b):
            transposed = matrix.swapaxes(-1, -2).astype(x.dtype)
            z = mx.gather_mm(z, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + self.scale * z

    @property
    def base(self) -> nn.Module:
        """The layer below the adapter."""
        return self.linear

    def delta(self) -> mx.array:
        """Return s B A for each expert, the change of the base's weight: (experts, out, in), float32."""
        return self.scale * (self.lora_b @ self.lora_a)


Adapter = LoRALinear | LoRAEmbedding | LoRASwitchLinear

_LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: LoRALinear,
    nn.QuantizedLinear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    nn.QuantizedEmbedding: LoRAEmbedding,
    SwitchLinear: LoRASwitchLinear,
    QuantizedSwitchLinear: LoRASwitchLinear,
}


def can_adapt(module: nn.Module) -> bool:
    """Tell whether ``module`` is a base that an adapter fits on."""
    return type(module) in _LAYERS


def adapt(module: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> Adapter:
    """Return a new adapter over ``module``."""
    return _LAYERS[type(module)](module, rank, scale, dropout)


def base_shape(module: nn.Module) -> tuple[int, int]:
    """Return the (rows, columns) of a base's weight, of one expert for a switch layer, as if it were not quantized."""
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        return module.output_dims, module.input_dims
    return _shape(module)


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        columns = columns * 32 // module.bits  # 3, 5 and 6 bits do not divide 32: multiply first
    return rows, columns


def _uniform(shape: tuple[int, ...], fan_in: int) -> mx.array:
    bound = 1 / math.sqrt(fan_in)  # mlx-lm's and, up to a constant, everybody's start
    return mx.random.uniform(-bound, bound, shape)
