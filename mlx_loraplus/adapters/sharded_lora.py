"""LoRA over a linear layer whose weight is divided among processes; see ``tensor_parallel``."""

import weakref
from typing import Any

import mlx.core as mx
from mlx.nn.layers.distributed import sum_gradients

from .base_layers import SPLIT_ROWS, project
from .lora import LoRALinear, add_product

# A weak reference to the latest input of the sharded layers, and the result of _sum_gradients.
_summed: list[Any] = []


class ShardedLoRALinear(LoRALinear):
    """LoRA over a sharded Linear or QuantizedLinear.

    Each process holds a part of the base, and the whole of A and B.
    """

    @property
    def kind(self) -> str:
        """The kind's name in the settings, which is not the name of this module."""
        return "lora"

    def __call__(self, x: mx.array) -> Any:
        """Return y, which is divided in the same way as the base's output.

        With divided rows: (..., in) → (..., this process's part of out). With divided columns:
        (..., this process's part of in) → (..., out).
        """
        base = self.base
        rank, processes = base.group.rank(), base.group.size()
        a, b = self.lora_matrices()
        a = a.astype(x.dtype)
        b = (self.scale * b).astype(x.dtype)

        if isinstance(base, SPLIT_ROWS):
            x = _sum_gradients(x, base.group)
            part = mx.split(b, processes, axis=1)[rank]
            y: Any = add_product(project(base, x), self.dropout(x), a, part)
        else:
            part = mx.split(a, processes, axis=0)[rank]
            dropped = self.dropout(x, (rank, processes))
            y = add_product(project(base, x), dropped, part, b)
            y = mx.distributed.all_sum(y, group=base.group)

        # Add the bias after the sum. Otherwise it would be added once for each process.
        return y + base.bias if "bias" in base else y


def _sum_gradients(x: mx.array, group: mx.distributed.Group) -> Any:
    """Return x; its gradient is summed over the processes once for all layers that take this x.

    MLX's own layers sum once for each layer. That is five sums in a block (q, k, v, gate and up),
    although two are enough.
    """
    if _summed:
        latest, result = _summed
        if latest() is x:
            return result

    # The callback clears _summed when x is no longer used.
    identity: Any = sum_gradients(group)
    result = identity(x)
    _summed[:] = weakref.ref(x, lambda _: _summed.clear()), result
    return result
