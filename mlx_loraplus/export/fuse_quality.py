"""Measure how well a fuse preserves an adapter's effect on the weights and on the answers.

The results are stored in ``fuse.json``, in the folder of the fused model and in the folder of each
fused run. A new version may add keys. Keys are removed or redefined only with a new schema number.

schema
    1
model
    The name of the base.
adapters
    {last part of the folder: weight}
save_path
    The last part of the fused model's folder.
bytes_before, bytes_after
    Size of the weights on disk: of the base, and of the fused model.
answers
    Loss in nats per token on training examples: {"base", "base + adapter", "fused"}, and "kl",
    KL(base + adapter || fused). Empty if no examples were read.
layers
    Path → figures on the layer's intended change D = merged - W and its actual change
    D' = fused - W:

    - before, after: how the weight is stored: "4 bits", "mxfp4" or "bfloat16"
    - ratio: ||D|| / ||W||
    - cosine: between D and D'
    - error: ||D' - D|| / ||D||
    - output_cosine: between x D^T and x D'^T over inputs x; null if no inputs were used
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.base_layers import LINEARS
from ..adapters.lora import Adapter
from ..adapters.trainable import find_adapters
from ..command_config import FuseConfig
from ..config import TrainConfig
from ..data.batches import in_order
from ..data.dataset import Examples
from ..data.load_data import load_data
from ..data.model_limits import Limits, check_examples, limits_of
from ..data.tokenize import Example
from ..errors import ConfigError, DataError
from ..kernels.trunk_and_head import find_trunk_and_head
from ..models.derived_weights import start_inference
from ..models.moved_run_paths import read_run_settings
from ..rich_display import Tracker, untracked
from ..runs.history import SETTINGS
from ..runs.progress import Log
from ..settings import configure

MIN_COSINE = 0.95  # least cosine of intended and actual change for a change that is preserved
SAMPLE_TOKENS = 2048  # supervised tokens to compare answers on
CHUNK_BYTES = 2**26  # bytes of logits that are computed at a time
BATCH_SIZE = 4
INPUTS = 1024  # number of tokens for which the inputs of layers are gathered


@dataclass(repr=False)
class LayerChange:
    """One layer's intended change D = merged - W, and its actual change D' = fused - W.

    Attributes:
        path: The layer's path.
        before: How the base layer is stored, such as "4 bits" or "bfloat16".
        after: How the fused layer is stored.
        sums: Sums over all weights: ||W||², ||D||², ||D'||², <D, D'>, ||D' - D||².
        outputs: For some inputs x: ||x Dᵀ||², ||x D'ᵀ||², and the dot product of x Dᵀ and x D'ᵀ;
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
        """Add a part of the layer.

        Args:
            weight: W, float32.
            merged: W + D, float32.
            fused: W + D', float32.
            inputs: Inputs x of the layer, (tokens, columns) each.
        """
        intended = merged - weight
        actual = fused - weight
        missed = actual - intended
        self.sums = self.sums + _dots(
            (weight, weight),
            (intended, intended),
            (actual, actual),
            (intended, actual),
            (missed, missed),
        )

        for x in inputs:
            intended_change = x @ intended.T
            actual_change = x @ actual.T
            products = _dots(
                (intended_change, intended_change),
                (actual_change, actual_change),
                (intended_change, actual_change),
            )
            self.outputs = products if self.outputs is None else self.outputs + products

    @property
    def ratio(self) -> float:
        """||D|| / ||W||."""
        weight, intended = self.sums[:2]
        return math.sqrt(intended / weight) if weight else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between D and D'; 1 if D is zero."""
        return _cosine(*self.sums[1:4])

    @property
    def output_cosine(self) -> float | None:
        """Cosine between the outputs' changes, x Dᵀ and x D'ᵀ; None without inputs."""
        return None if self.outputs is None else _cosine(*self.outputs)

    @property
    def error(self) -> float:
        """||D' - D|| / ||D||; it is 1 if the fused layer equals the base."""
        intended, missed = self.sums[1], self.sums[4]
        return math.sqrt(missed / intended) if intended else 0.0

    @property
    def preserved(self) -> bool:
        """Whether the change is preserved, judged by its outputs if known, else by weights."""
        cosine = self.cosine if self.output_cosine is None else self.output_cosine
        return cosine >= MIN_COSINE

    def __repr__(self) -> str:
        """Return a one-line summary."""
        return (
            f"{self.path}: changed by {self.ratio:.2%}, as {self.after}, cosine {self.cosine:.3f}"
        )

    def figures(self) -> dict[str, Any]:
        """Return the layer's entry in fuse.json."""
        names = ("before", "after", "ratio", "cosine", "error", "output_cosine")
        return {name: getattr(self, name) for name in names}


