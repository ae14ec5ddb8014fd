"""LoRA-RITE and Riemannian-preconditioned AdamW beside LoRA and LoRA+, in short runs on a real model.

Both act on the pair (A, B) rather than on each matrix, so that what is learned depends less (Riemannian) or not at all
(RITE) on how the product A B is split: (A R, R⁻¹ B) for any R that can be inverted. Neither is in the package.

- ``Riemannian`` (Zhang and Pilanci, arXiv 2402.02347): g_A ← g_A (B Bᵀ + ε I)⁻¹, g_B ← (Aᵀ A + ε I)⁻¹ g_B, then Adam.
- ``Rite`` (Yen et al., arXiv 2410.20625): with A = Q_A R_A and Bᵀ = Q_B R_B the gradient ∇W Q_B is free of B's size.
  Its moments are kept in the basis Q_B and turned with it, V of shape (rank, rank), and A moves by η M R_B⁻ᵀ.
"""

from mlx_loraplus import LoRAPlus  # isort: skip  before mlx

import math
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import RunConfig
from mlx_loraplus.data.examples import load_data
from mlx_loraplus.data.packing import plan_batches
from mlx_loraplus.generation import load
from mlx_loraplus.settings import configure
from mlx_loraplus.training.loop import arrays_of, make_step, score
from mlx_loraplus.training.loss import make_loss
from mlx_loraplus.training.split import split_model

Arrays = dict[str, mx.array]
MODEL, BATCH, UPDATES, VALID_ROWS, LAYERS = "smollm2-135m", 4, 12, 32, 8


class Riemannian(LoRAPlus):
    """Adam on gradients preconditioned by the other matrix."""

    epsilon = 1e-2

    def update(self, model: nn.Module, gradients: dict, usable: mx.array | None = None) -> mx.array:
        """Precondition, then update as ever."""
        flat: Arrays = dict(tree_flatten(gradients))
        parameters: Arrays = dict(tree_flatten(model.trainable_parameters()))
        for a, b in pairs(parameters):
            eye = self.epsilon * mx.eye(parameters[b].shape[0])
            flat[a] = flat[a] @ inverse(parameters[b] @ parameters[b].T + eye)
            flat[b] = inverse(parameters[a].T @ parameters[a] + eye) @ flat[b]
        return super().update(model, tree_unflatten(list(flat.items())), usable)


class Rite(LoRAPlus):
    """LoRA-RITE, its rate of B lr_ratio times that of A; no decay, no clipping, no escaped mass."""

    betas = (0.9, 0.999)

    def init(self, model: nn.Module, groups: Any) -> None:
        """Make its state, beside what is not used of Adam's."""
        super().init(model, groups)
        self.moments: dict[str, tuple[mx.array, mx.array, mx.array]] = {}

    def update(self, model: nn.Module, gradients: dict, usable: Any = None) -> mx.array:  # noqa: ARG002
        """Move both matrices of every pair."""
        flat: Arrays = dict(tree_flatten(gradients))
        parameters: Arrays = dict(tree_flatten(model.trainable_parameters()))
        rates, t, new = self._rates(self.state["step"]), int(self.state["step"].item()) + 1, {}
        for a, b in pairs(parameters):
            tall = {a: parameters[a], b: parameters[b].T}  # (in, rank), (out, rank)
            slopes = {a: flat[a], b: flat[b].T}
            for name, other in ((a, b), (b, a)):
                basis, triangle = mx.linalg.qr(tall[other], stream=mx.cpu)
                undo = mx.linalg.pinv(triangle, stream=mx.cpu)
                free = slopes[name] @ undo
                zero = (mx.zeros_like(free), mx.zeros_like(triangle), basis)
                m, v, before = self.moments.get(name, zero)
                turn = basis.T @ before
                beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in self.betas)
                v = beta2 * (turn @ v @ turn.T) + (1 - beta2) * (free.T @ free) / len(free)
                m = beta1 * (m @ turn.T) + (1 - beta1) * (free @ inverse_root(v))
                self.moments[name] = (m, v, basis)
                step = m @ undo.T
                new[name] = tall[name] - rates["lora_a" if name == a else "lora_b"] * step
            new[b] = new[b].T
        model.update(tree_unflatten(list(new.items())))
        self.state["step"] = self.state["step"] + 1
        mx.eval(list(self.moments.values()))
        return mx.array(0.0)


