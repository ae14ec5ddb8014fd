"""An Ollama ``Modelfile``: the weights, and the model's prompt form in Ollama's template language.

A chat template is translated by rendering it with Ollama's placeholders in place of the messages
and of today's date. A model without one gets the prompt form that its adapter was trained with.
Source: docs/template.md and template/template.go of Ollama; its ``currentDate``, written as
2026-11-26, came with 0.11.1.
"""

import contextlib
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..data.chat_template import dated
from ..errors import ModelError
from ..models.prompt_format import PromptFormat

# Ollama reads the last two as the same expression. The different spelling tells a prompt from an
# answer in the rendered text.
_SYSTEM = "{{ $.System }}"
_PROMPT = "{{ .Content }}"
_ANSWER = "{{.Content}}"
_TODAY = "{{ currentDate }}"
_RAW_PROMPT = "{{ .Prompt }}"


def modelfile(
    tokenizer: TokenizerWrapper,
    weights: str,
    adapter: str | None = None,
    prompt_format: PromptFormat | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: The model's.
        weights: A GGUF file, or a name that Ollama knows.
        adapter: A LoRA in a GGUF file.
        prompt_format: How prompts are written if the tokenizer has no chat template; None for the
            bare prompt.

    Raises:
        ModelError: The chat template fails on messages, or changes them.
    """
    lines = [f"FROM {weights}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")

    if tokenizer.has_chat_template:
        template, end_of_turn = _chat_template(tokenizer)
    else:
        template, end_of_turn = (prompt_format or PromptFormat()).write_raw(_RAW_PROMPT), ""

    lines.append(f'TEMPLATE """{template}"""')
    if end_of_turn:
        lines.append(f"PARAMETER stop {end_of_turn}")
    return "\n".join([*lines, ""])


def _chat_template(tokenizer: TokenizerWrapper) -> tuple[str, str]:
    """Return a chat template in Ollama's language, and the text that ends a turn."""
    system = ("system", _SYSTEM)
    prompt = ("user", _PROMPT)
    answer = ("assistant", _ANSWER)

    # What follows an answer, and what a later prompt adds to a chat.
    end = _after_last_answer(_render(tokenizer, prompt, answer))
    later = _render(tokenizer, prompt, answer, prompt, asks=True)
    later = _after_last_answer(later).removeprefix(end)

    # The first prompt, which may bring the template's default system message. A template that
    # refuses a system message is written without one.
    first = _without_bos(tokenizer, _render(tokenizer, prompt, asks=True))
    with contextlib.suppress(ModelError):
        with_system = _without_bos(tokenizer, _render(tokenizer, system, prompt, asks=True))
        first = f"{{{{ if $.System }}}}{with_system}{{{{ else }}}}{first}{{{{ end }}}}"

    # The first prompt is the first message, or the second if a system message precedes it. An
    # answer in last place is continued, so its end is left out.
    turn = f"{{{{ if le $i 1 }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}"
    answered = f"{_ANSWER}{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{end}{{{{ end }}}}"
    roles = (
        f'{{{{ if eq .Role "user" }}}}{turn}'
        f'{{{{ else if eq .Role "assistant" }}}}{answered}{{{{ end }}}}'
    )
    template = f"{{{{ range $i, $_ := .Messages }}}}{roles}{{{{ end }}}}"
    return template, end.strip()


def _after_last_answer(text: str) -> str:
    return text.rpartition(_ANSWER)[2]


def _render(tokenizer: TokenizerWrapper, *turns: tuple[str, str], asks: bool = False) -> str:
    """Return a chat as text, ending with the header of an answer if ``asks``.

    Raises:
        ModelError: The template fails, or its text does not contain every message unchanged.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    options: dict[str, Any] = dated(tokenizer, lambda _: _TODAY)

    try:
        text = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, **options
            )
        )
    # A template is a program, which may raise anything.
    except Exception as problem:  # noqa: BLE001
        raise ModelError(
            "the chat template can't be converted for Ollama, because it fails with"
            f" {problem!r:.100}: use a model with another template"
        ) from None

    if any(content not in text for _, content in turns):
        raise ModelError(
            "the chat template can't be converted for Ollama, because it leaves out or changes"
            " messages: use a model with another template"
        )
    return text


def _without_bos(tokenizer: TokenizerWrapper, text: str) -> str:
    """Drop the token that llama.cpp adds at the start of every text."""
    adds_bos = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
