"""LoRA-RITE and Riemannian-preconditioned Adam, for scripts/study/evidence: are they worth an ``--optimizer``?

Both act on the pair (A, B) rather than on each matrix, so that what is learned depends less
(Riemannian) or not at all (RITE) on how the product A B is split: (A R, R⁻¹ B) for any R that can
be inverted. Neither is in the package.

- ``Riemannian`` (Zhang and Pilanci, arXiv 2402.02347): g_A ← g_A (B Bᵀ + ε I)⁻¹, g_B ← (Aᵀ A + ε
  I)⁻¹ g_B, then Adam.
- ``Rite`` (Yen et al., arXiv 2410.20625): with A = Q_A R_A and Bᵀ = Q_B R_B the gradient ∇W Q_B is
  free of B's size. Its moments are kept in the basis Q_B and turned with it, V of shape (rank,
  rank), and A moves by η M R_B⁻ᵀ.
"""

from mlx_loraplus import LoRAPlus  # isort: skip  before mlx

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Arrays = dict[str, mx.array]


class Riemannian(LoRAPlus):
    """Adam on gradients preconditioned by the other matrix."""

    epsilon = 1e-2

    def update(self, model: nn.Module, gradients: dict, usable: mx.array | None = None) -> mx.array:
        """Precondition the gradients, then update as usual."""
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


RULES: dict[str, type[LoRAPlus]] = {"adam": LoRAPlus, "riemannian": Riemannian, "rite": Rite}
