"""Find what trains in a model: its adapters, its fully trained modules, and their LoRA+ groups."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from ..errors import AdapterError, counted
from ..models.language_model import check_blocks
from .full import weight_groups
from .lora import Adapter
from .unfreeze import FullyTrained, own_arrays


@dataclass(frozen=True)
class TrainableParams:
    """The trainable parameters of a model, and the LoRA+ group of each.

    ``groups`` maps the path of every trainable parameter to its LoRA+ group: ``lora_a`` (rate eta),
    ``lora_b`` (rate lambda * eta), ``magnitude`` (of DoRA, a multiple of eta), ``weights`` (of
    adapter full, rate eta) or ``embedding`` (a separate rate, for adapters on embeddings, for
    modules that train in full, and for embeddings and head of adapter full). No other code assigns
    parameters to groups.

    ``residuals`` maps the path of each base that ``quantize`` has quantized to the relative error
    ‖W - Q‖ / ‖W‖ without the adapter and with it. ``skipped`` maps each linear layer that matches
    the targets but gets no adapter to the reason.
    """

    groups: Mapping[str, str]
    trainable: int
    total: int
    residuals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        # The number of trainable parameters, and their groups.
        counts = sorted(Counter(self.groups.values()).items())
        sizes = ", ".join(f"{count} in {name}" for name, count in counts)
        trained = f"{self.trainable:,} of {self.total:,} parameters train"
        text = f"{trained} ({self.trainable / self.total:.2%}); arrays: {sizes}"

        # The mean quantization error.
        if self.residuals:
            before = sum(without for without, _ in self.residuals.values()) / len(self.residuals)
            after = sum(error for _, error in self.residuals.values()) / len(self.residuals)
            text += (
                f"; quantizing loses {after:.2%} of the weights' norm, {before:.2%} without the"
                " adapter's start"
            )

        # The layers that were skipped.
        for reason, count in sorted(Counter(self.skipped.values()).items()):
            text += f"; skipped {counted(count, 'layer')} ({reason})"
        return text


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return path → adapter for every adapter on ``model``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}


def check_no_foreign_adapters(model: nn.Module) -> None:
    """Check that a model has no adapters of another program, such as mlx-lm's layers.

    They would be taken for the base: new adapters would be put on the matrix inside of them.

    Raises:
        AdapterError: It has some.
        ModelError: It is not a language model of mlx-lm.
    """
    check_blocks(model)
    for path, module in model.named_modules():
        if "lora_a" in module and not isinstance(module, Adapter):
            program = type(module).__module__.partition(".")[0]
            raise AdapterError(
                f"the model has adapters of {program} ({path} is a {type(module).__name__}): load"
                " it without them, or with them by mlx_loraplus.load(model, adapter_path=FOLDER)"
            )


def adapter_arrays(model: nn.Module) -> list[mx.array]:
    """Return the arrays of a model's adapters, with their bases, and of fully trained modules."""
    modules = [*find_adapters(model).values(), *find_fully_trained(model).values()]
    arrays: list[mx.array] = []
    for module in modules:
        parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
        arrays += parameters.values()
    return arrays


def find_fully_trained(model: nn.Module) -> dict[str, Any]:
    """Return path → module for every module of ``model`` that trains in full."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, FullyTrained)
    }


def find_groups(model: nn.Module) -> dict[str, str]:
    """Return path → LoRA+ group for parameters of adapters and of modules that train in full."""
    groups: dict[str, str] = {}
    for path, adapter in find_adapters(model).items():
        for name, group in adapter.groups.items():
            groups[f"{path}.{name}"] = group

    for path, module in find_fully_trained(model).items():
        for name in own_arrays(module):
            groups[f"{path}.{name}"] = "embedding"
    return groups


def trainable_summary(
    model: nn.Module, residuals: Mapping[str, tuple[float, float]] | None = None
) -> TrainableParams:
    """Count the trainable parameters of ``model``, and return the LoRA+ group of each.

    Args:
        model: A model with adapters.
        residuals: As in ``TrainableParams``.

    Raises:
        AdapterError: Nothing trains, or a trainable parameter belongs to no group.
    """
    # Every trainable parameter must have a group, because the group sets its learning rate.
    trainable: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    known = find_groups(model) | weight_groups(model)
    groups = {name: group for name, group in known.items() if name in trainable}
    if not groups:
        raise AdapterError("nothing trains in this model: attach adapters first")
    stray = sorted(trainable.keys() - groups.keys())
    if stray:
        raise AdapterError(
            f"found {counted(len(stray), 'trainable parameter')} outside the adapters, such as"
            f" {stray[0]}: freeze all parameters that belong to no adapter"
        )

    # mlx-lm counts only the bases, so the parameters of the adapters are added.
    own = 0
    for adapter in find_adapters(model).values():
        own += sum(adapter[name].size for name in adapter.groups)
    size = sum(array.size for array in trainable.values())
    return TrainableParams(groups, size, get_total_parameters(model) + own, residuals or {})
