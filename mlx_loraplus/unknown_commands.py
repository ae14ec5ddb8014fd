"""What may be meant by a first word that is not a command."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from .errors import nearest
from .unknown_arguments import flag_owners, takes_value

_OTHER_NAMES = {
    **dict.fromkeys(("finetune", "fine-tune", "fine_tune", "fintune"), "train"),
    "lora": "train",
    "sft": "train",
    "resume": "train -c RUN/run.yaml --resume",
    "preview": "train --dry-run",
    "evaluate": "train --test",
    "eval": "train --test",
    "version": "--version",
    "-V": "--version",
    "-v": "--version",
    "models": "train --list-models",
    "--list-models": "train --list-models",
    "list-models": "train --list-models",
    "list": "train --list-models",
    "test": "train --test",
    "merge": "fuse",
    "convert": "export",
    "report": "compare",
}
"""Names of commands in other programs, or words that users try → the command here."""
_PREFIX = "mlx_loraplus."


def command_hint(words: Sequence[str], commands: Collection[str]) -> str:
    """Return a hint, e.g. ``" (did you mean 'train'?)"``, or an empty text.

    Args:
        words: All words after ``mlx_loraplus``; the first is not a command.
        commands: The names of the commands.
    """
    meant = _meant_words(words, commands)
    if meant:
        return f" (did you mean {shlex.join(meant)!r}?)"
    return nearest(words[0], commands)


def _meant_words(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Return the command that may be meant, with its arguments; empty if none is known."""
    name, rest = words[0], list(words[1:])
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name].split()
    if name.removeprefix(_PREFIX) in commands:
        return [name.removeprefix(_PREFIX), *rest]

    # A file of settings, or the folder of a run or adapter
    if name.endswith((".yaml", ".yml")):
        return ["train", "-c", *words]
    if (Path(name) / "adapter_config.json").is_file():
        has_prompt = any(word.split("=")[0] == "--prompt" for word in rest)
        return ["generate", *words] if has_prompt else ["chat", *words]

    return _after_command(words, commands) if name.startswith("-") else []


def _after_command(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Return flags that are before their command, or without one, after it; empty if unknown."""
    for place, word in enumerate(words):
        if word in commands and not takes_value(words[place - 1]):
            return [word, *words[:place], *words[place + 1 :]]
    owners = flag_owners(words[0])
    return [*owners[:1], *words] if owners else []
