"""Find the data that ``--data`` names: folders, files or hub data sets.

Without ``--data``, the built-in demo set is used. A folder contains one of these:

- a train file and, optionally, a valid (validation, val, dev, eval) and a test file, each of which
  may be divided into shards (train-00000-of-00004.parquet);
- a data set that ``datasets`` saved with ``save_to_disk``;
- only documents (.txt), which are all used for training.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import describe_entry, is_not_ordinary_file
from ..hub_access import hub_reachable
from .data_file_names import SPLIT_NAMES, SPLITS, SplitName, check_shards, find_unused, stem_of
from .demo import demo_rows
from .hub_rows import dataset_rows
from .missing_data import check_spaces, file_type_hint, missing_hint, show_name
from .readers import READERS, RawRow
from .train_files import advise_train_file

DOCUMENT = ".txt"
SUFFIXES = (*READERS, DOCUMENT)

# The folder of the cache with rows from Python, and the names of the folders in it
STORED_ROWS = "python"
_STORED_NAME = re.compile(r"(\d+)-rows-[0-9a-f]{16}")

_WHAT_TO_GIVE = "; give a folder that contains train.jsonl, a file, or a hub id"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """Rows that are read together, usually those of one file.

    Attributes:
        name: Prefix of each row's location, for example "train.jsonl".
        rows: Returns a new iterator over (row number, row) at each call.
        identity: Returns a digest of the data that the rows are read from.
        documents: Text files that are joined and cut into examples. They replace ``rows``.
        notes: Notes for the report, for example on files that are not used.
    """

    name: str
    rows: Callable[[], Iterator[RawRow]]
    identity: Callable[[], str]
    documents: Sequence[Path] = ()
    notes: Sequence[str] = ()


Source = Mapping[SplitName, list[Table]]
"""The data of one ``--data`` argument: the tables of each of its splits."""


def find_sources(names: Sequence[str]) -> list[Source]:
    """Find each named data set, without reading its rows.

    Args:
        names: Folders, files and hub ids (``org/name`` or ``org/name:config``). If empty, the
            demo set is used.

    Raises:
        DataError: A data set does not exist, can't be read, or has no training rows.
    """
    if not names:
        return [_demo_source()]
    check_spaces(names)

    # With several data sets, the names of their tables must differ
    sources: list[Source] = []
    is_alone = len(names) == 1
    for number, name in enumerate(names):
        if is_from_python(name):
            sources.append(_stored_source(name, "data" if is_alone else f"data[{number}]"))
        elif is_alone:
            sources.append(_find_source(name, names))
        else:
            sources.append(_with_full_names(name, _find_source(name, names)))
    return sources


def describe_sources(names: Sequence[str]) -> str:
    """Return the names of data sets for a message."""
    if not names:
        return "the demo set"
    return ", ".join("data from Python" if is_from_python(name) else name for name in names)


def is_from_python(name: str) -> bool:
    """Return whether a name is a folder of rows from Python, which may have been removed."""
    path = Path(name)
    return path.parent.name == STORED_ROWS and _STORED_NAME.fullmatch(path.name) is not None


def _stored_source(name: str, label: str) -> Source:
    """Return the tables of rows from Python.

    Raises:
        DataError: The rows are no longer in the cache.
    """
    folder = Path(name)
    found: dict[SplitName, Path] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        if path.is_file():
            found[split] = path
    if not found:
        raise DataError(
            f"these rows came from Python, and their copy {name} was removed from the cache: give"
            " the same rows again"
        )

    # Mark the rows as used, unless the cache is read-only
    with suppress(OSError):
        os.utime(folder)

    source: dict[SplitName, list[Table]] = {}
    for split, path in found.items():
        (table,) = _tables_of([path])
        shown = label if list(found) == ["train"] else f"{label} {split}"
        source[split] = [replace(table, name=shown)]
    return source


def _with_full_names(name: str, source: Source) -> Source:
    """Add the folder to the names of a source's tables: a/train.jsonl instead of train.jsonl."""
    path = Path(name)
    folder = path.parent if path.suffix.lower() in SUFFIXES else path

    renamed: dict[SplitName, list[Table]] = {}
    for split, tables in source.items():
        renamed[split] = []
        for table in tables:
            # The tables of a hub data set already have its name
            has_full_name = table.name.startswith(f"{name} ")
            full_name = table.name if has_full_name else str(folder / table.name)
            renamed[split].append(replace(table, name=full_name))
    return renamed


