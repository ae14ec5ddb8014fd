"""The state of a translation, with the lines that report it; ``migration.py`` translates."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .foreign_names import FOREIGN_NAMES, NESTED, PROGRAMS
from .spelling import flag_of, in_names

_MOST_SHOWN = 4  # settings in a block


@dataclass
class Translation:
    """The settings of a command while they are translated."""

    foreign: dict[str, Any]  # settings of other programs that are still to be translated
    ours: dict[str, Any]  # settings of this package
    context: Mapping[str, Any]  # settings that override these, such as flags
    stored: Mapping[str, Any]  # settings that these override, such as those of a YAML file
    known: Collection[str]  # the settings of the command
    as_flags: bool  # whether the settings are written as flags
    sources: dict[str, str] = field(default_factory=dict)  # setting → the one it was made of
    translated: list[str] = field(default_factory=list)  # "scale 20 → alpha 160"
    left_out: list[str] = field(default_factory=list)  # "train (…)"
    problems: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, ours: Mapping[str, Any]) -> None:
        """Translate a setting to one or several of this package's.

        Args:
            name: The setting of the other program.
            value: Its value.
            ours: The settings with the same meaning, and their values.
        """
        for setting, translated in ours.items():
            here = self.spell(setting)
            if setting in self.ours and self.ours[setting] != translated:
                self.problems.append(
                    f"{self.written(name, value)} is {self.written(setting, translated)} here, but"
                    f" {here} is also {value_text(self.ours[setting])}: give one of them"
                )
            self.ours[setting] = translated
            self.sources[setting] = name

        made = [self.written(setting, each) for setting, each in ours.items()]
        self.report(name, value, ", ".join(made))

    def report(self, name: str, value: Any, here: str) -> None:
        """Report what a setting is here."""
        self.translated.append(f"{self.written(name, value)} → {here}")

    def leave_out(self, name: str, note: str) -> None:
        """Report a setting that changes nothing here."""
        self.left_out.append(f"{self.spell(name)} ({note})")

    def refuse(self, name: str, value: Any, note: str) -> None:
        """Report a setting that has no counterpart here."""
        program = next(key for key, settings in PROGRAMS.items() if name in settings)
        advice = f"leave it out; {note}" if note else "leave it out"
        self.problems.append(
            f"{program}'s {self.written(name, value)} can't be translated: {advice}"
        )

    def spell(self, name: str) -> str:
        """Return a setting as the user writes it: as a flag or as a name."""
        return flag_of(name) if self.as_flags else name

    def written(self, name: str, value: Any) -> str:
        """Return a setting with its value as the user writes them; True is a flag alone."""
        if self.as_flags and value is True:
            return self.spell(name)
        return f"{self.spell(name)} {value_text(value)}"

    def finished(self, messages: Iterable[str]) -> list[str]:
        """Return messages, which name flags, with the settings as the user writes them."""
        named = () if self.as_flags else [*self.known, *FOREIGN_NAMES]
        return [in_names(message, named) for message in messages]

    def notes_on_loss(self) -> list[str]:
        """Return a note on what is learned, where mlx-lm learns more and nothing says what."""
        is_given = self.get("train_on", None) is not None
        is_sft = self.get("objective", "sft") == "sft"
        if is_given or not is_sft or "train_on" not in self.known:
            return []
        return [
            "of chats and prompts, only the answers are learned, as with mlx-lm's mask_prompt"
            " (--train-on everything: all of the text, as mlx-lm does by default)"
        ]

    def get(self, name: str, default: Any) -> Any:
        """Return the value of one of this package's settings."""
        return {**self.stored, **self.ours, **self.context}.get(name, default)


def about_block(settings: Mapping[str, Any], name: str, known: Collection[str]) -> str:
    """Return what to do about a setting that holds settings; "" if it is another one."""
    block: Any = settings[name]
    if hasattr(block, "__dataclass_fields__") and not isinstance(block, type):
        names = _listed(list(block.__dataclass_fields__))
        return (
            f"{name} is of the type {type(block).__name__}, which holds settings ({names}): give"
            f" them as keywords, without {name}"
        )
    if type(block) is not dict or not block or name in (*NESTED, "fields"):
        return ""
    inside = [str(key).replace("-", "_") for key in block]
    are_foreign = FOREIGN_NAMES.issuperset(inside) and "train" not in inside  # a file's name too
    if set(inside).isdisjoint(known) and not are_foreign:
        return ""
    return f"{name} holds settings ({_listed(inside)}): write them one level up, without {name}"


def _listed(names: Sequence[str]) -> str:
    """Return the first names of settings for a message."""
    more = ["…"] if len(names) > _MOST_SHOWN else []
    return ", ".join([*names[:_MOST_SHOWN], *more])[:200]


def value_text(value: Any) -> str:
    """Return a value for a message."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(value_text, value))[:80]
    return f"{value!s:.80}"


def read_number(value: Any) -> Any:
    """Return a number that YAML reads as text, such as 1e-5; other values are returned as given."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
