"""Long rows and documents: truncated, dropped, split or refused, and no token twice."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.dataset import SPAN, EncodedTable, Examples
from mlx_loraplus.data.long_rows import limit_lengths
from mlx_loraplus.data.row_problems import RowProblems
from mlx_loraplus.data.split_report import SplitReport
from mlx_loraplus.data.stored_rows import ROW
from mlx_loraplus.errors import DataError
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import plan_batches
from tests.data.reading import GOOD, LONG, load, texts, write


def test_long_rows(tmp_path: Path, letters):
    folder = write(
        tmp_path / "data", train=f"{GOOD}\n{LONG}\n{LONG.replace('abcdefgh', 'abcdefghijkl')}"
    )
    tokenizer = letters()  # rows of 3, 17 and 21 tokens; the completions begin at 1, 8 and 12
    data = load(tokenizer, folder, max_seq_length=12)
    assert texts(data.examples["train"], tokenizer) == ["ab</s>", "abcdefghijkl"]
    assert [example.supervised.sum() for example in data.examples["train"]] == [2, 4]
    assert (
        str(data.reports["train"])
        == "2 rows, 15 tokens, 6 supervised; 1 row truncated to 12 tokens (5 lost); "
        "1 row dropped (nothing to train on in their first 12 tokens)"
    )
    assert data.reports["train"].long_rows == [
        "train.jsonl:2 (17 tokens)",
        "train.jsonl:3 (21 tokens, dropped)",
    ]

    data = load(tokenizer, folder, max_seq_length=12, on_long="drop")
    assert texts(data.examples["train"], tokenizer) == ["ab</s>"]
    assert str(data.reports["train"]).endswith("; 2 rows dropped (longer than 12 tokens)")

    data = load(tokenizer, folder, max_seq_length=12, on_long="split")
    assert texts(data.examples["train"], tokenizer) == [
        "ab</s>",
        "abcdefghijkl",
        "lmnop</s>",
        "lijklmnop</s>",
    ]
    assert [example.place[-1] for example in data.examples["train"]] == ["1", "2", "2", "3"]
    assert sum(example.supervised.sum() for example in data.examples["train"]) == 2 + 9 + 9
    assert str(data.reports["train"]) == "3 rows as 4 examples, 31 tokens, 20 supervised"

    with pytest.raises(
        DataError, match=r"longer than --max-seq-length 12: train\.jsonl:2 \(17 tokens\); train\.js"
    ):
        load(tokenizer, folder, max_seq_length=12, on_long="error")
    with pytest.raises(
        DataError,
        match=r"no training row of 3 is left \(3 rows dropped \(longer than 2 tokens\)\);"
        " raise --max-seq-length, which is 2$",
    ):
        load(tokenizer, folder, max_seq_length=2, on_long="drop")


def table_of(supervised: list[list[bool]], *, documents: bool = False) -> EncodedTable:
    """Return a table of examples with this supervision, whose token ids are their positions."""
    lengths = [len(row) for row in supervised]
    stops = np.cumsum(lengths)
    spans = np.zeros(len(supervised), SPAN)
    for n, row in enumerate(supervised):
        learned = np.flatnonzero(row)
        spans[n] = (n, stops[n] - lengths[n], stops[n], learned[-1], len(learned), 0, 0)
    tokens = np.arange(sum(lengths), dtype=np.int32)
    rows = np.zeros(len(supervised), ROW)
    numbers = np.arange(len(rows)) + 1
    for name in ("line", "row_digest", "prompt_digest", "opening_digest"):
        rows[name] = numbers
    return EncodedTable(
        "train.jsonl",
        documents,
        tokens,
        np.array([*chain(*supervised)]),
        rows,
        spans,
        RowProblems(),
        int(tokens.max(initial=-1)),
    )


supervision = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=40).map(lambda row: [False, *row, True]),
    min_size=1,
    max_size=12,
)


def learned_tokens(examples: Examples) -> list[int]:
    return [int(token) for example in examples for token in example.tokens[example.supervised]]


@settings(max_examples=300, deadline=None)
@given(
    rows=supervision,
    limit=st.integers(2, 30),
    on_long=st.sampled_from(["truncate", "drop", "split"]),
)
def test_no_supervised_token_is_lost_twice_or_wrong(rows, limit, on_long):
    table, report = table_of(rows), SplitReport(limit, on_long)
    examples = Examples([table], limit_lengths(table, report))
    got, every = learned_tokens(examples), np.flatnonzero(table.supervised)
    assert len(set(got)) == len(got), "none is learned twice"
    assert set(got) <= set(every.tolist()), "and none that is not supervised"
    for index, example in enumerate(examples):
        assert 2 <= len(example.tokens) <= limit
        assert example.supervised.any()
        assert not example.supervised[0]
        assert examples.lengths[index] == np.flatnonzero(example.supervised)[-1]
        assert examples.target_counts[index] == example.supervised.sum()
        np.testing.assert_array_equal(np.diff(example.tokens), 1)
    if on_long == "split":
        assert got == every.tolist(), "all are learned"
    else:
        starts = table.spans["start"]
        fits = table.spans["stop"] - starts <= limit
        kept = [
            token
            for start, stop, whole in zip(starts, table.spans["stop"], fits, strict=True)
            for token in range(
                start, stop if whole else start + limit if on_long == "truncate" else start
            )
            if table.supervised[token]
        ]
        assert got == kept
        cut = [
            n
            for n in np.flatnonzero(~fits)
            if rows[n][:limit] and any(rows[n][1:limit]) and on_long == "truncate"
        ]
        assert (report.cut_rows, report.dropped) == (len(cut), int((~fits).sum()) - len(cut))
        assert report.cut_tokens == sum(len(rows[n]) - limit for n in cut)
    assert report.long == (table.spans["stop"] - table.spans["start"] > limit).sum()


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=8),
    limit=st.integers(2, 30),
    bos=st.booleans(),
)
def test_joined_documents_lose_no_token(lengths, limit, bos):
    table = table_of([[not bos, *[True] * (length - 1)] for length in lengths], documents=True)
    examples = Examples([table], limit_lengths(table, SplitReport(limit, "error")))
    assert learned_tokens(examples) == [n for n in np.flatnonzero(table.supervised) if n > 0]
    assert all(len(example.tokens) == limit for example in list(examples)[:-2]) or limit == 2
    for index in range(len(examples)):
        line = int(examples.place(index).split(":")[1])
        assert (
            table.spans["start"][line - 1]
            <= examples.spans["start"][index]
            < table.spans["stop"][line - 1]
        )


@settings(max_examples=50, deadline=None)
@given(
    rows=supervision,
    limit=st.integers(3, 30),
    pack=st.booleans(),
    batch_size=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_an_epoch_of_batches_holds_every_supervised_token_once(
    rows, limit, pack, batch_size, epoch
):
    table = table_of(rows)
    examples = Examples([table], limit_lengths(table, SplitReport(limit, "split")))
    config = configure(
        TrainConfig, {"batch_size": batch_size, "max_seq_length": limit, "pack": pack}
    )
    batches = plan_batches(examples, config.data, seed=3)
    targets: list[int] = []
    for n in range(batches.per_epoch, 2 * batches.per_epoch):
        batch = batches[n]
        targets += batch.targets[batch.weights > 0].tolist()
        before = batch.tokens.flatten()[batch.positions[batch.weights > 0]]
        np.testing.assert_array_equal(before + 1, batch.targets[batch.weights > 0])
    assert sorted(targets) == np.flatnonzero(table.supervised).tolist()


def test_documents_from_files(tmp_path: Path, letters):
    tokenizer = letters()
    (tmp_path / "data").mkdir()
    for name, text in (("a", "One.\n"), ("b", "Two and three.\n")):
        (tmp_path / "data" / f"{name}.txt").write_text(text)
    examples = load(tokenizer, tmp_path / "data", max_seq_length=8).examples["train"]
    assert texts(examples, tokenizer) == ["One.\n</s>Tw", "wo and t", "three.\n</s>"]
    assert [example.supervised.sum() for example in examples] == [7, 7, 7]
    assert examples.place(0) == "2 documents:1"
