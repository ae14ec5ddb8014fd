"""Convert flat settings to a config and back.

Defaults are filled in, and all problems are reported together.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic

from .command_config import CONFIGS
from .config import (
    KINDS,
    OBJECTIVE_RATE_FACTORS,
    OLD_NAMES,
    RATES,
    AdapterConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from .conflicts import adapter_conflicts, find_conflicts
from .errors import ConfigError, join_problems, nearest, nearest_names
from .foreign_names import FOREIGN_NAMES, OTHER_WORDS, foreign_hint, meant_setting
from .setting_types import describe_refused, find_booleans
from .spelling import in_names

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The flags of ``train`` that are not settings
TRAIN_FLAGS = ("launch", "list_models", "dry_run", "test", "open", "log_format", "verbosity")

_SHORT_RUN = 50  # steps; a shorter run reports each step
_MAX_NAME = 64  # characters of an unknown name to repeat
_ALMOST_EQUAL = 0.8  # the least similarity of a misspelled flag of ``train``

_SYSTEM = "the rows hold system prompts, in a field system or in a message with the role system"
_IN_ROWS = {
    "system": _SYSTEM,
    "system_prompt": _SYSTEM,
    "tools": "the rows hold it, in a field tools",
}
"""Names that a command for training does not have → where their content is."""

Part = TypeVar("Part", AdapterConfig, OptimizerConfig)
Config = TypeVar("Config", bound="DataclassInstance")

_validator = cache(pydantic.TypeAdapter)  # making one takes 20 times longer than using it


def configure(
    kind: type[Config],
    settings: Mapping[str, Any],
    *,
    whole: bool = True,
    flags: Collection[str] = (),
) -> Config:
    """Make a config from flat settings, with defaults filled in.

    Args:
        kind: TrainConfig or the config of another command.
        settings: Setting name to value, e.g. ``{"lr_ratio": 16, "rank": 8}``.
        whole: False if more settings may follow. Then checks and defaults that depend on several
            settings are skipped.
        flags: The settings, here or in other programs, that messages write as flags. The others
            are written as names.

    Raises:
        ConfigError: Names that are not settings, or values that are not allowed; all of them are
            reported together.
    """
    # Unknown names are reported together with the values that are not allowed.
    homes = _homes(kind)
    settings = current_names(settings)
    unknown = [
        f"{_shown(name)} is not a setting{_hint(name, homes)}"
        for name in settings
        if name not in homes
    ]

    # The settings of each part go into a separate dictionary.
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in homes:
            continue
        home = homes[name]
        part = nested.setdefault(home, {}) if home else nested
        part[name] = value

    config, problems = _validated(kind, nested)
    if config is not None and whole:
        problems += find_conflicts(config, settings_of(config), settings_of(TrainConfig()))
    named = {*homes, *FOREIGN_NAMES}.difference(flags)
    problems = [in_names(problem, named) for problem in [*unknown, *problems]]
    if config is None or problems:
        raise ConfigError(join_problems(problems))

    # Defaults that depend on other settings.
    if not whole or not isinstance(config, TrainConfig):
        return config
    adapter = _fill_rank(config.adapter)
    config = dataclasses.replace(config, adapter=adapter)
    optimizer = fill_rates(config.optimizer, adapter, config.objective)
    return dataclasses.replace(config, optimizer=optimizer)


def default_rate(config: TrainConfig) -> float:
    """Return the default eta for a run's adapter, objective and lambda."""
    return _default_rate(config.optimizer, config.adapter, config.objective)


def replace_auto_rate(config: TrainConfig) -> TrainConfig:
    """Return a run's settings with the default learning rate if it is auto."""
    if config.optimizer.learning_rate != "auto":
        return config
    optimizer = dataclasses.replace(config.optimizer, learning_rate=default_rate(config))
    return dataclasses.replace(config, optimizer=optimizer)


def _hint(name: str, known: Collection[str]) -> str:
    """Return what is probably meant by a name that is not a setting, in parentheses."""
    meant = meant_setting(name, [*known, *TRAIN_FLAGS])
    if not meant and not nearest_names(name, known, _ALMOST_EQUAL):
        meant = next(iter(nearest_names(name, TRAIN_FLAGS, _ALMOST_EQUAL)), "")
    if name in TRAIN_FLAGS or meant in TRAIN_FLAGS:
        flag = "it" if name in TRAIN_FLAGS else meant
        return f" ({flag} is a flag of the command mlx_loraplus.train alone: leave it out)"
    if meant:
        return f" (did you mean {meant!r}?)"
    if where := in_rows(name, known):
        return f": {where}"
    owners = [command for command, kind in CONFIGS.items() if name in _homes(kind)]
    if owners:
        return f" (a setting of mlx_loraplus.{owners[0]})"
    # A word that means a setting of another command is not like any setting here.
    return foreign_hint(name) or ("" if name in OTHER_WORDS else nearest(name, known))


