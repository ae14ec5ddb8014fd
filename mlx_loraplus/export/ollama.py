"""An Ollama ``Modelfile``: the weights, and the model's own chat template in Ollama's words.

The template is not looked up by family but rendered with Ollama's placeholders as the messages.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError
from ..places import write_atomically

_SYSTEM, _PROMPT, _RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"


def write_modelfile(folder: Path, tokenizer: TokenizerWrapper, weights: str, adapter: str | None = None) -> None:
    """Write ``modelfile`` into a folder; raises as that does."""
    write_atomically(folder / "Modelfile", modelfile(tokenizer, weights, adapter).encode())


def modelfile(tokenizer: TokenizerWrapper, weights: str, adapter: str | None = None) -> str:
    """Return a Modelfile over ``weights``, a GGUF file or a name that Ollama knows, and a LoRA's GGUF file.

    Raises: ModelError where the chat template fails on messages, or changes them.
    """
    lines = [f"FROM {weights}", *([f"ADAPTER {adapter}"] if adapter else [])]
    if not tokenizer.has_chat_template:
        return "\n".join([*lines, f'TEMPLATE """{_PROMPT}"""', ""])
    system, prompt, answer = (
        {"role": role, "content": text}
        for role, text in (("system", _SYSTEM), ("user", _PROMPT), ("assistant", _RESPONSE))
    )
    end = _render(tokenizer, prompt, answer).rpartition(_RESPONSE)[2]
    turn = _render(tokenizer, prompt, answer, prompt, asks=True).rpartition(_RESPONSE)[2].removeprefix(end)
    alone = _without_bos(tokenizer, _render(tokenizer, prompt, asks=True))
    first = turn
    with contextlib.suppress(ModelError):  # it knows no system message
        first = _without_bos(tokenizer, _render(tokenizer, system, prompt, asks=True))
    if first != turn:
        before, after = first.split(_SYSTEM, 1)
        if alone != turn and alone.startswith(before) and alone.endswith(after):  # it has one of its own
            lines.append(f'SYSTEM """{alone.removeprefix(before).removesuffix(after)}"""')
        turn = f"{{{{ if .System }}}}{first}{{{{ else }}}}{turn}{{{{ end }}}}"
    lines.append(f'TEMPLATE """{turn}{_RESPONSE}{end}"""')
    if end.strip():
        lines.append(f"PARAMETER stop {end.strip()}")
    return "\n".join([*lines, ""])


def _render(tokenizer: TokenizerWrapper, *messages: Mapping[str, Any], asks: bool = False) -> str:
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except Exception as problem:  # a template is a program  # noqa: BLE001
        raise ModelError(f"its chat template can't become a Modelfile's: it fails with {problem!r:.100}") from None
    if any(message["content"] not in text for message in messages):
        raise ModelError("its chat template can't become a Modelfile's: it leaves out or changes messages")
    return text


def _without_bos(tokenizer: TokenizerWrapper, text: str) -> str:
    """Drop the token that llama.cpp puts before every text itself."""
    return text.removeprefix(tokenizer.bos_token) if tokenizer.encode("a")[0] == tokenizer.bos_token_id else text
