"""Read a YAML file of settings, and say what is wrong with it and in which line."""

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from .command_config import CONFIGS
from .errors import ConfigError
from .files import read_bounded
from .foreign_names import FOREIGN_NAMES, NESTED
from .settings import setting_names
from .userpaths import similar_paths

# The files of settings in the folder of a run or a sweep
_SETTINGS_FILES = ("run.yaml", "best.yaml", "sweep.yaml")

_MAX_BYTES = 1 << 16  # of a YAML file
_MAX_DEPTH = 20  # nested brackets in a line; PyYAML takes seconds for more

# The suffixes of files that users may take for files of settings.
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz")
_ROWS = (".jsonl", ".csv", ".tsv", ".parquet", ".txt")

_NULL = "tag:yaml.org,2002:null"

# A line that may be a setting, but has no colon with a space after it: rank 8, rank:8 or rank = 8
_NO_COLON = re.compile(r"(?P<name>[A-Za-z][\w-]*)\s*[:=\s]\s*(?P<value>[^\s:=].*)")
_LONGEST_SHOWN = 60  # characters of a line


_SETTINGS = frozenset(name for kind in CONFIGS.values() for name in setting_names(kind))


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, except that it refuses a repeated name, and a name without a value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            line = node.start_mark.line + 1
            raise ConfigError(f"{twice[0]} is given twice, in the block of line {line}")
        is_foreign = not FOREIGN_NAMES.isdisjoint(names)
        for key, value in node.value:
            # But null and ~ may be written, and files of other programs leave settings empty.
            is_empty = value.tag == _NULL and value.value == ""
            if is_empty and (key.value.replace("-", "_") in _SETTINGS or not is_foreign):
                line = key.start_mark.line + 1
                raise ConfigError(
                    f"{key.value} has no value, in line {line}: write one after the colon, or leave"
                    " the line out"
                )
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: The file can't be read, is not YAML, or holds something other than settings.
    """
    text = _read_text(path)
    try:
        too_deep = any(_depth(line) > _MAX_DEPTH for line in text.split("\n"))
        settings = [] if too_deep else _StrictLoader(text).get_single_data()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    # PyYAML raises TypeError if a name is a list or another value that can't be a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(_about_yaml(path, text, error)) from None

    if settings is None:
        raise ConfigError(f"{path} is empty: write settings, one `name: value` a line")
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        line = _line_without_colon(path, text) if isinstance(settings, str) else ""
        raise ConfigError(line or f"{path} must hold settings, one `name: value` a line")

    # With references, a few bytes of YAML can describe nested values that are huge in memory.
    for name, value in settings.items():
        if not _is_flat(value) and name not in NESTED:
            raise ConfigError(
                f"{path}: {name!r:.64} must be one value, a list of values, or names with values"
            )
    return _underscored(path, settings)


def _read_text(path: Path) -> str:
    """Return the text of a file of settings.

    Raises:
        ConfigError: The file can't be read, or is not UTF-8.
    """
    try:
        return read_bounded(path, _MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        hint = similar_paths(path, (".yaml", ".yml"))
        raise ConfigError(
            f"there is no file {path}{hint}: give the path of a YAML file of settings, or leave -c"
            " out"
        ) from None
    except OSError as error:
        hint = ""
        if path.is_dir():
            found = [name for name in _SETTINGS_FILES if (path / name).is_file()]
            hint = f"; give a file, such as {path / (found or _SETTINGS_FILES)[0]}"
        raise ConfigError(f"the settings in {path} can't be read: {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8: save it as UTF-8") from None


def _about_yaml(path: Path, text: str, error: Exception) -> str:
    """Return what is wrong with a file that is not YAML, and how to write the line."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", ""))
    if mark is not None and "\\t" in problem:
        return f"{path}:{mark.line + 1}: YAML allows no tabs here: use spaces"

    # The parser stops in the line of the mistake, or in the one below it.
    if mark is not None and ("':'" in problem or "mapping values" in problem):
        above = text.splitlines()[: mark.line + 1]
        if found := _line_without_colon(path, "\n".join(above)):
            return found
        line = f"{path}:{mark.line + 1}: {_shown_line(above[-1])}"
        quotes = "put quotes around a value with a colon"
        if "mapping values" in problem:
            indented = above[-1].startswith(" ")
            spaces = "begin the line without spaces if it is a setting, or " if indented else ""
            return f"{line} can't be read: {spaces}{quotes}"
    reason = " ".join(str(error).split())[:300]
    return f"{path} is not YAML: {reason}"


def _line_without_colon(path: Path, text: str) -> str:
    """Return how to write the first line that lacks its colon; "" if none does."""
    for number, line in enumerate(text.splitlines(), 1):
        written, *_ = line.split(" #")
        has_colon = ": " in written or written.rstrip().endswith(":")
        found = None if has_colon else _NO_COLON.fullmatch(written.rstrip())
        if found is not None:
            return (
                f"{path}:{number}: {_shown_line(line)} is not a setting, which has a colon and a"
                f" space after its name: write {found['name']}: {found['value']:.{_LONGEST_SHOWN}}"
            )
    return ""


def _shown_line(line: str) -> str:
    """Return a line of a file for a message."""
    return f"{line.strip()!r:.{_LONGEST_SHOWN}}"


def _underscored(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with _ for -, because flags are copied into files.

    Raises:
        ConfigError: A setting is written in both ways.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        written = name.replace("-", "_")
        if written in found:
            raise ConfigError(f"{path}: {written} is given twice, also as {name}")
        found[written] = value
    return found


def check_settings_file(path: Path) -> None:
    """Check that a file given for settings is not of another kind.

    Raises:
        ConfigError: It is an adapter's or a model's config, weights, or rows.
    """
    folder = path.parent
    if path.name == "adapter_config.json":
        advice = f"an adapter's config: to start from it, give --resume-adapter-file {folder}"
    elif path.name == "config.json":
        advice = f"a model's config: give the model as --model {folder}"
    elif path.suffix.lower() in _WEIGHTS:
        advice = "weights: a model goes to --model, an adapter to --resume-adapter-file"
    elif path.suffix.lower() in _ROWS:
        advice = "rows or a history: rows go to --data"
    else:
        return
    raise ConfigError(f"{path} holds no settings, but {advice}; -c takes a YAML file")


def _depth(line: str) -> int:
    """Return the nesting depth of brackets in a line; prompts may contain brackets, e.g. JSON."""

    def follow(depth: int, character: str) -> int:
        if character in "[{":
            return depth + 1
        if character in "]}":
            return max(0, depth - 1)
        return depth

    return max(accumulate(line, follow, initial=0))


def _is_flat(value: Any) -> bool:
    """Return whether a value is a scalar, or a list or mapping of scalars."""
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list):
        items = value
    else:
        return True
    return all(not isinstance(item, dict | list) for item in items)
