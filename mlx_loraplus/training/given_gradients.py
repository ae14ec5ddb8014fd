"""Check what an own training loop gives to the optimizer's ``update``."""

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ConfigError, counted


def flat_gradients(
    model: nn.Module, gradients: Any, names: Collection[str]
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Return the gradients and the parameters that train, by path.

    Args:
        model: The model to update.
        gradients: Tree of the gradients, from ``nn.value_and_grad``.
        names: The paths of the parameters that the optimizer has a state for.

    Raises:
        ConfigError: The model is not the first argument, or a parameter or its gradient is missing.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "LoRAPlus.update takes the model, then the gradients: update(model, gradients)"
        )

    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    if gone := [name for name in names if name not in parameters]:
        raise ConfigError(
            f"{counted(len(gone), 'parameter')} given to init, such as {gone[0]}, can't be updated,"
            " because nothing of this name trains in the model: give the model that was given to"
            " init, or call init again"
        )

    flat: dict[str, mx.array] = dict(tree_flatten(gradients))
    if missing := [name for name in names if name not in flat]:
        raise ConfigError(
            f"the gradients lack {counted(len(missing), 'parameter')}, such as {missing[0]}: give"
            " all that nn.value_and_grad(model, loss) returns"
        )
    return flat, parameters
