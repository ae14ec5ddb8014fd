"""The settings of a command that are taken from the adapter in ``resume_adapter_file``."""

from collections.abc import Collection, Sequence

from ..adapters.storage import adapter_folder
from ..adapters.stored_files import check_is_adapter, model_for
from ..config import TrainConfig
from ..errors import ConfigError
from ..inference.generate import load
from ..settings import configure, settings_of
from .starting_adapter import resolve_config


def with_adapters_model(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """Return the config with the model of the adapter that the run starts from, if none is given.

    The adapter is checked before any model is looked for.

    A resumed run has its own adapters, and the one that it started from may be gone.

    Args:
        config: The settings of the command.
        given: The names of those that were given.

    Raises:
        AdapterError: There is no adapter, it names no model, or its model is gone.
    """
    start = config.resume_adapter_file
    if start is None or config.resume:
        return config
    check_is_adapter(adapter_folder(start))
    if "model" in given:
        return config
    return configure(TrainConfig, settings_of(config) | {"model": model_for(None, start)})


def plan_from_adapter(
    config: TrainConfig, given: Collection[str], families: Sequence[str]
) -> TrainConfig:
    """Return the config of a plan, with the settings of the adapter that the run starts from.

    Args:
        config: The settings of the command.
        given: The names of those that were given.
        families: The families of models to plan for.

    Raises:
        ModelError: The model can't be loaded.
        ConfigError: The plan is for several models; or as for ``resolve_config``.
        AdapterError: As for ``resolve_config``.
    """
    if config.resume_adapter_file is None or config.resume:
        return config
    if families:
        raise ConfigError(
            f"an adapter belongs to one model: leave out {' '.join(families)}, or"
            " --resume-adapter-file"
        )

    config = with_adapters_model(config, given)
    names = {"model", *given}
    settings = {name: value for name, value in settings_of(config).items() if name in names}
    model, _ = load(config.model)
    return resolve_config(model, settings)
