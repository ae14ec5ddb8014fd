"""What ``--data`` names is found: a folder, a file, a hub data set, or several of them; without it, the demo set.

A folder holds a train file and, if there are any, a valid (or validation) and a test file, or shards of them
(train-00000-of-00004.parquet); or a data set that ``datasets`` saved; or documents (.txt) only, which are for training.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ..hub import hub_reachable
from .demo import demo_splits
from .readers import READERS, Row

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
NAMES: dict[str, Split] = {  # a file's or a hub split's name to the split it is
    "train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
DOCUMENT = ".txt"
SUFFIXES = (*READERS, DOCUMENT)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Rows that are read together."""

    name: str  # what their places begin with, "train.jsonl"
    rows: Callable[[], Iterator[Row]]  # yields (place, row) anew at each call
    identity: Callable[[], str]  # returns a digest of what the rows are made from
    documents: tuple[Path, ...] = ()  # files of text to be joined and cut, instead of rows


@dataclass(frozen=True)
class Source:
    """One name given to ``--data``, and the tables of its splits."""

    name: str
    tables: dict[Split, list[Table]] = field(default_factory=lambda: {"train": [], "valid": [], "test": []})


def find_sources(names: Sequence[str]) -> list[Source]:
    """Find folders, files and hub ids (``org/name``, or ``org/name:config``), or the demo set; no rows are read yet.

    Raises: DataError where there is no such data set, or it has no training rows.
    """
    return [_find_source(name) for name in names] or [_demo()]


def _find_source(name: str) -> Source:
    path = Path(name).expanduser()
    source = Source(name)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        _add_hub_splits(source, _datasets(name).load_from_disk(str(path)))
    elif path.is_dir():
        _add_folder(source, path)
    elif path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"data is a file of no known kind: {name!r}; give {', '.join(SUFFIXES)}, or a folder")
        source.tables["train"] += _tables([path])
    elif _HUB_ID.fullmatch(name) and not name.startswith(".") and path.suffix.lower() not in SUFFIXES:
        _add_hub_splits(source, _load_hub(name))
    else:
        raise DataError(f"data not found: {name!r}; give a folder that holds train.jsonl, a file, or a hub id")
    return source


def _add_folder(source: Source, folder: Path) -> None:
    """Add the files of a folder to the splits that they are named for."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    found: dict[Split, dict[str, list[Path]]] = {"train": {}, "valid": {}, "test": {}}
    for path in files:
        stem = re.sub(r"-\d+-of-\d+$", "", path.stem)
        if stem in NAMES:
            found[NAMES[stem]].setdefault(stem + path.suffix, []).append(path)
    if not found["train"] and files and all(path.suffix.lower() == DOCUMENT for path in files):
        found["train"]["documents"] = [path for path in files if path.stem not in NAMES]
    for split, choices in found.items():
        if len(choices) > 1:
            raise DataError(f"{folder} holds both {' and '.join(choices)}; keep one of them")
        source.tables[split] += _tables(*choices.values())
    if not source.tables["train"]:
        here = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"no train.jsonl (or {', '.join(SUFFIXES[1:])}) in {str(folder)!r}, which holds {here}; name the training "
            "rows so, or give the file itself"
        )


def _tables(paths: Sequence[Path] = ()) -> list[Table]:
    """Return a table for each file, or one for all where they are documents."""
    if paths and paths[0].suffix.lower() == DOCUMENT:
        name = paths[0].name if len(paths) == 1 else f"{len(paths)} documents"
        return [Table(name, lambda: iter(()), lambda: "".join(map(_digest, paths)), tuple(paths))]
    return [Table(path.name, partial(READERS[path.suffix.lower()], path), partial(_digest, path)) for path in paths]


def _digest(path: Path) -> str:
    """Return a digest of a file's kind and contents."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() + hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None


def _demo() -> Source:
    """Return the built-in demo set as a source."""
    source = Source("the demo set")
    splits = demo_splits()
    for split in SPLITS:
        rows = [dict(record.fields) for record in getattr(splits, split)]
        identity = hashlib.blake2b(json.dumps(rows).encode()).hexdigest()
        table = Table(f"demo {split}", partial(enumerate, rows, 1), lambda identity=identity: identity)
        source.tables[split].append(table)
    return source


def _datasets(name: str) -> Any:
    """Return the datasets package, which only hub data sets need."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name!r} is no file and no folder, and a hub data set needs pip install 'mlx_loraplus[datasets]'"
        ) from None
    return datasets


def _load_hub(name: str) -> Any:
    """Return a hub data set, from the local cache where it is there already."""
    repository, _, config = name.partition(":")
    datasets = _datasets(name)
    if not hub_reachable():  # so that the hub's client asks the local cache alone, and no network for half a minute
        import huggingface_hub

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # a network, a server and a repository's files can fail in ways without a common root
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name!r} is no file or folder, and no data set that the hub gives: {reason:.300}") from None


def _add_hub_splits(source: Source, splits: Any) -> None:
    """Add the splits of a datasets.DatasetDict; rows stay on disk."""
    named = {name: rows for name, rows in splits.items() if name in NAMES}
    if "train" not in named:
        raise DataError(f"{source.name} has no split named train, but {', '.join(splits)}")
    for name, rows in named.items():
        files = [Path(entry["filename"]) for entry in rows.cache_files]
        if not files:
            raise DataError(f"{source.name}: the rows of {name} are in memory only; save them with save_to_disk")
        identity = partial(lambda files: "".join(map(_digest, files)), files)
        source.tables[NAMES[name]].append(Table(f"{source.name} {name}", partial(enumerate, rows, 1), identity))
