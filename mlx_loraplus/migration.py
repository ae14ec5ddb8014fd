"""Translate the settings of other programs, such as mlx-lm and TRL, to this package's settings.

A setting is translated only if it means the same here. The translation is reported in one line.
Otherwise, the error names the setting to use. The table of all names is in ``foreign_names.py``.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .command_config import CONFIGS
from .config import LR_RATIO
from .errors import ConfigError, counted, join_problems
from .foreign_names import (
    LLAMA_FACTORY,
    MLX_LM,
    PROGRAMS,
    TRL,
    ForeignSetting,
    find_foreign,
)
from .mlx_lm_schedule import read_schedule, unused_parts
from .settings import configure, current_names, setting_names
from .translation import Translation, about_block, read_number, value_text

_RANK = 8  # the default rank of mlx-lm, PEFT and this package
_PER_BATCH = ("iters", "steps_per_report", "steps_per_eval", "steps_per_save")

_FIELDS = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
    "dataset_text_field": "text",
}
"""Settings that name a column → the field that it holds."""

_USUAL = {"betas": [0.9, 0.999], "eps": 1e-8, "bias_correction": True, "momentum": 0.0}
"""Values of ``optimizer_config`` that the optimizers here have anyway."""


def translate(
    kind: type,
    settings: Mapping[str, Any],
    context: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
    *,
    quiet: bool = False,
    as_flags: bool = False,
) -> dict[str, Any]:
    """Return settings in which the names of other programs are replaced by this package's.

    A line on standard error reports what was replaced.

    Args:
        kind: The config of the command.
        settings: Setting name to value, from keywords, a YAML file or flags.
        context: Settings that override these.
        stored: Settings that these override.
        quiet: Report nothing.
        as_flags: Write the settings as flags in messages.

    Raises:
        ConfigError: A setting of another program has no counterpart here, or contradicts one of
            this package's settings. The message lists all problems.
    """
    known = setting_names(kind)
    settings = current_names(settings)
    blocks = {name: line for name in settings if (line := about_block(settings, name, known))}
    settings = {name: value for name, value in settings.items() if name not in blocks}
    names = [name for name in settings if name not in known and find_foreign(name)]
    if not names and not blocks:
        return settings

    # A setting that is null is not given.
    given = {name: value for name, value in settings.items() if value is not None}
    foreign = {name: given[name] for name in names if name in given}
    ours = {name: value for name, value in given.items() if name not in names}
    work = Translation(foreign, ours, context or {}, stored or {}, known, as_flags)
    if foreign.get("fine_tune_type") == "full":
        _leave_out_lora(work)
    _unpack(work)
    for name, value in list(work.foreign.items()):
        _translate_one(work, name, value)
    if not MLX_LM.keys().isdisjoint(names):
        _count_steps(work)

    for name in work.ours.keys() - set(known) - settings.keys():
        given = work.spell(work.sources.get(name, name))
        owner = next(key for key, each in CONFIGS.items() if name in setting_names(each))
        work.problems.append(
            f"{given} is {work.spell(name)} here, which this command does not have:"
            f" mlx_loraplus.{owner} has it"
        )
    if work.problems or blocks:
        # Flags are checked later, because only tyro knows how to read them.
        native = {name: value for name, value in work.ours.items() if name in {*known, *settings}}
        others = [] if as_flags else _other_problems(kind, native)
        found = [*blocks.values(), *work.finished(work.problems), *others]
        raise ConfigError(join_problems(found))
    if not quiet:
        sys.stderr.write(_line(work, names) + "\n")
    return work.ours


def _other_problems(kind: type, settings: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with settings of this package, in one line if anything is."""
    try:
        configure(kind, settings, whole=False)
    except ConfigError as error:
        return [str(error)]
    return []


