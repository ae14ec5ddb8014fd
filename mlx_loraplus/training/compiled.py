"""Compile a function for each shape that occurs repeatedly, with a limit on the memory for traces.

``mx.compile`` traces a function for each shape of its arguments. For a large model, a trace costs
seconds and tens of megabytes. MLX keeps every trace as long as the compiled function exists.
Therefore each shape gets its own compiled function when it occurs for the second time. If there
are too many functions, the least recently used function is dropped, which frees its memory.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import TrainConfig
from ..device import on_gpu
from ..errors import ConfigError
from ..memory.traces import MAX_TRACES


def should_compile(config: TrainConfig) -> bool:
    """Return whether to compile the step.

    auto compiles only on a GPU: on a CPU, MLX builds every kernel with the C++ compiler first.
    """
    return config.compile == "on" or (config.compile == "auto" and on_gpu())


class CompiledByShape:
    """A function that runs eagerly for new shapes, and compiled for shapes that it has seen before.

    Args:
        function: Takes trees of arrays. Everything else that it reads or changes is in ``state``.
        state: Arrays that the function reads and changes, as for ``mx.compile``.
        most: Maximum number of compiled functions that are kept.
    """

    def __init__(self, function: Callable[..., Any], state: list[Any], most: int = MAX_TRACES):
        self.function = function
        self.state = state
        self.most = most
        self._seen: set[tuple[Any, ...]] = set()
        self._traces: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled if these shapes were seen before.

        Raises:
            ConfigError: The function can't be compiled.
        """
        shape = _shape_of(arguments)
        if shape not in self._seen:
            self._seen.add(shape)
            return self.function(*arguments)

        if shape not in self._traces:
            self._traces[shape] = self._compile()
        self._traces.move_to_end(shape)
        if len(self._traces) > self.most:
            self._traces.popitem(last=False)
        try:
            return self._traces[shape](*arguments)
        except ValueError as problem:
            # Some models of mlx-lm compute a part with NumPy, which needs the numbers themselves.
            if "during function transformations" not in str(problem):
                raise
            raise ConfigError(
                "compile: mlx-lm computes a part of this model outside MLX, so its step can't be"
                " compiled: set --compile off"
            ) from None

    @property
    def traces(self) -> int:
        """The number of compiled functions that are kept."""
        return len(self._traces)

    def _compile(self) -> Callable[..., Any]:
        """Return a new compiled function with its own trace."""

        # MLX stores traces by the function's identity, so each trace needs a new function object.
        @wraps(self.function)
        def function(*arguments: Any) -> Any:
            return self.function(*arguments)

        return mx.compile(function, inputs=self.state, outputs=self.state)


def _shape_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the key of a trace: the names, shapes and types of all arrays."""
    leaves: Any = tree_flatten(list(arguments))
    return tuple(
        (name, None if leaf is None else (tuple(leaf.shape), leaf.dtype)) for name, leaf in leaves
    )
