"""Compile a function for each shape that occurs repeatedly, with a limit on the memory for traces.

``mx.compile`` traces a function for each shape of its arguments. For a large model, a trace costs
seconds and tens of megabytes. MLX keeps every trace as long as the compiled function exists.
Therefore each shape gets its own compiled function when it occurs for the second time. A run keeps
at most ``MAX_TRACES`` of them, one of which is the update's. If there are more, a shape that has
occurred twice as often as the least recently used one replaces it, which frees its memory. Without
this condition, a run with more shapes than functions would trace them again and again;
scripts/bench/shapes counts the functions that a run compiles.
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
Call = tuple[int, Shape]
"""The number of a function, and the shape of its arguments."""


def should_compile(config: TrainConfig) -> bool:
    """Return whether to compile the step.

    auto compiles only on a GPU: on a CPU, MLX builds every kernel with the C++ compiler first.
    """
    return config.compile == "on" or (config.compile == "auto" and on_gpu())


class Traces:
    """The compiled functions that are kept, one for each function and shape.

    Args:
        most: Maximum number of compiled functions that are kept; by default all of a run's, except
            that of the update, whose arguments always have the same shapes.
    """

    def __init__(self, most: int = MAX_TRACES - 1):
        self.most = most
        self._functions = 0
        self._seen: Counter[Call] = Counter()
        self._kept: OrderedDict[Call, Callable[..., Any]] = OrderedDict()

    @property
    def count(self) -> int:
        """The number of compiled functions that are kept."""
        return len(self._kept)

    def add_function(self) -> int:
        """Return the number that a further function has in its calls."""
        self._functions += 1
        return self._functions

    def choose(
        self, call: Call, function: Callable[..., Any], compile_it: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """Return the compiled function for a call, or the function itself.

        Args:
            call: The function's number, and the shapes of its arguments.
            function: The function that is not compiled.
            compile_it: Makes a new compiled function.
        """
        self._seen[call] += 1
        if call in self._kept:
            self._kept.move_to_end(call)
            return self._kept[call]

        # A new shape has to be worth a trace, and the trace that it replaces.
        if self._seen[call] == 1:
            return function
        if len(self._kept) == self.most:
            oldest = next(iter(self._kept))
            if self._seen[call] < 2 * self._seen[oldest]:
                return function
            del self._kept[oldest]

        self._kept[call] = compile_it()
        return self._kept[call]


class CompiledByShape:
    """A function that runs eagerly for new shapes, and compiled for shapes that it has seen before.

    Args:
        function: Takes trees of arrays. Everything else that it reads or changes is in ``state``.
        state: Arrays that the function reads and changes, as for ``mx.compile``.
        traces: What keeps the compiled functions, of this function and of others.
    """

    def __init__(self, function: Callable[..., Any], state: list[Any], traces: Traces):
        self.function = function
        self.state = state
        self.traces = traces
        self._number = traces.add_function()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled if these shapes were seen before.

        Raises:
            ConfigError: The function can't be compiled.
        """
        try:
            return self._choose(arguments)(*arguments)
        except ValueError as problem:
            # Some models of mlx-lm compute a part with NumPy, which needs the numbers themselves.
            if "during function transformations" not in str(problem):
                raise
            raise ConfigError(
                "compile: mlx-lm computes a part of this model outside MLX, so its step can't be"
                " compiled: set --compile off"
            ) from None

    def count_call(self, *arguments: Any) -> None:
        """Count a call that an earlier session made, without computing it.

        A resumed run then compiles the same calls as an uninterrupted one. This matters because
        compiled and eager results may differ in their last bits.
        """
        self._choose(arguments)

    def _choose(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """Return the compiled function for these arguments' shapes, or the function itself."""
        call = self._number, _shape_of(arguments)
        return self.traces.choose(call, self.function, self._compile)

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