def _find_source(name: str, names: Sequence[str]) -> Source:
    """Find one data set: a local path if it exists, otherwise a hub data set.

    Raises:
        DataError: Neither of them exists, or the data set can't be read.
    """
    try:
        source = _find_local(name, names)
    except OSError as error:
        raise DataError(f"can't read {name!r:.300}: {error.strerror}") from None
    if source is not None:
        return source

    is_file_name = Path(name).suffix.lower() in SUFFIXES
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and not is_file_name:
        return _dataset_source(name, _load_dataset_dict(name))
    raise DataError(f"data not found: {name!r}{missing_hint(name)}{_WHAT_TO_GIVE}")


def _find_local(name: str, names: Sequence[str]) -> Source | None:
    """Return the source at a local path, or None if nothing is there."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111  (Path's raises for an unknown user)
    if (path / "dataset_dict.json").is_file():
        return _dataset_source(name, _load_dataset_dict(name, path))
    if path.is_dir():
        return _folder_source(path)
    if is_not_ordinary_file(path):
        raise DataError(
            f"can't read {name!r}: it is {describe_entry(path)}; give a folder or an ordinary file"
        )
    if not path.is_file():
        return None

    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"unsupported file type: {name!r}{file_type_hint(path)}; give one of"
            f" {', '.join(SUFFIXES)}, or a folder"
        )
    (table,) = _tables_of([path])
    return {"train": [replace(table, notes=_sibling_notes(path, names))]}


def _sibling_notes(path: Path, names: Sequence[str]) -> list[str]:
    """Return a note if a file, or one beside it, is one of validation or test rows by its name."""
    beside = path.absolute().parent.iterdir()
    files = sorted(other for other in beside if other.suffix.lower() in READERS)
    splits = {other: SPLIT_NAMES.get(stem_of(other)) for other in files}
    given = {Path(os.path.expanduser(name)).absolute() for name in names}  # noqa: PTH111
    evaluated = [other for other, split in splits.items() if split in ("valid", "test")]
    advice = f"give the folder instead: --data {path.parent}"
    if path.absolute() in evaluated and "train" in map(splits.get, given):
        return [f"{path.name} is trained on, like every file of --data; to validate, {advice}"]
    unused = ", ".join(other.name for other in evaluated if other not in given)
    if not unused:
        return []
    if SPLIT_NAMES.get(stem_of(path)) != "train":
        advice = f"rename {path.name} to train{path.suffix} and {advice}"
    return [f"files next to {path.name} are not used: {unused:.200}; to use them, {advice}"]


def _folder_source(folder: Path) -> Source:
    """Return the tables of a folder by split.

    Raises:
        DataError: There is no training file, or a split has several files that are not shards.
    """
    # A split must not be left out silently because its file can't be read
    for path in sorted(folder.iterdir()):
        is_split = path.suffix.lower() in SUFFIXES and stem_of(path) in SPLIT_NAMES
        if is_split and is_not_ordinary_file(path):
            raise DataError(
                f"can't read {path}: it is {describe_entry(path)}; replace it with an ordinary"
                " file, or remove it"
            )

    # Group the files by split and, within a split, by name; shards with the same name form one set
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    files = sorted(path for path in files if path.is_file())
    of_splits = [path for path in files if stem_of(path) in SPLIT_NAMES]
    check_shards(of_splits)
    found: dict[SplitName, dict[str, list[Path]]] = {}
    for path in of_splits:
        stem = stem_of(path)
        choices = found.setdefault(SPLIT_NAMES[stem], {})
        choices.setdefault(stem + path.suffix.lower(), []).append(path)

    # A folder that only has documents needs no train file
    only_documents = all(path.suffix.lower() == DOCUMENT for path in files)
    if "train" not in found and only_documents:
        found["train"] = {"documents": [path for path in files if path not in of_splits]}

    # Each split has one table or one set of shards
    source: dict[SplitName, list[Table]] = {}
    for split, choices in found.items():
        if len(choices) > 1:
            raise DataError(
                f"{folder} has several files for {split}: {', '.join(choices)}; keep one of them"
            )
        (paths,) = choices.values()
        source[split] = _tables_of(paths)

    if not source.get("train"):
        entries = [show_name(entry) for entry in sorted(folder.iterdir())]
        raise DataError(
            f"no train.jsonl (or {', '.join(SUFFIXES[1:])}) in {str(folder)!r}, which contains"
            f" {', '.join(entries[:8]) or 'nothing'}; {advise_train_file(folder)}"
        )

    # Report the files that are not used with the first table
    first, *others = source["train"]
    source["train"] = [replace(first, notes=find_unused(folder, of_splits)), *others]
    return source


def _tables_of(paths: Sequence[Path]) -> list[Table]:
    """Return one table for each file; documents share one table."""
    if not paths:
        return []
    if paths[0].suffix.lower() == DOCUMENT:
        name = paths[0].name if len(paths) == 1 else f"{len(paths)} documents"
        return [Table(name, lambda: iter(()), partial(_digest_files, paths), paths)]

    tables: list[Table] = []
    for path in paths:
        reader = READERS[path.suffix.lower()]
        tables.append(Table(path.name, partial(reader, path), partial(_digest_files, [path])))
    return tables


def _digest_files(paths: Sequence[Path]) -> str:
    """Return the suffixes of the files and the digests of their contents.

    Raises:
        DataError: A file can't be read.
    """
    digests: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from None
        digests.append(path.suffix.lower() + digest)
    return "".join(digests)


def _demo_source() -> Source:
    """Return the built-in demo set."""
    rows = demo_rows()
    digest = hashlib.blake2b(json.dumps(rows).encode()).hexdigest()

    source: dict[SplitName, list[Table]] = {}
    for split in SPLITS:
        numbered_rows = partial(enumerate, rows[split], 1)
        source[split] = [Table(f"demo {split}", numbered_rows, partial(str, f"{digest} {split}"))]
    return source


def _load_dataset_dict(name: str, folder: Path | None = None) -> Any:
    """Load a datasets.DatasetDict from ``folder`` or, if it is None, from the hub or its cache.

    Raises:
        DataError: The ``datasets`` package is not installed, or it can't load the data set.
    """
    try:
        from datasets import config, load_dataset, load_from_disk
    except ImportError:
        need = f"loading the saved data set {name!r}"
        if folder is None:
            need = (
                f"{name!r} is not a local file or folder{missing_hint(name)}: check the path; a"
                " data set of the Hugging Face hub"
            )
        raise DataError(f"{need} requires pip install 'mlx_loraplus[datasets]'") from None

    # Without a connection, use the local cache at once instead of waiting for timeouts
    if folder is None and not hub_reachable():
        import huggingface_hub

        config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True

    repository, _, subset = name.partition(":")
    try:
        if folder is not None:
            return load_from_disk(folder)
        return load_dataset(repository, subset or None)
    # Errors of the network, the server and the repository's files have no common base class
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split()) or type(error).__name__
        problem, advice = "can't be loaded as a saved data set", ""
        if folder is None:
            problem = "is not a local file or folder, and can't be loaded from the Hugging Face hub"
            advice = _WHAT_TO_GIVE
        message = f"{name!r} {problem}: {reason:.300}{missing_hint(name)}{advice}"
        raise DataError(message) from None


def _dataset_source(name: str, dataset: Any) -> Source:
    """Return the tables of a datasets.DatasetDict, whose rows stay on disk.

    Raises:
        DataError: The data set has no split named train, or its rows are only in memory.
    """
    if "train" not in dataset:
        raise DataError(f"{name} has no split named train; its splits are {', '.join(dataset)}")

    unused = [key for key in dataset if key.lower() not in SPLIT_NAMES]
    notes = [f"unused splits: {', '.join(unused):.300}"] if unused else []

    # Several splits of the data set may belong to one of ours, such as "dev" and "validation"
    source: dict[SplitName, list[Table]] = {}
    for key, rows in dataset.items():
        split = SPLIT_NAMES.get(key.lower())
        if split is None:
            continue

        # The digest of the rows is that of the files that hold them
        files = [Path(entry["filename"]) for entry in rows.cache_files]
        if not files:
            raise DataError(
                f"{name}: the rows of {key} are only in memory; save the data set with save_to_disk"
            )
        table = Table(
            name=f"{name} {key}",
            rows=partial(dataset_rows, f"{name} {key}", rows),
            identity=partial(_digest_files, files),
            notes=notes if split == "train" else [],
        )
        source.setdefault(split, []).append(table)
    return source
