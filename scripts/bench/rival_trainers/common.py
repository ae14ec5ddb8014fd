"""What the trainers of scripts/bench/rivals share. It runs in each rival's environment, without mlx_loraplus.

A trainer is a file beside this one with a function ``train(task, clock)``. It loads the task's
model, attaches LoRA, and trains with its own loop for a few passes over the same rows. All but the
last pass allocate and compile; the last one is timed. ``run`` prints one JSON line.
"""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

BETA = 0.1  # of DPO
MATMUL = 2048  # side of the matrices that show whether a process has the fast BLAS


@dataclass(frozen=True)
class Task:
    """What to train and how, the same for every trainer.

    Attributes:
        model: An mlx-lm folder.
        objective: ``sft`` or ``dpo``.
        batch_size: Examples or pairs in a batch.
        updates: Batches in a pass over the rows.
        passes: How often the rows are trained on; the last pass is timed.
        targets: The paths of the layers that get LoRA.
        rank: Of the adapters.
        scale: alpha / rank.
        rate: The constant learning rate.
        seed: Of every random number.
        max_length: No row is longer.
        checkpoint: Recompute each block in the backward pass.
        rows: ``tokens`` and ``offset``, the first supervised token, for each example; for pairs
            ``prompt``, ``chosen``, ``rejected`` too, where the rows of a pair follow each other.
        held_out: Rows to judge by.
        folder: Where a trainer may write.
    """

    model: str
    objective: str
    batch_size: int
    updates: int
    passes: int
    targets: list[str]
    rank: int
    scale: float
    rate: float
    seed: int
    max_length: int
    checkpoint: bool
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    folder: str

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.passes * self.updates

    @property
    def target_names(self) -> list[str]:
        """The last parts of the paths of the layers that get LoRA."""
        return sorted({path.rsplit(".", 1)[-1] for path in self.targets})


@dataclass
class Clock:
    """The moments at which updates end, their losses, and the sizes of their batches.

    Args:
        updates: In a pass.

    Attributes:
        moments: Seconds, one for each update.
        losses: One for each update.
        padded: Input tokens with their padding, for each batch that was made; empty if unknown.
        base_bytes: Alive when model, adapters and optimizer are ready.
        peak_bytes: The most that was alive while training.
        kernels: How many compiled kernels MLX has on disk at the end of each pass.
        reference_seconds: What DPO's reference took if it was computed once, before the first update.
        model: The trained model.
    """

    updates: int
    moments: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    padded: list[int] = field(default_factory=list)
    base_bytes: int = 0
    peak_bytes: int = 0
    kernels: list[int] = field(default_factory=list)
    reference_seconds: float = 0.0
    model: Any = None

    def start(self, model: nn.Module) -> None:
        """Take what is alive now as the base of the memory that training needs."""
        self.model = model
        mx.eval(model.parameters())
        mx.synchronize()
        mx.clear_cache()
        self.base_bytes = mx.get_active_memory()
        mx.reset_peak_memory()

    def tick(self, loss: float) -> None:
        """Note that an update has ended."""
        self.moments.append(time.perf_counter())
        self.losses.append(float(loss))
        self.peak_bytes = mx.get_peak_memory()
        if len(self.moments) % self.updates == 0:
            self.kernels.append(count_kernels())

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Note an update, as a callback of mlx-lm."""
        self.tick(train_info["train_loss"])

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Ignore a validation, as a callback of mlx-lm."""

    def counted(
        self, iterate: Callable[..., Iterator[Any]], arrays: int = 1
    ) -> Callable[..., Iterator[Any]]:
        """Return mlx-lm's ``iterate_batches``, which counts its batches, and continues when it is called again.

        Args:
            iterate: Yields tuples of arrays.
            arrays: How many of them hold tokens.
        """
        source: list[Iterator[Any]] = []

        def batches(*positional: Any, **named: Any) -> Iterator[Any]:
            if not source:
                source.append(iterate(*positional, **named))
            for batch in source[0]:
                shapes = [array.shape for array in batch[:arrays]]
                self.padded.append(sum(rows * (length - 1) for rows, length in shapes))
                yield batch

        return batches


def read_task(file: str) -> Task:
    """Return the task that scripts/bench/rivals has written."""
    return Task(**json.loads(Path(file).read_text(encoding="utf-8")))


