"""What ``--data`` names is found: a folder, a file, a hub data set, or several of them; without it, the demo set.

A folder holds a train file and, if there are any, a valid (validation, val, dev, eval) and a test
file, or shards of them (train-00000-of-00004.parquet); or a data set that ``datasets`` saved; or
documents (.txt) only, which are for training.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ..hub_access import hub_reachable
from .demo import demo_rows
from .readers import READERS, RawRow

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")
NAMES: dict[str, SplitName] = {  # a file's or a hub split's name to the split it is
    "train": "train", "test": "test", "testing": "test",
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval", "evaluation"), "valid"),
}  # fmt: skip
DOCUMENT = ".txt"
SUFFIXES = (*READERS, DOCUMENT)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Rows that are read together."""

    name: str  # what their places begin with, "train.jsonl"
    rows: Callable[[], Iterator[RawRow]]  # yields (place, row) anew at each call
    identity: Callable[[], str]  # returns a digest of what the rows are made from
    documents: Sequence[Path] = ()  # files of text to be joined and cut, instead of rows
    notes: Sequence[str] = ()  # such as what lies beside it and is not used


Source = Mapping[SplitName, list[Table]]
"""What one name given to ``--data`` stands for: the tables of the splits that it has."""


def find_sources(names: Sequence[str]) -> list[Source]:
    """Find folders, files and hub ids (``org/name``, or ``org/name:config``), or the demo set; no rows are read yet.

    Raises: DataError where there is no such data set, or it has no training rows.
    """
    if len(names) > 1:
        return [_with_places(name, _find_source(name)) for name in names]
    return [_find_source(name) for name in names] or [_demo()]


def _with_places(name: str, source: Source) -> Source:
    """Return a source of several, the places of whose rows say which it is: a/train.jsonl."""
    path = Path(name)
    home = path.parent if path.suffix.lower() in SUFFIXES else path

    def placed(table: Table) -> Table:
        return (
            table
            if table.name.startswith(f"{name} ")
            else replace(table, name=str(home / table.name))
        )

    return {split: list(map(placed, tables)) for split, tables in source.items()}


def _find_source(name: str) -> Source:
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path's own raises where there is no such user)
    suffix = path.suffix.lower()
    try:
        if (path / "dataset_dict.json").is_file():
            return _of_datasets(name, _load_datasets(name, path))
        if path.is_dir():
            return _of_folder(path)
        if path.is_file():
            if suffix not in SUFFIXES:
                raise DataError(
                    f"data is a file of no known kind: {name!r}; give {', '.join(SUFFIXES)}, or a"
                    " folder"
                )
            (table,) = _of_files([path])
            return {"train": [replace(table, notes=_siblings(path))]}
    except OSError as error:
        raise DataError(f"can't read {name!r:.300}: {error.strerror}") from None
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and suffix not in SUFFIXES:
        return _of_datasets(name, _load_datasets(name))
    raise DataError(
        f"data not found: {name!r}; give a folder that holds train.jsonl, a file, or a hub id"
    )


def _stem(path: Path) -> str:
    """Return what a file is named for, without the number of a shard."""
    return re.sub(r"-\d+-of-\d+$", "", path.stem).lower()


def _siblings(path: Path) -> list[str]:
    """Return a note on the files for validation and tests beside a single file, which are not used."""
    beside = [
        other.name
        for other in sorted(path.absolute().parent.iterdir())
        if other.suffix.lower() in READERS
        and NAMES.get(_stem(other)) in ("valid", "test")
        and other.name != path.name
    ]
    if not beside:
        return []
    rename = (
        "" if NAMES.get(_stem(path)) == "train" else f", with {path.name} named train{path.suffix}"
    )
    folder = str(path.parent)
    return [
        f"{', '.join(beside)[:200]} beside {path.name} not used: give the folder, --data"
        f" {folder}{rename}, to use it"
    ]


