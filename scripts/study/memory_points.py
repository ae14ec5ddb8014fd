"""One training step of a small or real model: its peak, and the peak that ``memory.estimate`` predicts."""

import mlx_loraplus  # noqa: F401, I001  before mlx

import gc
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import TrainableParams
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.device import on_gpu
from mlx_loraplus.export.fuse_quality import INPUTS, gather_inputs
from mlx_loraplus.export.fuse import fuse_adapter
from mlx_loraplus.memory.estimate import Coefficients, Memory, Sizes, estimate
from mlx_loraplus.models.skeleton import config_of, make_skeleton
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.settings import configure
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.kernels.cross_entropy import make_loss, make_score
from mlx_loraplus.kernels.patch import grad_checkpointing
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from scripts.study.memory_families import NEW, STUDIED, UNSEEN

ITEMSIZE = 2 if on_gpu() else 4  # of activations: bfloat16, and float32 on a CPU

_SMALL = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SMALL | {"model_type": "llama", "tie_word_embeddings": False},
    "narrow": _SMALL | {
        "model_type": "llama", "tie_word_embeddings": True, "hidden_size": 128, "num_hidden_layers": 8,
        "intermediate_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "heads": _SMALL | {
        "model_type": "llama", "tie_word_embeddings": True, "hidden_size": 64, "intermediate_size": 64,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64,
    },
    "head": _SMALL | {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 64, "vocab_size": 65_536,
                      "num_hidden_layers": 1, "intermediate_size": 64},
    "stream": _SMALL | {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 1024, "head_dim": 32,
                        "vocab_size": 64, "intermediate_size": 64},
    "gemma": _SMALL | {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 128,
        "vocab_size": 32_768, "sliding_window": 256, "sliding_window_pattern": 3, "query_pre_attn_scalar": 128,
    },
    "qwen": _SMALL | {
        "model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 4096, "rope_theta": 10_000.0,
    },
    "mixtral": _SMALL | {
        "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4, "intermediate_size": 256,
    },
    "scout": {
        "model_type": "llama4",
        "text_config": _SMALL | {
            "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 512,
            "interleave_moe_layer_step": 1, "intermediate_size": 256, "intermediate_size_mlp": 512,
            "max_position_embeddings": 4096, "num_experts_per_tok": 1, "num_local_experts": 4, "rope_scaling": None,
            "rope_theta": 10_000.0, "use_qk_norm": True,
        },
    },
    "wide": _SMALL | {
        "model_type": "llama", "tie_word_embeddings": False, "hidden_size": 512, "num_hidden_layers": 3,
        "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16_384,
    },
    "deep": _SMALL | {
        "model_type": "llama", "tie_word_embeddings": True, "hidden_size": 192, "num_hidden_layers": 12,
        "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
        "vocab_size": 8192,
    },
    "gemma-windows": _SMALL | {
        "model_type": "gemma3_text", "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
        "vocab_size": 50_000, "sliding_window": 128, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64,
    },
    "qwen2": _SMALL | {
        "model_type": "qwen2", "tie_word_embeddings": True, "hidden_size": 320, "num_attention_heads": 5,
        "num_key_value_heads": 1, "intermediate_size": 864, "rms_norm_eps": 1e-6, "vocab_size": 24_000,
    },
    "qwen-moe": _SMALL | {
        "model_type": "qwen3_moe", "tie_word_embeddings": False, "max_position_embeddings": 4096,
        "rope_theta": 10_000.0, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "phi": _SMALL | {
        "model_type": "phi3", "tie_word_embeddings": False, "max_position_embeddings": 4096, "rope_theta": 10_000.0,
        "original_max_position_embeddings": 4096, "vocab_size": 12_000,
    },
} | STUDIED | UNSEEN | NEW  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A step: a model of ``MODELS`` or a real one's short name, a batch, and settings of a run."""

    model: str
    rows: int
    length: int
    checkpoint: bool = False
    share: float = 0.5
    bits: int | None = None
    packed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""
        return configure(TrainConfig, self.settings | {"pack": self.packed})

    @property
    def sizes(self) -> Sizes:
        """The sizes of its skeleton."""
        return measure(skeleton(self), self.config.adapter, ITEMSIZE)

    @property
    def targets(self) -> int:
        """Supervised positions."""
        return max(1, int(self.rows * self.length * self.share))

    def __str__(self) -> str:
        """Return it in one line."""
        more = [f"{self.bits} bits"] if self.bits else []
        more += ["packed"] if self.packed else []
        more += ["checkpoint"] if self.checkpoint else []
        more += [f"{name} {value}" for name, value in self.settings.items()]
        return ", ".join([f"{self.model} {self.rows} x {self.length}", *more])


