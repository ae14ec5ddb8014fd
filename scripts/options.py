"""Write mlx_loraplus/keyword_types.py, the types of the keywords, from the configs; with --check only compare it."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_loraplus import config as config_module
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.config import (
    AdapterConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

OPTIONS = Path(__file__).parent.parent / "mlx_loraplus" / "keyword_types.py"

HEADER = '''"""The keywords of the public functions with their types, so that editors complete and check them.

``scripts/options.py`` generates this file from ``config.py`` and ``command_config.py``, which
explain each setting.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

StrPath = str | os.PathLike[str]

RowsOrNames = StrPath | Iterable[Any]
"""What the setting ``data`` accepts in Python: names of data sets, or rows."""
'''

# Types whose validators accept more than the type itself
ACCEPTED = {
    config_module.UserPath: "StrPath",
    config_module.UserPaths: "StrPath | Sequence[StrPath]",
    config_module.Prompts: "str | Sequence[str] | Mapping[str, str]",
    config_module.Columns: "str | Sequence[str] | Mapping[str, str]",
    config_module.Switch: "bool | Literal['auto', 'on', 'off']",
}
# The settings that have an effect on scoring a model
SCORED = (
    "model", "data", "fields", "valid_split", "on_bad", "on_long", "train_on", "batch_size",
    "max_seq_length", "objective", "seed",
)  # fmt: skip
ACCEPTED_BY_NAME = {"data": "RowsOrNames", "quantize": "int | str | None"}


def options() -> str:
    """Return the text of keyword_types.py."""
    shared = _fields(AdapterConfig) | _fields(OptimizerConfig) | _fields(ObjectiveConfig)
    shared |= _fields(DataConfig)
    data = {"data": shared.pop("data")}
    run = _fields(TrainConfig)
    model = {"model": run.pop("model")}
    scored = {name: (model | data | shared | run)[name] for name in SCORED}

    classes = [
        _typed_dict("SharedOptions", "TypedDict, total=False", "Adapter, optimizer, objective and data.", shared),
        _typed_dict("RunOptions", "SharedOptions, total=False", "What the keywords of runs share.", run),
        _typed_dict("TrainOptions", "RunOptions, total=False", "Keywords of ``finetune``.", model | data),
        _typed_dict("EvaluateOptions", "TypedDict, total=False", "Keywords of ``evaluate``.", scored),
        _typed_dict("PreviewOptions", "RunOptions, total=False", "Keywords of ``preview``.", model),
        _typed_dict("PlanOptions", "RunOptions, total=False", "Keywords of ``plan_memory``.", data),
        _typed_dict(
            "SweepOptions", "SharedOptions, total=False", "Keywords of ``sweep_rates``.", _fields(SweepConfig) | data
        ),
    ]  # fmt: skip
    text = "\n\n".join([HEADER, *classes])
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(OPTIONS), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _fields(kind: type) -> dict[str, str]:
    """Return the names and types of a config's own settings."""
    hints = get_type_hints(kind, include_extras=True)
    fields = [
        field for field in dataclasses.fields(kind) if field.default_factory is dataclasses.MISSING
    ]
    return {
        field.name: ACCEPTED_BY_NAME.get(field.name) or _written(hints[field.name])
        for field in fields
    }


def _written(hint: Any) -> str:
    """Return the source of the type of what a setting of this type accepts."""
    if hint in ACCEPTED:
        return ACCEPTED[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _written(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_written(part) for part in parts)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if origin is tuple:
        return f"Sequence[{_written(parts[0])}]"
    return "None" if hint is type(None) else hint.__name__


def _typed_dict(name: str, bases: str, purpose: str, fields: dict[str, str]) -> str:
    """Return the source of a TypedDict."""
    lines = [f"class {name}({bases}):", f'    """{purpose}"""', ""]
    lines += [f"    {field}: {kind}" for field, kind in fields.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write keyword_types.py; with --check, only compare it."""
    text = options()
    if "--check" not in sys.argv:
        OPTIONS.write_text(text, encoding="utf-8")
    elif text != OPTIONS.read_text(encoding="utf-8"):
        sys.exit(
            "mlx_loraplus/keyword_types.py is out of date: run .venv/bin/python scripts/options.py"
        )


if __name__ == "__main__":
    main()
