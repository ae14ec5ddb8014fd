"""A folder of jsonl files becomes records; every bad row is named with its file and line, all in one message.

A row is one JSON object on one line, of one kind (the formats of OpenAI's fine-tuning guide, as mlx-lm reads them)::

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, join_problems

Kind = Literal["chat", "completion", "text"]
KIND_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
FORMATS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
ROLES = ("system", "user", "assistant", "tool")
SPLIT_FILES = {"train": ("train.jsonl",), "valid": ("valid.jsonl", "validation.jsonl"), "test": ("test.jsonl",)}


@dataclass(frozen=True)
class Record:
    """One row: its kind, the fields that kind needs, and where it came from ("train.jsonl:17")."""

    kind: Kind
    fields: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Splits:
    """The rows of a data set; only ``train`` is never empty."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]


class _BadRowError(Exception):
    """What is wrong with one row, without its place."""


def read_folder(path: str | Path) -> Splits:
    """Read train.jsonl and, where they exist, valid.jsonl (or validation.jsonl) and test.jsonl.

    Args:
        path: folder that holds the files, UTF-8 with or without a byte order mark; blank lines are skipped.

    Raises:
        DataError: the folder or train.jsonl is missing or empty, or there are bad rows (all of them in one message).
    """
    folder = Path(path)
    files = _find_files(folder)
    problems: list[str] = []
    splits = {name: _read_file(file, problems) if file else [] for name, file in files.items()}
    if problems:
        raise DataError(f"{folder}: {join_problems(problems)}; each line must be one of {FORMATS}")
    if not splits["train"]:
        raise DataError(f"{folder / 'train.jsonl'} has no rows; each line must be one of {FORMATS}")
    return Splits(**splits)


def _find_files(folder: Path) -> dict[str, Path | None]:
    """Return the file of each split, or None where there is none."""
    if folder.is_file():
        raise DataError(f"data is a file: {str(folder)!r}; give the folder that holds it, with the rows in train.jsonl")
    if not folder.is_dir():
        raise DataError(f"data folder not found: {str(folder)!r}; give a folder that holds train.jsonl")
    files: dict[str, Path | None] = {}
    for split, names in SPLIT_FILES.items():
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise DataError(f"{folder} holds both {' and '.join(names)}; keep one of them")
        files[split] = found[0] if found else None
    if files["train"] is None:
        here = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"no train.jsonl in {str(folder)!r}, which holds {here}; put the training rows in train.jsonl")
    return files


def _read_file(file: Path, problems: list[str]) -> list[Record]:
    """Return the good rows of a file and append what is wrong with the others to ``problems``."""
    records: list[Record] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                source = f"{file.name}:{number}"
                try:
                    kind, fields = _parse_row(line)
                except _BadRowError as problem:
                    problems.append(f"{source}: {problem}")
                    continue
                if records and kind != records[0].kind:
                    problems.append(f"{source}: {kind} row, but {records[0].source} is {records[0].kind}")
                else:
                    records.append(Record(kind, fields, source))
    except OSError as error:
        raise DataError(f"can't read {file}: {error.strerror}") from error
    return records


def _parse_row(line: bytes) -> tuple[Kind, Mapping[str, Any]]:
    """Return a line's kind and the fields that kind needs."""
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # an escaped half of a surrogate pair is legal JSON, but no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1})") from error
    except UnicodeEncodeError as error:
        raise _BadRowError("an escape of half a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise _BadRowError("not JSON (nested too deep)") from error
    except json.JSONDecodeError as error:
        raise _BadRowError(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # a number of too many digits
        raise _BadRowError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _BadRowError(f"{_type_name(row)}, not an object")
    row = {name: value for name, value in row.items() if value is not None}
    kinds: list[Kind] = [kind for kind, names in KIND_FIELDS.items() if any(name in row for name in names)]
    if not kinds:
        raise _BadRowError(f"no known field (it has {', '.join(f'{name!r:.40}' for name in list(row)[:6]) or 'none'})")
    if len(kinds) > 1:
        raise _BadRowError(f"fields of several kinds ({' and '.join(kinds)})")
    kind = kinds[0]
    missing = [name for name in KIND_FIELDS[kind] if name not in row]
    if missing:
        raise _BadRowError(f"no {missing[0]!r}")
    if kind == "chat":
        return kind, _check_chat(row)
    fields = {name: row[name] for name in KIND_FIELDS[kind]}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise _BadRowError(f"{name!r} is {_type_name(value)}, not a string")
        if name != "prompt" and not value.strip():
            raise _BadRowError(f"{name!r} is empty")
    return kind, fields


def _check_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a chat row, or say what is wrong with them."""
    messages = row["messages"]
    if not isinstance(messages, list):
        raise _BadRowError(f"'messages' is {_type_name(messages)}, not a list")
    if not messages:
        raise _BadRowError("'messages' is empty")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _BadRowError(f"messages[{place}] is {_type_name(message)}, not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _BadRowError(f"messages[{place}] has the role {role!r:.40}; roles are {', '.join(ROLES)}")
        if role == "assistant" and content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise _BadRowError(f"messages[{place}] ({role}) has {_type_name(content)} as content, not a string")
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise _BadRowError(f"messages[{place}] (assistant) has empty content")
    if not any(message["role"] == "assistant" for message in messages):
        raise _BadRowError("no assistant turn, so nothing to learn")
    if "tools" not in row:
        return {"messages": messages}
    if not isinstance(row["tools"], list):
        raise _BadRowError(f"'tools' is {_type_name(row['tools'])}, not a list")
    return {"messages": messages, "tools": row["tools"]}


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
