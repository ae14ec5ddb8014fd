"""Did a fuse keep what was learned? Measured on the weights, layer by layer, and on the model's answers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.table import Table

from ..adapters.attach import find_adapters
from ..adapters.base import LINEARS
from ..adapters.lora import Adapter
from ..config import FuseConfig, RunConfig
from ..data.batches import in_order
from ..data.examples import Examples
from ..data.loading import load_data
from ..data.templates import Example
from ..errors import DataError
from ..training.progress import Tell
from ..training.split import split_model

SURVIVES = 0.95  # cosine between the change that was meant and the change that was made
CHUNK_BYTES = 2**26  # of logits at a time
ROWS = 4  # in a batch
INPUTS = 1024  # tokens whose inputs to the layers are looked at


@dataclass
class Change:
    """What became of one layer's change D = merged - W, as the fused layer has it: D'.

    Sums over the layer's weights, and over its outputs for some inputs, are added up a part at a time.

    Attributes:
        path: The layer's.
        before: How its base was stored, "4 bits" or "bfloat16".
        after: How the fused layer is.
    """

    path: str
    before: str
    after: str
    weight: float = 0.0
    wanted: float = 0.0
    made: float = 0.0
    both: float = 0.0
    missed: float = 0.0
    outputs: tuple[float, float, float] | None = None

    def add(self, weight: mx.array, merged: mx.array, fused: mx.array, inputs: Sequence[mx.array] = ()) -> None:
        """Count a part of the layer, W, W + D and W + D', float32, and its outputs for these ``inputs``."""
        wanted, made = merged - weight, fused - weight
        sums = [(a * b).sum() for a, b in ((weight, weight), *_products(wanted, made), (made - wanted, made - wanted))]
        for x in inputs:
            sums += [(a * b).sum() for a, b in _products(x @ wanted.T, x @ made.T)]
        found = np.array(mx.stack(sums), np.float64)
        self.weight, self.wanted, self.made, self.both, self.missed = (
            np.array([self.weight, self.wanted, self.made, self.both, self.missed]) + found[:5]
        ).tolist()
        if len(inputs):
            total = found[5:].reshape(-1, 3).sum(axis=0) + np.array(self.outputs or (0.0, 0.0, 0.0))
            self.outputs = tuple(total.tolist())

    @property
    def ratio(self) -> float:
        """‖D‖ / ‖W‖."""
        return math.sqrt(self.wanted / self.weight) if self.weight else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between D and D'; 1 where there was nothing to keep."""
        return _cosine(self.wanted, self.made, self.both)

    @property
    def output_cosine(self) -> float | None:
        """Cosine between the changes of the outputs, x Dᵀ and x D'ᵀ; None where no inputs are known."""
        return None if self.outputs is None else _cosine(*self.outputs)

    @property
    def survives(self) -> bool:
        """Whether the change is kept: judged by the outputs, or by the weights where no inputs are known."""
        cosine = self.cosine if self.output_cosine is None else self.output_cosine
        return cosine >= SURVIVES

    @property
    def error(self) -> float:
        """‖D' - D‖ / ‖D‖; 1 is as if the adapter had been dropped."""
        return math.sqrt(self.missed / self.wanted) if self.wanted else 0.0

    def figures(self) -> dict[str, Any]:
        """Return what fuse.json has of it."""
        return {
            "before": self.before, "after": self.after, "ratio": self.ratio, "cosine": self.cosine, "error": self.error,
            "output_cosine": self.output_cosine,
        }  # fmt: skip


def _products(wanted: mx.array, made: mx.array) -> tuple[tuple[mx.array, mx.array], ...]:
    return (wanted, wanted), (made, made), (wanted, made)


def _cosine(wanted: float, made: float, both: float) -> float:
    if wanted == 0:
        return 1.0
    return both / math.sqrt(wanted * made) if made else 0.0


