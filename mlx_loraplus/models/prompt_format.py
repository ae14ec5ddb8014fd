"""How a prompt is written when a model is asked: stored with the adapter, so that it is asked as it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PROMPT_FORMAT = (  # the key in adapter_config.json, and in a fused model's config.json
    "prompt_format"
)

RawForm = Literal["completion", "alpaca", "question"]

RAW_FORMS: dict[str, tuple[str, str]] = {
    # Without a chat template: what is asked, and what stands before the answer.
    "completion": ("{prompt}", ""),
    "alpaca": ("### Instruction:\n{prompt}\n\n### Response:\n", ""),
    "question": ("Question: {prompt}\nAnswer:", " "),
}


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are written.

    Args:
        form: Without a chat template, the kind of row whose form a prompt gets.
        thinking: With a chat template, whether the generation prompt may leave a block of thoughts
            open.
    """

    form: RawForm = "completion"
    thinking: bool = False

    @classmethod
    def read(cls, stored: object) -> "PromptFormat":
        """Return what ``adapter_config.json`` or ``config.json`` has stored; the default for anything else."""
        if not isinstance(stored, Mapping):
            return cls()
        values: Mapping[Any, Any] = stored
        form, thinking = values.get("form"), values.get("thinking")
        return cls(form if form in RAW_FORMS else "completion", thinking is True)

    def stored(self) -> dict[str, Any]:
        """Return what ``read`` takes."""
        return {"form": self.form, "thinking": self.thinking}

    def write_raw(self, prompt: str) -> str:
        """Return a prompt in its form, for a model without a chat template."""
        return RAW_FORMS[self.form][0].replace("{prompt}", prompt)


def format_of(model: object) -> PromptFormat:
    """Return the format that a model was trained with; the default for a model that was not trained here."""
    found = getattr(model, "prompt_format", None)
    return found if isinstance(found, PromptFormat) else PromptFormat()
