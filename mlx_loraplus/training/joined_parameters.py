"""Small arrays joined into few, because a GPU needs one kernel launch per operation and array.

A LoRA+ group has hundreds of small matrices. An elementwise update rule treats them as a few
arrays. Files store the arrays one by one, under the names of the parameters.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

# The most elements of a joined array. A step has temporary arrays of about 16 times its size, and
# larger arrays would save nothing.
_MOST = 1 << 20


class JoinedParameters:
    """The parameters that one update rule steps, with the small ones of each type joined.

    Args:
        parameters: Path → parameter.
        join: Whether to join the small parameters; only elementwise rules allow it.

    Attributes:
        shapes: Path → the shape of each parameter.
        joined: The name of each joined array → the paths of its parameters.
        alone: The paths of the other parameters.
    """

    def __init__(self, parameters: Mapping[str, mx.array], *, join: bool):
        self.shapes = {name: tuple(array.shape) for name, array in parameters.items()}
        self.joined: dict[str, list[str]] = {}
        self.alone: list[str] = []
        last: dict[mx.Dtype, list[str]] = {}  # each type's last joined array
        space: Counter[mx.Dtype] = Counter()  # the elements that still fit into it
        for name, array in parameters.items():
            if not join or array.size > _MOST:
                self.alone.append(name)
                continue

            # Begin another array if this parameter does not fit into the last one.
            if array.size > space[array.dtype]:
                last[array.dtype] = []
                space[array.dtype] = _MOST
                self.joined[f"joined {array.dtype} {len(self.joined)}"] = last[array.dtype]
            last[array.dtype].append(name)
            space[array.dtype] -= array.size

    def join(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the arrays of the parameters, with the small ones joined."""
        packed = {name: arrays[name] for name in self.alone}
        for name, members in self.joined.items():
            packed[name] = mx.concatenate([arrays[member].reshape(-1) for member in members])
        return packed

    def split(self, packed: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the arrays one by one; the inverse of ``join``."""
        arrays = {name: packed[name] for name in self.alone}
        for name, members in self.joined.items():
            sizes = [math.prod(self.shapes[member]) for member in members]
            ends = np.cumsum(sizes)[:-1].tolist()
            for member, piece in zip(members, mx.split(packed[name], ends), strict=True):
                arrays[member] = piece.reshape(self.shapes[member])
        return arrays

    def split_state(self, state: Mapping[str, Any]) -> dict[str, mx.array]:
        """Return an update rule's state with the names and shapes of the parameters.

        Args:
            state: The rule's own values, such as its step, and the moments of each joined array.
        """
        kept = [*self.alone, *self.joined]
        arrays = {name: state[name] for name in state if name not in kept}
        for moment in _moments(state, kept):
            one_by_one = self.split({name: state[name][moment] for name in kept})
            arrays |= {f"{name}.{moment}": array for name, array in one_by_one.items()}
        return arrays

    def restore_state(self, state: dict[str, Any], arrays: Mapping[str, mx.array]) -> None:
        """Set an update rule's state in place to the arrays from ``split_state``."""
        kept = [*self.alone, *self.joined]
        for name in [name for name in state if name not in kept]:
            state[name] = arrays[name]
        for moment in _moments(state, kept):
            one_by_one = {name: arrays[f"{name}.{moment}"] for name in self.shapes}
            for name, array in self.join(one_by_one).items():
                state[name][moment] = array


def _moments(state: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the rule's names for the values that it stores per array, such as m and v."""
    return sorted({moment for name in names for moment in state[name]})
