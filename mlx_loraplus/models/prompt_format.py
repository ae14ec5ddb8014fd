"""The format in which prompts are rendered for a model.

The format is stored with the adapter, so that later prompts have the same format as in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PROMPT_FORMAT = "prompt_format"
"""The key of the format in adapter_config.json, and in the config.json of a fused model."""

RawForm = Literal["completion", "alpaca", "question"]

RAW_FORMS: dict[str, tuple[str, str]] = {
    "completion": ("{prompt}", ""),
    "alpaca": ("### Instruction:\n{prompt}\n\n### Response:\n", ""),
    "question": ("Question: {prompt}\nAnswer:", " "),
}
"""For models without a chat template: the prompt, and the separator before the answer."""


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are rendered.

    Args:
        form: The kind of row that a prompt is rendered as. Used without a chat template.
        thinking: Whether the generation prompt may open a block of thoughts. Used with a chat
            template.
        system: The system prompt that most rows share, or None.
        mixed_systems: Whether the rows have different system prompts, so that none is used.
    """

    form: RawForm = "completion"
    thinking: bool = False
    system: str | None = None
    mixed_systems: bool = False

    @classmethod
    def read(cls, stored: object) -> "PromptFormat":
        """Return the format stored in a config file; the default if the value is not a format."""
        if not isinstance(stored, Mapping):
            return cls()

        # Another version may have stored values that are unknown here.
        values: Mapping[Any, Any] = stored
        form = values.get("form")
        if form not in RAW_FORMS:
            form = "completion"
        system = values.get("system")
        if not isinstance(system, str) or not system.strip():
            system = None
        mixed = values.get("mixed_systems") is True
        return cls(form, values.get("thinking") is True, system, mixed)

    def stored(self) -> dict[str, Any]:
        """Return the value to store in a config file; ``read`` is the inverse."""
        stored: dict[str, Any] = {"form": self.form, "thinking": self.thinking}
        if self.system is not None:
            stored["system"] = self.system
        if self.mixed_systems:
            stored["mixed_systems"] = True
        return stored

    def render_raw(self, prompt: str, system: str = "") -> str:
        """Return a prompt rendered in ``form``, for a model without a chat template."""
        template, _ = RAW_FORMS[self.form]
        return with_system(template.replace("{prompt}", prompt), system)


def with_system(prompt: str, system: str) -> str:
    """Return a prompt with a system prompt before it, for a model without a chat template."""
    return f"{system}\n\n{prompt}" if system.strip() else prompt


def format_of(model: object) -> PromptFormat:
    """Return the format that a model was trained with; the default for a base model."""
    found = getattr(model, "prompt_format", None)
    return found if isinstance(found, PromptFormat) else PromptFormat()
