"""mlx-train-perf's loss in mlx-lm's ``train()``, as its README says. Its kernels need Metal; elsewhere it has a chunked loss."""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

import mlx.core as mx
from mlx_train_perf.adapters.mlx_lm import make_loss_fn

from scripts.bench.rival_trainers import mlx_lm
from scripts.bench.rival_trainers.common import Clock, Task, run


def train(task: Task, clock: Clock) -> None:
    """Train with its kernel where there is Metal, with its chunked loss elsewhere."""
    way = "auto" if mx.metal.is_available() else "chunked"
    mlx_lm.train(task, clock, lambda model: make_loss_fn(model, impl=way))


if __name__ == "__main__":
    run(train, "mlx-train-perf")