def _of_folder(folder: Path) -> Source:
    """Return the files of a folder by the splits that they are named for."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    found: dict[SplitName, dict[str, list[Path]]] = {}
    for path in files:
        stem = _stem(path)
        if stem in NAMES:
            found.setdefault(NAMES[stem], {}).setdefault(stem + path.suffix.lower(), []).append(
                path
            )
    if "train" not in found and files and all(path.suffix.lower() == DOCUMENT for path in files):
        found["train"] = {"documents": [path for path in files if _stem(path) not in NAMES]}
    for choices in found.values():
        if len(choices) > 1:
            raise DataError(f"{folder} holds both {' and '.join(choices)}; keep one of them")
    source: Source = {split: _of_files(*choices.values()) for split, choices in found.items()}
    if not source.get("train"):
        here = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"no train.jsonl (or {', '.join(SUFFIXES[1:])}) in {str(folder)!r}, which holds {here};"
            " name the training rows so, or give the file itself"
        )
    return source


def _of_files(paths: Sequence[Path]) -> list[Table]:
    """Return a table for each file, or one for all where they are documents."""
    if paths and paths[0].suffix.lower() == DOCUMENT:
        name = paths[0].name if len(paths) == 1 else f"{len(paths)} documents"
        return [Table(name, lambda: iter(()), partial(_digest, paths), paths)]
    return [
        Table(path.name, partial(READERS[path.suffix.lower()], path), partial(_digest, [path]))
        for path in paths
    ]


def _digest(paths: Sequence[Path]) -> str:
    """Return digests of the files' kinds and contents."""
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(
                    path.suffix.lower() + hashlib.file_digest(file, "blake2b").hexdigest()
                )
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from None
    return "".join(digests)


def _demo() -> Source:
    rows = demo_rows()
    identity = hashlib.blake2b(json.dumps(rows).encode()).hexdigest()
    return {
        split: [
            Table(
                f"demo {split}",
                partial(enumerate, rows[split], 1),
                lambda split=split: f"{identity} {split}",
            )
        ]
        for split in SPLITS
    }


def _load_datasets(name: str, folder: Path | None = None) -> Any:
    """Return a datasets.DatasetDict: what it saved to ``folder``, or a hub data set, from the local cache if there."""
    try:
        from datasets import config, load_dataset, load_from_disk
    except ImportError:
        raise DataError(
            f"{name!r} is no file and no folder of files, and a hub data set needs pip install"
            " 'mlx_loraplus[datasets]'"
        ) from None
    repository, _, subset = name.partition(":")
    if (
        folder is None and not hub_reachable()
    ):  # so that the hub's client asks the local cache alone, and at once
        import huggingface_hub

        config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return (
            load_dataset(repository, subset or None) if folder is None else load_from_disk(folder)
        )
    except Exception as error:  # a network, a server and a repository's files can fail in ways without a common root  # noqa: BLE001
        reason = " ".join(str(error).split()) or type(error).__name__
        what = (
            "no file or folder, and no data set that the hub gives"
            if folder is None
            else "no data set as saved"
        )
        raise DataError(f"{name!r} is {what}: {reason:.300}") from None


def _of_datasets(name: str, splits: Any) -> Source:
    """Return the splits of a datasets.DatasetDict; rows stay on disk."""
    if "train" not in splits:
        raise DataError(f"{name} has no split named train, but {', '.join(splits)}")
    source: dict[SplitName, list[Table]] = {}
    left = [key for key in splits if key.lower() not in NAMES]
    notes = [f"splits that are not used: {', '.join(left):.300}"] if left else []
    for key, rows in splits.items():
        if key.lower() in NAMES:
            files = [Path(entry["filename"]) for entry in rows.cache_files]
            if not files:
                raise DataError(
                    f"{name}: the rows of {key} are in memory only; save them with save_to_disk"
                )
            place = f"{name} {key}"
            table = Table(place, partial(_rows_of, place, rows), partial(_digest, files))
            split = NAMES[key.lower()]
            source.setdefault(split, []).append(
                replace(table, notes=notes if split == "train" else [])
            )
    return source


def _rows_of(name: str, rows: Any) -> Iterator[RawRow]:
    """Yield the rows of a datasets.Dataset, pictures and the like as they are stored; places are their numbers."""
    for column, feature in rows.features.items():
        if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
            rows = rows.cast_column(column, type(feature)(decode=False))
    try:
        yield from enumerate(rows, start=1)
    # Other features are decoded by libraries whose errors have no common root.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{name} can't be read: {' '.join(str(error).split()):.300}") from None