def _line(work: Translation, names: list[str]) -> str:
    """Return the line that reports a translation."""
    # Several programs may know a name. The one that knows most of them comes first.
    left = set(names)
    programs: list[str] = []
    while left:
        program = max(PROGRAMS, key=lambda key: len(left & PROGRAMS[key].keys()))
        left -= PROGRAMS[program].keys()
        programs.append(program)

    parts = [", ".join(work.translated)] if work.translated else []
    if work.get("adapter", "lora") == "full" and work.get("num_layers", -1) == -1:
        parts.append(
            "embeddings, last norm and head train too (--num-layers N: only the last blocks)"
        )
    if work.left_out:
        parts.append(f"left out: {', '.join(work.left_out)}")
    has_b = work.get("adapter", "lora") != "full"
    has_rate = work.get("learning_rate", None) is not None
    if has_b and has_rate and work.get("lr_ratio", None) is None:
        parts.append(f"B learns at {LR_RATIO:g} times this rate (--lr-ratio 1: at the same rate)")
    if "mlx-lm" in programs:
        parts += work.notes_on_loss()
    source = f"{programs[0]}'s settings" if len(programs) == 1 else " and ".join(programs)
    return f"{source}: {'; '.join(work.finished(parts)) or 'nothing to translate'}"


def _leave_out_lora(work: Translation) -> None:
    """Leave out the settings of LoRA, which mlx-lm ignores when it trains all weights."""
    for name in ("lora_parameters", "scale", "keys"):
        if work.foreign.pop(name, None) is not None:
            work.leave_out(name, "there is no LoRA with fine_tune_type full")


def _unpack(work: Translation) -> None:
    """Replace nested settings by their contents."""
    # mlx-lm's settings of LoRA.
    parameters = _pop_mapping(work, "lora_parameters")
    for name, value in parameters.items():
        home = work.ours if name in ("rank", "dropout") else work.foreign
        home[name] = value
        if home is work.foreign and name not in ("scale", "keys"):
            del work.foreign[name]
            hint = "it has rank, dropout, scale and keys"
            if name in ("alpha", "lora_alpha"):
                hint = _instead_of_alpha(value, parameters.get("rank", _RANK))
            work.problems.append(f"lora_parameters: {name} is unknown: {hint}")

    # PEFT's settings of LoftQ.
    loftq = _pop_mapping(work, "loftq_config")
    for name, ours in (("loftq_bits", "quantize"), ("loftq_iter", "loftq_iters")):
        if name in loftq:
            value = loftq.pop(name)
            work.put(name, value, {ours: str(value) if ours == "quantize" else value})
    if loftq:
        work.problems.append(f"loftq_config: {', '.join(loftq)} is unknown")

    # mlx-lm's settings of the chosen optimizer.
    chosen = _pop_mapping(work, "optimizer_config").get(work.get("optimizer", "adamw"), {})
    for name, value in chosen.items() if isinstance(chosen, Mapping) else ():
        if name == "weight_decay":
            work.ours[name] = value
        elif name not in _USUAL or read_number(value) != _USUAL[name]:
            usual = f": it is {_USUAL[name]} here" if name in _USUAL else ""
            work.problems.append(
                f"optimizer_config: {name} {value_text(value)} is not a setting{usual}; leave it"
                " out"
            )


def _instead_of_alpha(alpha: Any, rank: Any) -> str:
    """Return what mlx-lm has instead of alpha."""
    given, size = read_number(alpha), read_number(rank)
    are_numbers = isinstance(given, int | float) and isinstance(size, int | float) and size > 0
    scale = f"scale: {given / size:g}" if are_numbers else "scale"
    return (
        f"mlx-lm has scale, which is alpha / rank: write {scale} instead, or alpha:"
        f" {value_text(alpha)} outside lora_parameters"
    )


def _pop_mapping(work: Translation, name: str) -> dict[str, Any]:
    """Take a nested setting out of those that are still to be translated."""
    value = work.foreign.pop(name, {})
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    work.problems.append(f"{name} must hold settings, not {value_text(value)}")
    return {}


