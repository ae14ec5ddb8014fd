"""Encode a prompt for generation, with the same tokens as in training."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import DataError
from ..models.prompt_format import PromptFormat
from .chat_template import ChatTemplate
from .special_tokens import fast_tokenizer, leading_bos
from .template_check import check_template


def encode_prompt(
    prompt: str,
    tokenizer: TokenizerWrapper,
    *,
    chat: bool = True,
    earlier: Sequence[dict[str, str]] = (),
    form: PromptFormat | None = None,
    tools: Sequence[Any] = (),
) -> list[int]:
    """Return a prompt's token ids, which are the same as in training except for the date.

    Args:
        prompt: The text, or the user's message.
        tokenizer: A tokenizer that has a fast version.
        chat: Whether to write the prompt in the training format, instead of unchanged.
        earlier: Messages that a chat template puts before the prompt. If the first is a system
            message, it replaces the one that the model was trained with; empty, it removes it.
        form: The format that the model was trained with.
        tools: The tools that the model may call; a chat template writes them into the prompt.

    Raises:
        DataError: The template refuses the messages, or the prompt has no tokens.
        ModelError: The template can't write any chat.
    """
    form = form or PromptFormat()
    bos = leading_bos(tokenizer)
    system = form.system or ""
    if earlier and earlier[0]["role"] == "system":
        system, earlier = earlier[0]["content"], earlier[1:]

    # A chat template writes BOS itself.
    if not chat:
        text = prompt
    elif tokenizer.has_chat_template:
        check_template(tokenizer)
        first = [{"role": "system", "content": system}] if system.strip() else []
        messages = [*first, *earlier, {"role": "user", "content": prompt}]
        template = ChatTemplate(tokenizer)
        text = template.render(messages, ask=True, thinking=form.thinking, tools=tools)
        bos = []
    else:
        text = form.write_raw(prompt, system)

    ids = fast_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    if ids[:1] != bos:
        ids = bos + ids
    if not ids:
        raise DataError("the prompt is empty; give at least one word")
    return ids
