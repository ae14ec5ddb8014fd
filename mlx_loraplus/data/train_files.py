"""Say which file or folder to give, for a folder that has no training file of its own."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..userpaths import shell_word
from .data_file_names import SPLIT_NAMES, stem_of
from .missing_data import file_type_hint
from .readers import READERS

# How far below a folder files are looked for, and in how many folders at most
_MAX_DEPTH, _MOST_FOLDERS = 3, 1000

_MOST_SHOWN = 3
# Parts of names of files that are probably not for training
_NOT_TRAINED = re.compile(r"val|dev|eval|test|held")
_DATASET = "dataset_dict.json"  # the mark of a data set that ``datasets`` saved


def advise_train_file(folder: Path) -> str:
    """Return what to do about a folder without a training file, by what it holds."""
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries]
    if "history.jsonl" in names:
        return "it is a run: give the data that it was trained on, which its run.yaml names"
    if "config.json" in names:
        return "it looks like a model: are --model and --data swapped?"

    files = [entry for entry in entries if entry.suffix.lower() in READERS and entry.is_file()]
    if files:
        return _advise_files(files)
    below = list(_files_below(folder))
    if below:
        return _advise_below(below)

    for entry in entries:
        if hint := file_type_hint(entry):
            return f"{entry.name!r:.80} is not read{hint}"
    return "save the training rows there, for example in train.jsonl with one row per line"


def _advise_files(files: Sequence[Path]) -> str:
    """Return what to do about a folder whose files have other names."""
    if all(SPLIT_NAMES.get(stem_of(file)) in ("valid", "test") for file in files):
        return f"save the training rows there too, for example in train{files[0].suffix}"
    if len(files) == 1:
        return f"rename it to train{files[0].suffix}, or give the file: --data {_words(files)}"

    # Every file after --data is trained on, so name none that seems to be for validation.
    train = [file for file in files if not _NOT_TRAINED.search(stem_of(file))] or list(files)
    return (
        f"rename the file to train on to train{train[0].suffix} and the file to validate on, if"
        f" there is one, to valid{train[0].suffix}, or give only what to train on, as in --data"
        f" {_words(train)}"
    )


def _advise_below(files: Sequence[Path]) -> str:
    """Return which folder or file to give, of those in the folders of a folder."""
    train = [file for file in files if stem_of(file) == "train" or file.name == _DATASET]
    if not train:
        return f"give files in its folders, as in --data {_words(_not_evaluated(files) or files)}"

    folders = list(dict.fromkeys(file.parent for file in train))
    if len(folders) == 1:
        return f"give the folder that holds {train[0].name}: --data {_words(folders)}"
    return f"give one or several of the folders in it, as in --data {_words(folders)}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the data files in the folders of a folder, as far as ``_MAX_DEPTH`` levels below it."""
    for number, (place, folders, names) in enumerate(os.walk(folder)):
        path = Path(place)
        is_end = len(path.relative_to(folder).parts) >= _MAX_DEPTH or number >= _MOST_FOLDERS
        folders[:] = [] if is_end else sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if Path(name).suffix.lower() in READERS and path != folder:
                yield path / name


def _not_evaluated(files: Sequence[Path]) -> list[Path]:
    """Return the files that are not of validation or test rows, by their names and folders."""
    found: list[Path] = []
    for file in files:
        splits = {SPLIT_NAMES.get(stem_of(file)), SPLIT_NAMES.get(file.parent.name.lower())}
        if not splits & {"valid", "test"}:
            found.append(file)
    return found


def _words(paths: Sequence[Path]) -> str:
    """Return the first paths as words of a command."""
    return " ".join(shell_word(path) for path in paths[:_MOST_SHOWN])