def _translate_one(work: Translation, name: str, value: Any) -> None:
    """Translate one setting, or report why it can't be."""
    setting = find_foreign(name)
    assert setting is not None

    # Settings whose translation depends on others.
    if name in _SPECIAL:
        _SPECIAL[name](work, name, value)
    else:
        _translate_by_table(work, name, value, setting)


def _translate_by_table(work: Translation, name: str, value: Any, setting: ForeignSetting) -> None:
    """Translate a setting that means the same whatever the others are."""
    if setting.ours is None:
        if setting.values is None:
            work.leave_out(name, setting.note)
        elif value not in (list(setting.values) or (False, {}, [])):  # or it is off
            work.refuse(name, value, setting.note)
        return
    if setting.values is None:
        work.put(name, value, {setting.ours: value})
        return

    # Only some values have a counterpart.
    assert isinstance(setting.values, Mapping)
    try:
        translated = setting.values[value]
    except (KeyError, TypeError):
        allowed = setting.note or f"allowed are {', '.join(map(value_text, setting.values))}"
        work.refuse(name, value, allowed)
        return
    if translated is not None:
        work.put(name, value, {setting.ours: translated})


# --- settings whose translation depends on others -----------------------------------------------


def _translate_scale(work: Translation, name: str, value: Any) -> None:
    """Translate mlx-lm's scale s, which is alpha / rank."""
    scale, rank = read_number(value), read_number(work.get("rank", _RANK))
    if isinstance(scale, str) or isinstance(rank, str):
        work.refuse(name, value, "alpha = scale x rank, and both must be numbers")
    else:
        work.put(name, value, {"alpha": float(scale * rank)})


def _translate_field(work: Translation, name: str, value: Any) -> None:
    """Translate the setting of one column to an entry of ``fields``, which holds all columns."""
    if value == _FIELDS[name]:
        return
    fields = work.ours.setdefault("fields", [])
    if isinstance(fields, list):
        fields.append(f"{_FIELDS[name]}={value}")
    work.report(name, value, f"{work.spell('fields')} {_FIELDS[name]}={value}")


def _translate_warmup_ratio(work: Translation, name: str, value: Any) -> None:
    """Translate a fraction of the run to steps, for which the number of steps must be known."""
    iters = work.get("iters", work.foreign.get("max_steps", work.stored.get("max_steps")))
    fraction = read_number(value)
    if not value:
        return
    if not isinstance(fraction, float | int) or not 0 < fraction < 1:
        work.problems.append(
            f"{work.spell(name)} is a fraction of the run, such as 0.1, not {value_text(value)}:"
            " --warmup takes a number of steps"
        )
    elif not isinstance(iters, int) or iters < 1:
        epochs = [key for key in ("num_train_epochs", "num_epochs") if key in work.foreign]
        epochs += ["epochs"] * (work.get("epochs", None) is not None)
        in_place = f"in place of {work.spell(epochs[0])}" if epochs else "too"
        work.problems.append(
            f"{work.spell(name)} {value_text(value)} needs the number of steps: give --iters N"
            f" {in_place}, or {work.spell('warmup')} in steps instead"
        )
    else:
        work.put(name, value, {"warmup": math.ceil(fraction * iters)})


def _translate_warmup_steps(work: Translation, name: str, value: Any) -> None:
    """Translate steps or, in Transformers 5, a fraction of the run."""
    if isinstance(value, float) and 0 < value < 1:
        _translate_warmup_ratio(work, name, value)
    else:
        work.put(name, value, {"warmup": value})


def _translate_scheduler(work: Translation, name: str, value: Any) -> None:
    """Translate TRL's schedule; its constant one has no warm-up."""
    if value == "constant":
        work.put(name, value, {"schedule": "constant", "warmup": 0})
    else:
        _translate_by_table(work, name, value, TRL[name])


