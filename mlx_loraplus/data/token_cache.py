"""Cache the tokens of a table on disk, so that its rows are encoded only once.

The cache key is a digest of the file's contents, the tokenizer, its chat template and the choice of
supervised tokens. A change to any of them creates a new shard; a change to ``max_seq_length`` or
``on_long`` does not. A shard is written under a temporary name and renamed once it is complete.
During writing, only a few hundred rows are in memory. Afterwards, the arrays are memory-mapped.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import DataError
from ..files import cached_folder, remove_unused
from .chat_writer import TrainOn
from .dataset import KIND_NAMES, ROW, SPAN, Shard, Span, StoredRow
from .document_tokens import encode_document
from .prefix_digests import text_digests
from .readers import read_text
from .row_digests import exact_digest, row_digests, system_of
from .row_problems import RowProblems
from .rows import MakeRow, Row, make_row, make_rows
from .sources import Table
from .special_tokens import fast_tokenizer
from .tokenize import Encoded, Example, encode

# Version of the shard format, including its notes; a new number invalidates all cached shards
_VERSION = 17

# Limits on the rows that are encoded together
_MAX_ROWS = 512
_MAX_CHARACTERS = 2**19

# Number of rows between two progress reports
_PROGRESS_ROWS = 100_000


@dataclass(frozen=True)
class Encoder:
    """Everything that determines how rows become tokens.

    Attributes:
        tokenizer: The model's tokenizer.
        train_on: Which tokens are supervised.
        names: The column of each field, from the setting ``fields``.
        log: Called regularly with a line about the progress.
        make: Makes the rows. The two examples of a row with two answers are adjacent.
    """

    tokenizer: TokenizerWrapper
    train_on: TrainOn
    names: Mapping[str, str]
    log: Callable[[str], None]
    make: MakeRow = make_row

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything that token ids and supervision depend on."""
        tokenizer = self.tokenizer
        template = tokenizer._chat_template  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        packages = ("mlx_loraplus", "transformers", "tokenizers")
        parts = [
            fast_tokenizer(tokenizer).to_str(),
            str(tokenizer.chat_template),
            getattr(template, "__module__", ""),
            tokenizer.encode(""),
            tokenizer.bos_token_id,
            sorted(tokenizer.eos_token_ids),
            [version(package) for package in packages],
            self.train_on,
            self.make.__name__,
            sorted(self.names.items()),
            _VERSION,
            ROW.descr,
            SPAN.descr,
        ]
        return _key(parts)


def open_shard(table: Table, encoder: Encoder) -> Shard:
    """Return a table's shard from the cache; encode the table first if it is not cached.

    Raises:
        DataError: The table can't be read, or its file changed during reading.
        OutputError: The cache can't be written.
    """
    identity = table.identity()
    key = _key([identity, bool(table.documents), encoder.digest])

    # The file may change while it is read.
    def build(folder: Path) -> None:
        remove_unused("tokens")
        write_shard(folder, table, encoder)
        if table.identity() != identity:
            raise DataError(
                f"{table.name} changed while it was read: start again once it is complete"
            )

    folder = cached_folder("tokens", key, build)

    # Mark the shard as used, unless the cache is read-only
    with suppress(OSError):
        os.utime(folder)

    # Map the arrays, and read the rest
    problems = json.loads((folder / PROBLEMS).read_text(encoding="utf-8"))
    systems = json.loads((folder / SYSTEMS).read_text(encoding="utf-8"))
    return Shard(
        name=table.name,
        documents=bool(table.documents),
        tokens=_map_array(folder / "tokens", np.int32),
        supervised=_map_array(folder / "supervised", np.bool_),
        rows=_map_array(folder / "rows", ROW),
        spans=_map_array(folder / "spans", SPAN),
        beginnings=folder / "beginnings",
        problems=RowProblems(**problems),
        largest=int((folder / LARGEST).read_text(encoding="utf-8")),
        systems={int(digest): text for digest, text in systems.items()},
    )


# The files of a shard
ARRAYS = ("tokens", "supervised", "rows", "spans", "beginnings")
PROBLEMS = "problems.json"
LARGEST = "largest_id"
SYSTEMS = "systems.json"
_MOST_SYSTEMS = 100


class Chunk(NamedTuple):
    """Arrays to append to the files of a shard; their indices are relative to the chunk's start."""

    tokens: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray
    spans: np.ndarray
    beginnings: np.ndarray = np.zeros(0, np.uint64)


