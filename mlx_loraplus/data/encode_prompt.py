"""Encode a prompt for generation, with the same tokens as in training; read what it generates."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import DataError
from ..models.prompt_format import PromptFormat
from .chat_notes import shows_tools
from .chat_template import ChatTemplate
from .messages import BadRowError
from .special_tokens import end_tokens, fast_tokenizer, leading_bos
from .template_check import ANSWER, check_template
from .template_forms import ChatForm
from .thoughts import find_open_tags


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
        chat: Whether to render the prompt in the training format, instead of unchanged.
        earlier: Messages that a chat template puts before the prompt. If the first is a system
            message, it replaces the one that the model was trained with; an empty one removes it.
        form: The format that the model was trained with.
        tools: The tools that the model may call; a chat template renders them in the prompt.

    Raises:
        DataError: The template refuses the messages or renders no tools, or the prompt has no
            tokens, or is not valid UTF-8.
        ModelError: The template can't render any chat.
    """
    form = form or PromptFormat()
    bos = leading_bos(tokenizer)
    system, messages = _chat_before_answer(prompt, earlier, form)

    # Without a format around it, an empty prompt leaves BOS, after which a model can begin a text.
    has_format = chat and (tokenizer.has_chat_template or form.render_raw("", system).strip())
    if has_format and not prompt.strip():
        raise DataError(
            "the prompt is empty; give at least one word (--no-chat lets a model begin a text)"
        )

    # A chat template renders BOS itself.
    if not chat:
        text = prompt
    elif tokenizer.has_chat_template:
        check_template(tokenizer)
        template = ChatTemplate(tokenizer)
        text = template.render(messages, ask=True, thinking=form.thinking, tools=tools)
        if tools and not shows_tools(template, messages, tools, ask=True, thinking=form.thinking):
            raise DataError(
                "the tools can't reach the model, because its chat template renders none; leave"
                " them out, or describe them in the system message"
            )
        bos = []
    else:
        text = form.render_raw(prompt, system)

    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the prompt {text!r:.60} has characters that are not valid UTF-8"
        ) from None
    ids = fast_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    if ids[:1] != bos:
        ids = bos + ids
    if not ids:
        raise DataError("the prompt is empty; give at least one word")
    return ids


def content_of_answer(
    text: str,
    prompt: str,
    tokenizer: TokenizerWrapper,
    *,
    earlier: Sequence[dict[str, str]] = (),
    form: PromptFormat,
) -> str:
    """Return the content of a generated answer, without what a chat template renders around it.

    The template renders that text itself when the answer is one of the earlier messages of the next
    prompt.

    Args:
        text: The generated text, without the token that ends generation.
        prompt: The user's message that was answered.
        tokenizer: The model's tokenizer.
        earlier: Messages before the prompt, as in ``encode_prompt``.
        form: The format that the model was trained with.
    """
    if not tokenizer.has_chat_template:
        return text

    # Render an ordinary answer to the same prompt, as in training.
    ends = end_tokens(tokenizer)
    template = ChatTemplate(tokenizer, ends=ends)
    _, messages = _chat_before_answer(prompt, earlier, form)
    answer = {"role": "assistant", "content": ANSWER}
    asked = template.render(messages, ask=True, thinking=form.thinking)
    try:
        turn = template.render_turn(ChatForm([*messages, answer], {}), len(messages), None)
    except BadRowError:
        return text

    # Remove what surrounds it from the generated text too.
    before, _, after = turn.answer.partition(ANSWER)
    for end in ends:
        after = after.removesuffix(end)
    if turn.prompt == asked and text.startswith(before):
        return text.removeprefix(before).removesuffix(after)

    # Thoughts in a content begin with the tag that opens them, which the prompt contains.
    tags = find_open_tags(asked)
    if tags is None or tags[1] not in text:
        return text
    return asked[asked.rindex(tags[0]) :] + text


def _chat_before_answer(
    prompt: str, earlier: Sequence[dict[str, str]], form: PromptFormat
) -> tuple[str, list[dict[str, str]]]:
    """Return the system prompt, and all messages of the chat that the model answers."""
    system = form.system or ""
    if earlier and earlier[0]["role"] == "system":
        system, earlier = earlier[0]["content"], earlier[1:]
    first = [{"role": "system", "content": system}] if system.strip() else []
    return system, [*first, *earlier, {"role": "user", "content": prompt}]
