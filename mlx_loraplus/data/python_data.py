"""Accept rows from Python as the setting ``data``: lists, generators, data sets and data frames.

Rows in memory are written to the cache once, as JSON lines in a folder that is named for their
content. The setting then names this folder, so that everything that works with files works with
rows from Python too: tokens are cached by content, a run can be resumed, and other commands find
the data in ``run.yaml``. The rows are written one at a time, so they may be larger than memory.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..call_checks import DATA_ALLOWED, is_mlx_module, shown
from ..errors import DataError, nearest
from ..files import cache_folder, cached_folder, remove_unused, temporary_name, write_error
from .csv_rows import repeated_name
from .hub_rows import dataset_rows
from .sources import SPLIT_NAMES, SPLITS, STORED_ROWS, SplitName

# The types of pandas' missing values; NaN is read as null, as in a file
_MISSING = ("NAType", "NaTType")


def store_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose ``data`` consists of names; rows in memory are stored in the cache.

    Args:
        settings: Flat settings. ``data`` may be a path, a hub id, rows, or a list of these.

    Raises:
        DataError: ``data`` has no rows, or can't hold rows.
        OutputError: The cache can't be written.
    """
    if "data" not in settings:
        return dict(settings)
    return {**settings, "data": _names_of(settings["data"])}


def _names_of(data: Any) -> list[str]:
    """Return the name of each data set; a list of rows is one data set."""
    is_list = isinstance(data, list | tuple)
    if not is_list or not any(_is_data_set(item) for item in data):
        _check_no_lists(data)
        return [_name_of(data, "data")]

    names: list[str] = []
    first = next(number for number, item in enumerate(data) if _is_data_set(item))
    for number, item in enumerate(data):
        if not _is_data_set(item):
            is_text = isinstance(data[first], str)
            text = ", and a text as a row, {'text': …}" if is_text else ""
            raise DataError(
                f"data[{number}] is {shown(item)}, but data[{first}] is a whole data set"
                f" ({shown(data[first])}): give rows next to data sets as {{'train': rows}}{text}"
            )
        names.append(_name_of(item, f"data[{number}]"))
    return names


def _check_no_lists(data: Any) -> None:
    """Check that the items of a list are rows, and not lists of rows.

    Raises:
        DataError: Each of them is a list that begins with a dict, which is no message of a chat.
    """
    items = cast("list[Any]", data) if isinstance(data, list | tuple) else []
    for item in items:
        first = item[0] if isinstance(item, list | tuple) and item else None
        if not isinstance(first, Mapping) or not {"role", "from"}.isdisjoint(first):
            return
    if len(items) < 2:  # one list of rows is those rows
        return
    raise DataError(
        "data is a list of lists of rows: name its splits, {'train': rows, 'valid': rows}, or"
        " give several data sets, [{'train': rows}, {'train': more_rows}]"
    )


def _is_data_set(item: Any) -> bool:
    """Return whether an item of a list is a whole data set, and not a row."""
    is_splits = isinstance(item, Mapping) and _has_splits(cast("Mapping[Any, Any]", item))
    return isinstance(item, str | os.PathLike) or is_splits or _table_reader(item) is not None


def _has_splits(data: Mapping[Any, Any]) -> bool:
    """Return whether a key of a mapping is the name of a split and its value is not a text."""
    for key, rows in data.items():
        is_split = isinstance(key, str) and key.lower() in SPLIT_NAMES
        if is_split and not isinstance(rows, str):
            return True
    return False


def _name_of(data: Any, label: str) -> str:
    """Return the name of a data set; ``label`` names it in messages."""
    if is_mlx_module(data):
        raise DataError(f"{label} is a model ({type(data).__name__}); {DATA_ALLOWED}")
    if isinstance(data, io.IOBase):
        raise DataError(f"{label} is an open file; give its path, such as 'train.jsonl'")
    if not isinstance(data, str | os.PathLike):
        return str(_store(_splits_of(data, label), label))

    # A name with spaces is likely to be a text; a missing file without them is reported later
    name = os.fspath(data)
    is_there = os.path.exists(os.path.expanduser(name))  # noqa: PTH110, PTH111
    if len(name.split()) > 1 and not is_there:
        raise DataError(
            f"{label} is the text {name!r:.80}, which is not a path; give texts as rows, such as"
            " [{'text': …}]"
        )
    return name


def _splits_of(data: Any, label: str) -> dict[SplitName, tuple[str, Any]]:
    """Return the label and the rows of each split; rows without a split are training rows."""
    if not isinstance(data, Mapping):
        return {"train": (label, data)}

    splits = cast("Mapping[Any, Any]", data)
    if not _has_splits(splits):
        columns = ", ".join(map(str, splits))
        if splits and {str(key).lower() for key in splits} <= SPLIT_NAMES.keys():
            raise DataError(
                f"{label} is one dict ({columns:.80}) whose values are not"
                " rows; give {'train': rows, 'valid': rows}, or the folder of the files as a path"
            )
        hint = nearest(next(iter(map(str, splits)), ""), SPLITS)
        raise DataError(
            f"{label} is one dict ({columns or 'empty':.80}){hint}; give a list of rows, such as"
            " [{…}], or a dict of splits, {'train': rows, 'valid': rows}"
        )

    found: dict[SplitName, tuple[str, Any]] = {}
    for key, rows in splits.items():
        split = SPLIT_NAMES.get(str(key).lower())
        if split is None or split in found:
            why = f"is a second {split} split" if split else "is not a split"
            raise DataError(
                f"{label}[{key!r:.40}] {why}; give at most one each of {', '.join(SPLITS)}, and"
                " nothing else"
            )
        found[split] = (f"{label}[{key!r}]", rows)
    return found


