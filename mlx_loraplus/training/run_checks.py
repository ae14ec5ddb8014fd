"""Checks of a run's settings against its model, data and processes, before training starts."""

from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..adapters.full import check_full, trains_weights
from ..adapters.stored_files import UNKNOWN_MODEL, check_names_model
from ..adapters.tensor_parallel import is_sharded
from ..adapters.trainable import check_no_foreign_adapters, find_adapters
from ..call_checks import shown
from ..config import DIVERGED, DIVERGED_INIT2, OptimizerConfig, TrainConfig
from ..data.dataset import Examples
from ..errors import AdapterError, ConfigError, OutputError, counted
from ..launching import check_batch_size
from ..models.find_model import original_of
from ..models.model_name_check import check_model_path
from ..models.save_model_folder import origin_of
from ..models.trainable_families import check_trainable
from ..runs.history import Run
from ..runs.progress import Log
from ..runs.run_folder import is_run
from ..runs.state import Progress
from .distributed import World


def check_model_name(name: str) -> None:
    """Check that the name of the model to train is that of a model that can be trained.

    Raises:
        ConfigError: It is the folder of an adapter.
        ModelError: It is a path with no model, or mlx-lm can't train models of its kind.
    """
    check_model_path(name)
    check_names_model(name)
    check_trainable(name)


def check_world(config: TrainConfig, model: nn.Module, world: World, log: Log) -> None:
    """Check that this number of processes can train with these settings.

    Raises:
        ConfigError: A batch has fewer examples than there are processes, or the model was not
            loaded for ``parallel``.
    """
    # How the model is loaded must match how it is trained.
    if is_sharded(model) != world.is_tensor_parallel:
        raise ConfigError(
            "--parallel tensor needs more than one process and a model from"
            " load(name, group=mx.distributed.init()), and such a model needs --parallel tensor"
        )
    if config.parallel == "tensor" and world.size == 1:
        log("note: --parallel tensor has no effect in one process: --launch 2 starts two")

    # Otherwise some processes would never have an example.
    check_batch_size(config.data.batch_size, world.data_shards)


def check_fresh(model: nn.Module, config: TrainConfig) -> None:
    """Check that the run does not accidentally continue with what an earlier one has trained.

    Raises:
        ConfigError: An earlier run left its adapters on the model, and ``resume`` is off; or it
            trained the model's weights; or adapter full can't save the model.
        AdapterError: The model has adapters of another program.
    """
    check_no_foreign_adapters(model)

    # Weights that an earlier run trained can't be undone.
    trained_in = getattr(model, "trained_in", None)
    if trains_weights(model) and trained_in is None:
        raise ConfigError(
            "attach_adapters has made the model's weights trainable, which a run does itself: load"
            " the model again, and give --adapter full"
        )
    if trains_weights(model):
        raise ConfigError(
            f"the model's weights were trained by an earlier run ({trained_in}): load the model"
            f" again to resume that run or for a new one, or load({str(trained_in)!r}) to train"
            " them further"
        )
    if config.adapter.adapter == "full":
        origin_of(model)
        check_full(model, config.adapter.num_layers, original_of(config.model))

    # A resumed run needs its own adapters.
    if trained_in is None or config.resume or not find_adapters(model):
        return
    what = (
        f"the model still has the adapters of an earlier run ({trained_in}): load the model again"
    )
    if _can_continue(Path(trained_in)):
        raise ConfigError(
            f"{what} for a new run, or continue that one, which has not ended, with resume=True and"
            f" adapter_path={trained_in!r}"
        )
    raise ConfigError(
        f"{what} for a new run, or load it with adapter_path={trained_in!r} to train them further"
    )


def _can_continue(folder: Path) -> bool:
    """Return whether a folder holds a run that has not ended, such as an interrupted one."""
    with suppress(OutputError, ConfigError):
        return is_run(folder) and not Run.load(folder).finished
    return False