def _dots(*pairs: tuple[mx.array, mx.array]) -> np.ndarray:
    """Return the dot product of each pair."""
    return np.array(mx.stack([(a * b).sum() for a, b in pairs]), np.float64)


def _cosine(intended: float, actual: float, both: float) -> float:
    """Return the cosine of two vectors from their squared norms and their product."""
    if intended == 0:
        return 1.0
    return float(both / math.sqrt(intended * actual)) if actual else 0.0


def layer_change_table(changes: Iterable[LayerChange]) -> str:
    """Return a table with one line per layer name: mean figures, and how the layers are stored."""
    groups: dict[str, list[LayerChange]] = {}
    for change in changes:
        name = change.path.rpartition(".")[2]
        groups.setdefault(name, []).append(change)

    head = f"{'layers':14} {'change':>9} {'cosine':>9} {'error':>6} {'of outputs':>11}  stored as"
    return "\n".join([head, *(_table_line(name, group) for name, group in groups.items())])


def _table_line(name: str, group: Sequence[LayerChange]) -> str:
    """Return the table's line for all layers with one name."""
    ratio = fmean(change.ratio for change in group)
    cosine = fmean(change.cosine for change in group)
    error = fmean(change.error for change in group)

    output_cosines = [change.output_cosine for change in group]
    known = [output_cosine for output_cosine in output_cosines if output_cosine is not None]
    outputs = f"{fmean(known):.3f}" if known else "-"

    kinds: Counter[str] = Counter()
    for change in group:
        if change.before == change.after:
            kinds[change.after] += 1
        else:
            kinds[f"{change.before} → {change.after}"] += 1
    stored = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{name:14} {ratio:9.2%} {cosine:9.3f} {error:6.2f} {outputs:>11}  {stored}"


def data_settings(config: FuseConfig, folders: Iterable[Path], log: Log) -> TrainConfig | None:
    """Return the settings for reading training examples; None if there are none to read.

    Args:
        config: The settings of the fuse. If ``data`` is set, it replaces the data of the run.
        folders: The folders of the adapters. The first run folder provides the settings.
        log: Called with the reason if the run's settings can't be read.
    """
    files = [folder / SETTINGS for folder in folders if (folder / SETTINGS).is_file()]
    if config.sample_tokens == 0 or not (files or config.data):
        if config.sample_tokens:
            log("the answers are not compared: no run.yaml names training data; give --data")
        return None
    try:
        settings = read_run_settings(files[0]) if files else {}
        if config.data:
            settings = settings | {"data": config.data, "data_weights": ()}
        return configure(TrainConfig, settings)
    except ConfigError as problem:
        where = f"{files[0]} can't be read" if files else "the data can't be used"
        log(f"the answers are not compared: {where}: {problem}")
        return None


def sample_examples(
    run: TrainConfig, base: nn.Module, tokenizer: TokenizerWrapper, config: FuseConfig, log: Log
) -> tuple[Examples, Examples] | None:
    """Return two random samples of a run's training examples; None if they can't be used.

    The first sample is for comparing answers. Its examples have at most ``sample_tokens``
    supervised tokens in total; a sample of a single example may have more. The second sample is for
    ``gather_inputs``. It holds the other examples, or the same ones if there are no others.

    Args:
        run: The settings from ``data_settings``.
        base: The model that will read the examples.
        tokenizer: The base's tokenizer.
        config: The settings of the fuse.
        log: Called with the reason if the run's data can't be used.

    Raises:
        DataError: The data that ``config`` names can't be read, or contains tokens for which the
            model has no embeddings.
    """
    limits = limits_of(base)
    try:
        run = _within_positions(run, limits)
        examples = load_data(run, tokenizer, "train").examples["train"]
        check_examples(limits, {"train": examples}, tokenizer)
    except DataError as problem:
        if config.data:
            raise
        log(f"the answers are not compared (--data names other examples): {problem}")
        return None

    # Take shuffled examples until sample_tokens is reached.
    order = np.random.default_rng(run.seed).permutation(len(examples))
    totals = np.cumsum(examples.target_counts[order])
    wanted = SAMPLE_TOKENS if config.sample_tokens is None else config.sample_tokens
    count = max(1, int(np.searchsorted(totals, wanted, side="right")))

    first, others = order[:count], order[count:]
    return examples.take(first), examples.take(others if len(others) else first)


def _within_positions(run: TrainConfig, limits: Limits) -> TrainConfig:
    """Return the settings with max_seq_length limited to the model's table of positions."""
    if limits.positions is None or limits.longest is None:
        return run
    length = min(run.data.max_seq_length, limits.longest)
    return replace(run, data=replace(run.data, max_seq_length=length))


