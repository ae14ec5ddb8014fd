"""Did a fuse keep what was learned? Measured on the weights, layer by layer, and on the model's answers.

``fuse.json``, beside the fused model and in the folder of each run that was fused, holds the
measures. Keys may be added; none changes its meaning or goes without a new schema.

============
======================================================================================================
schema        1
model         the base's name
adapters      {folder's last part: weight}
save_path     the last part of the fused model's folder
bytes_before  size of the base's weights; bytes_after, of the fused ones
answers       loss in nats per token on training rows: {"base", "base + adapter", "fused"}, and "kl", KL(base + adapter
              || fused); {} where no rows were read
layers        {path: {before, after: how its weight is stored ("4 bits", "bfloat16"); ratio: ||D|| / ||W|| of its change
              D = merged - W; cosine of D and what the fused weight has of it, D'; error: ||D' - D|| / ||D||;
              output_cosine: of x D^T and x D'^T over inputs x, null where none were looked at}}
============
======================================================================================================
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.adapter import Adapter
from ..adapters.attach import find_adapters
from ..adapters.layers import LINEARS
from ..config import FuseConfig, RunConfig
from ..data.batches import in_order
from ..data.dataset import Examples
from ..data.splits import load_data
from ..data.tokenize import Example
from ..errors import ConfigError, DataError
from ..kernels.head import split_model
from ..runs.history import SETTINGS
from ..runs.progress import Log
from ..settings import configure, read_settings

SURVIVES = 0.95  # cosine between the change that was meant and the change that was made
CHUNK_BYTES = 2**26  # of logits at a time
ROWS = 4  # in a batch
INPUTS = 1024  # tokens whose inputs to the layers are looked at


@dataclass(repr=False)
class LayerChange:
    """What became of one layer's change D = merged - W, as the fused layer has it: D'.

    Attributes:
        path: The layer's.
        before: How its base was stored, "4 bits" or "bfloat16".
        after: How the fused layer is.
        sums: Over its weights: ||W||², ||D||², ||D'||², <D, D'>, ||D' - D||².
        outputs: Over its outputs' changes x Dᵀ and x D'ᵀ for some inputs: the three in the middle;
            None without inputs.
    """

    path: str
    before: str
    after: str
    sums: np.ndarray = field(default_factory=lambda: np.zeros(5))
    outputs: np.ndarray | None = None

    def add(
        self, weight: mx.array, merged: mx.array, fused: mx.array, inputs: Sequence[mx.array] = ()
    ) -> None:
        """Count a part of the layer, W, W + D and W + D', float32, and its outputs for these ``inputs``."""
        wanted, made = merged - weight, fused - weight
        missed = made - wanted
        self.sums = self.sums + _dots((weight, weight), *_crossed(wanted, made), (missed, missed))
        for x in inputs:
            found = _dots(*_crossed(x @ wanted.T, x @ made.T))
            self.outputs = found if self.outputs is None else self.outputs + found

    @property
    def ratio(self) -> float:
        """||D|| / ||W||."""
        return math.sqrt(self.sums[1] / self.sums[0]) if self.sums[0] else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between D and D'; 1 where there was nothing to keep."""
        return _cosine(*self.sums[1:4])

    @property
    def output_cosine(self) -> float | None:
        """Cosine between the changes of the outputs, x Dᵀ and x D'ᵀ; None where no inputs are known."""
        return None if self.outputs is None else _cosine(*self.outputs)

    @property
    def error(self) -> float:
        """||D' - D|| / ||D||; 1 is as if the adapter had been dropped."""
        return math.sqrt(self.sums[4] / self.sums[1]) if self.sums[1] else 0.0

    @property
    def preserved(self) -> bool:
        """Whether the change is kept: judged by the outputs, or by the weights where no inputs are known."""
        return (self.cosine if self.output_cosine is None else self.output_cosine) >= SURVIVES

    def __repr__(self) -> str:
        """Return one line."""
        return (
            f"{self.path}: changed by {self.ratio:.2%}, as {self.after}, cosine {self.cosine:.3f}"
        )

    def figures(self) -> dict[str, Any]:
        """Return what fuse.json has of it."""
        names = ("before", "after", "ratio", "cosine", "error", "output_cosine")
        return {name: getattr(self, name) for name in names}


def _crossed(wanted: mx.array, made: mx.array) -> tuple[tuple[mx.array, mx.array], ...]:
    return (wanted, wanted), (made, made), (wanted, made)


def _dots(*pairs: tuple[mx.array, mx.array]) -> np.ndarray:
    return np.array(mx.stack([(a * b).sum() for a, b in pairs]), np.float64)


def _cosine(wanted: float, made: float, both: float) -> float:
    if wanted == 0:
        return 1.0
    return float(both / math.sqrt(wanted * made)) if made else 0.0


def layer_change_table(changes: Iterable[LayerChange]) -> str:
    """Return the changes as a table, a line for the layers of one name: means, and how many are stored how."""
    groups: dict[str, list[LayerChange]] = {}
    for change in changes:
        groups.setdefault(change.path.rpartition(".")[2], []).append(change)
    lines = [
        f"{'layers':14} {'change':>9} {'cosine':>9} {'error':>6} {'of outputs':>11}  stored as"
    ]
    for name, group in groups.items():
        ratio, cosine, error = (
            fmean(getattr(c, key) for c in group) for key in ("ratio", "cosine", "error")
        )
        known = [c.output_cosine for c in group if c.output_cosine is not None]
        outputs = f"{fmean(known):.3f}" if known else "-"
        kinds = Counter(
            f"{c.before} → {c.after}" if c.before != c.after else c.after for c in group
        )
        stored = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"{name:14} {ratio:9.2%} {cosine:9.3f} {error:6.2f} {outputs:>11}  {stored}")
    return "\n".join(lines)


