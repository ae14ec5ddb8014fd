"""Compile a function for the shapes that come back, and forget those that do not.

``mx.compile`` traces a function for each shape of its arguments, which costs seconds and tens of
megabytes for a large model, and keeps every trace as long as the compiled function lives. So each
shape gets a compiled function of its own, when it is seen for the second time; the least recently
used one is dropped where there are too many, and its memory with it.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

MAX_TRACES = 16


class CompiledByShape:
    """A function that runs eagerly for a new shape and compiled for one that it has seen.

    Args:
        function: Of trees of arrays; everything else that it reads or changes is in ``state``.
        state: Arrays that the function reads and changes, as for ``mx.compile``.
        most: Compiled functions that are alive at a time.
    """

    def __init__(self, function: Callable[..., Any], state: list[Any], most: int = MAX_TRACES):
        self.function = function
        self.state = state
        self.most = most
        self._seen: set[tuple[Any, ...]] = set()
        self._traces: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled if these shapes were seen before."""
        shape = _shape_of(arguments)
        if shape not in self._seen:
            self._seen.add(shape)
            return self.function(*arguments)

        if shape not in self._traces:
            self._traces[shape] = self._compile()
        self._traces.move_to_end(shape)
        if len(self._traces) > self.most:
            self._traces.popitem(last=False)
        return self._traces[shape](*arguments)

    @property
    def traces(self) -> int:
        """The number of compiled functions that are alive."""
        return len(self._traces)

    def _compile(self) -> Callable[..., Any]:
        """Return the function compiled, with a trace of its own."""

        # MLX keeps traces by the function's identity, so each needs another function.
        @wraps(self.function)
        def function(*arguments: Any) -> Any:
            return self.function(*arguments)

        return mx.compile(function, inputs=self.state, outputs=self.state)


def _shape_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a trace depends on: the names, shapes and types of all arrays."""
    leaves: Any = tree_flatten(list(arguments))
    return tuple(
        (name, None if leaf is None else (tuple(leaf.shape), leaf.dtype)) for name, leaf in leaves
    )