class _RecordingLayer(nn.Module):
    """A layer that appends its inputs to a list."""

    def __init__(self, layer: Adapter, inputs: list[mx.array]):
        super().__init__()
        self.layer = layer
        self._inputs = inputs  # a public name would make them parameters of the model

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x.reshape(-1, x.shape[-1]))
        return self.layer(x)  # pyright: ignore[reportCallIssue]  a linear layer's adapter has one


def gather_inputs(
    model: nn.Module, examples: Sequence[Example], track: Tracker = untracked
) -> dict[str, list[mx.array]]:
    """Return the inputs of each linear layer with an adapter, for up to ``INPUTS`` tokens.

    Experts are left out, because each expert receives too few tokens.

    Args:
        model: A model with adapters.
        examples: The examples to run the model on, in this order.
        track: Shows the progress.

    Returns:
        Path → arrays of shape (tokens, columns). Layers that have the same input share them.
    """
    # Wrap each adapter in a layer that records its inputs.
    adapters = {
        path: adapter
        for path, adapter in find_adapters(model).items()
        if isinstance(adapter.base, LINEARS)
    }
    inputs: dict[str, list[mx.array]] = {path: [] for path in adapters}
    recording = [
        (path, _RecordingLayer(adapter, inputs[path])) for path, adapter in adapters.items()
    ]
    model.update_modules(tree_unflatten(recording))
    start_inference(model)

    # Use only a part of a long example, so that at least four examples are used.
    texts: list[np.ndarray] = []
    for example in examples:
        if sum(map(len, texts)) >= INPUTS:
            break
        texts.append(example.tokens[: INPUTS // 4])

    for tokens in track(texts, "gathering the inputs of the layers"):
        mx.eval(model(mx.array(tokens)[None]), inputs)

    model.update_modules(tree_unflatten(list(adapters.items())))
    return inputs


@dataclass(frozen=True)
class Answers:
    """A model's answers at the supervised positions of a sample, stored as hidden states.

    Attributes:
        head: Computes logits from the states. An adapted or quantized head stays in memory.
        states: The inputs of the head, (targets, hidden).
        targets: The token ids to predict, (targets,).
    """

    head: Any
    states: mx.array
    targets: mx.array

    def logs(self, part: slice) -> mx.array:
        """Return the log-probabilities of a part of the positions, (part, vocabulary)."""
        return nn.log_softmax(self.head(self.states[part]).astype(mx.float32))


def collect_answers(
    model: nn.Module, examples: Sequence[Example], name: str = "model", track: Tracker = untracked
) -> Answers:
    """Run a model over a sample, and return its answers; ``track`` shows the model's name."""
    # A model whose trunk and head are not found returns logits, which are used as states.
    trunk_and_head: Any = find_trunk_and_head(model)
    trunk, head = (
        (trunk_and_head.trunk, trunk_and_head.head)
        if trunk_and_head
        else (model, lambda logits: logits)
    )
    start_inference(model)

    states: list[mx.array] = []
    targets: list[mx.array] = []
    for batch in track(list(in_order(examples, BATCH_SIZE)), f"answers of {name}"):
        positions = mx.array(batch.positions[: batch.target_count])
        hidden = trunk(mx.array(batch.tokens)).flatten(0, 1)
        states.append(hidden[positions])
        targets.append(mx.array(batch.targets[: batch.target_count]))
        mx.eval(states[-1])
    return Answers(head, mx.concatenate(states), mx.concatenate(targets))


def losses(answers: Mapping[str, Answers]) -> dict[str, float]:
    """Return the mean loss per token of each set of answers to the same sample, in nats.

    With several sets, the result also has ``kl``, the mean KL(first || last).
    """
    sets = list(answers.values())
    first, last = sets[0], sets[-1]
    count = len(first.targets)

    # Logits are computed for a few positions at a time.
    vocabulary = first.logs(slice(1)).shape[-1]
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    sums = np.zeros(len(sets) + 1)
    for start in range(0, count, step):
        part = slice(start, start + step)
        logs = [each.logs(part) for each in sets]
        targets = first.targets[part, None]
        found = [-mx.take_along_axis(log, targets, axis=-1).sum() for log in logs]
        divergence = (mx.exp(logs[0]) * (logs[0] - logs[-1])).sum()
        sums += np.array(mx.stack([*found, divergence]))

    *means, kl = (sums / count).tolist()
    result = dict(zip(answers, means, strict=True))
    if first is not last:
        result["kl"] = max(kl, 0.0)
    return result
