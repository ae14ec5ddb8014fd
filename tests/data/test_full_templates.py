"""What the full templates of public models do that their short forms in ``templates`` do not."""

import re
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.errors import DataError
from tests.data.conftest import LetterTokenizer
from tests.data.reading import encode_rows
from tests.data.test_template_kinds import CALL, CHATML, TEMPLATES, TOOLS, bot, learned, user

RESULT = {"role": "tool", "name": "plover", "tool_call_id": CALL["id"], "content": "grue"}
CHAT = [user("zork"), bot("", tool_calls=[CALL]), RESULT, bot("quux")]
TURN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- for call in m.tool_calls or [] %}{{- CALL }}{%- endfor %}"
    "{{- (m.content or '') + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def encoded_chat(tokenizer: Any, chat: list[dict[str, Any]] = CHAT) -> Any:
    """Encode a chat with tools."""
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
    return encoded


@pytest.mark.parametrize("template", ["gemma4", "response_markers"])
def test_thoughts_of_a_call_stay_where_the_template_has_a_place_for_them(
    letters: LetterTokenizer, template: str
):
    """It has none for those of an answer; the prompt for the answer is still that of the template."""
    tokenizer = letters(template, **TEMPLATES[template])
    key = "tool_plan" if "tool_plan" in str(tokenizer.chat_template) else "reasoning_content"
    chat = [message | {key: "frobozz"} if "tool_calls" in message else message for message in CHAT]
    chat[-1] = chat[-1] | {key: "gnusto"}
    encoded = encoded_chat(tokenizer, chat)
    text = learned(encoded, tokenizer)
    assert text.count("frobozz") == text.count("gnusto") == 1
    assert any("no place for the thoughts of some answers" in note for note in encoded.notes)

    asked = tokenizer.apply_chat_template(
        chat[:3], tools=TOOLS, add_generation_prompt=True, enable_thinking=True
    )
    assert "frobozz" in tokenizer.decode(asked)
    starts = [example.tokens[: len(asked)].tolist() for example in encoded.examples]
    assert asked in starts


@pytest.mark.parametrize(
    ("arguments", "is_python"),
    [
        ("call.function.arguments", False),  # prints what it gets: a string of JSON
        ("call.function.arguments | tojson", False),
        ("call.function.arguments.items() | list and call.function.arguments", True),
    ],
)
def test_arguments_are_in_json_where_the_template_can_render_it(
    letters: LetterTokenizer, arguments: str, is_python: bool
):
    tokenizer = letters("chatml", **CHATML)
    call = "call.function.name + ' ' ~ (" + arguments + ")"
    tokenizer.chat_template = "{{- tools | tojson }}" + TURN.replace("CALL", call)
    encoded = encoded_chat(tokenizer)
    text = learned(encoded, tokenizer)
    assert bool(re.search(r"plover \{'", text)) == is_python
    assert bool(re.search(r'plover \{"', text)) != is_python
    assert any("as Python, not as JSON" in note for note in encoded.notes) == is_python


def test_tools_that_a_template_needs_but_does_not_render_are_noted(letters: LetterTokenizer):
    """It fails without tools, and shows them only after a system message."""
    tokenizer = letters("chatml", **CHATML)
    shown = (
        "{%- if tools | length > 0 and messages[0].role == 'system' %}{{- tools | tojson }}"
        "{%- endif %}"
    )
    call = "call.function.name + ' ' + call.function.arguments | tojson"
    tokenizer.chat_template = shown + TURN.replace("CALL", call)
    note = "the chat template leaves out or rewrites tools"
    assert note in encoded_chat(tokenizer).notes
    with pytest.raises(DataError, match="the tools can't reach the model"):
        encode_prompt("zork", tokenizer, tools=TOOLS)

    # With a system message, they reach the model.
    system = {"role": "system", "content": "frotz"}
    assert note not in encoded_chat(tokenizer, [system, *CHAT]).notes
    assert encode_prompt("zork", tokenizer, tools=TOOLS, earlier=[system])


def test_an_answer_without_an_end_token_is_noted(letters: LetterTokenizer):
    """Apriel's template ends a call only where the result of its tool follows."""
    tokenizer = letters("chatml", **CHATML)
    call = "call.function.name + ' ' + call.function.arguments | tojson"
    template = "{{- tools | tojson }}" + TURN.replace("CALL", call)
    tokenizer.chat_template = template
    assert not encoded_chat(tokenizer).notes

    ends_later = "(m.content or '') + ('\\n' if m.tool_calls and loop.last else '<|im_end|>\\n')"
    tokenizer.chat_template = template.replace("(m.content or '') + '<|im_end|>\\n'", ends_later)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "for call in", "if m.tool_calls and not loop.last %}{{- '#' }}{%- endif %}{%- for call in"
    )
    encoded = encoded_chat(tokenizer)
    (note,) = encoded.notes
    assert note.startswith("the chat template renders no end token after some answers")
    ends = [example.tokens[np.flatnonzero(example.supervised)[-1]] for example in encoded.examples]
    assert any(end not in tokenizer.eos_token_ids for end in ends)


def test_the_end_of_every_prompt_has_the_tokens_of_generation(smollm2: TokenizerWrapper):
    """Line breaks before a word are two tokens for SmolLM2, and one at the end of a prompt."""
    template = smollm2.chat_template
    try:
        smollm2.chat_template = TURN.replace("m.role + '\\n'", "m.role + '\\n\\n'").replace(
            "assistant\\n'", "assistant\\n\\n'"
        )
        chat = [user("zork"), bot("xyzzy"), user("grue"), bot("quux"), user("frotz"), bot("wug")]
        (encoded,) = encode_rows([make_row({"messages": chat}, 1)], smollm2)
        (example,) = encoded.examples
        begins = np.flatnonzero(example.supervised & ~np.append(False, example.supervised[:-1]))
        assert len(begins) == 3
        for begin, turn in zip(begins, (1, 3, 5), strict=True):
            asked = smollm2.apply_chat_template(chat[:turn], add_generation_prompt=True)
            assert example.tokens[begin - 3 : begin].tolist() == asked[-3:]
        assert smollm2.decode(example.tokens).count("\n\n") == 6
        assert sum("there is nothing to do" in note for note in encoded.notes) == 1
    finally:
        smollm2.chat_template = template
