"""What is measured: the model and the rows of each case, and the sizes from which its FLOPs follow."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS (both trainers profit)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.adapters.base_layers import base_shape
from mlx_loraplus.data.demo import demo_rows
from mlx_loraplus.data.row_problems import RowProblems
from mlx_loraplus.data.rows import Row, make_rows
from mlx_loraplus.data.sources import SPLITS, find_sources
from mlx_loraplus.data.tokenize import Example, RowRenderer, encode
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head

SEED = 0
HELD_OUT = 16  # rows whose loss is measured after training
LONG = 2048  # tokens in a row of case d
TARGETS = ("all-linear",)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        title: The title in the tables.
        model: A short name, or ``4-bit``: a random Llama of 1.3 million parameters, quantized.
        kind: The form of a row: completion (prompts are not learned), text, or long (2,048 tokens
            of text).
        batch_size: Rows in a batch.
        updates: Timed updates, unless ``--updates`` gives another number.
        trainers: The trainers to run, stock first.
    """

    title: str
    model: str
    kind: str
    batch_size: int
    updates: int
    trainers: tuple[str, ...]


CASES = {
    "a": Case(
        "Gemma 3 270M, completions",
        "gemma-3-270m",
        "completion",
        8,
        6,
        ("stock", "ours", "ours+checkpoint"),
    ),
    "b": Case("SmolLM2 135M, text", "smollm2-135m", "text", 8, 8, ("stock", "ours", "ours+pack")),
    "c": Case(
        "4-bit Llama of 1.3M parameters, completions",
        "4-bit",
        "completion",
        8,
        20,
        ("stock", "ours"),
    ),
    "d": Case(
        "Gemma 3 270M, rows of 2,048 tokens",
        "gemma-3-270m",
        "long",
        1,
        2,
        ("stock", "ours", "ours+checkpoint"),
    ),
}


@dataclass(frozen=True)
class Task:
    """A model without adapters, the rows to train on (one epoch, in the file's order), and rows to judge by."""

    model: nn.Module
    examples: list[Example]
    held_out: list[Example]
    batch_size: int


def prepare(case: Case, data: str | None, updates: int) -> Task:
    """Load the case's model and encode its rows: ``updates`` batches, each of neighbours in the file, as stock has it.

    Args:
        case: Which.
        data: A folder with train.jsonl and valid.jsonl, or None for the built-in demo set.
        updates: Batches to make.
    """
    splits = read_splits(data)
    if case.model == "4-bit":
        model = small_llama(vocabulary=4096, bits=4)
        tokenizer = load_tokenizer(find_model("smollm2-135m").path)
    else:
        model, tokenizer, _ = load_folder(find_model(case.model).path)
    rows = _records(case, splits, updates)
    examples = _encode(rows, tokenizer)
    held_out = _encode(_as_text(case, splits["valid"][:HELD_OUT]), tokenizer)
    if len(examples) != updates * case.batch_size:
        raise RuntimeError(
            f"{len(examples)} rows of {updates * case.batch_size} are left after encoding"
        )
    examples, held_out = ([_trimmed(row) for row in part] for part in (examples, held_out))
    if case.model == "4-bit":
        examples, held_out = ([_folded(row, 4096) for row in part] for part in (examples, held_out))
    return Task(model, examples, held_out, case.batch_size)


def small_llama(
    *, vocabulary: int, hidden: int = 128, layers: int = 4, bits: int | None = None
) -> nn.Module:
    """Return a Llama with random weights, an untied head and blocks in the usual proportions."""
    mx.random.seed(SEED)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=hidden, num_hidden_layers=layers, intermediate_size=3 * hidden,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=vocabulary,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def _records(case: Case, splits: Mapping[str, Sequence[Row]], updates: int) -> list[Row]:
    """Return the rows to train on: whole batches of neighbours, from seeded places in the file."""
    rows = splits["train"]
    if case.kind == "long":
        return [
            _joined(rows, start)
            for start in Random(SEED).sample(range(len(rows)), updates * case.batch_size)
        ]
    batches = len(rows) // case.batch_size
    if updates > batches:
        raise SystemExit(
            f"error: --updates {updates} is more than the {batches} batches that the data has"
        )
    starts = [case.batch_size * batch for batch in Random(SEED).sample(range(batches), updates)]
    return _as_text(
        case, [row for start in starts for row in rows[start : start + case.batch_size]]
    )


