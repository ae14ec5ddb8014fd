"""Write an Ollama ``Modelfile``: the weights, and the prompt format as an Ollama template.

A chat template is translated by rendering it with Ollama's placeholders in place of the messages
and of today's date. A model without a chat template gets the prompt format that its adapter was
trained with. Source: docs/template.md and template/template.go of Ollama. ``currentDate``, which
is written as 2026-11-26, exists since Ollama 0.11.1.
"""

import contextlib
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..data.chat_template import dated
from ..errors import ModelError
from ..models.prompt_format import PromptFormat

# To Ollama, the last two are the same expression. Here the different spelling distinguishes a
# prompt from an answer in the rendered text.
_SYSTEM = "{{ $.System }}"
_PROMPT = "{{ .Content }}"
_ANSWER = "{{.Content}}"
_TODAY = "{{ currentDate }}"
_RAW_PROMPT = "{{ .Prompt }}"
_RAW_SYSTEM = "{{ .System }}"


def modelfile(
    tokenizer: TokenizerWrapper,
    weights: str,
    adapter: str | None = None,
    prompt_format: PromptFormat | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: The model's tokenizer.
        weights: A GGUF file, or the name of a model in Ollama.
        adapter: A GGUF file with a LoRA.
        prompt_format: The system prompt, and how prompts are rendered if the tokenizer has no chat
            template; None for the bare prompt.

    Raises:
        ModelError: The chat template fails, or changes the messages.
    """
    form = prompt_format or PromptFormat()
    lines = [f"FROM {weights}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")

    if tokenizer.has_chat_template:
        template, end_of_turn = _chat_template(tokenizer)
    else:
        system = _RAW_SYSTEM if form.system is not None else ""
        template, end_of_turn = form.render_raw(_RAW_PROMPT, system), ""

    lines.append(f'TEMPLATE """{template}"""')
    if form.system is not None:
        lines.append(_system_line(form.system))
    if end_of_turn:
        lines.append(f"PARAMETER stop {end_of_turn}")
    return "\n".join([*lines, ""])


def _system_line(system: str) -> str:
    """Return the line that sets the system prompt.

    Raises:
        ModelError: The text contains the quotation marks that would end it.
    """
    if '"""' in system:
        raise ModelError(
            'a Modelfile can\'t contain a system prompt with """ in it: train with another one'
        )
    return f'SYSTEM """{system}"""'


def _chat_template(tokenizer: TokenizerWrapper) -> tuple[str, str]:
    """Return a chat template in Ollama's language, and the text that ends a turn."""
    system = ("system", _SYSTEM)
    prompt = ("user", _PROMPT)
    answer = ("assistant", _ANSWER)

    # Find the text that follows an answer, and the text that a later prompt adds to a chat.
    end = _after_last_answer(_render(tokenizer, prompt, answer))
    later = _render(tokenizer, prompt, answer, prompt, asks=True)
    later = _after_last_answer(later).removeprefix(end)

    # Render the first prompt, which may include the template's default system message. If the
    # template refuses a system message, the Modelfile has no place for one.
    first = _without_bos(tokenizer, _render(tokenizer, prompt, asks=True))
    with contextlib.suppress(ModelError):
        with_system = _without_bos(tokenizer, _render(tokenizer, system, prompt, asks=True))
        first = f"{{{{ if $.System }}}}{with_system}{{{{ else }}}}{first}{{{{ end }}}}"

    # The first prompt is the first message, or the second after a system message. If the last
    # message is an answer, the model continues it, so its end marker is left out.
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
    """Remove the BOS token from the start, because llama.cpp adds it to every text."""
    adds_bos = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text