def predict(point: Point, parts: Coefficients | None = None) -> Memory:
    """Return the predicted memory, from the skeleton alone."""
    return estimate(
        point.sizes,
        point.config,
        point.rows,
        point.length,
        point.targets,
        checkpoint=point.checkpoint,
        parts=parts,
    )


def peak_of(point: Point, what: str = "step") -> int:
    """Run a training step, a validation batch or a fuse, and return its peak above what was alive before the model."""
    gc.collect()
    before = mx.get_active_memory()
    mx.random.seed(0)
    model = (
        skeleton(point) if point.model in MODELS else load_folder(find_model(point.model).path)[0]
    )
    if ITEMSIZE == 2 and point.model in MODELS:
        model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    trainable = attach_adapters(model, point.config.adapter)
    if what == "fuse":
        mx.eval(model.parameters())
        gc.collect()
        mx.reset_peak_memory()
        tokens = np.arange(INPUTS // 4, dtype=np.int32) % 64
        inputs = gather_inputs(model, 4 * [Example(tokens, tokens > 0, "")])
        fuse_adapter(model, inputs=inputs)
    else:
        _compute(point, model, trainable, train=what == "step")
    return mx.get_peak_memory() - before


def _compute(point: Point, model: nn.Module, trainable: TrainableParams, *, train: bool) -> None:
    """Train on a batch, or validate on it; the peak starts when all that lasts is there."""
    trunk_and_head = find_trunk_and_head(model)
    optimizer = LoRAPlus(point.config.optimizer, 10)
    optimizer.init(model, trainable.groups)
    mx.eval(model.parameters(), optimizer.state)
    arrays = _batch(point)
    gc.collect()
    model.train(train)
    with memory_efficient(model), grad_checkpointing(model) if point.checkpoint else nullcontext():
        mx.reset_peak_memory()
        if not train:
            mx.eval(make_score(trunk_and_head)(model, *arrays[:4]))
            return
        accumulate, update = make_step(
            model, make_loss(trunk_and_head), optimizer, compiled=on_gpu()
        )
        carried = None
        for _ in range(point.config.grad_accumulation_steps - 1):
            carried = accumulate(arrays, carried)
            mx.eval(carried)
        total, norm = update(*accumulate(arrays, carried), mx.array(float(point.targets)))
        mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
        if not math.isfinite(total.item()):
            raise RuntimeError(f"{point}: the loss is not finite")


def skeleton(point: Point) -> nn.Module:
    """Return the point's model without weights."""
    if point.model not in MODELS:
        return make_skeleton(config_of(point.model) | {"quantization": None})
    return make_skeleton(
        MODELS[point.model]
        | {"quantization": {"group_size": 32, "bits": point.bits} if point.bits else None}
    )


def _batch(point: Point) -> tuple[mx.array, ...]:
    """Return what the loss takes: tokens, and positions, targets and weights of what is learned."""
    chance = np.random.default_rng(0)
    tokens = chance.integers(0, 64, (point.rows, point.length))
    positions = np.sort(chance.permutation(point.rows * point.length)[: point.targets])
    learned = chance.integers(0, 64, point.targets)
    arrays = (
        *(mx.array(a.astype(np.int32)) for a in (tokens, positions, learned)),
        mx.ones(point.targets),
    )
    if not point.packed:
        return arrays
    segments = 1 + np.arange(point.length) * 4 // point.length  # four examples in each row
    return *arrays, mx.array(np.tile(segments, (point.rows, 1)).astype(np.int32))
