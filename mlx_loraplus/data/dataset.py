"""The examples of a split, whose tokens stay on disk.

``open_encoded_table`` encodes a table once, and keeps its tokens in an ``EncodedTable`` in the
cache. ``Examples`` reads the examples of some encoded tables when they are indexed.

The cache key is a digest of the file's contents and of what determines its tokens
(``EncodingSettings``), such as the tokenizer, its chat template and the choice of supervised
tokens. A change to any of them creates a new folder; a change to ``max_seq_length`` or ``on_long``
does not.

A folder is written under a temporary name and renamed once it is complete. During writing, only a
few hundred rows are in memory. Afterwards, the arrays are memory-mapped.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import DataError, counted
from ..files import cached_folder, remove_unused
from .document_tokens import encode_document
from .encoding_settings import EncodingSettings, cache_key
from .messages import BadRowError
from .prefix_digests import PART, TextDigests
from .readers import read_text
from .row_digests import exact_digest, system_of
from .row_notes import notes_on
from .row_problems import RowProblems
from .rows import Row, make_rows
from .sources import Table
from .stored_rows import ROW, StoredRow, store_document, store_row
from .tokenize import Example, RowRenderer, encode

# Version of the format, including its notes; a new number invalidates all encoded tables
_VERSION = 32

# The files of an encoded table; the arrays are those of a ``Chunk``
ARRAYS = ("tokens", "supervised", "rows", "spans", "beginnings", "parts")
PROBLEMS = "problems.json"
LARGEST = "largest_id"
SYSTEMS = "systems.json"

# Maximum number of system messages that an encoded table keeps
_MOST_SYSTEMS = 100

# Limits on the rows that are encoded together
_MAX_ROWS = 512
_MAX_CHARACTERS = 2**19

# Number of rows between two progress reports
_PROGRESS_ROWS = 100_000


class Span(NamedTuple):
    """Where the tokens of one example are: those of a row, or of a part of one."""

    row: int  # index of its row
    start: int  # its first token
    stop: int  # the end of its tokens
    inputs: int  # number of input tokens, which end before the last supervised token
    targets: int  # number of supervised tokens
    source: int = 0  # index of its source, set when tables are combined
    table: int = 0  # index of its table, set when tables are combined


_SPAN_TYPES = ("i8", "i8", "i8", "i4", "i4", "i4", "i4")
SPAN = np.dtype(list(zip(Span._fields, _SPAN_TYPES, strict=True)))


@dataclass(frozen=True)
class EncodedTable:
    """The tokens of one table.

    Attributes:
        name: The table's name.
        documents: Whether the table contains documents, which may be joined and cut anywhere.
        tokens: Token ids of all rows, one after another, (tokens,) int32.
        supervised: Whether each token is supervised, (tokens,) bool.
        rows: Line, kind and digests of each row, (rows,) ``stored_rows.ROW``.
        spans: The examples before the maximum length is applied, (examples,) SPAN.
        beginnings: The file with the digests of the beginnings of all rows, one row after another,
            uint64. It is not mapped, because mapped pages count as memory once they are read.
        parts: The file with the places where the parts of all rows begin, PART.
        problems: Bad rows and notes.
        largest: The largest token id, or -1 if there are no tokens.
        systems: The system messages of the rows by their digests; only the first hundred.
    """

    name: str
    documents: bool
    tokens: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray
    spans: np.ndarray
    problems: RowProblems
    largest: int
    systems: Mapping[int, str] = field(default_factory=dict[int, str])
    beginnings: Path | None = None
    parts: Path | None = None


class Examples(Sequence[Example]):
    """A sequence of examples that are read from disk when they are indexed.

    Args:
        tables: The encoded tables that hold the tokens.
        spans: The position of each example in the tables, (examples,) SPAN.

    Attributes:
        lengths: Number of input tokens, which end before the last supervised token, (examples,).
        target_counts: Number of supervised tokens, (examples,).
    """

    def __init__(self, tables: Sequence[EncodedTable], spans: np.ndarray):
        self.tables = tables
        self.spans = spans
        self.lengths = spans["inputs"]
        self.target_counts = spans["targets"]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, index: int
    ) -> Example:
        span = self.spans[index]
        table = self.tables[span["table"]]
        where = slice(span["start"], span["stop"])

        # If the example continues a row, its first token is already predicted in the part before
        supervised = np.array(table.supervised[where])
        supervised[:1] = False
        return Example(np.array(table.tokens[where]), supervised, self.place(index))

    def place(self, index: int) -> str:
        """Return the location of an example's row, such as "train.jsonl:17"."""
        span = self.spans[index]
        table = self.tables[span["table"]]
        return f"{table.name}:{table.rows['line'][span['row']]}"

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples with these indices, in this order."""
        return Examples(self.tables, self.spans[indices])

    def first_of_rows(self) -> np.ndarray:
        """Return the index of the first example of each row, in ascending order, (rows,)."""
        return np.sort(np.unique(self.row_numbers(), return_index=True)[1])

    def row_numbers(self) -> np.ndarray:
        """Return a number for each example, which is the same for those of one row, (examples,)."""
        return (self.spans["table"].astype(np.int64) << 48) | self.spans["row"]

    def fingerprint(self) -> str:
        """Return a digest of the examples: their tokens, their supervision and their order."""
        digest = hashlib.blake2b(self.spans.tobytes(), digest_size=16)
        for table in self.tables:
            digest.update(table.tokens.data)
            digest.update(table.supervised.data)
        return digest.hexdigest()

    def of_rows(self, name: str) -> np.ndarray:
        """Return a field of ROW for each example's row, (examples,)."""
        return self.pick([table.rows[name] for table in self.tables])

    def pick(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the value of each example's row, (examples,).

        Args:
            values: For each table, a value of each row.
        """
        picked = np.zeros(len(self), values[0].dtype if values else np.int64)
        for number, of_table in enumerate(values):
            in_table = self.spans["table"] == number
            picked[in_table] = of_table[self.spans["row"][in_table]]
        return picked


def open_encoded_table(table: Table, encoding: EncodingSettings) -> EncodedTable:
    """Return an encoded table from the cache; encode the table first if it is not there.

    Raises:
        DataError: The table can't be read, or its file changed during reading.
        OutputError: The cache can't be written.
    """
    identity = table.identity()
    key = [identity, bool(table.documents), encoding.digest, ROW.descr, SPAN.descr, _VERSION]

    # The file may change while it is read.
    def build(folder: Path) -> None:
        remove_unused("tokens")
        write_encoded_table(folder, table, encoding)
        if table.identity() != identity:
            raise DataError(
                f"{table.name} changed while it was read: start again once it is complete"
            )

    folder = cached_folder("tokens", cache_key(key), build)

    # Mark the folder as used, unless the cache is read-only
    with suppress(OSError):
        os.utime(folder)

    # Map the arrays, and read the rest
    problems = json.loads((folder / PROBLEMS).read_text(encoding="utf-8"))
    systems = json.loads((folder / SYSTEMS).read_text(encoding="utf-8"))
    return EncodedTable(
        name=table.name,
        documents=bool(table.documents),
        tokens=_map_array(folder / "tokens", np.int32),
        supervised=_map_array(folder / "supervised", np.bool_),
        rows=_map_array(folder / "rows", ROW),
        spans=_map_array(folder / "spans", SPAN),
        beginnings=folder / "beginnings",
        parts=folder / "parts",
        problems=RowProblems(**problems),
        largest=int((folder / LARGEST).read_text(encoding="utf-8")),
        systems={int(digest): text for digest, text in systems.items()},
    )


class Chunk(NamedTuple):
    """Arrays to append to a table's files; their indices are relative to the chunk's start."""

    tokens: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray
    spans: np.ndarray
    beginnings: np.ndarray = np.zeros(0, np.uint64)
    parts: np.ndarray = np.zeros(0, PART)


def write_encoded_table(folder: Path, table: Table, encoding: EncodingSettings) -> None:
    """Encode a table, and write its tokens into a folder."""
    problems = RowProblems()
    systems: dict[int, str] = {}
    if table.documents:
        chunks = _document_chunks(table.documents, encoding.tokenizer)
    else:
        chunks = _row_chunks(table, encoding, problems, systems)

    tokens_written = rows_written = 0
    largest = -1
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        for chunk in chunks:
            # Make the indices relative to the start of the table
            chunk.spans["start"] += tokens_written
            chunk.spans["stop"] += tokens_written
            chunk.spans["row"] += rows_written
            for name, file in files.items():
                getattr(chunk, name).tofile(file)

            # Report the progress once for every _PROGRESS_ROWS rows
            reports = rows_written // _PROGRESS_ROWS
            tokens_written += len(chunk.tokens)
            rows_written += len(chunk.rows)
            largest = max(largest, int(chunk.tokens.max(initial=-1)))
            if rows_written // _PROGRESS_ROWS > reports:
                encoding.log(f"{table.name}: {counted(rows_written, 'row')} encoded")

    # Write what is known only after all rows
    (folder / LARGEST).write_text(str(largest), encoding="utf-8")
    (folder / PROBLEMS).write_text(json.dumps(asdict(problems)), encoding="utf-8")
    (folder / SYSTEMS).write_text(json.dumps(systems), encoding="utf-8")


@dataclass
class _ChunkBuilder:
    """Collects encoded rows and joins them into a chunk."""

    tokens: list[np.ndarray] = field(default_factory=list)
    supervised: list[np.ndarray] = field(default_factory=list)
    rows: list[StoredRow] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    texts: list[TextDigests] = field(default_factory=list)
    length: int = 0

    def add(self, row: Row, examples: Sequence[Example], *, thinking: bool) -> None:
        """Add a row and its encoded examples."""
        # The examples, one after another
        for example in examples:
            supervised = np.flatnonzero(example.supervised)
            stop = self.length + len(example.tokens)
            self.spans.append(
                Span(
                    row=len(self.rows),
                    start=self.length,
                    stop=stop,
                    # The inputs are the tokens before the last supervised one.
                    inputs=int(supervised[-1]),
                    targets=len(supervised),
                )
            )
            self.tokens.append(example.tokens)
            self.supervised.append(example.supervised)
            self.length = stop

        # The row, with the digests that find duplicates and conversations
        stored, digests = store_row(row, thinking=thinking)
        self.rows.append(stored)
        self.texts.append(digests)

    def build(self) -> Chunk:
        """Return the chunk of all rows that were added."""
        return Chunk(
            np.concatenate(self.tokens),
            np.concatenate(self.supervised),
            np.array(self.rows, ROW),
            np.array(self.spans, SPAN),
            np.concatenate([text.beginnings for text in self.texts]),
            np.concatenate([text.parts for text in self.texts]),
        )


def _row_chunks(
    table: Table, encoding: EncodingSettings, problems: RowProblems, systems: dict[int, str]
) -> Iterator[Chunk]:
    """Yield a table's encoded rows in chunks, and fill ``problems`` and ``systems``."""
    tokenizer, train_on = encoding.tokenizer, encoding.train_on
    renderer = RowRenderer(tokenizer, train_on)

    # Lines of the file become rows, then texts, then token ids
    all_rows = make_rows(table.rows(), encoding.names, problems, encoding.make)
    for rows in _groups(all_rows):
        rendered_rows = [renderer.render(row) for row in rows]
        encoded_rows = encode(rendered_rows, tokenizer, train_on)

        # Collect the rows that can be trained on, and report the others
        chunk = _ChunkBuilder()
        for row, encoded in zip(rows, encoded_rows, strict=True):
            # Each answer needs an example with a supervised token
            examples = [example for example in encoded.examples if example.supervised.any()]
            answers = 1 if row.rejected is None else 2
            if len(examples) < answers:
                problem = BadRowError(encoded.problem or "no token to train on")
                problems.add_problem(row.line, problem)
                continue

            chunk.add(row, examples, thinking=encoded.thinking)
            system = system_of(row)
            if system and len(systems) < _MOST_SYSTEMS:
                systems[exact_digest(system)] = system
            for note in notes_on(row, encoded, examples, encoding):
                problems.add_note(row.line, note)
        if chunk.rows:
            yield chunk.build()


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield lists of a few hundred rows, or of fewer rows if these are long."""
    group: list[Row] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += sum(len(str(value)) for value in row.fields.values())
        if len(group) == _MAX_ROWS or characters >= _MAX_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _document_chunks(paths: Sequence[Path], tokenizer: TokenizerWrapper) -> Iterator[Chunk]:
    """Yield the chunks of encoded documents; the last one of a document has its row and span."""
    no_rows, no_spans = np.zeros(0, ROW), np.zeros(0, SPAN)
    for number, path in enumerate(paths, start=1):
        # Encode the text in pieces
        length = targets = 0
        for ids, supervised in encode_document(read_text(path), tokenizer):
            length += len(ids)
            targets += sum(supervised)
            yield Chunk(np.array(ids, np.int32), np.array(supervised, bool), no_rows, no_spans)

        # Add the document as one row; its tokens are in earlier chunks, so its span starts below 0
        row, digests = store_document(path, number)
        span = Span(row=0, start=-length, stop=0, inputs=length - 1, targets=targets)
        yield Chunk(
            np.zeros(0, np.int32),
            np.zeros(0, bool),
            np.array([row], ROW),
            np.array([span], SPAN),
            digests.beginnings,
            digests.parts,
        )


def _map_array(path: Path, dtype: Any) -> np.ndarray:
    """Map a file as an array; an empty file can't be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
