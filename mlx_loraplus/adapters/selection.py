"""Which linear layers an adapter may go on: not routers, not gates, and none whose weight is read past the layer."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import ModelError
from .layers import EMBEDDINGS, EXPERTS, LINEARS, base_shape, blocks_of, can_adapt
from .tables import probe_tokens

READ = "weights that the model reads past the layer"
UNUSED = "layers without a gradient"
_OWN = ("base", "size", "was_read", "_no_grad", "_training")


def is_narrow(module: nn.Module, rank: int) -> bool:
    """Tell whether a layer is a gate or a set of coefficients: a side of 1 or 2, or one far smaller than the other.

    Such a side is below ``rank`` and at most an eighth of the other, so that an adapter would be
    larger than the layer.
    """
    if not isinstance(module, LINEARS):
        return False
    smaller, larger = sorted(base_shape(module))
    return smaller <= 2 or (smaller < rank and 8 * smaller <= larger)


def find_routers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that choose among experts.

    A router has an output for each expert and lies beside the experts, or is the only linear layer
    of a module that does. Where such a module lies beside the experts inside the feed-forward
    module, it may have more outputs than there are experts, for experts that do nothing.
    """
    modules = dict(model.named_modules())
    blocks = {id(block) for block in blocks_of(model)}
    experts: dict[str, int] = {
        path: module.weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        for path, module in modules.items()
        if isinstance(module, EXPERTS)
    }
    experts |= _listed_experts(model)
    routers: set[str] = set()
    for path, module in modules.items():
        if not isinstance(module, LINEARS):
            continue
        rows = base_shape(module)[0]
        parent = path.rpartition(".")[0]
        counts = _counts_under(experts, parent)
        if rows in counts:
            routers.add(path)
            continue

        # A module that holds nothing but the router, with the experts beside it.
        holder = modules.get(parent)  # None for an element of a list
        alone = (
            holder is not None and sum(can_adapt(other) for _, other in holder.named_modules()) == 1
        )
        beside = parent.rpartition(".")[0]
        counts = _counts_under(experts, beside) if alone and beside else set()
        in_block = id(modules.get(beside)) in blocks
        if rows in counts or (counts and not in_block and rows > max(counts)):
            routers.add(path)
    return routers


def _listed_experts(model: nn.Module) -> dict[str, int]:
    """Return the path of each list of equal modules inside a block → its length: some families keep experts so."""
    lists: dict[str, int] = {}
    for path, block in model.named_modules():
        if any(block is one for one in blocks_of(model)):
            members = {
                inner for inner, _ in block.named_modules() if inner.rpartition(".")[2].isdigit()
            }
            for prefix in {inner.rpartition(".")[0] for inner in members}:
                lists[f"{path}.{prefix}"] = sum(
                    inner.rpartition(".")[0] == prefix for inner in members
                )
    return lists


def _counts_under(experts: Mapping[str, int], path: str) -> set[int]:
    """Return how many experts the layers under ``path`` have."""
    return {count for other, count in experts.items() if f"{other}.".startswith(f"{path}.")}


class _Watched(nn.Module):
    """A layer whose output takes a change, so that it has a gradient, and that notes whether its arrays are read."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.was_read = False
        self.size: Any = mx.array(0.0)  # of the change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, and ``size`` times random numbers."""
        y = self.base(*args, **kwargs)
        change = mx.random.normal(y.shape, key=mx.random.key(1))
        return y + (self.size * change).astype(y.dtype)

    def __getattr__(self, name: str) -> Any:
        """Return the layer's attribute, and note that it was read."""
        if name in _OWN:
            return super().__getattr__(name)
        self.was_read = True
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the layer's attribute, as some models do before they call it."""
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            self.was_read = True
            setattr(self.base, name, value)


def find_unusable(model: nn.Module) -> dict[str, str]:
    """Run the model once, both ways, and return path → reason for the linear layers that no adapter can stand in for.

    An adapter changes what a layer returns when it is called. A layer whose weight the model reads
    elsewhere would fail or lose its change. One that is never called, or whose output only chooses
    among others, has no gradient.

    Raises: ModelError where mlx-lm itself cannot run the model, or cannot differentiate it.
    """
    _check_sound(model)
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    layers = {
        path: module
        for path, module in model.named_modules()
        if id(module) in inside and can_adapt(module) and not isinstance(module, EMBEDDINGS)
    }
    watched = {path: _Watched(module) for path, module in layers.items()}
    training = model.training
    model.eval()
    try:
        model.update_modules(tree_unflatten(list(watched.items())))
        sizes = _gradients_of_changes(model, watched)
    except Exception as problem:  # whatever mlx-lm's models raise where they do not run  # noqa: BLE001
        if not type(model).__module__.startswith("mlx_lm."):
            return {}  # a model of one's own may take something else than tokens
        kind = getattr(model, "model_type", type(model).__name__)
        told = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} can't train a {kind} model on this machine: {told:.200}"
        ) from None
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
        model.train(training)

    # Experts that no token of this probe was sent to have no gradient here, and are sent others.
    listed = _listed_experts(model)
    unusable = {path: READ for path, layer in watched.items() if layer.was_read}
    return unusable | {
        path: UNUSED
        for path, size in sizes.items()
        if size == 0 and path not in unusable and isinstance(layers[path], LINEARS)
        if not any(path.startswith(f"{prefix}.") for prefix in listed)
    }


def _check_sound(model: nn.Module) -> None:
    """Raise ModelError for defects of mlx-lm's classes that running the model would not tell, or not survive."""
    kind = getattr(model, "model_type", type(model).__name__)
    if not hasattr(model, "_no_grad"):
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} can't train a {kind} model: its class is not a complete"
            " module"
        )

    # Ids that the model blanks in its logits: MLX writes them without a bounds check.
    size = getattr(getattr(model, "args", None), "vocab_size", None)
    for name, ids in model.items():
        if (
            size
            and name.endswith("tokenizer_ids")
            and isinstance(ids, mx.array)
            and ids.max().item() >= size
        ):
            raise ModelError(
                f"mlx-lm {version('mlx-lm')} can't run this {kind} model: its code writes to token "
                f"{ids.max().item():,}, and vocab_size is {size:,}"
            )


def _gradients_of_changes(model: nn.Module, watched: Mapping[str, _Watched]) -> dict[str, float]:
    """Return path → the gradient, of a sum over the logits, for the size of each layer's change."""

    def total(sizes: list[mx.array]) -> mx.array:
        for layer, size in zip(watched.values(), sizes, strict=True):
            layer.size = size
        logits: Any = model(probe_tokens(model, 8))
        return mx.sin(logits.astype(mx.float32)).sum()

    if not watched:
        mx.eval(total([]))
        return {}
    found: Any = mx.grad(total)([mx.array(0.0) for _ in watched])
    mx.eval(found)
    return {path: size.item() for path, size in zip(watched, found, strict=True)}
