"""A table's rows as tokens on disk: encoded once, found again by what they were made from, indexed but not read.

The key is a digest of the file's contents, the tokenizer, its chat template and what is supervised,
so a change to any of them makes a new shard, and another ``max_seq_length`` or ``on_long`` does
not. A shard is built under another name and renamed when it is whole. Memory holds a few hundred
rows while it is built.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import DataError
from ..files import cache_folder, cached_folder
from .readers import read_text
from .rows import KINDS, Row, RowProblems, read_records
from .sources import Table
from .tokenize import TrainOn, encode, encode_document, fast_tokenizer

_VERSION = 9  # of this format; a new number makes every cached shard stale
_ROWS, _CHARACTERS = 512, 2**19  # encoded together, at most
_TELL = 100_000  # rows
_DAYS = 30  # after which an unused shard is removed

KIND_NAMES = tuple(KINDS)
ROW = np.dtype(
    [
        ("line", "i8"),
        ("kind", "u1"),
        ("thinking", "u1"),
        ("whole", "u8"),
        ("asked", "u8"),
        ("begins", "u8"),
    ]
)
"""A row's place, kind, whether its prompt lets the model think, and digests, blanks and case aside: of all of it, its
prompt and how its conversation begins."""
_PLACE = ("row", "i8"), ("start", "i8"), ("stop", "i8"), ("inputs", "i4"), ("targets", "i4")
SPAN = np.dtype([*_PLACE, ("source", "i4"), ("shard", "i4")])
"""An example's row, its place among the tokens, how many are seen and supervised, its source and shard."""


@dataclass(frozen=True)
class Shard:
    """A table's tokens."""

    name: str  # the table's
    documents: bool  # whether it is text to be joined and cut anywhere
    tokens: np.ndarray  # int32, all rows one after another
    supervised: np.ndarray  # bool, the same
    rows: np.ndarray  # ROW for each row
    spans: np.ndarray  # SPAN for each whole example
    findings: RowProblems
    largest: int  # token id, -1 without any


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: by which tokenizer, what is supervised, and what the rows call their fields."""

    tokenizer: TokenizerWrapper
    train_on: TrainOn
    names: Mapping[str, str]
    log: Callable[[str], None]

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything that token ids and supervision follow from."""
        tokenizer = self.tokenizer
        template = str(tokenizer.chat_template)
        parts = [
            fast_tokenizer(tokenizer).to_str(), template, getattr(tokenizer._chat_template, "__module__", ""),  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            tokenizer.encode(""), tokenizer.bos_token_id, sorted(tokenizer.eos_token_ids),
            [version(package) for package in ("mlx_loraplus", "transformers", "tokenizers")],
            self.train_on, sorted(self.names.items()), _VERSION, ROW.descr, SPAN.descr,
        ]  # fmt: skip
        return _key(parts)


def open_shard(table: Table, encoder: Encoder) -> Shard:
    """Return a table's shard from the cache, encoded first if it is not there.

    Raises: DataError where the table can't be read, or changed while it was; OutputError for the
    cache.
    """
    identity = table.identity()
    key = _key([identity, bool(table.documents), encoder.digest])

    def build(folder: Path) -> None:
        _remove_unused()
        write_shard(folder, table, encoder)
        if table.identity() != identity:
            raise DataError(f"{table.name} changed while it was read: start again when it is whole")

    folder = cached_folder("tokens", key, build)
    with suppress(OSError):  # a cache that is only read
        os.utime(folder)
    parts = {name: _mapped(folder / name, kind) for name, kind in FILES.items()}
    findings = RowProblems(**json.loads((folder / "findings.json").read_text(encoding="utf-8")))
    largest = int((folder / LARGEST).read_text(encoding="utf-8"))
    return Shard(table.name, bool(table.documents), **parts, findings=findings, largest=largest)


LARGEST = "largest_id"
FILES: dict[str, Any] = {"tokens": np.int32, "supervised": np.bool_, "rows": ROW, "spans": SPAN}


def write_shard(folder: Path, table: Table, encoder: Encoder) -> None:
    """Encode a table into a folder."""
    findings = RowProblems()
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in FILES}
        start, row, largest = 0, 0, -1
        documents = _document_chunks(table.documents, encoder.tokenizer)
        chunks = documents if table.documents else _row_chunks(table, encoder, findings)
        for tokens, supervised, rows, spans in chunks:
            spans["start"] += start
            spans["stop"] += start
            spans["row"] += row
            if row // _TELL < (row + len(rows)) // _TELL:
                encoder.log(f"{table.name}: {row + len(rows):,} rows encoded")
            start, row = start + len(tokens), row + len(rows)
            largest = max(largest, int(tokens.max(initial=-1)))
            for file, part in zip(files.values(), (tokens, supervised, rows, spans), strict=True):
                part.tofile(file)
    (folder / LARGEST).write_text(str(largest), encoding="utf-8")
    (folder / "findings.json").write_text(json.dumps(asdict(findings)), encoding="utf-8")


