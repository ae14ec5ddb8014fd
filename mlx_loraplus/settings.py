"""Convert flat settings, or a YAML file of them, to a config and back.

Defaults are filled in, and all problems are reported together.
"""

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
    PREFERENCE_SHARE,
    RATES,
    AdapterConfig,
    FuseConfig,
    OptimizerConfig,
    SweepConfig,
    TrainConfig,
)
from .errors import ConfigError, counted, join_problems, nearest
from .files import read_bounded
from .foreign_names import NESTED, foreign_hint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MAX_BYTES = 1 << 16  # of a YAML file
_MAX_DEPTH = 20  # nested brackets in a line; PyYAML takes seconds for more
_SHORT_RUN = 50  # steps; a shorter run reports each step
_MAX_NAME = 64  # characters of an unknown name to repeat

Part = TypeVar("Part", AdapterConfig, OptimizerConfig)
Config = TypeVar("Config", bound="DataclassInstance")


class _UniqueLoader(yaml.SafeLoader):
    """The safe loader, which refuses a name that stands twice instead of using the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice[0]} is given twice, in the block of line {line}")
        return super().construct_mapping(node, deep)


def configure(kind: type[Config], settings: Mapping[str, Any], *, whole: bool = True) -> Config:
    """Make a config from flat settings, with defaults filled in.

    Args:
        kind: TrainConfig or the config of another command.
        settings: Setting name to value, e.g. ``{"lr_ratio": 16, "rank": 8}``.
        whole: False if more settings may follow. Then checks and defaults that depend on several
            settings are skipped.

    Raises:
        ConfigError: Names that are no settings, or values that are not allowed; all of them are
            reported together.
    """
    # Unknown names are reported together with the values that are not allowed.
    homes = _homes(kind)
    settings = current_names(settings)
    unknown = [
        f"{_shown(name)} is no setting{foreign_hint(name) or nearest(name, homes)}"
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

    config = _validated(kind, nested, unknown)
    conflicts = _conflicts(config) if whole else []
    if unknown or conflicts:
        raise ConfigError(join_problems(unknown + conflicts))

    # Defaults that depend on other settings.
    if not whole or not isinstance(config, TrainConfig):
        return config
    adapter = _fill_rank(config.adapter)
    rate = KINDS[adapter.adapter].rate or RATES[adapter.init]
    if config.objective.is_paired:
        rate *= PREFERENCE_SHARE
    optimizer = _fill_rates(config.optimizer, rate, KINDS[adapter.adapter].lr_ratio)
    return dataclasses.replace(config, adapter=adapter, optimizer=optimizer)


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
    part = _validated(type(config), dataclasses.asdict(config), [])
    if isinstance(part, OptimizerConfig):
        return _fill_rates(part, RATES["init1"], LR_RATIO)

    problems = _adapter_conflicts(part, settings_of(part))
    if problems:
        raise ConfigError(join_problems(problems))
    return _fill_rank(part)


def _validated(kind: type[Config], values: Mapping[str, Any], problems: Sequence[str]) -> Config:
    """Make a config whose values are all allowed.

    Raises:
        ConfigError: A value is not allowed; the message also lists the ``problems`` found earlier.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(join_problems([*problems, *_describe(error.errors())])) from None


def _fill_rank(config: AdapterConfig) -> AdapterConfig:
    if config.rank:
        return config
    return dataclasses.replace(config, rank=KINDS[config.adapter].rank)


def _fill_rates(
    config: OptimizerConfig, rate_at_one: float, default_ratio: float
) -> OptimizerConfig:
    """Fill in lambda and eta; ``rate_at_one`` is the default eta at lambda 1."""
    ratio = config.lr_ratio or default_ratio
    default = float(f"{rate_at_one / math.sqrt(ratio):.3g}")
    rate = config.learning_rate or default
    return dataclasses.replace(config, learning_rate=rate, lr_ratio=ratio)


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


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: The file can't be read, is not YAML, or holds something other than settings.
    """
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8")
        too_deep = any(_depth(line) > _MAX_DEPTH for line in text.split("\n"))
        settings = [] if too_deep else _UniqueLoader(text).get_single_data()
    except OSError as error:
        raise ConfigError(f"the settings in {path} can't be read: {error.strerror}") from None
    # PyYAML raises TypeError if a name is a list or another value that can't be a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} is not YAML: {reason}") from None

    if settings is None:  # an empty file
        return {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(f"{path} must hold settings, one `name: value` a line")

    # With references, a few bytes of YAML can describe nested values that are huge in memory.
    for name, value in settings.items():
        if not _is_flat(value) and name not in NESTED:
            raise ConfigError(
                f"{path}: {name!r:.64} must be one value, a list of values, or names with values"
            )
    return settings


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


def _describe(details: Iterable[Any]) -> list[str]:
    """Return one line for each value that pydantic refused.

    For a setting that may be a number or a word, pydantic reports two errors; they become one line.
    """
    allowed: dict[tuple[str, str], list[str]] = {}
    for detail in details:
        # The location ends with the setting's name. For unions, pydantic's own labels follow it.
        names = [part for part in detail["loc"] if isinstance(part, str)]
        names = [part for part in names if not part.startswith(("constrained", "literal"))]
        message = detail["msg"].removeprefix("Input ").partition(", unable")[0]
        message = message.replace("should be", "must be")

        key = (names[-1], f"{detail['input']!r:.80}")
        allowed.setdefault(key, []).append(message)

    lines: list[str] = []
    for (name, value), (first, *others) in allowed.items():
        alternatives = [first, *(other.removeprefix("must be ") for other in others)]
        lines.append(f"{name} {' or '.join(alternatives)}, not {value}")
    return lines


def _shown(name: str) -> str:
    """Return a name for a message; shortened and quoted if it is long or can't be printed."""
    if len(name) <= _MAX_NAME and name.isprintable():
        return name
    return f"{name!r:.{_MAX_NAME}}"


