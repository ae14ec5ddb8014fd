"""From flat settings to a config and back: defaults filled in, every problem told, all of them together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic

from .config import LR_RATIO, RANKS, RATES, AdapterConfig, ExportConfig, FuseConfig, OptimizerConfig, RunConfig
from .errors import ConfigError, join_problems, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Part = TypeVar("Part", AdapterConfig, OptimizerConfig)
Config = TypeVar("Config", bound="DataclassInstance")


def configure(kind: type[Config], settings: Mapping[str, Any], *, whole: bool = True) -> Config:
    """Make a config of ``kind`` from flat settings, defaults filled in, all problems told together.

    Args:
        kind: RunConfig or another command's.
        settings: Setting name to value, e.g. ``{"lr_ratio": 16, "rank": 8}``.
        whole: False where others may still be added: what depends on several settings is left as it is.

    Raises:
        ConfigError: A name that is no setting, or a value that is not allowed.
    """
    homes = _homes(kind)
    problems = [f"{_shown(name)} is no setting{nearest(name, homes)}" for name in settings if name not in homes]
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if name in homes:
            part = nested.setdefault(homes[name], {}) if homes[name] else nested
            part[name] = value
    try:
        config = pydantic.TypeAdapter(kind).validate_python(nested)
    except pydantic.ValidationError as error:
        problems += [_describe(detail) for detail in error.errors()]
        raise ConfigError(join_problems(problems)) from None
    if whole:
        problems += _conflicts(config)
    if problems:
        raise ConfigError(join_problems(problems))
    return _filled(config) if whole and isinstance(config, RunConfig) else config  # pyright: ignore[reportReturnType]


def checked(config: Part) -> Part:
    """Return a part made by hand, e.g. ``OptimizerConfig(lr_ratio=4)``, if its values are allowed, defaults filled in.

    Raises:
        ConfigError: They are not.
    """
    try:
        part: Any = pydantic.TypeAdapter(type(config)).validate_python(dataclasses.asdict(config))
    except pydantic.ValidationError as error:
        raise ConfigError(join_problems([_describe(detail) for detail in error.errors()])) from None
    if not isinstance(part, AdapterConfig):
        return _fill_rates(part, "init1")  # pyright: ignore[reportReturnType]
    if problems := _adapter_conflicts(part):
        raise ConfigError(join_problems(problems))
    return _fill_rank(part)  # pyright: ignore[reportReturnType]


def _filled(config: RunConfig) -> RunConfig:
    """Fill in what depends on the adapter and its init."""
    adapter = config.adapter
    rates = adapter.adapter if adapter.adapter in RATES else adapter.init
    return dataclasses.replace(config, adapter=_fill_rank(adapter), optimizer=_fill_rates(config.optimizer, rates))


def _fill_rank(config: AdapterConfig) -> AdapterConfig:
    return config if config.rank else dataclasses.replace(config, rank=RANKS[config.adapter])


def _fill_rates(config: OptimizerConfig, key: str) -> OptimizerConfig:
    ratio = config.lr_ratio or LR_RATIO
    rate = config.learning_rate or float(f"{RATES[key] / math.sqrt(ratio):.3g}")
    return dataclasses.replace(config, learning_rate=rate, lr_ratio=ratio)


def settings_of(config: "DataclassInstance") -> dict[str, Any]:
    """Return a config's settings as one flat dictionary, the inverse of ``configure``."""
    settings: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        settings.update(value if isinstance(value, dict) else {name: value})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def setting_names(kind: type) -> list[str]:
    """Return the names of a config's settings, those of its parts among them."""
    return list(_homes(kind))


def _homes(kind: type) -> dict[str, str]:
    """Map each setting's name to the part that holds it, "" for the config itself."""
    homes: dict[str, str] = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.default_factory):
            homes |= dict.fromkeys((part.name for part in dataclasses.fields(item.default_factory)), item.name)
        else:
            homes[item.name] = ""
    return homes


def _describe(detail: Any) -> str:
    name = [
        part for part in detail["loc"] if isinstance(part, str) and not part.startswith(("constrained", "literal"))
    ][-1]
    message = detail["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{name} {message}, not {detail['input']!r:.80}"


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
        if config.optimizer.magnitude_lr_ratio != 1 and config.adapter.adapter != "dora":
            problems.append("magnitude_lr_ratio is for adapter dora: only its magnitudes have that rate")
        problems += _adapter_conflicts(config.adapter)
        weights, sets = len(config.data.data_weights), len(config.data.data)
        if weights not in (0, sets):
            problems.append(f"data_weights has {weights} values for {sets} data sets")
    if isinstance(config, FuseConfig) and config.dequantize and config.bits != "auto":
        problems.append("dequantize and bits exclude each other: give one of them")
    if isinstance(config, ExportConfig):
        if (config.to is None) == (config.from_ is None):
            problems.append("give one of --to (peft, gguf, hub) and --from (peft, gguf)")
        if config.whole is not None and config.to != "gguf":
            problems.append("whole is for --to gguf")
        if bool(config.repo_id) != (config.to == "hub"):
            problems.append("--to hub needs a repo_id, owner/name, and nothing else has one")
    return problems


def _adapter_conflicts(config: AdapterConfig) -> list[str]:
    problems = []
    if config.num_layers < -1 or config.num_layers == 0:
        problems.append(f"num_layers must be -1 (all blocks) or at least 1, not {config.num_layers}")
    if config.adapter == "vera":
        if config.init != "init1":
            problems.append(f"vera has no init {config.init}: its A and B stay random; use adapter lora or dora")
        if config.rslora or config.alpha != AdapterConfig.alpha:
            problems.append("vera has no scale: leave alpha and rslora out")
    if config.quantize is not None and config.init not in ("pissa", "loftq"):
        problems.append(f"quantize is for init pissa and loftq, not {config.init}: load a quantized model instead")
    if config.quantize_group_size != AdapterConfig.quantize_group_size and (
        config.quantization is None or config.quantization["mode"] != "affine"
    ):
        problems.append("quantize_group_size is for init pissa or loftq with quantize as a number of bits")
    if config.loftq_iters != AdapterConfig.loftq_iters and config.init != "loftq":
        problems.append(f"loftq_iters is for init loftq, not {config.init}")
    if config.svd != AdapterConfig.svd and config.init not in ("pissa", "loftq"):
        problems.append(f"svd is for init pissa and loftq, not {config.init}")
    return problems
