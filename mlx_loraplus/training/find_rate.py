"""``find_rate``: the rate that ``learning_rate auto`` would find, without training."""

from typing import Unpack

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import TrainConfig
from ..data.load_data import load_examples
from ..data.model_limits import check_examples, limits_of
from ..data.python_data import store_data
from ..errors import ConfigError
from ..keyword_types import TrainOptions
from ..memory.run_sizes import resolve_batch, resolve_length
from ..migration import translate
from ..models.loading import shared_copy
from ..runs.history import Run
from ..runs.progress import no_log
from .distributed import World
from .finetune import start_state
from .rate_search import RateSearch, search_rate
from .run_checks import check_world, with_model_name
from .session import Session
from .starting_adapter import resolve_config


def find_rate(
    model: nn.Module, tokenizer: TokenizerWrapper, /, **settings: Unpack[TrainOptions]
) -> RateSearch:
    """Find the learning rate of a run, as ``finetune`` does with ``learning_rate="auto"``.

    The search takes the work of 30 steps. It trains a copy of the adapters, so the model does not
    change, and nothing is written.

    Args:
        model: From ``load``, with or without an adapter.
        tokenizer: From ``load``.
        settings: The settings of ``finetune``, without ``learning_rate`` and ``resume``.

    Returns:
        The search, with its ``rate`` and the rates that were tried.

    Raises:
        ConfigError: A setting is unknown or not allowed.
        DataError: The data can't be trained on; the message lists the problems.
        DeviceError: Memory ran out, or the GPU failed.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> found = find_rate(model, tokenizer, data="my_folder")
        >>> run = finetune(model, tokenizer, data="my_folder", learning_rate=found.rate)
    """
    # Read the settings.
    given = translate(TrainConfig, dict(settings))
    if given.get("learning_rate") not in (None, "auto"):
        raise ConfigError("find_rate finds the --learning-rate: leave it out")
    if given.get("resume"):
        raise ConfigError("find_rate finds the rate of a new run: leave out resume")
    config = resolve_config(
        model, with_model_name(model, store_data(given | {"learning_rate": "auto"}))
    )

    # Read the data, and choose the sizes that the settings leave to this machine.
    world = World.join(config.parallel)
    with world.sync_errors():
        config = resolve_length(config, model)
        examples = load_examples(config, tokenizer, no_log)
        check_examples(limits_of(model), examples, tokenizer, no_log)
        config = resolve_batch(config, model, int(examples["train"].lengths.max()), no_log)
        check_world(config, model, world, no_log)

    # Search with a copy, which shares the model's arrays and gets the adapters.
    session = Session(Run(config), tokenizer, examples, None, world, no_log, [])
    trial = shared_copy(model)
    state = start_state(trial, session).train_state
    world.broadcast(trial)
    return search_rate(state, session.config, world)
