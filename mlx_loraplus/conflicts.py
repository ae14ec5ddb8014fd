"""Settings that are valid individually but not together, such as those of another adapter."""

from collections.abc import Collection, Mapping
from typing import Any

from .command_config import FuseConfig, SweepConfig
from .config import KINDS, AdapterConfig, TrainConfig
from .errors import counted
from .spelling import flag_of


def find_conflicts(
    config: Any, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Return the problems of settings that are valid individually but not together, with flags.

    These checks are not validators of the config, because the settings of a YAML file may conflict
    until the flags override them.

    Args:
        config: The config of a command.
        settings: Its settings, flat.
        defaults: The default settings of a run.
    """
    # Fuse and sweep.
    if isinstance(config, FuseConfig):
        if config.dequantize and config.bits != "auto":
            return ["--dequantize and --bits exclude each other: give one of them"]
        return []
    if isinstance(config, SweepConfig):
        return _sweep_conflicts(config)
    if not isinstance(config, TrainConfig):
        return []

    # Train: length and optimizer.
    problems: list[str] = []
    if config.iters is not None and config.epochs is not None:
        problems.append("--iters and --epochs both say how long to train: give one of them")
    if config.resume and config.overwrite:
        problems.append("--resume continues the run that --overwrite removes: give one of them")
    if config.optimizer.optimizer == "adam" and config.optimizer.weight_decay > 0:
        problems.append("--optimizer adam has no --weight-decay: use adamw, which is adam with it")
    only_vectors = config.adapter.adapter == "vera" and not config.adapter.train_modules
    if config.optimizer.optimizer == "muon" and only_vectors:
        problems.append(
            "--adapter vera trains only vectors, which muon steps as adamw does: use"
            " --optimizer adamw"
        )

    # Adapter, objective and data. The settings of an adapter that the run starts from are known
    # once it is loaded, and ``resolve_config`` checks them then.
    if config.resume_adapter_file is None or config.adapter.adapter == "full":
        problems += adapter_conflicts(config.adapter, settings, defaults)
    problems += _objective_conflicts(config)
    weights, sets = len(config.data.data_weights), len(config.data.data)
    if weights not in (0, sets):
        values = counted(weights, "value")
        problems.append(
            f"--data-weights has {values} for {counted(sets, 'data set')}: give one for each"
        )
    return problems


def _sweep_conflicts(config: SweepConfig) -> list[str]:
    """Return which settings a sweep does not accept; others are checked with its runs."""
    if config.adapter.adapter == "full":
        return [
            "a sweep searches rates for A and B, which full does not have: use --adapter lora, or"
            " train with several rates and compare the runs with mlx_loraplus.compare"
        ]
    problems: list[str] = []
    if config.optimizer.learning_rate == "auto":
        problems.append(
            "a sweep searches rates itself, so --learning-rate can't be auto: leave it out, or give"
            " a number as the baseline"
        )

    # An adapter that the runs start from has a rank and a scale.
    given = {"ranks": config.ranks, "alphas": config.alphas}
    if config.resume_adapter_file is not None:
        problems += [
            f"{flag_of(name)} can't be tried with --resume-adapter-file, whose adapter has its own:"
            f" leave {flag_of(name)} out"
            for name, values in given.items()
            if values
        ]
    return problems


def _objective_conflicts(config: TrainConfig) -> list[str]:
    """Return which settings the objective does not accept."""
    given, objective = config.objective, config.objective.objective
    problems: list[str] = []

    # Settings of other objectives.
    if given.beta is not None and objective not in ("dpo", "ipo", "simpo", "kto"):
        instead = ": what TRL calls beta is --orpo-lambda here" if objective == "orpo" else ""
        objectives = "dpo, ipo, simpo and kto"
        problems.append(f"--beta is for --objective {objectives}, not {objective}{instead}")
    if given.label_smoothing and objective != "dpo":
        problems.append(f"--label-smoothing is for --objective dpo, not {objective}")
    if given.simpo_gamma is not None and objective != "simpo":
        problems.append(f"--simpo-gamma is for --objective simpo, not {objective}")
    if given.orpo_lambda is not None and objective != "orpo":
        problems.append(f"--orpo-lambda is for --objective orpo, not {objective}")
    if given.kto_weights != (1.0, 1.0) and objective != "kto":
        problems.append(f"--kto-weights is for --objective kto, not {objective}")
    if given.reference != "base" and not given.has_reference:
        problems.append(f"--reference is for --objective dpo, ipo and kto, not {objective}")
    if not given.has_preferences:
        return problems

    # Settings that have no meaning for preferences, or are not supported for them.
    refused = {
        "--pack": config.data.pack,
        "--data-weights": config.data.data_weights,
        "--train-on everything": config.data.train_on == "everything",
        "--on-long split": config.data.on_long == "split",
        "--parallel tensor": config.parallel == "tensor",
    }
    for name, is_given in refused.items():
        if is_given:
            problems.append(f"{name} is for --objective sft, not {objective}: leave it out")
    return problems


def adapter_conflicts(
    config: AdapterConfig, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Return which settings the adapter's kind or init does not accept.

    Args:
        config: The adapter.
        settings: The adapter's settings or all settings of its run. Those that differ from the
            default count as given.
        defaults: The default settings of a run.
    """
    given = {name for name, value in settings.items() if value != defaults[name]}
    init = config.init

    # config.KINDS lists which settings each kind accepts and refuses.
    problems: list[str] = []
    own = KINDS[config.adapter].own
    for other, facts in KINDS.items():
        foreign = given.intersection(facts.own).difference(own)
        problems += [
            f"{flag_of(name)} is for --adapter {other}, not {config.adapter}" for name in foreign
        ]
    for names, message in KINDS[config.adapter].refused.items():
        refused = [name for name in names if name in given]
        if refused:
            names_given = ", ".join(map(flag_of, refused))
            problems.append(message.format(names=names_given, **settings))

    if config.adapter == "full":
        return problems + _full_conflicts(config, settings, given)

    # Settings that need an init.
    approximates = init in ("pissa", "loftq")
    if config.quantize is not None and not approximates:
        problems.append(
            f"--quantize is for --init pissa and loftq, not {init}: load a quantized model instead"
        )
    if "quantize_group_size" in given and (config.quantization or {}).get("mode") != "affine":
        problems.append(
            "--quantize-group-size is for --init pissa or loftq with --quantize as a number of bits"
        )
    if "loftq_iters" in given and init != "loftq":
        problems.append(f"--loftq-iters is for --init loftq, not {init}")
    if "svd" in given and not approximates:
        problems.append(f"--svd is for --init pissa and loftq, not {init}")
    return problems


def _full_conflicts(
    config: AdapterConfig, settings: Mapping[str, Any], given: Collection[str]
) -> list[str]:
    """Return which settings have no effect without A and B, or on embeddings that do not train."""
    problems: list[str] = []
    if settings.get("lr_ratio") not in (None, 1.0):
        problems.append(
            f"--adapter full has no B, so --lr-ratio can't be {settings['lr_ratio']:g}: leave it"
            " out, or train LoRA+ with --adapter lora"
        )
    if config.num_layers != -1 and "embedding_learning_rate" in given:
        problems.append(
            "--embedding-learning-rate has no effect with --adapter full and --num-layers"
            f" {config.num_layers}, because no embedding trains: leave one of them out"
        )
    return problems
