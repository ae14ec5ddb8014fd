"""An Ollama ``Modelfile``: the weights, and the model's own chat template in Ollama's words.

The template is not looked up by family but rendered with Ollama's placeholders as the messages and
as today's date. Source: docs/template.md and template/template.go of Ollama; its ``currentDate``,
as 2026-11-26, came with 0.11.1.
"""

import contextlib
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..data.chat_template import dated
from ..errors import ModelError

_SYSTEM, _PROMPT, _ANSWER = (
    "{{ $.System }}",
    "{{ .Content }}",
    "{{.Content}}",
)  # the two are one to Ollama, not to us
_TODAY = "{{ currentDate }}"


def modelfile(tokenizer: TokenizerWrapper, weights: str, adapter: str | None = None) -> str:
    """Return a Modelfile over ``weights``, a GGUF file or a name that Ollama knows, and a LoRA's GGUF file.

    Raises: ModelError where the chat template fails on messages, or changes them.
    """
    lines = [f"FROM {weights}", *([f"ADAPTER {adapter}"] if adapter else [])]
    if not tokenizer.has_chat_template:
        return "\n".join([*lines, 'TEMPLATE """{{ .Prompt }}"""', ""])
    system, prompt, answer = ("system", _SYSTEM), ("user", _PROMPT), ("assistant", _ANSWER)
    end = _render(tokenizer, prompt, answer).rpartition(_ANSWER)[2]
    later = (
        _render(tokenizer, prompt, answer, prompt, asks=True)
        .rpartition(_ANSWER)[2]
        .removeprefix(end)
    )
    first = _without_bos(
        tokenizer, _render(tokenizer, prompt, asks=True)
    )  # with the system message of its own, if any
    with contextlib.suppress(ModelError):  # it knows no system message
        given = _without_bos(tokenizer, _render(tokenizer, system, prompt, asks=True))
        first = f"{{{{ if $.System }}}}{given}{{{{ else }}}}{first}{{{{ end }}}}"
    # a chat's first prompt is its first message, or the second behind the system's; an answer that
    # is last goes on
    turn = f"{{{{ if le $i 1 }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}"
    answered = f"{_ANSWER}{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{end}{{{{ end }}}}"
    roles = (
        f'{{{{ if eq .Role "user" }}}}{turn}{{{{ else if eq .Role "assistant" }}}}{answered}{{{{'
        " end }}"
    )
    lines.append(f'TEMPLATE """{{{{ range $i, $_ := .Messages }}}}{roles}{{{{ end }}}}"""')
    if end.strip():
        lines.append(f"PARAMETER stop {end.strip()}")
    return "\n".join([*lines, ""])


def _render(tokenizer: TokenizerWrapper, *turns: tuple[str, str], asks: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    options: dict[str, Any] = dated(tokenizer, lambda _: _TODAY)
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, **options
            )
        )
    except Exception as problem:  # a template is a program  # noqa: BLE001
        raise ModelError(
            f"its chat template can't become a Modelfile's: it fails with {problem!r:.100}"
        ) from None
    if any(content not in text for _, content in turns):
        raise ModelError(
            "its chat template can't become a Modelfile's: it leaves out or changes messages"
        )
    return text


def _without_bos(tokenizer: TokenizerWrapper, text: str) -> str:
    """Drop the token that llama.cpp puts before every text itself."""
    return (
        text.removeprefix(tokenizer.bos_token)
        if tokenizer.encode("a")[0] == tokenizer.bos_token_id
        else text
    )