def write_shard(folder: Path, table: Table, encoder: Encoder) -> None:
    """Encode a table and write its shard into a folder."""
    problems = RowProblems()
    systems: dict[int, str] = {}
    if table.documents:
        chunks = _document_chunks(table.documents, encoder.tokenizer)
    else:
        chunks = _row_chunks(table, encoder, problems, systems)

    tokens_written = rows_written = 0
    largest = -1
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        for chunk in chunks:
            # Make the indices relative to the start of the shard
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
                encoder.log(f"{table.name}: {rows_written:,} rows encoded")

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
    beginnings: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def add(self, row: Row, examples: Sequence[Example], *, thinking: bool) -> None:
        """Add a row and its encoded examples."""
        # The examples, one after another
        for example in examples:
            learned = np.flatnonzero(example.supervised)
            stop = self.length + len(example.tokens)
            self.spans.append(
                Span(
                    row=len(self.rows),
                    start=self.length,
                    stop=stop,
                    # The inputs are the tokens before the last supervised one.
                    inputs=int(learned[-1]),
                    targets=len(learned),
                )
            )
            self.tokens.append(example.tokens)
            self.supervised.append(example.supervised)
            self.length = stop

        # The row, with the digests that find duplicates and conversations
        system = exact_digest(system_of(row))
        whole, asked, begins = row_digests(row)
        text = text_digests(row, system)
        self.beginnings.append(text.beginnings)
        self.rows.append(
            StoredRow(
                line=row.line,
                kind=KIND_NAMES.index(row.kind),
                thinking=thinking,
                whole=whole,
                asked=asked,
                begins=begins,
                system=system,
                text=text.text,
                prompt=text.prompt,
                beginnings=len(text.beginnings),
            )
        )

    def build(self) -> Chunk:
        """Return the chunk of all rows that were added."""
        return Chunk(
            np.concatenate(self.tokens),
            np.concatenate(self.supervised),
            np.array(self.rows, ROW),
            np.array(self.spans, SPAN),
            np.concatenate(self.beginnings),
        )


def _row_chunks(
    table: Table, encoder: Encoder, problems: RowProblems, systems: dict[int, str]
) -> Iterator[Chunk]:
    """Yield a table's encoded rows in chunks, and fill ``problems`` and ``systems``."""
    for rows in _groups(make_rows(table.rows(), encoder.names, problems, encoder.make)):
        chunk = _ChunkBuilder()
        encoded_rows = encode(rows, encoder.tokenizer, encoder.train_on)
        for row, encoded in zip(rows, encoded_rows, strict=True):
            examples = [example for example in encoded.examples if example.supervised.any()]
            answers = 1 if row.rejected is None else 2
            if len(examples) < answers:
                problems.add_problem(row.line, encoded.problem or "no token to train on")
                continue

            chunk.add(row, examples, thinking=encoded.thinking)
            system = system_of(row)
            if system and len(systems) < _MOST_SYSTEMS:
                systems[exact_digest(system)] = system
            for note in _notes(row, encoded, examples, encoder):
                problems.add_note(row.line, note)
        if chunk.rows:
            yield chunk.build()


def _notes(
    row: Row, encoded: Encoded, examples: Sequence[Example], encoder: Encoder
) -> Iterable[str]:
    """Return the notes on a row, without duplicates."""
    # Notes on the row's messages and columns
    notes = [*encoded.notes, *row.notes]
    if row.untrained and encoder.train_on == "everything":
        notes.append(
            "messages marked as not to be trained on are trained on, because --train-on is"
            " everything"
        )
    if row.unused:
        notes.append(f"unused fields: {', '.join(map(repr, row.unused)):.300}")
    if encoder.names and not row.named:
        columns = ", ".join(map(repr, encoder.names.values()))
        notes.append(
            f"none of the columns named by --fields ({columns:.300}) was found, so the columns were"
            " auto-detected"
        )

    # Some templates put a line break after the end-of-turn token, so check the last two tokens
    ends = set(encoder.tokenizer.eos_token_ids)
    for example in examples:
        targets = np.flatnonzero(example.supervised)
        last_targets = example.tokens[targets[-2:]].tolist()
        if ends.isdisjoint(last_targets):
            notes.append(
                "the last supervised tokens do not end generation, so the model may not learn to"
                " stop"
            )
    return dict.fromkeys(notes)


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
        with path.open("rb") as file:
            digest = int.from_bytes(hashlib.file_digest(file, "blake2b").digest()[:8])
        kind = KIND_NAMES.index("text")
        row = StoredRow(number, kind, thinking=False, whole=digest, asked=digest, begins=digest)
        span = Span(row=0, start=-length, stop=0, inputs=length - 1, targets=targets)
        yield Chunk(
            np.zeros(0, np.int32),
            np.zeros(0, bool),
            np.array([row], ROW),
            np.array([span], SPAN),
        )


def _key(parts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _map_array(path: Path, dtype: Any) -> np.ndarray:
    """Map a file as an array; an empty file can't be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