def in_rows(name: str, known: Collection[str]) -> str:
    """Return where the rows hold something that is no setting of training; "" for other names."""
    if "data" not in known or name not in _IN_ROWS:
        return ""
    return _IN_ROWS[name]


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under their present names; see ``config.OLD_NAMES``.

    Raises:
        ConfigError: A setting is given under both of its names.
    """
    for old in settings:
        if OLD_NAMES.get(old) in settings:
            raise ConfigError(f"{old} is the old name of {OLD_NAMES[old]}: give one of them")
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


def checked(config: Part) -> Part:
    """Validate a part made by hand, e.g. ``OptimizerConfig(lr_ratio=4)``, and fill in defaults.

    Raises:
        ConfigError: A value is not allowed.
    """
    part, problems = _validated(type(config), dataclasses.asdict(config))
    if isinstance(part, AdapterConfig):
        problems += adapter_conflicts(part, settings_of(part), settings_of(TrainConfig()))
    if part is None or problems:
        names = _homes(TrainConfig)
        raise ConfigError(join_problems([in_names(problem, names) for problem in problems]))
    if isinstance(part, OptimizerConfig):
        return fill_rates(part, AdapterConfig())
    return _fill_rank(part)


def _validated(kind: type[Config], values: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Return a config of these values, or the problems of those that are not allowed."""
    try:
        config: Config = _validator(kind).validate_python(values)
    except pydantic.ValidationError as error:
        return None, describe_refused(error.errors())
    booleans = find_booleans(values, config)
    return (None if booleans else config), booleans


def _fill_rank(config: AdapterConfig) -> AdapterConfig:
    if config.rank:
        return config
    return dataclasses.replace(config, rank=KINDS[config.adapter].rank)


def fill_rates(
    config: OptimizerConfig,
    adapter: AdapterConfig,
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008  it is frozen
) -> OptimizerConfig:
    """Fill in lambda and eta, whose defaults depend on the adapter and the objective."""
    ratio = config.lr_ratio or KINDS[adapter.adapter].lr_ratio
    rate = config.learning_rate or _default_rate(config, adapter, objective)
    return dataclasses.replace(config, learning_rate=rate, lr_ratio=ratio)


def _default_rate(
    config: OptimizerConfig, adapter: AdapterConfig, objective: ObjectiveConfig
) -> float:
    """Return the default eta, c / sqrt(lambda)."""
    kind = KINDS[adapter.adapter]
    rate_at_one = kind.rate or RATES[adapter.init]
    rate_at_one *= OBJECTIVE_RATE_FACTORS.get(objective.objective, 1.0)
    return _rounded(rate_at_one / math.sqrt(config.lr_ratio or kind.lr_ratio))


def _rounded(rate: float) -> float:
    """Round a rate to the three digits that are shown."""
    return float(f"{rate:.3g}")


def fit_to_length(config: TrainConfig, steps: int) -> TrainConfig:
    """Return a run's settings with the defaults that depend on its number of steps filled in."""
    optimizer = fit_warmup(config.optimizer, steps)
    report = 1 if steps < _SHORT_RUN else 10
    validate = min(200, max(1, steps // 5))
    return dataclasses.replace(
        config,
        optimizer=optimizer,
        steps_per_report=config.steps_per_report or report,
        steps_per_eval=config.steps_per_eval or validate,
    )


def fit_warmup(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """Return the optimizer's settings with the default warm-up for a number of steps."""
    if config.warmup is not None:
        return config
    return dataclasses.replace(config, warmup=min(10, steps // 10))


def settings_of(config: "DataclassInstance") -> dict[str, Any]:
    """Return a config's settings as one flat dictionary, the inverse of ``configure``."""
    settings: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            settings.update(value)
        else:
            settings[name] = value

    # YAML and JSON have lists but no tuples.
    for name, value in settings.items():
        if isinstance(value, tuple):
            settings[name] = list(value)
    return settings


def setting_names(kind: type) -> list[str]:
    """Return the names of a config's settings, including those of its parts."""
    return list(_homes(kind))


def _homes(kind: type) -> dict[str, str]:
    """Map each setting's name to the part that holds it; "" is the config itself."""
    homes: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        part = field.default_factory
        if not dataclasses.is_dataclass(part):
            homes[field.name] = ""
            continue
        for inner in dataclasses.fields(part):
            homes[inner.name] = field.name
    return homes


def _shown(name: str) -> str:
    """Return a name for a message; shortened and quoted if it is long or can't be printed."""
    if len(name) <= _MAX_NAME and name.isprintable():
        return name
    return f"{name!r:.{_MAX_NAME}}"
