"""Compile a function for each shape that occurs repeatedly, with a limit on the memory for traces.

``mx.compile`` traces a function for each shape of its arguments. For a large model, a trace costs
seconds and tens of megabytes. MLX keeps every trace as long as the compiled function exists.
Therefore each shape gets its own compiled function when it occurs for the second time. If there
are too many functions, a shape that has occurred twice as often as the least recently used one
replaces it, which frees its memory. Without this condition, a run with more shapes than functions
would trace them again and again; scripts/bench/shapes counts the functions that a run compiles.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import TrainConfig
from ..device import on_gpu
from ..errors import ConfigError
from ..memory.trace_memory import MAX_TRACES

Shape = tuple[Any, ...]
"""The names, shapes and types of all arrays of a call."""


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
        self._seen: Counter[Shape] = Counter()
        self._traces: OrderedDict[Shape, Callable[..., Any]] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled if these shapes were seen before.

        Raises:
            ConfigError: The function can't be compiled.
        """
        try:
            return self._choose(_shape_of(arguments))(*arguments)
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

    def count_call(self, *arguments: Any) -> None:
        """Count a call that an earlier session made, without computing it.

        A resumed run then compiles the same calls as an uninterrupted one. This matters because
        compiled and eager results may differ in their last bits.
        """
        self._choose(_shape_of(arguments))

    def _choose(self, shape: Shape) -> Callable[..., Any]:
        """Return the compiled function of a shape, or the function itself."""
        self._seen[shape] += 1
        if shape in self._traces:
            self._traces.move_to_end(shape)
            return self._traces[shape]

        # A new shape has to be worth a trace, and the trace that it replaces.
        if self._seen[shape] == 1:
            return self.function
        if len(self._traces) == self.most:
            oldest = next(iter(self._traces))
            if self._seen[shape] < 2 * self._seen[oldest]:
                return self.function
            del self._traces[oldest]

        self._traces[shape] = self._compile()
        return self._traces[shape]

    def _compile(self) -> Callable[..., Any]:
        """Return a new compiled function with its own trace."""

        # MLX stores traces by the function's identity, so each trace needs a new function object.
        @wraps(self.function)
        def function(*arguments: Any) -> Any:
            return self.function(*arguments)

        return mx.compile(function, inputs=self.state, outputs=self.state)


def _shape_of(arguments: tuple[Any, ...]) -> Shape:
    """Return the names, shapes and types of all arrays of a call."""
    leaves: Any = tree_flatten(list(arguments))
    shape: list[Any] = []
    for name, leaf in leaves:
        shape.append((name, None if leaf is None else (tuple(leaf.shape), leaf.dtype)))
    return tuple(shape)