def check_no_adapters(model: nn.Module) -> None:
    """Check that a model has no adapters before a sweep, which attaches its own.

    Raises:
        AdapterError: It has some.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already, and a sweep attaches its own: load the model again,"
            " without an adapter (--resume-adapter-file starts every trial from one)"
        )


def check_validation(config: TrainConfig, valid: Examples) -> None:
    """Check that there is validation data if a setting needs it.

    Raises:
        ConfigError: ``patience`` or ``prompts`` is given without validation data.
    """
    if config.patience is not None and not valid:
        raise ConfigError(
            "--patience needs validation examples: add a valid file, give --valid-split 0.25, or"
            " leave --patience out"
        )
    if config.prompts and not valid:
        raise ConfigError(
            "--prompts are answered at validations, which need examples: add a valid file, give"
            " --valid-split 0.25, or leave --prompts out"
        )


def check_length(progress: Progress, steps: int) -> None:
    """Check that a resumed run has not trained for more steps than it should have.

    Raises:
        ConfigError: It has.
    """
    if progress.step > steps:
        raise ConfigError(
            f"the run has trained {counted(progress.step, 'step')}, more than the {steps:,} that"
            f" are asked for: leave --iters and --epochs out, or give --iters above {progress.step}"
        )


def check_rates(config: TrainConfig, groups: Mapping[str, str]) -> None:
    """Check that a rate that was given has parameters to learn at it.

    Args:
        config: The run's settings.
        groups: The group of each parameter that is trained.

    Raises:
        ConfigError: ``embedding_learning_rate`` was given, but no embedding is trained.
    """
    rate = config.optimizer.embedding_learning_rate
    if rate != OptimizerConfig.embedding_learning_rate and "embedding" not in groups.values():
        raise ConfigError(
            f"--embedding-learning-rate {rate:g} has no effect, because no embedding and no whole"
            " module is trained: leave it out, or name some in --target-modules or --train-modules"
        )


def warn_about_rates(config: TrainConfig, steps: int, log: Log) -> None:
    """Warn about rates at which runs have diverged, and about a warm-up that takes the whole run.

    The measure is s λ η, the rate at which the output changes at first. With init2, B does not
    start at zero, so only A's rate matters, and the measure is s η.
    """
    optimizer, adapter = config.optimizer, config.adapter
    if (optimizer.warmup or 0) >= steps:
        warmup = counted(optimizer.warmup or 0, "step")
        log(f"warning: the warm-up of {warmup} takes the whole run of {steps}")

    # The limits were measured with these optimizers and adapters only. A rate that is searched is
    # found on the run's own model and data.
    if optimizer.optimizer not in ("adam", "adamw") or adapter.adapter not in ("lora", "dora"):
        return
    if optimizer.learning_rate == "auto":
        return

    # Compute the measure, and find the settings that lower it.
    rate = adapter.scale * (optimizer.learning_rate or 0.0)
    if adapter.init == "init2":
        limit = DIVERGED_INIT2
        measure = "s x eta"
        remedies = ["--learning-rate"]
    else:
        rate *= optimizer.lr_ratio or 1.0
        limit = DIVERGED
        measure = "s x lambda x eta"
        remedies = ["--learning-rate", "--lr-ratio"]
    # An adapter that the run starts from keeps its scale.
    if config.resume_adapter_file is None:
        remedies.append("--alpha")

    if rate >= limit:
        log(
            f"warning: {measure} is {rate:.2g}, and runs with {limit:g} have diverged: lower"
            f" {' or '.join(remedies)}"
        )


def with_model_name(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the name by which ``model`` was loaded.

    A model that this package did not load is described by its kind.

    Raises:
        ConfigError: The settings name another model, or hold a model.
    """
    name = getattr(model, "loaded_as", None)
    if name is None:
        kind = getattr(model, "model_type", type(model).__name__)
        return {"model": f"a {kind} {UNKNOWN_MODEL}", **settings}

    asked = settings.get("model", name)
    if not isinstance(asked, str | PathLike):
        raise ConfigError(
            f"model is {shown(asked)}, and not a name: the model is the first argument, so leave"
            " out model"
        )
    if asked != name and Path(asked).absolute() != Path(name).absolute():
        raise ConfigError(
            f"model {asked!r:.80} is not the model given, which is {name!r:.80}: leave out model"
        )
    return {**settings, "model": name}
