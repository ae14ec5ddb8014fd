"""Find layers that get no adapter: routers, narrow gates, and layers an adapter cannot replace."""

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import ModelError
from ..failures import failure_of, is_lost
from .base_layers import (
    EMBEDDINGS,
    EXPERTS,
    LINEARS,
    base_shape,
    blocks_of,
    can_adapt,
)
from .dropout import train_without_dropout
from .token_tables import probe_tokens

READ = "layers whose weight the model reads directly"
UNUSED = "layers without a gradient"

# Attributes of _ProbedLayer itself; every other attribute belongs to the layer.
_OWN = ("base", "size", "was_read", "_no_grad", "_training")


def is_narrow(module: nn.Module, rank: int) -> bool:
    """Return whether a layer is a gate or a set of coefficients rather than a projection.

    Its smaller side is 1 or 2, or is below ``rank`` and at most an eighth of the other side. An
    adapter on it would be larger than the layer.
    """
    if not isinstance(module, LINEARS):
        return False
    smaller, larger = sorted(base_shape(module))
    return smaller <= 2 or (smaller < rank and 8 * smaller <= larger)


# Routers


def find_routers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that choose among experts.

    A router has one output for each expert. It is a sibling of the experts, or the only linear
    layer of a module that is a sibling of the experts. In the second case, inside the feed-forward
    module, a router may have more outputs than there are experts; the extra outputs select experts
    that do nothing.
    """
    experts = _count_experts(model)
    if not experts:
        return set()
    modules = dict(model.named_modules())
    blocks = {id(block) for block in blocks_of(model)}

    routers: set[str] = set()
    for path, module in modules.items():
        if not isinstance(module, LINEARS):
            continue
        rows, _ = base_shape(module)

        # A router that is a sibling of the experts.
        parent = path.rpartition(".")[0]
        if rows in _counts_under(experts, parent):
            routers.add(path)
            continue

        # A router that is the only layer of a sibling module. A layer that is directly in a list
        # does not have such a module.
        beside = parent.rpartition(".")[0]
        holder = modules.get(parent)
        if holder is None or not beside or _count_adaptable(holder) != 1:
            continue
        counts = _counts_under(experts, beside)
        beside_is_block = id(modules.get(beside)) in blocks
        has_idle_outputs = bool(counts) and not beside_is_block and rows > max(counts)
        if rows in counts or has_idle_outputs:
            routers.add(path)
    return routers


def _count_experts(model: nn.Module) -> dict[str, int]:
    """Return the number of experts by the path of the layer or the list that holds them."""
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, EXPERTS):
            layer: Any = module
            counts[path] = layer.weight.shape[0]
    return counts | _listed_experts(model)


def _listed_experts(model: nn.Module) -> dict[str, int]:
    """Return the length of each list of modules inside a block, by its path.

    Some families keep their experts in such a list.
    """
    blocks = {id(block) for block in blocks_of(model)}
    lists: dict[str, int] = {}
    for path, block in model.named_modules():
        if id(block) not in blocks:
            continue

        # The path of a member of a list ends with its index.
        lengths: Counter[str] = Counter()
        for inner, _ in block.named_modules():
            prefix, _, name = inner.rpartition(".")
            if name.isdigit():
                lengths[prefix] += 1
        for prefix, length in lengths.items():
            lists[f"{path}.{prefix}"] = length
    return lists


def _counts_under(experts: Mapping[str, int], path: str) -> set[int]:
    """Return the numbers of experts of the layers at or below ``path``."""
    return {count for other, count in experts.items() if f"{other}.".startswith(f"{path}.")}


def _count_adaptable(module: nn.Module) -> int:
    """Return how many layers in ``module`` can have an adapter."""
    return sum(can_adapt(layer) for _, layer in module.named_modules())


# Layers that an adapter cannot replace


class _ProbedLayer(nn.Module):
    """A wrapper that records whether a layer's arrays are read, and whether its output matters.

    ``size`` scales a random change of the output. The gradient of ``size`` is 0 if the output has
    no effect on the logits.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.was_read = False
        self.size: Any = mx.array(0.0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output plus ``size`` times random numbers."""
        y = self.base(*args, **kwargs)
        change = mx.random.normal(y.shape, key=mx.random.key(1))
        return y + (self.size * change).astype(y.dtype)

    def __getattr__(self, name: str) -> Any:
        """Return the layer's attribute, and record that it was read."""
        if name in _OWN:
            return super().__getattr__(name)
        self.was_read = True
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the layer's attribute, as some models do before they call the layer."""
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            self.was_read = True
            setattr(self.base, name, value)


def find_unusable(model: nn.Module) -> dict[str, str]:
    """Return path → reason for the linear layers that no adapter can replace.

    An adapter changes the output of a layer's call. If the model reads the layer's weight directly,
    the model would fail or would ignore the adapter. If the layer is never called, or if its output
    only makes a discrete choice, the adapter would have no gradient. To find these layers, the
    model runs once, forward and backward.

    Raises:
        ModelError: mlx-lm cannot run the model, or cannot differentiate it.
    """
    _check_sound(model)
    layers = _linear_layers(model)
    probed = {path: _ProbedLayer(module) for path, module in layers.items()}

    # Run the model with the wrappers in place, and always restore it.
    training = model.training
    train_without_dropout(model)
    try:
        model.update_modules(tree_unflatten(list(probed.items())))
        gradients = _gradients_of_changes(model, probed)
    except Exception as problem:
        if failure_of(problem) is not None or is_lost(problem):
            raise

        # A model of mlx-lm that cannot run may raise any type of exception. A user's own model may
        # take inputs other than tokens, so its exceptions are ignored.
        if not type(model).__module__.startswith("mlx_lm."):
            return {}
        kind = getattr(model, "model_type", type(model).__name__)
        details = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} can't train a {kind} model on this machine: {details:.200}"
        ) from None
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
        model.train(training)

    return _reasons(model, probed, gradients)