def training_of(config: FuseConfig, folders: Iterable[Path], log: Log) -> RunConfig | None:
    """Return the settings to read training rows by: an adapter's own, with ``data`` in their place if it is given."""
    files = [path for folder in folders if (path := folder / SETTINGS).is_file()]
    if not config.sample_tokens or not (files or config.data):
        return None
    try:
        settings = read_settings(files[0]) if files else {}
        return configure(
            RunConfig, settings | ({"data": config.data, "data_weights": ()} if config.data else {})
        )
    except ConfigError as problem:  # cut off, or by another version
        log(f"the answers are not compared, since {files[0]} can't be read: {problem}")
        return None


def sample_rows(
    run: RunConfig, tokenizer: TokenizerWrapper, config: FuseConfig, log: Log
) -> tuple[Examples, Examples] | None:
    """Return two seeded choices of a run's training examples; None, told, where its data has gone.

    By the first, answers are compared: they have together at most ``sample_tokens`` supervised
    tokens, or there is one. The second is for ``gather_inputs``: all others, or the same where
    there are no others.

    Raises: DataError where the data that ``config`` names can't be read.
    """
    try:
        examples = load_data(run, tokenizer, "train").examples["train"]
    except DataError as problem:
        if config.data:
            raise
        log(
            "the answers are not compared, since the training rows can't be read (--data names"
            f" others): {problem}"
        )
        return None
    order = np.random.default_rng(run.seed).permutation(len(examples))
    fit = int(
        np.searchsorted(np.cumsum(examples.targets[order]), config.sample_tokens, side="right")
    )
    first, others = np.split(order, [max(1, fit)])
    return examples.take(first), examples.take(others if len(others) else first)


class _Watched(nn.Module):
    """A layer that adds its inputs to a list."""

    def __init__(self, layer: Adapter, inputs: list[mx.array]):
        super().__init__()
        self.layer = layer
        self._inputs = inputs  # under a public name they would be parameters of the model

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x.reshape(-1, x.shape[-1]))
        return self.layer(x)  # pyright: ignore[reportCallIssue]  a linear layer's adapter has one


def gather_inputs(model: nn.Module, examples: Sequence[Example]) -> dict[str, list[mx.array]]:
    """Return path → what each linear layer with an adapter is given for up to ``INPUTS`` tokens, (tokens, columns).

    Layers side by side share the arrays. Experts are left out: each sees too few of the tokens.
    """
    adapters = {path: a for path, a in find_adapters(model).items() if isinstance(a.base, LINEARS)}
    inputs: dict[str, list[mx.array]] = {path: [] for path in adapters}
    model.update_modules(
        tree_unflatten([(path, _Watched(a, inputs[path])) for path, a in adapters.items()])
    )
    model.eval()
    seen = 0
    for example in examples:
        if seen >= INPUTS:
            break
        tokens = example.tokens[: INPUTS // 4]
        mx.eval(model(mx.array(tokens)[None]), inputs)
        seen += len(tokens)
    model.update_modules(tree_unflatten(list(adapters.items())))
    return inputs


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

    def logs(self, part: slice) -> mx.array:
        """Return log-probabilities, (part, vocabulary)."""
        return nn.log_softmax(self.head(self.states[part]).astype(mx.float32))


def ask(model: nn.Module, examples: Sequence[Example]) -> Answers:
    """Run a model over a sample."""
    split: Any = split_model(model)
    trunk, head = (split.trunk, split.head) if split else (model, lambda logits: logits)
    model.eval()
    states, targets = [], []
    for batch in in_order(examples, ROWS):
        places = mx.array(batch.positions[: batch.supervised])
        states.append(trunk(mx.array(batch.tokens)).flatten(0, 1)[places])
        targets.append(mx.array(batch.targets[: batch.supervised]))
        mx.eval(states[-1])
    return Answers(head, mx.concatenate(states), mx.concatenate(targets))


def losses(answers: Mapping[str, Answers]) -> dict[str, float]:
    """Return each one's mean loss per token, and of several ``kl``, the mean KL(first || last), all in nats.

    Logits are made for a few positions at a time.
    """
    named = list(answers.values())
    count = len(named[0].targets)
    rows = max(1, CHUNK_BYTES // (4 * named[0].logs(slice(1)).shape[-1]))
    sums = np.zeros(len(named) + 1)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        logs = [answer.logs(part) for answer in named]
        targets = named[0].targets[part, None]
        found = [-mx.take_along_axis(log, targets, axis=-1).sum() for log in logs]
        sums += np.array(mx.stack([*found, (mx.exp(logs[0]) * (logs[0] - logs[-1])).sum()]))
    *means, divergence = (sums / count).tolist()
    known = dict(zip(answers, means, strict=True))
    return known | {"kl": max(divergence, 0.0)} if len(named) > 1 else known
