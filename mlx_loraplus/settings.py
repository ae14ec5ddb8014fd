"""From flat settings, or a YAML file of them, to a config and back: defaults filled in, all problems told together."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic
import yaml

from .config import (
    KINDS,
    LR_RATIO,
    OLD_NAMES,
    RATES,
    AdapterConfig,
    FuseConfig,
    OptimizerConfig,
    RunConfig,
)
from .errors import ConfigError, join_problems, nearest
from .files import read_bounded

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Part = TypeVar("Part", AdapterConfig, OptimizerConfig)
Config = TypeVar("Config", bound="DataclassInstance")


def configure(kind: type[Config], settings: Mapping[str, Any], *, whole: bool = True) -> Config:
    """Make a config of ``kind`` from flat settings, defaults filled in, all problems told together.

    Args:
        kind: RunConfig or another command's.
        settings: Setting name to value, e.g. ``{"lr_ratio": 16, "rank": 8}``.
        whole: False where others may still be added: what depends on several settings is left as it
            is.

    Raises:
        ConfigError: A name that is no setting, or a value that is not allowed.
    """
    homes = _homes(kind)
    settings = current_names(settings)
    problems = [
        f"{_shown(name)} is no setting{nearest(name, homes)}"
        for name in settings
        if name not in homes
    ]
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if name in homes:
            part = nested.setdefault(homes[name], {}) if homes[name] else nested
            part[name] = value
    config = _validated(kind, nested, problems)
    if problems := problems + (_conflicts(config) if whole else []):
        raise ConfigError(join_problems(problems))
    if not whole or not isinstance(config, RunConfig):
        return config
    adapter = _fill_rank(config.adapter)
    optimizer = _fill_rates(config.optimizer, KINDS[adapter.adapter].rate or RATES[adapter.init])
    return dataclasses.replace(config, adapter=adapter, optimizer=optimizer)


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under their present names; see ``config.OLD_NAMES``.

    Raises:
        ConfigError: A setting is given under both of its names.
    """
    both = [old for old in settings if OLD_NAMES.get(old) in settings]
    if both:
        raise ConfigError(f"{both[0]} is the old name of {OLD_NAMES[both[0]]}: give one of them")
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


def checked(config: Part) -> Part:
    """Return a part made by hand, e.g. ``OptimizerConfig(lr_ratio=4)``, if its values are allowed, defaults filled in.

    Raises:
        ConfigError: They are not.
    """
    part = _validated(type(config), dataclasses.asdict(config), [])
    if isinstance(part, OptimizerConfig):
        return _fill_rates(part, RATES["init1"])
    if problems := _adapter_conflicts(part, settings_of(part)):
        raise ConfigError(join_problems(problems))
    return _fill_rank(part)


def _validated(kind: type[Config], values: Mapping[str, Any], problems: Sequence[str]) -> Config:
    """Return a config whose every value is allowed, or refuse it with the ``problems`` there are already."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(join_problems([*problems, *_describe(error.errors())])) from None


def _fill_rank(config: AdapterConfig) -> AdapterConfig:
    return config if config.rank else dataclasses.replace(config, rank=KINDS[config.adapter].rank)


def _fill_rates(config: OptimizerConfig, at_one: float) -> OptimizerConfig:
    ratio = config.lr_ratio or LR_RATIO
    rate = config.learning_rate or float(f"{at_one / math.sqrt(ratio):.3g}")
    return dataclasses.replace(config, learning_rate=rate, lr_ratio=ratio)


def settings_of(config: "DataclassInstance") -> dict[str, Any]:
    """Return a config's settings as one flat dictionary, the inverse of ``configure``."""
    settings: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        settings.update(value if isinstance(value, dict) else {name: value})
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
    }


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: It can't be read, or holds something else.
    """
    try:
        text = read_bounded(path, 1 << 16).decode("utf-8")
        deep = any(_depth(line) > 20 for line in text.split("\n"))  # PyYAML takes seconds for these
        settings = [] if deep else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"the settings in {path} can't be read: {error.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # TypeError: a list or so as a name
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(settings, dict | None) or any(
        not isinstance(name, str) for name in settings or ()
    ):
        raise ConfigError(f"{path} must hold settings, one `name: value` a line")
    if nested := [name for name, value in (settings or {}).items() if not _is_plain(value)]:
        raise ConfigError(
            f"{path}: {nested[0]!r:.64} must be one value, a list of them, or names with values"
        )
    return settings or {}


def _depth(line: str) -> int:
    """Return how deep brackets nest in a line; prompts may hold some too, as JSON does."""
    return max(
        accumulate(line, lambda depth, c: max(0, depth + (c in "[{") - (c in "]}")), initial=0)
    )


def _is_plain(value: Any) -> bool:
    """Tell a value, a list or a mapping of them from deeper ones: YAML can write these small and mean them huge."""
    items = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    )
    return all(not isinstance(item, dict | list) for item in items)


def setting_names(kind: type) -> list[str]:
    """Return the names of a config's settings, those of its parts among them."""
    return list(_homes(kind))


