"""Check that a tokenizer's chat template can render a chat at all.

A template may contain a mistake, use a function that does not exist, refuse every chat, or render
nothing. Each row would then be reported as a bad row, although the rows are not to blame.
"""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError
from ..failures import reason_text
from ..files import cache_folder

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""The errors that a template may raise. Templates are programs that run in a sandbox."""

QUESTION = "An ordinary question"
ANSWER = "Some short answer"

SOME_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Look up.", "parameters": {"type": "object"}},
}


def check_template(tokenizer: TokenizerWrapper) -> None:
    """Check that a chat template can render one of a few ordinary chats.

    Args:
        tokenizer: A tokenizer that has a chat template.

    Raises:
        ModelError: The template fails for each of them, or renders none of their messages.
    """
    # One chat that the template renders is enough.
    first_error: Exception | None = None
    for messages, options in _ordinary_chats():
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TEMPLATE_ERRORS as error:
            first_error = first_error or error
            continue
        if QUESTION in text or ANSWER in text:
            return

    # Say why it renders none, with the place of the first error.
    if not str(tokenizer.chat_template or "").strip():
        reason = "is empty"
    elif first_error is None:
        reason = "renders none of a chat's messages"
    else:
        line = _line_of(first_error)
        where = f" at line {line}" if line else ""
        reason = f"fails for every chat{where} ({reason_text(first_error):.300})"
    raise ModelError(
        f"{_place_of(tokenizer)} {reason}; correct the template, or use a model with another one"
    ) from first_error


def _ordinary_chats() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield short chats, with the options to render each."""
    question = {"role": "user", "content": QUESTION}
    answer = {"role": "assistant", "content": ANSWER}
    in_parts = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    system = {"role": "system", "content": "Be brief."}
    tools: dict[str, Any] = {"tools": [SOME_TOOL]}

    yield [question], {"add_generation_prompt": True}
    yield [question, answer], {}
    yield [in_parts], {"add_generation_prompt": True}
    yield [system, question], {"add_generation_prompt": True}
    yield [system, question, answer], tools


def _line_of(error: Exception) -> int | None:
    """Return the number of the template's line where an error occurred, or None."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno

    # Jinja adds the template's own lines to the traceback
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _place_of(tokenizer: TokenizerWrapper) -> str:
    """Return which chat template this is: the file that holds it."""
    name_or_path = str(getattr(tokenizer, "name_or_path", ""))
    if not name_or_path:
        return "the model's chat template"
    folder = Path(name_or_path)
    if folder.is_relative_to(cache_folder()):
        return "the chat template in the model's GGUF file"
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            return f"the chat template in {folder / name}"
    return "the model's chat template"
