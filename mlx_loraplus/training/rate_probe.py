"""Train a run from its start at other rates, measure its losses, and return to the start.

A ``Probe`` makes real steps of the run, with its batches, objective, optimizer, accumulation and
processes, but at a rate of its own and without warm-up and schedule. ``probing`` restores the
model, the optimizer and the random state afterwards, bit-exactly.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config import TrainConfig
from ..data.batches import arrays_of
from ..device import bounded_memory
from ..kernels.patch import grad_checkpointing, memory_efficient
from ..runs.state import Event
from .distributed import World
from .fastest_step import unchanged
from .interrupts import explain_failure
from .objectives import make_objective
from .schedule import seed_of
from .trainer import PAIRS, SUPERVISED, TrainLoop, TrainState

FORWARD = 1 / 2
"""Cost of a loss without gradients, in steps.

Frozen weights need no gradient, so the backward pass takes about as long as the forward pass. It
takes longer if all weights train, or with gradient checkpointing.
"""


@contextmanager
def probing(state: TrainState, config: TrainConfig, world: World) -> Generator["Probe"]:
    """Let a search train a run's model inside the block, and restore everything after it.

    Args:
        state: The run's state before its first step.
        config: The run's settings.
        world: The processes that train together; each of them searches.

    Raises:
        DeviceError: Memory ran out, or the GPU failed.
    """
    loop = TrainLoop(state, (), config, _ignore, lambda: None, world)
    gated_mlps = None if state.probes is None else state.probes.gated_mlps
    checkpointing = grad_checkpointing(state.model) if state.grad_checkpoint else nullcontext()
    with (
        unchanged(state),
        state.optimizer.constant_rates(),
        bounded_memory(),
        memory_efficient(state.model, gated_mlps, state.choices),
        checkpointing,
        explain_failure(loop.step_batches, config, can_checkpoint=state.can_checkpoint),
        world.watch(config.distributed_timeout),
    ):
        yield Probe(loop)


class Probe:
    """Makes steps of a run from its start, at any rate.

    All numbers are equal on all processes, because they are computed from sums over the processes.

    Args:
        loop: The run's loop, before its first step.

    Attributes:
        spent: The cost of what was done, in steps of the run.
    """

    def __init__(self, loop: TrainLoop):
        self.loop = loop
        self.state = loop.state
        self.spent = 0.0
        self._start = self.parameters()
        self._moments = self.state.optimizer.arrays()
        self._next = 0
        self._loss = make_objective(
            self.state.trunk_and_head, self.state.objective, self.state.choices
        )

    def parameters(self) -> dict[str, mx.array]:
        """Return the parameters that train, by name."""
        return dict(tree_flatten(self.state.model.trainable_parameters()))

    def restart(self, next_step: int = 0) -> None:
        """Return to the run's start, and read the batches from step ``next_step``, from 0."""
        self.state.model.update(tree_unflatten(list(self._start.items())))
        self.state.optimizer.restore(self._moments)
        self._next = next_step

    def move(self, directions: Mapping[str, mx.array], distance: float) -> None:
        """Set the parameters to start + distance · direction."""
        moved = {
            name: (start + distance * directions[name]).astype(start.dtype)
            for name, start in self._start.items()
        }
        self.state.model.update(tree_unflatten(list(moved.items())))
        mx.eval(moved)

    def step(self, rate: float) -> float:
        """Make a step at ``rate``, and return the mean loss of its batches before it.

        The loss is nan if it or a gradient is not finite; then the parameters do not change.
        """
        self.state.optimizer.learning_rate = rate
        stats = self.loop.step(self._number())
        self._next += 1
        self.spent += 1
        loss = stats.loss / (stats.pairs or stats.supervised)
        return loss if math.isfinite(loss) and math.isfinite(stats.norm) else math.nan

    def losses(self, count: int) -> np.ndarray:
        """Return the mean loss of each of the next ``count`` steps' batches, at these parameters.

        The next step reads these batches again.
        """
        first = self._next
        found: list[float] = []
        for _ in range(count):
            found.append(self._loss_of_step())
            self._next += 1
        self._next = first
        return np.array(found)

    def gradients(self) -> tuple[float, dict[str, mx.array]]:
        """Return the mean loss and gradients of the next step's batches, without a step."""
        self._read()
        total, gradients, counts = self.loop.sum_batches()
        flat: dict[str, mx.array] = dict(tree_flatten(gradients))
        count = self._count(counts)
        mean = {name: gradient.astype(mx.float32) / count for name, gradient in flat.items()}
        mx.eval(mean, total)

        self._next += 1
        self.spent += 1
        return float(np.array(total).reshape(-1)[0]) / count, mean

    def _loss_of_step(self) -> float:
        """Return the mean loss of the next step's batches."""
        self._read()
        sums = np.zeros(3)
        baseline = self.loop.estimate_kl(self.loop.step_batches, self.loop.world)
        for batch in self.loop.step_batches:
            value = self._loss(self.state.model, *arrays_of(batch), *baseline)
            summed = value if isinstance(value, mx.array) else value[0]
            sums += (summed.item(), batch.target_count, batch.pairs)

        world = self.loop.world
        total, supervised, pairs = world.sum_shards(mx.array(sums, mx.float32)).tolist()
        self.spent += FORWARD
        return total / (pairs or supervised)

    def _count(self, counts: mx.array) -> float:
        """Return the number that the loss is a mean over: of tokens, pairs or labeled answers.

        ``counts`` is from ``sum_batches``.
        """
        place = PAIRS if self.state.objective.has_preferences else SUPERVISED
        return float(np.array(counts)[place])

    def _number(self) -> int:
        """Return the number of the step whose batches come next; after the last comes the first."""
        return 1 + self._next % self.state.schedule.steps

    def _read(self) -> None:
        """Read the next step's batches, and seed its dropout as the step does."""
        number, loop = self._number(), self.loop
        mx.random.seed(seed_of(loop.config.seed, number, loop.world.shard_index))
        loop.read_batches(number)


def _ignore(_: Event) -> None:
    """Report nothing."""