Chunk = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # tokens, supervised, rows, spans


def _row_chunks(table: Table, encoder: Encoder, findings: RowProblems) -> Iterator[Chunk]:
    """Yield a table's rows encoded, some hundreds at a time."""
    ends = set(encoder.tokenizer.eos_token_ids)
    for records in _some(read_records(table.rows(), encoder.names, findings)):
        tokens, supervised, rows, spans, start = [], [], [], [], 0
        for record, encoded in zip(
            records, encode(records, encoder.tokenizer, encoder.train_on), strict=True
        ):
            examples = [example for example in encoded.examples if example.supervised.any()]
            if not examples:
                findings.add_problem(record.line, encoded.problem or "nothing to learn in it")
                continue
            notes = [*encoded.notes, *record.notes]
            if record.untrained and encoder.train_on == "everything":
                notes.append(
                    "messages that ask not to be learned are learned, since --train-on is"
                    " everything"
                )
            if record.unused:
                notes.append(
                    f"fields that are not used: {', '.join(map(repr, record.unused)):.300}"
                )
            if encoder.names and not record.named:
                columns = ", ".join(map(repr, encoder.names.values()))
                notes.append(
                    f"none of the columns that fields names ({columns:.300}), so taken as it is"
                )
            for example in examples:
                learned = np.flatnonzero(example.supervised)
                if not ends & set(example.tokens[learned[-2:]].tolist()):
                    notes.append(
                        "the last tokens that are learned do not end generation, so answers may"
                        " run on"
                    )
                stop = start + len(example.tokens)
                spans.append((len(rows), start, stop, learned[-1], len(learned), 0, 0))
                tokens.append(example.tokens)
                supervised.append(example.supervised)
                start = stop
            rows.append(
                (record.line, KIND_NAMES.index(record.kind), encoded.thinking, *_digests(record))
            )
            for note in dict.fromkeys(notes):
                findings.add_note(record.line, note)
        if rows:
            yield (
                np.concatenate(tokens),
                np.concatenate(supervised),
                np.array(rows, ROW),
                np.array(spans, SPAN),
            )


def _some(records: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield lists of up to some hundreds of rows, fewer if they are long."""
    held, size = [], 0
    for record in records:
        held.append(record)
        size += sum(len(str(value)) for value in record.fields.values())
        if len(held) == _ROWS or size >= _CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _document_chunks(paths: Sequence[Path], tokenizer: TokenizerWrapper) -> Iterator[Chunk]:
    """Yield documents encoded, a piece at a time; one row and one span for each document, with its last piece."""
    for number, path in enumerate(paths, start=1):
        length, learned = 0, 0
        for ids, supervised in encode_document(read_text(path), tokenizer):
            length += len(ids)
            learned += sum(supervised)
            yield (
                np.array(ids, np.int32),
                np.array(supervised, bool),
                np.zeros(0, ROW),
                np.zeros(0, SPAN),
            )
        with path.open("rb") as file:
            whole = int.from_bytes(hashlib.file_digest(file, "blake2b").digest()[:8])
        rows = np.array([(number, KIND_NAMES.index("text"), False, whole, whole, whole)], ROW)
        spans = np.array([(0, -length, 0, length - 1, learned, 0, 0)], SPAN)
        yield np.zeros(0, np.int32), np.zeros(0, bool), rows, spans


def _digests(record: Row) -> tuple[int, int, int]:
    """Return digests of a record, of its prompt, and of how its conversation begins; of the record where it has none.

    A conversation begins with its messages up to the user's first: rows that are growing prefixes
    of one begin alike, and a system message that many conversations share does not make them one.
    """
    fields = record.fields
    if "messages" in fields:
        messages = fields["messages"]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        asked = messages[: turns[-1]]
        first = next(
            (turn for turn, message in enumerate(asked) if message["role"] == "user"), len(asked)
        )
        spoken: Any = [[message["role"], message.get("content")] for message in asked[: first + 1]]
        whole = _digest(messages)
    else:
        asked = fields.get("prompt", "")
        spoken = [["user", asked]] if asked.strip() else []
        whole = _digest("\0".join(fields.values()))
    return (
        whole,
        _digest(asked) if asked and str(asked).strip() else whole,
        _digest(spoken) if spoken else whole,
    )


def _digest(value: Any) -> int:
    text = (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    )
    text = text.replace("\\n", " ")
    return int.from_bytes(
        hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=8).digest()
    )


def _key(parts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _mapped(path: Path, kind: Any) -> np.ndarray:
    return np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)


def _remove_unused() -> None:
    """Remove shards that no run has opened for a month."""
    for folder in (cache_folder() / "tokens").glob("[!.]*"):
        with suppress(OSError):  # another process may be at it
            if time.time() - folder.stat().st_mtime > _DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