def has_no_effect(model: nn.Module, unusable: Mapping[str, str]) -> bool:
    """Return whether no linear layer has an effect on the logits, as in a damaged model.

    Args:
        model: The model.
        unusable: What ``find_unusable`` returned for it.
    """
    layers = _linear_layers(model)
    return bool(layers) and all(unusable.get(path) == UNUSED for path in layers)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → layer for the layers inside the blocks that can have an adapter."""
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_linear = can_adapt(module) and not isinstance(module, EMBEDDINGS)
        if is_linear and id(module) in inside:
            layers[path] = module
    return layers


def _reasons(
    model: nn.Module,
    probed: Mapping[str, _ProbedLayer],
    gradients: Mapping[str, float],
) -> dict[str, str]:
    """Return path → reason for the probed layers that no adapter can replace."""
    unusable = {path: READ for path, layer in probed.items() if layer.was_read}

    # Experts without a gradient are not reported, because other tokens may select them.
    listed = tuple(f"{prefix}." for prefix in _listed_experts(model))
    for path, gradient in gradients.items():
        is_expert = not isinstance(probed[path].base, LINEARS) or path.startswith(listed)
        if gradient == 0 and path not in unusable and not is_expert:
            unusable[path] = UNUSED
    return unusable


def _check_sound(model: nn.Module) -> None:
    """Check for defects of mlx-lm's classes that a run would not report or that would crash it.

    Raises:
        ModelError: The model has such a defect.
    """
    kind = getattr(model, "model_type", type(model).__name__)
    if not hasattr(model, "_no_grad"):
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} can't train a {kind} model: its class is not a complete"
            " module"
        )

    # The model masks these token ids in its logits, and MLX writes them without a bounds check.
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    if not size:
        return
    for name, ids in model.items():
        if not name.endswith("tokenizer_ids") or not isinstance(ids, mx.array):
            continue
        largest = ids.max().item()
        if largest >= size:
            raise ModelError(
                f"mlx-lm {version('mlx-lm')} can't run this {kind} model: its code writes to token"
                f" {largest:,}, and vocab_size is {size:,}"
            )


def _gradients_of_changes(model: nn.Module, probed: Mapping[str, _ProbedLayer]) -> dict[str, float]:
    """Return path → gradient of a sum over the logits with respect to each layer's ``size``."""

    def total(sizes: list[mx.array]) -> mx.array:
        for layer, size in zip(probed.values(), sizes, strict=True):
            layer.size = size
        logits: Any = model(probe_tokens(model, 8))
        return mx.sin(logits.astype(mx.float32)).sum()

    # If there are no layers to probe, only check that the model runs.
    if not probed:
        mx.eval(total([]))
        return {}

    found: Any = mx.grad(total)([mx.array(0.0) for _ in probed])
    mx.eval(found)
    return {path: gradient.item() for path, gradient in zip(probed, found, strict=True)}