def pairs(parameters: Arrays) -> Iterator[tuple[str, str]]:
    """Yield the names of A and B of every adapter."""
    return ((name, name[:-1] + "b") for name in parameters if name.endswith("lora_a"))


def inverse(matrix: mx.array) -> mx.array:
    """Return the inverse of a small matrix."""
    return mx.linalg.inv(matrix, stream=mx.cpu)


def inverse_root(matrix: mx.array) -> mx.array:
    """Return matrix^(-1/2) of a symmetric one; directions that nothing has moved along stay where they are."""
    values, vectors = mx.linalg.eigh(0.5 * (matrix + matrix.T), stream=mx.cpu)
    usable = values > 1e-10 * mx.maximum(values.max(), 1e-30)
    return (vectors * mx.where(usable, mx.rsqrt(mx.where(usable, values, 1.0)), 0.0)) @ vectors.T


METHODS: dict[str, tuple[type[LoRAPlus], float, tuple[float, ...]]] = {  # rule, lambda, rates
    "LoRA (Adam)": (LoRAPlus, 1.0, (1e-3, 3e-3, 1e-2)),
    "LoRA+ λ 8 (Adam)": (LoRAPlus, 8.0, (3e-4, 1e-3)),
    "Riemannian AdamW": (Riemannian, 1.0, (1e-3, 3e-3, 1e-2)),
    "LoRA-RITE": (Rite, 1.0, (1e-4, 3e-4, 1e-3)),
}


def run_optimizers(data: str | None, updates: int = UPDATES) -> tuple[dict[str, Any], None]:
    """Train the last blocks with every method and rate, from one start and on the same batches."""
    settings = {"model": MODEL, "data": data or (), "batch_size": BATCH, "max_seq_length": 256, "num_layers": LAYERS}
    config = configure(RunConfig, settings)
    model, tokenizer = load(MODEL)
    examples = load_data(config, tokenizer, "train", "valid").examples
    valid = [examples["valid"][i] for i in range(VALID_ROWS)]
    mx.random.seed(0)
    census = attach_adapters(model, config.adapter)
    start = dict(tree_flatten(model.trainable_parameters()))
    split = split_model(model)
    batches = plan_batches(examples["train"], config.data, seed=0)
    result: dict[str, Any] = {
        "model": MODEL, "data": data or "demo", "updates": updates, "batch_size": BATCH, "last_blocks": LAYERS,
        "before": score(model, split, valid, BATCH).loss, "methods": {},
    }  # fmt: skip
    print(result)
    for name, (rule, ratio, rates) in METHODS.items():
        for rate in rates:
            model.load_weights(list(start.items()), strict=False)
            plain = {"learning_rate": rate, "lr_ratio": ratio, "warmup": 1, "max_grad_norm": 0.0}
            optimizer = rule(configure(RunConfig, plain).optimizer, total_steps=updates)
            optimizer.init(model, census.groups)
            accumulate, update = make_step(model, make_loss(split), optimizer, compiled=False)
            model.train()
            started, losses = time.perf_counter(), []
            for number in range(updates):
                batch = batches[number]
                total, _ = update(*accumulate(arrays_of(batch), None), mx.array(float(batch.supervised)))
                mx.eval(total, model.trainable_parameters(), optimizer.state)
                losses.append(total.item() / batch.supervised)
            seconds = (time.perf_counter() - started) / updates
            loss = score(model, split, valid, BATCH).loss
            found = {"valid_loss": loss if math.isfinite(loss) else None, "seconds": round(seconds, 2)}
            result["methods"].setdefault(name, {})[str(rate)] = found | {"losses": np.round(losses, 4).tolist()}
            print(f"{name}, rate {rate:g}: {loss:.4f}, {seconds:.2f} s an update", flush=True)
    return result, None