def read_splits(data: str | None) -> dict[str, list[Row]]:
    """Return the good rows of a folder's files, or those of the built-in demo set."""
    return _read(data) if data else _demo()


def _demo() -> dict[str, list[Row]]:
    return {
        split: [Row("completion", row, line) for line, row in enumerate(rows, start=1)]
        for split, rows in demo_rows().items()
    }


def _read(data: str) -> dict[str, list[Row]]:
    """Return the good rows of a folder's files."""
    (source,) = find_sources([data])
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        tables = source.get(split, [])
        rows[split] = [
            row for table in tables for row in make_rows(table.rows(), {}, RowProblems())
        ]
    return rows


def _as_text(case: Case, rows: Sequence[Row]) -> list[Row]:
    return (
        list(rows)
        if case.kind == "completion"
        else [Row("text", {"text": _text(r)}, r.line) for r in rows]
    )


def _joined(rows: Sequence[Row], start: int) -> Row:
    """Return one row of at least 2,048 tokens, made of the rows from ``start`` on."""
    text = ""
    for row in cycle([*rows[start:], *rows[:start]]):
        text += _text(row) + "\n\n"
        if len(text) > 8 * LONG:
            return Row("text", {"text": text}, row.line)
    raise AssertionError


def _text(row: Row) -> str:
    return row.fields["prompt"] + row.fields["completion"]


def _encode(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """Return the examples of some rows."""
    renderer = RowRenderer(tokenizer)
    encoded_rows = encode([renderer.render(row) for row in rows], tokenizer)
    return [example for row in encoded_rows for example in row.examples]


def _trimmed(example: Example) -> Example:
    """Return the first 2,048 tokens of an example, up to its last supervised one.

    A template may add a line break after it. Stock supervises everything up to the end of a row,
    and both trainers must learn the same tokens.
    """
    end = int(np.flatnonzero(example.supervised[:LONG])[-1]) + 1
    return replace(example, tokens=example.tokens[:end], supervised=example.supervised[:end])


def _folded(example: Example, vocabulary: int) -> Example:
    """Return the example with token ids of a small vocabulary. Its length is real, its text is not."""
    return replace(example, tokens=(example.tokens % vocabulary).astype(np.int32))


@dataclass(frozen=True)
class Sizes:
    """What a step's matmul FLOPs follow from: (out, in) of the adapted layers, Σ heads · head_dim, |head|."""

    linears: list[tuple[int, int]]
    queries: int
    head: int
    vocabulary: int

    def step_flops(
        self, rank: int, rows: int, length: int, positions: int, grad_checkpoint: bool
    ) -> float:
        """Return the multiplications and additions of a step's matrix products.

        For each token and each adapted layer (in, out), forward 2·in·out + 2·r·(in + out), backward
        2·in·out for the activations + 4·r·(in + out) for A, B and the activations. For each block's
        attention 4·length²·heads·head_dim a row forward, twice that backward. The head
        2·hidden·vocabulary for each of ``positions`` forward, as much backward. Checkpointing: the
        blocks' forward once more. The first block's inputs need no gradient; counting it anyway
        overstates the total by less than 2%.
        """
        tokens = rows * length
        base = sum(2 * o * i for o, i in self.linears) * tokens
        adapters = sum(2 * rank * (o + i) for o, i in self.linears) * tokens
        attention = 4 * rows * length**2 * self.queries
        forward, backward = base + adapters + attention, base + 2 * adapters + 2 * attention
        return forward * (1 + grad_checkpoint) + backward + 4 * positions * self.head


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes of a model that has no adapters yet, from its modules."""
    targets = find_targets(model, TARGETS, -1)
    trunk_and_head = find_trunk_and_head(model)
    if trunk_and_head is None:
        raise RuntimeError("could not locate this model's output head")
    vocabulary, hidden = base_shape(trunk_and_head.head.layer)
    return Sizes(
        linears=[base_shape(module) for module in targets.values()],
        queries=sum(
            base_shape(module)[0] for path, module in targets.items() if path.endswith("q_proj")
        ),
        head=vocabulary * hidden,
        vocabulary=vocabulary,
    )
