"""The types of settings: what values they accept, and the forms that they convert."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from .errors import counted, nearest
from .spelling import flag_of
from .userpaths import looks_like_file, user_path
from .value_hints import fraction_hint, number_hint

LARGEST_ALPHA = 1e9  # larger scales overflow float32
_LIMIT = 1 << 63  # MLX's arrays and random generators accept integers below this


def find_booleans(values: Mapping[str, Any], config: Any) -> list[str]:
    """Return one line for each number that is given as True or False, which pydantic accepts."""
    problems: list[str] = []
    for name, value in values.items():
        found = getattr(config, name)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(found):
            problems += find_booleans(value, found)
            continue

        given = value if isinstance(value, list | tuple) else [value]
        made = found if isinstance(found, tuple) else [found]
        if any(type(item) is bool for item in given) and type(made[0]) in (int, float):
            problems.append(f"{flag_of(name)} must be a number, not {value!r:.80}")
    return problems


def describe_refused(details: Iterable[Any]) -> list[str]:
    """Return one line for each value that pydantic refused, with the settings as flags.

    For a setting that may be a number or a word, pydantic reports two errors; they become one line.
    """
    # Setting and value → pydantic's messages in our words; and setting → how to write its value.
    allowed: dict[tuple[str, str], list[str]] = {}
    hints: dict[str, str] = {}
    for detail in sorted(details, key=lambda detail: detail["type"] == "too_short"):
        # The location ends with the setting's name. For unions, pydantic's own labels follow it.
        names = [part for part in detail["loc"] if isinstance(part, str)]
        names = [part for part in names if not part.startswith(("constrained", "literal"))]
        if detail["type"] == "too_short" and any(name == names[-1] for name, _ in allowed):
            continue  # a value in the list was refused, which is reported itself
        message = detail["msg"].removeprefix("Input ").partition(", unable")[0]
        message = re.sub("^(Tuple|Value) should", "must", message.partition(" after ")[0])
        message = message.replace("should be", "must be").replace("valid tuple", "list of values")
        message = message.partition(", got ")[0].replace("a valid boolean", "true or false")

        # Repeat the value only if it is simple.
        given = detail["input"]
        is_simple = given is None or type(given) in (str, bool, int, float, list, tuple, dict)
        key = (names[-1], f"{given!r:.80}" if is_simple else f"a {type(given).__name__}")
        if detail["type"] == "missing":  # one error for each value that a pair lacks
            place = detail["loc"][-1]
            needed = counted(place + 1, "value") if isinstance(place, int) else "a value"
            allowed[key] = [f"must have {needed}"]
        else:
            allowed.setdefault(key, []).append(message)
        if detail["type"] == "less_than":
            hints[names[-1]] = fraction_hint(detail["input"], detail["ctx"]["lt"])

    lines: list[str] = []
    for (name, value), (first, *others) in allowed.items():
        alternatives = [first, *(other.removeprefix("must be ") for other in others)]
        hint = hints.get(name, "")
        if "valid number" in first or "valid integer" in first:
            hint = number_hint(name, value.strip("'"), whole="integer" in first)
        words = re.findall(r"'([^']+)'", first) if value.startswith("'") else []
        hint = hint or nearest(value.strip("'"), words)
        lines.append(f"{flag_of(name)} {' or '.join(alternatives)}, not {value}{hint}")
    return lines


def _as_names(value: Any) -> Any:
    """Accept one name without a list, and null for no names; pydantic reports a mapping."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str | os.PathLike):
        return (value,)
    return value or ()


def _as_columns(value: Any) -> Any:
    """Accept a mapping for name=column pairs."""
    if isinstance(value, Mapping):
        columns: list[Any] = []
        for name, column in value.items():
            columns.append(f"{name}={column}" if isinstance(column, str | int) else column)
        return tuple(columns)
    return _as_names(value)


_NO_WORD = str.maketrans("[]()'\",", " " * 7)


def _as_words(value: Any) -> Any:
    """Accept words in one text, as in q_proj,v_proj, and null or none for no words."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value or ()

    words: list[Any] = []
    for item in value:
        # Brackets and quotes remain from a list in Python's notation.
        words += item.translate(_NO_WORD).split() if isinstance(item, str) else [item]
    return () if words == ["none"] else tuple(words)


def _as_path(value: Any) -> Any:
    """Expand ``~`` in a path; pydantic reports values of other types."""
    if not isinstance(value, str | os.PathLike):
        return value

    try:
        return user_path(value)
    except ValueError as problem:
        raise PydanticCustomError("path", "{problem}", {"problem": str(problem)}) from None


def _as_switch(value: Any) -> Any:
    """Accept booleans: YAML reads on and off as booleans, and mlx-lm's grad_checkpoint has them."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


def _as_mode(value: Any) -> Any:
    """Accept a number of bits as an integer, as YAML reads it without quotes."""
    return str(value) if isinstance(value, int) else value


def _check_text(text: str) -> str:
    """Refuse the name of a text file."""
    if looks_like_file(text):
        raise PydanticCustomError(
            "text", 'must be the text itself, which "$(cat FILE)" gives in a shell'
        )
    return text


def _check_layers(value: int) -> int:
    """Refuse 0 and numbers below -1."""
    if value < -1 or value == 0:
        raise PydanticCustomError("num_layers", "must be -1 (all blocks) or at least 1")
    return value


# Types of settings
NumLayers = Annotated[int, AfterValidator(_check_layers)]
Warmup = Annotated[int, Field(ge=0, lt=_LIMIT)]
Count = Annotated[int, Field(ge=1, lt=_LIMIT)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Alpha = Annotated[float, Field(gt=0, le=LARGEST_ALPHA, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=_LIMIT)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)]
Columns = Annotated[tuple[str, ...], BeforeValidator(_as_columns)]
Prompt = Annotated[str, AfterValidator(_check_text)]
Prompts = Annotated[tuple[Prompt, ...], BeforeValidator(_as_names)]
Words = Annotated[tuple[str, ...], BeforeValidator(_as_words)]
UserPath = Annotated[str, BeforeValidator(_as_path)]
"""A path, or a name that may be a path; the only place where ~ becomes the home folder."""
UserPaths = Annotated[tuple[UserPath, ...], BeforeValidator(_as_names)]

AdapterKind = Literal["lora", "dora", "vera", "full"]
Quantize = Annotated[
    Literal["2", "3", "4", "5", "6", "8", "mxfp4", "nvfp4", "mxfp8"] | None,
    BeforeValidator(_as_mode),
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_as_words)]
Written = Literal["peft", "gguf", "hub"]
Read = Literal["peft", "gguf"]
Merged = Literal["f16", "q8_0", "q5_1", "q4_1", "f32"]
if TYPE_CHECKING:  # auto is resolved before any code reads these settings
    Rows = Any
    Length = Any
    Rate = Any
else:
    Rows, Length = Count | Literal["auto"], Annotated[int, Field(ge=2)] | Literal["auto"]
    Rate = Positive | Literal["auto"]
