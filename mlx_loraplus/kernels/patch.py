"""Replace parts of a model during training with equivalent parts that need less memory.

mlx-lm's models have no hook for this. Their attention is a module-level function of MLX, their
gated delta rule one of mlx-lm, and the call of a block or an MLP is a method of its class.
Therefore the contexts in this file replace these functions and give modules a subclass of their
class. Apart from this file, only ``inference/generate.py`` replaces a function of mlx-lm.

Attention uses ``attention.py``, ``window_attention.py`` or MLX's own function, the gated delta rule
uses ``delta_rule.py``, and gated MLPs use ``elementwise.py``. MLPs are not recognized by name
alone: each is tried on the loaded model, and an MLP that computes something else is not replaced.

Gradient checkpointing keeps only the input of each block. mlx-lm patches the block's class
permanently, and draws new dropout masks when it recomputes a block. Here, each block has another
class only inside the context, and both passes share a random key.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import gated_delta

from ..adapters.base_layers import LINEARS, base_shape, blocks_of
from ..adapters.dropout import drawing_from
from ..adapters.lora import base_of
from ..device import backend
from ..failures import is_lost
from .attention import CausalMask, attention
from .choices import (
    AttentionKind,
    DeltaRuleKind,
    StepChoices,
    default_choices,
    fused_length,
)
from .delta_rule import delta_rule, loop_in_pieces
from .elementwise import GATES
from .window_attention import window_attention

# Root mean squares of the gate values with which an MLP is tried.
PROBED_SIZES = (1e-2, 0.3, 1.0, 2.0, 10.0, 80.0)
# Tolerance relative to the largest number, which allows for float32 rounding. The exact GELU and
# its tanh approximation differ by at least 1e-4.
PROBE_MARGIN = 2e-5
_native = mx.fast.scaled_dot_product_attention


@contextmanager
def memory_efficient(
    model: nn.Module,
    gates: Mapping[str, str] | None = None,
    choices: StepChoices | None = None,
) -> Generator[None]:
    """Train ``model`` with less memory inside the context, and restore the model after it.

    Args:
        model: The model to train.
        gates: The result of ``find_gated_mlps`` for this model; None to compute it here.
        choices: How attention and the gated delta rule are computed; by default, what suits the
            device best.
    """
    # Inside another such context, the model is already prepared.
    if replaces_attention():
        yield
        return

    if gates is None:
        gates = find_gated_mlps(model)
    modules = dict(model.named_modules())
    kinds: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, gate in gates.items():
        kinds.append((modules[path], _gated(type(modules[path]), gate)))

    choices = choices or default_choices()
    with (
        replaced_attention(choices.attention),
        _replaced_delta_rule(choices.delta_rule),
        _reclassed(kinds),
    ):
        yield


@contextmanager
def replaced_attention(kind: AttentionKind = "chunked") -> Generator[None]:
    """Inside the context, attention accepts a ``CausalMask``, and is computed as ``kind`` says."""
    mx.fast.scaled_dot_product_attention = _replacement(kind)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = _native


def replaces_attention() -> bool:
    """Return whether the code runs inside ``replaced_attention``."""
    return mx.fast.scaled_dot_product_attention is not _native


def _replacement(kind: AttentionKind) -> Callable[..., mx.array]:
    """Return the function that replaces MLX's attention.

    It computes causal attention in chunks. If ``kind`` is "native", it does so only where MLX's
    own attention would need more memory, and computes sliding windows in blocks. All other
    attention is computed by MLX's own function.
    """

    def attend(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Any = None,
        sinks: Any = None,
        **rest: Any,
    ) -> mx.array:
        length = q.shape[2]
        if isinstance(mask, str) and mask == "causal" and length == k.shape[2]:
            mask = CausalMask()
        if not isinstance(mask, CausalMask):
            return _native(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)

        # Our attention does not support attention sinks.
        if sinks is not None:
            whole = slice(0, length)
            return _native(q, k, v, scale=scale, mask=mask.part(whole, whole), sinks=sinks, **rest)

        if kind == "native" and mask.is_plain(length):
            widths = (q.shape[3], v.shape[3])
            padded = fused_length(length, widths, q.itemsize, backend())
            if padded is not None:
                return _native_causal(q, k, v, padded, scale=scale, **rest)
        if kind == "native" and mask.window is not None and mask.window < length:
            return window_attention(q, k, v, scale, mask)
        return attention(q, k, v, scale, mask)

    return attend


def _native_causal(q: mx.array, k: mx.array, v: mx.array, padded: int, **rest: Any) -> mx.array:
    """Return MLX's causal attention, computed on rows that are padded to a length.

    The padding is at the end, so no query sees the keys in it.
    """
    length = q.shape[2]
    if padded == length:
        return _native(q, k, v, mask="causal", **rest)
    width = [(0, 0), (0, 0), (0, padded - length), (0, 0)]
    q, k, v = (mx.pad(array, width) for array in (q, k, v))
    return _native(q, k, v, mask="causal", **rest)[:, :, :length]


@contextmanager
def _replaced_delta_rule(kind: DeltaRuleKind) -> Generator[None]:
    """Inside the context, compute the gated delta rule of training as ``kind`` says."""
    loop = gated_delta.gated_delta_ops
    gated_delta.gated_delta_ops = delta_rule if kind == "native" else loop_in_pieces
    try:
        yield
    finally:
        gated_delta.gated_delta_ops = loop


@contextmanager
def grad_checkpointing(model: nn.Module) -> Generator[None]:
    """Checkpoint every block of ``model`` inside the context, and restore the blocks after it."""
    with _reclassed([(block, _checkpointed(type(block))) for block in blocks_of(model)]):
        yield


@contextmanager
def _reclassed(kinds: Sequence[tuple[nn.Module, type[nn.Module]]]) -> Generator[None]:
    """Give each module another class inside the context."""
    before = [(module, type(module)) for module, _ in kinds]
    for module, kind in kinds:
        module.__class__ = kind
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


@cache
def _gated(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """Return a subclass of an MLP that computes down(act(gate(x)) * up(x)) with our gradient."""

    def __call__(self: Any, x: mx.array) -> mx.array:  # noqa: N807
        return self.down_proj(GATES[name](self.gate_proj(x), self.up_proj(x)))

    return type(kind.__name__, (kind,), {"__call__": __call__})


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``kind`` whose call is checkpointed."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # Both passes draw the masks of dropout from this key.
        key = mx.random.key(0)
        if self.training:
            key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)

        def run(parameters: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.update(parameters)
            with drawing_from(key):
                return kind.__call__(self, *args, **kwargs)

        parameters = self.trainable_parameters()
        if args and isinstance(args[0], mx.array):
            x, parameters = _parameters_first(args[0], parameters)
            args = (x, *args[1:])
        return mx.checkpoint(run)(parameters, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__})


def _parameters_first(x: mx.array, parameters: dict[str, Any]) -> tuple[mx.array, dict[str, Any]]:
    """Return both unchanged. The backward pass computes the parameters' gradients before that of x.

    Without this order, MLX first follows the gradient of x down to the first block, and keeps what
    each block has recomputed until the optimizer needs the gradients of the parameters.
    """
    flat = tree_flatten(parameters)

    @mx.custom_function
    def forward(x: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return x, *arrays

    @forward.vjp
    def backward(_primals: Any, cotangents: Any, _outputs: Any) -> Any:
        of_x, *of_parameters = cotangents
        return mx.depends(of_x, of_parameters), *of_parameters

    outputs: Any = forward(x, *(array for _, array in flat))
    x, *arrays = outputs
    names = (name for name, _ in flat)
    return x, tree_unflatten(list(zip(names, arrays, strict=True)))


def find_gated_mlps(model: nn.Module) -> dict[str, str]:
    """Return path → gate for each gated MLP that is equivalent to one of ``GATES``."""
    found: dict[str, str] = {}
    training = model.training
    model.eval()
    try:
        for path, module in model.named_modules():
            layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if not all(isinstance(base_of(layer), LINEARS) for layer in layers):
                continue
            name = next((name for name, gate in GATES.items() if _computes(module, gate)), None)
            if name is not None:
                found[path] = name
    finally:
        model.train(training)
    return found


def _computes(mlp: Any, gate: Any) -> bool:
    """Return whether ``mlp`` computes down(gate(gate_proj(x), up_proj(x))) and its gradient.

    The sizes of x cover the range where the gate is almost linear, the range where it is curved,
    and large values that a clamp would change.
    """
    x = mx.random.normal((4, base_shape(base_of(mlp.gate_proj))[1]), key=mx.random.key(0))
    x = x / mx.sqrt(mx.square(mlp.gate_proj(x)).mean())

    def ours(x: mx.array) -> mx.array:
        return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))

    for size in PROBED_SIZES:
        try:
            expected, slopes = mx.vjp(mlp, [x * size], [x])
        except Exception as problem:  # it needs other arguments than x
            if is_lost(problem):
                raise
            return False
        got, gradients = mx.vjp(ours, [x * size], [x])
        for one, other in ((got[0], expected[0]), (gradients[0], slopes[0])):
            close: Any = mx.abs(one - other).max() <= PROBE_MARGIN * mx.abs(other).max()
            if one.shape != other.shape or not close.item():
                return False
    return True