def load_with_lora(task: Task) -> nn.Module:
    """Load the model with mlx-lm, and put mlx-lm's LoRA layers on it, all with the same start."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(task.model))
    model.freeze()
    options = {"rank": task.rank, "scale": task.scale, "dropout": 0.0, "keys": set(task.targets)}
    linear_to_lora_layers(model, len(model.layers), options)
    start_adapters(model, task.seed)
    return model


def start_adapters(model: nn.Module, seed: int) -> None:
    """Give every A the same seeded numbers whoever made it; B is zero."""
    generator = np.random.default_rng(seed)
    start = []
    arrays: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    for name, array in sorted(arrays.items()):
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(array.shape[0])
            start.append(
                (name, mx.array(generator.uniform(-bound, bound, array.shape).astype(np.float32)))
            )
    model.load_weights(start, strict=False)


class TokenRows:
    """Rows as mlx-lm's data sets hold them: dictionaries, processed on demand into (tokens, offset)."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """Return a row's tokens and where its supervised part begins."""
        return row["tokens"], row["offset"]


def allow_any_device() -> None:
    """Let trainers that ask Metal for its working set run elsewhere: they get the machine's memory, and no wired limit."""
    if mx.metal.is_available():
        return
    original = mx.device_info
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def device_info(*device: Any) -> dict[str, Any]:
        return {"max_recommended_working_set_size": memory, **original(*device)}

    mx.device_info = device_info
    mx.set_wired_limit = lambda _: 0


def log_probs(model: nn.Module, rows: Sequence[dict[str, Any]]) -> tuple[list[float], int]:
    """Return each row's summed log-probability of its supervised tokens, and how many they are in all."""
    model.eval()
    sums, count = [], 0
    for row in rows:
        tokens, offset = mx.array(row["tokens"]), max(row["offset"], 1)
        logits = model(tokens[None, :-1])[0, offset - 1 :]
        each = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[offset:])
        sums.append(-each.sum().item())
        count += each.size
    return sums, count


def judge(task: Task, sums: Sequence[float], count: int, reference: Sequence[float]) -> float:
    """Return the loss of held-out rows: the mean of their supervised tokens, or DPO's mean of their pairs."""
    if task.objective == "sft":
        return -sum(sums) / count
    gains = [now - before for now, before in zip(sums, reference, strict=True)]
    margins = [BETA * (gains[n] - gains[n + 1]) for n in range(0, len(gains), 2)]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def count_kernels() -> int:
    """Return how many kernels MLX has compiled for a CPU and kept in the temporary folder."""
    return sum(1 for _ in (Path(tempfile.gettempdir()) / "mlx").rglob("*.so"))


def matmul_rate() -> float:
    """Return the FLOP/s of the best of five large float32 matrix products."""
    a, b = mx.random.normal((MATMUL, MATMUL)), mx.random.normal((MATMUL, MATMUL))
    mx.eval(a, b)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        mx.eval(a @ b)
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL**3 / min(seconds)


def installed(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def text_pairs(task: Task, tokenizer: Any) -> list[dict[str, str]]:
    """Return the pairs as text, for a trainer that tokenizes it itself."""
    for row in task.rows:
        if list(tokenizer.encode(row["text"])) != row["tokens"]:
            raise RuntimeError("its tokenizer makes other tokens of a row")
    return [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in task.rows[::2]
    ]


def run(train: Callable[[Task, Clock], None], *packages: str) -> None:
    """Train, judge, and print one JSON line.

    Args:
        train: Of a rival.
        packages: Whose versions belong to the result, besides mlx and mlx-lm.
    """
    task = read_task(sys.argv[1])
    clock = Clock(task.updates)
    mx.random.seed(task.seed)
    np.random.seed(task.seed)  # what mlx-lm draws from  # noqa: NPY002

    train(task, clock)
    if len(clock.moments) != task.steps:
        raise RuntimeError(f"{len(clock.moments)} updates ended instead of {task.steps}")

    # In the timed pass, every row was trained on once. The reference of DPO is the start: B is 0.
    warm = task.steps - task.updates
    padded = clock.padded[warm : task.steps]
    sums, count = log_probs(clock.model, task.held_out)
    reference: list[float] = []
    if task.objective == "dpo":
        remove_adapters(clock.model)
        reference, _ = log_probs(clock.model, task.held_out)
    result = {
        "seconds": clock.moments[-1] - clock.moments[warm - 1] + clock.reference_seconds,
        "reference_seconds": clock.reference_seconds,
        "kernels_built": clock.kernels[-1] - clock.kernels[-2],
        "losses": clock.losses,
        "padded_tokens": sum(padded) if len(padded) == task.updates else None,
        "base_bytes": clock.base_bytes,
        "peak_bytes": clock.peak_bytes,
        "held_out_loss": judge(task, sums, count, reference),
        "matmul_flops_per_second": matmul_rate(),
        "versions": installed("mlx", "mlx-lm", *packages),
    }
    print("\n" + json.dumps(result))


def remove_adapters(model: nn.Module) -> None:
    """Set every B to zero."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    zeros = [
        (name, mx.zeros_like(array)) for name, array in arrays.items() if name.endswith("lora_b")
    ]
    model.load_weights(zeros, strict=False)