def _store(splits: Mapping[SplitName, tuple[str, Any]], label: str) -> Path:
    """Write rows to the cache unless they are there, and return their folder.

    Raises:
        DataError: There are no rows, or they can't be read.
        OutputError: The cache can't be written.
    """
    # Check all splits before a generator is consumed
    rows_of = {split: _rows_of(rows, name) for split, (name, rows) in splits.items()}

    remove_unused(STORED_ROWS)
    new = cache_folder() / STORED_ROWS / temporary_name(Path("rows"))
    _writing(new, lambda: new.mkdir(parents=True))
    try:
        # Write the rows; the folder's name follows from their content
        digest = hashlib.blake2b(digest_size=8)
        count = 0
        for split in SPLITS:
            if split in splits:
                digest.update(split.encode())
                path = new / f"{split}.jsonl"
                lines = _lines(rows_of[split], splits[split][0])
                count += _write_lines(path, lines, digest.update)
        if not count:
            raise DataError(
                f"{label} has no rows; to train on the demo set, leave data out (an iterator is"
                " empty after its first use)"
            )

        # Move the files to the folder, unless it is in the cache already
        def move(folder: Path) -> None:
            for path in new.iterdir():
                path.rename(folder / path.name)

        return cached_folder(STORED_ROWS, f"{count}-rows-{digest.hexdigest()}", move)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_lines(path: Path, lines: Iterator[bytes], update: Callable[[bytes], None]) -> int:
    """Write lines to a new file, pass each to ``update``, and return their number."""

    def open_file() -> BinaryIO:
        return path.open("xb")

    count = 0
    file: BinaryIO = _writing(path, open_file)
    try:
        for line in lines:
            update(line)
            _writing(path, lambda line=line: file.write(line))
            count += 1
    finally:
        # The last lines are written when the file is closed.
        _writing(path, file.close)
    return count


def _writing(path: Path, action: Callable[[], Any]) -> Any:
    """Call ``action``, which writes to the cache at ``path``.

    Only writing is wrapped, so that an OSError of the user's own iterator is not taken for ours.

    Raises:
        OutputError: The cache can't be written.
    """
    try:
        return action()
    except OSError as error:
        raise write_error(path, error) from error


def _rows_of(rows: Any, label: str) -> Iterator[Any]:
    """Return an iterator over rows.

    Raises:
        DataError: ``rows`` can't be iterated, or its order is not defined.
    """
    read = _table_reader(rows)
    if read is not None:
        return read(rows, label)

    is_iterable = isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping)
    if not is_iterable or isinstance(rows, set | frozenset):
        reason = ""
        if isinstance(rows, set | frozenset):
            reason = ", whose rows have no order"
        if isinstance(rows, str):
            reason = f" ({rows!r:.60}), and a split must hold rows"
        if callable(rows):
            reason = ", which must be called to give rows"
        if rows is None:
            raise DataError(f"{label} is None; {DATA_ALLOWED}; or leave it out")
        raise DataError(f"{label} is of the type {type(rows).__name__}{reason}; {DATA_ALLOWED}")
    return iter(cast("Iterable[Any]", rows))


def _lines(rows: Iterator[Any], label: str) -> Iterator[bytes]:
    """Yield each row as a line of JSON.

    Raises:
        DataError: A row is a text, or can't be written as JSON.
    """
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            raise DataError(
                f"row {number} of {label} is the text {row!r:.60}; give texts as {{'text': …}}"
            )
        try:
            line = json.dumps(row, default=_as_json)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"row {number} of {label} can't be written as JSON: {error!s:.200}"
            ) from None
        yield line.encode() + b"\n"


def _as_json(value: Any) -> Any:
    """Return a JSON value for an object of another type."""
    if isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value))
    # NumPy arrays and scalars
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value).__name__ in _MISSING:
        return None

    # Unused columns may hold anything; in a used column, this object is reported as a bad row
    return {"Python object": type(value).__name__}


# --- tables --------------------------------------------------------------------------------------
# They are recognized by their methods, so that no library has to be imported.


def _table_reader(data: Any) -> Callable[[Any, str], Iterator[Any]] | None:
    """Return the function that iterates over a table's rows, or None if the data is not a table."""
    if isinstance(data, type):
        return None
    if hasattr(data, "cast_column") and hasattr(data, "features"):
        return _rows_of_dataset
    for method, read in _READERS.items():
        if hasattr(data, method):
            return read
    return None


def _rows_of_dataset(data: Any, label: str) -> Iterator[Any]:
    """Yield the rows of a datasets.Dataset or IterableDataset."""
    for _, row in dataset_rows(label, data):
        yield row


def _rows_of_pandas(data: Any, label: str) -> Iterator[Any]:
    """Return the rows of a pandas.DataFrame, without its index."""
    columns = [str(column) for column in data.columns]
    if name := repeated_name(columns):
        raise DataError(
            f"{label}: two columns have the same name ({name:.200}): rename or drop one of them"
        )
    values = data.itertuples(index=False, name=None)
    return (dict(zip(columns, row, strict=True)) for row in values)


def _rows_of_polars(data: Any, _: str) -> Iterator[Any]:
    """Return the rows of a polars.DataFrame."""
    return data.iter_rows(named=True)


def _rows_of_arrow(data: Any, _: str) -> Iterator[Any]:
    """Yield the rows of a pyarrow.Table."""
    for batch in data.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Any, str], Iterator[Any]]] = {
    "itertuples": _rows_of_pandas,
    "to_dicts": _rows_of_polars,
    "to_batches": _rows_of_arrow,
}
"""The function that iterates over a table's rows, by the method that only such tables have."""