def _translate_lr_schedule(work: Translation, name: str, value: Any) -> None:
    """Translate mlx-lm's schedule, or report which part of it has no counterpart."""
    iters, batches = work.get("iters", None), work.get("grad_accumulation_steps", 1)
    steps = iters // batches if isinstance(iters, int) else None
    try:
        found = read_schedule(value, steps)
    except ConfigError as problem:
        work.problems.append(f"mlx-lm's {work.spell(name)} can't be translated: {problem}")
        return

    # In mlx-lm, the schedule's own rate is used instead of learning_rate.
    rate = work.ours.pop("learning_rate", None)
    work.put(name, value["name"], found)
    if rate is not None and read_number(rate) != found["learning_rate"]:
        work.leave_out("learning_rate", f"{work.spell(name)} sets the rate")
    for part, reason in unused_parts(value):
        work.left_out.append(f"{work.spell(name)}'s {part} ({reason})")


def _translate_max_steps(work: Translation, name: str, value: Any) -> None:
    """Translate max_steps, which is -1 by default, and overrides the epochs otherwise."""
    if value == -1:
        return
    if work.foreign.pop("num_train_epochs", None) is not None:
        work.leave_out("num_train_epochs", f"{work.spell(name)} overrides it")
    work.put(name, value, {"iters": value})


def _translate_epochs(work: Translation, name: str, value: Any) -> None:
    """Translate the epochs, unless max_steps overrides them."""
    if name in work.foreign and work.foreign.get("max_steps", -1) == -1:
        work.put(name, value, {"epochs": value})


def _translate_output(work: Translation, name: str, value: Any) -> None:
    """Translate the folder of the output, which only some commands write."""
    if "save_path" in work.known:
        work.put(name, value, {"save_path": value})
    elif "overwrite" in work.known:
        work.put(name, value, {"adapter_path": value})
    else:
        work.refuse(name, value, "this command writes nothing; --adapter-path is what it reads")


def _translate_stage(work: Translation, name: str, value: Any) -> None:
    """Translate LLaMA-Factory's stage; with dpo, pref_loss names the objective."""
    if value != "dpo" or "pref_loss" not in work.foreign:
        _translate_by_table(work, name, value, LLAMA_FACTORY[name])


def _translate_target(work: Translation, name: str, value: Any) -> None:
    """Translate LLaMA-Factory's modules; its all is all-linear here."""
    work.put(name, value, {"target_modules": "all-linear" if value == "all" else value})


def _translate_test(work: Translation, name: str, value: Any) -> None:
    """Report that ``test`` has to be given as an option of its own."""
    if value:
        work.leave_out(name, MLX_LM[name].note)


_SPECIAL: Mapping[str, Callable[[Translation, str, Any], None]] = {
    "scale": _translate_scale,
    "warmup_ratio": _translate_warmup_ratio,
    "warmup_steps": _translate_warmup_steps,
    "lr_scheduler_type": _translate_scheduler,
    "lr_schedule": _translate_lr_schedule,
    "max_steps": _translate_max_steps,
    "num_train_epochs": _translate_epochs,
    "output_dir": _translate_output,
    "lora_target": _translate_target,
    "stage": _translate_stage,
    "test": _translate_test,
    **dict.fromkeys(_FIELDS, _translate_field),
}


def _count_steps(work: Translation) -> None:
    """Translate mlx-lm's numbers of batches to optimizer steps.

    Both are equal without gradient accumulation.
    """
    size = work.get("grad_accumulation_steps", 1)
    if not isinstance(size, int) or size <= 1:
        return
    if "iters" in work.context:
        work.problems.append(
            "--iters counts batches in mlx-lm and optimizer steps here: use this package's names,"
            f" and divide --iters by --grad-accumulation-steps {size}"
        )
    for name in _PER_BATCH:
        value = work.ours.get(name)
        if isinstance(value, int):
            work.ours[name] = steps = max(1, value // size)
            work.translated.append(
                f"{work.spell(name)} {counted(value, 'batch')} → {counted(steps, 'step')}"
            )