def change_table(changes: Iterable[Change]) -> Table:
    """Return the changes as a table, a line for the layers of one name: means, and how many are stored how."""
    table = Table(title="each layer's change, and how much of it is kept")
    for name in ("layers", "", "of the weight", "cosine", "error", "outputs' cosine", "stored as"):
        table.add_column(name, justify="left" if name in ("layers", "stored as") else "right")
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.path.rpartition(".")[2], []).append(change)
    for name, group in groups.items():
        kinds = [f"{c.before} → {c.after}" if c.before != c.after else c.after for c in group]
        table.add_row(
            name,
            str(len(group)),
            f"{_mean(c.ratio for c in group):.2%}",
            f"{_mean(c.cosine for c in group):.3f}",
            f"{_mean(c.error for c in group):.2f}",
            f"{_mean(known):.3f}" if (known := [c.output_cosine for c in group if c.output_cosine is not None]) else "",
            ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        )
    return table


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def as_text(table: Table) -> str:
    """Return a table as text."""
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def sample_rows(
    run: RunConfig, tokenizer: TokenizerWrapper, config: FuseConfig, tell: Tell
) -> tuple[Examples, Examples] | None:
    """Return two seeded choices of a run's training examples; None, told, where its data has gone.

    By the first, answers are compared: they have together at most ``sample_tokens`` supervised tokens, or there is one.
    The second is for ``gather_inputs``: all others, or the same where there are no others.

    Raises:
        DataError: The data that ``config`` names can't be read.
    """
    try:
        examples = load_data(run, tokenizer, "train").examples["train"]
    except DataError as problem:
        if config.data:
            raise
        tell(f"the answers are not compared, since the training rows can't be read (--data names others): {problem}")
        return None
    order = np.random.default_rng(run.seed).permutation(len(examples))
    fit = int(np.searchsorted(np.cumsum(examples.targets[order]), config.sample_tokens, side="right"))
    first, others = np.split(order, [max(1, fit)])
    return examples.take(first), examples.take(others if len(others) else first)


class _Watched(nn.Module):
    """A layer that keeps its inputs."""

    def __init__(self, layer: Adapter):
        super().__init__()
        self.layer = layer
        self._inputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x.reshape(-1, x.shape[-1]))
        return self.layer(x)  # pyright: ignore[reportCallIssue]  a linear layer's adapter has one


def gather_inputs(model: nn.Module, examples: Sequence[Example]) -> dict[str, list[mx.array]]:
    """Return path → what each linear layer with an adapter is given for up to ``INPUTS`` tokens, (tokens, columns).

    Layers side by side share the arrays. Experts are left out: each sees too few of the tokens.
    """
    adapters = {path: a for path, a in find_adapters(model).items() if isinstance(a.base, LINEARS)}
    watched = {path: _Watched(adapter) for path, adapter in adapters.items()}
    model.update_modules(tree_unflatten(list(watched.items())))
    model.eval()
    seen = 0
    for example in examples:
        if seen >= INPUTS:
            break
        tokens = example.tokens[: INPUTS // 4]
        mx.eval(model(mx.array(tokens)[None]), [watch._inputs for watch in watched.values()])
        seen += len(tokens)
    model.update_modules(tree_unflatten(list(adapters.items())))
    return {path: watch._inputs for path, watch in watched.items()}


@dataclass(frozen=True)
class Answers:
    """What a model says at the supervised positions of a sample, kept as the states before its head.

    Attributes:
        head: Makes logits of them; an adapted or quantized head is kept alive by this.
        states: (targets, hidden).
        targets: (targets,).
    """

    head: Any
    states: mx.array
    targets: mx.array


def ask(model: nn.Module, examples: Sequence[Example]) -> Answers:
    """Run a model over a sample."""
    split = split_model(model)
    model.eval()
    trunk: Any = model if split is None else split.trunk
    states, targets = [], []
    for batch in in_order(examples, ROWS):
        places = mx.array(batch.positions[: batch.supervised])
        states.append(trunk(mx.array(batch.tokens)).flatten(0, 1)[places])
        targets.append(mx.array(batch.targets[: batch.supervised]))
        mx.eval(states[-1])
    return Answers(split.head if split else _as_it_is, mx.concatenate(states), mx.concatenate(targets))


def _as_it_is(states: mx.array) -> mx.array:
    return states


def losses(answers: Mapping[str, Answers]) -> dict[str, float]:
    """Return each one's mean loss per token, and ``kl``: the mean KL(first || last), all in nats.

    Logits are made for a few positions at a time.
    """
    named = list(answers.values())
    count = len(named[0].targets)
    rows = max(1, CHUNK_BYTES // (4 * _logs(named[0], slice(1)).shape[-1]))
    sums = np.zeros(len(named) + 1)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        logs = [_logs(answer, part) for answer in named]
        targets = named[0].targets[part, None]
        found = [-mx.take_along_axis(log, targets, axis=-1).sum() for log in logs]
        sums += np.array(mx.stack([*found, (mx.exp(logs[0]) * (logs[0] - logs[-1])).sum()]))
    means = (sums / count).tolist()
    return dict(zip([*answers, "kl"], means, strict=True))


def _logs(answers: Answers, part: slice) -> mx.array:
    """Return log-probabilities, (part, vocabulary)."""
    logits = answers.head(answers.states[part]).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