def _homes(kind: type) -> dict[str, str]:
    """Map each setting's name to the part that holds it, "" for the config itself."""
    homes: dict[str, str] = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.default_factory):
            homes |= dict.fromkeys(
                (part.name for part in dataclasses.fields(item.default_factory)), item.name
            )
        else:
            homes[item.name] = ""
    return homes


def _describe(details: Iterable[Any]) -> list[str]:
    """Say what is wrong, a line a value: what a number or a word may be is told together."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for detail in details:
        names = (part for part in detail["loc"] if isinstance(part, str))
        *_, name = (part for part in names if not part.startswith(("constrained", "literal")))
        message = (
            detail["msg"]
            .removeprefix("Input ")
            .partition(", unable")[0]
            .replace("should be", "must be")
        )
        wanted.setdefault((name, f"{detail['input']!r:.80}"), []).append(message)
    return [
        f"{name} {' or '.join([first, *(other.removeprefix('must be ') for other in others)])}, not"
        f" {value}"
        for (name, value), (first, *others) in wanted.items()
    ]


def _shown(name: str) -> str:
    """Return a name as it is, or shortened and quoted where a stranger made it up."""
    return name if len(name) <= 64 and name.isprintable() else f"{name!r:.64}"


def _conflicts(config: Any) -> list[str]:
    problems = []
    if isinstance(config, RunConfig):
        if config.iters is not None and config.epochs is not None:
            problems.append("iters and epochs both say how long to train: give one of them")
        if config.resume and config.overwrite:
            problems.append("resume goes on with the run that overwrite removes: give one of them")
        if config.optimizer.optimizer == "adam" and config.optimizer.weight_decay > 0:
            problems.append("adam has no weight_decay: use adamw, which is adam with it")
        problems += _adapter_conflicts(config.adapter, settings_of(config))
        weights, sets = len(config.data.data_weights), len(config.data.data)
        if weights not in (0, sets):
            problems.append(f"data_weights has {weights} values for {sets} data sets")
    if isinstance(config, FuseConfig) and config.dequantize and config.bits != "auto":
        problems.append("dequantize and bits exclude each other: give one of them")
    return problems


def _adapter_conflicts(config: AdapterConfig, settings: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with an adapter's ``settings``, or a run's: also what is not for this kind."""
    kind, defaults = KINDS[config.adapter], settings_of(RunConfig())
    given = {name for name, value in settings.items() if value != defaults[name]}
    problems = [
        f"{name} is for adapter {other}, not {config.adapter}"
        for other, said in KINDS.items()
        for name in said.own
        if name in given and name not in kind.own
    ]
    problems += [
        told.format(**settings)
        for names, told in kind.refused.items()
        if not given.isdisjoint(names)
    ]
    if config.num_layers < -1 or config.num_layers == 0:
        problems.append(
            f"num_layers must be -1 (all blocks) or at least 1, not {config.num_layers}"
        )
    if config.quantize is not None and config.init not in ("pissa", "loftq"):
        problems.append(
            f"quantize is for init pissa and loftq, not {config.init}: load a quantized model"
            " instead"
        )
    if "quantize_group_size" in given and (config.quantization or {}).get("mode") != "affine":
        problems.append(
            "quantize_group_size is for init pissa or loftq with quantize as a number of bits"
        )
    if "loftq_iters" in given and config.init != "loftq":
        problems.append(f"loftq_iters is for init loftq, not {config.init}")
    if "svd" in given and config.init not in ("pissa", "loftq"):
        problems.append(f"svd is for init pissa and loftq, not {config.init}")
    return problems