def _conflicts(config: Any) -> list[str]:
    """Return the problems of settings that are valid individually but not together.

    These checks are not validators of the config, because the settings of a YAML file may conflict
    until the flags override them.
    """
    if isinstance(config, FuseConfig):
        if config.dequantize and config.bits != "auto":
            return ["dequantize and bits exclude each other: give one of them"]
        return []
    if isinstance(config, SweepConfig) and config.adapter.adapter == "full":
        return [
            "a sweep searches rates for A and B, which full does not have: use adapter lora, or"
            " train with several learning_rate and compare the runs with mlx_loraplus.compare"
        ]
    if not isinstance(config, TrainConfig):
        return []

    problems: list[str] = []
    if config.iters is not None and config.epochs is not None:
        problems.append("iters and epochs both say how long to train: give one of them")
    if config.resume and config.overwrite:
        problems.append("resume continues the run that overwrite removes: give one of them")
    if config.optimizer.optimizer == "adam" and config.optimizer.weight_decay > 0:
        problems.append("adam has no weight_decay: use adamw, which is adam with it")
    problems += _adapter_conflicts(config.adapter, settings_of(config))

    problems += _objective_conflicts(config)

    weights, sets = len(config.data.data_weights), len(config.data.data)
    if weights not in (0, sets):
        problems.append(f"data_weights has {weights} values for {counted(sets, 'data set')}")
    return problems


def _objective_conflicts(config: TrainConfig) -> list[str]:
    """Return which settings the objective does not accept."""
    given, objective = config.objective, config.objective.objective
    problems: list[str] = []

    # Settings of other objectives.
    if given.beta is not None and objective not in ("dpo", "ipo", "simpo"):
        problems.append(f"beta is for objective dpo, ipo and simpo, not {objective}")
    if given.label_smoothing and objective != "dpo":
        problems.append(f"label_smoothing is for objective dpo, not {objective}")
    if given.simpo_gamma is not None and objective != "simpo":
        problems.append(f"simpo_gamma is for objective simpo, not {objective}")
    if given.orpo_lambda is not None and objective != "orpo":
        problems.append(f"orpo_lambda is for objective orpo, not {objective}")
    if given.reference != "base" and not given.has_reference:
        problems.append(f"reference is for objective dpo and ipo, not {objective}")
    if not given.is_paired:
        return problems

    # Settings that have no meaning for pairs, or are not supported for them.
    refused = {
        "pack": config.data.pack,
        "data_weights": config.data.data_weights,
        "train_on everything": config.data.train_on == "everything",
        "on_long split": config.data.on_long == "split",
        "parallel tensor": config.parallel == "tensor",
    }
    for name, is_given in refused.items():
        if is_given:
            problems.append(f"{name} is for objective sft, not {objective}: leave it out")
    return problems


def _adapter_conflicts(config: AdapterConfig, settings: Mapping[str, Any]) -> list[str]:
    """Return which settings the adapter's kind or init does not accept.

    Args:
        config: The adapter.
        settings: The adapter's settings or all settings of its run. Those that differ from the
            default count as given.
    """
    defaults = settings_of(TrainConfig())
    given = {name for name, value in settings.items() if value != defaults[name]}
    init = config.init

    # config.KINDS lists which settings each kind accepts and refuses.
    problems: list[str] = []
    own = KINDS[config.adapter].own
    for other, facts in KINDS.items():
        foreign = given.intersection(facts.own).difference(own)
        problems += [f"{name} is for adapter {other}, not {config.adapter}" for name in foreign]
    for names, message in KINDS[config.adapter].refused.items():
        refused = [name for name in names if name in given]
        if refused:
            problems.append(message.format(names=", ".join(refused), **settings))

    # Without A and B there is no ratio between their rates, and only what trains has a rate.
    if config.adapter == "full":
        if settings.get("lr_ratio") not in (None, 1.0):
            problems.append(
                f"full has no B, so lr_ratio can't be {settings['lr_ratio']:g}: leave it out, or"
                " train LoRA+ with adapter lora"
            )
        if config.num_layers != -1 and "embedding_learning_rate" in given:
            problems.append(
                "embedding_learning_rate has no effect with full and num_layers"
                f" {config.num_layers}, because no embedding trains: leave one of them out"
            )
        return problems

    # Settings that need an init.
    approximates = init in ("pissa", "loftq")
    if config.quantize is not None and not approximates:
        problems.append(
            f"quantize is for init pissa and loftq, not {init}: load a quantized model instead"
        )
    if "quantize_group_size" in given and (config.quantization or {}).get("mode") != "affine":
        problems.append(
            "quantize_group_size is for init pissa or loftq with quantize as a number of bits"
        )
    if "loftq_iters" in given and init != "loftq":
        problems.append(f"loftq_iters is for init loftq, not {init}")
    if "svd" in given and not approximates:
        problems.append(f"svd is for init pissa and loftq, not {init}")
    return problems
