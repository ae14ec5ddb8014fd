"""Say what is wrong with a file of an adapter, and how to get it again."""

from pathlib import Path

import pydantic

from ..userpaths import shell_word

RUN_SETTINGS = "run.yaml"  # a run's settings, beside its adapter
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints


def how_to_restore(folder: Path) -> str:
    """Return how to get a file in an adapter's folder again."""
    settings = folder / RUN_SETTINGS
    if settings.is_file() and (folder / CHECKPOINTS).is_dir():
        command = f"mlx_loraplus.train -c {shell_word(settings)} --resume"
        return f"{command} writes it again, from the last checkpoint"
    return "copy the file again"


def describe_invalid(error: pydantic.ValidationError) -> list[str]:
    """Return one line for each part of a JSON file that is missing or has a wrong value."""
    problems: list[str] = []
    for detail in error.errors():
        place = ".".join(map(str, detail["loc"])) or "its content"
        if detail["type"] == "missing":
            problems.append(f"{place} is missing")
        elif detail["type"] in ("model_type", "dict_type"):
            problems.append(f"{place} must be an object, {{…}}")
        else:
            message = detail["msg"].partition(", unable")[0]
            problems.append(f"{place} {message.replace('Input should be', 'must be')}")
    return problems
