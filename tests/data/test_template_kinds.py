"""Every template with every kind of row: each turn is trained on completely, or the row is refused.

No template contains the words of these rows, so the checks don't depend on the code under test.
"""

from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.data.tokenize import EncodedRow
from tests.data.conftest import LetterTokenizer
from tests.data.reading import encode_rows

CHATML = {"special": "<|im_start|> <think> </think>", "ends": "<|im_end|>"}
LLAMA3 = {
    "bos": "<|begin_of_text|>",
    "special": "<|start_header_id|> <|end_header_id|>",
    "ends": "<|eot_id|>",
}
TEMPLATES: dict[str, dict[str, str]] = {
    "alpaca": {}, "chatml": CHATML, "llama2": {}, "llama3": LLAMA3, "mistral": {}, "hermes_tools": CHATML,
    "gemma3": {"bos": "<bos>", "special": "<start_of_turn>", "ends": "<eos> <end_of_turn>"},
    "phi3": {"special": "<|system|> <|user|> <|assistant|>", "ends": "<|endoftext|> <|end|>"},
    "zephyr": {"special": "<|system|> <|user|> <|assistant|>"}, "qwen3": CHATML,
    # written after public shapes
    "empty_call": CHATML,  # a call without content is rendered as nothing
    "cuts_thoughts": CHATML,  # also those of the last turn
    # No switch
    "opens_thoughts": {"special": "<|bot|> <|user|> <|system|> <|tool|> <|call|> <think> </think>"},
    # Opens a block of thoughts, closes it by enable_thinking=False; calls in XML
    "thinking_switch": CHATML,
    "channels": {"special": "<|start|> <|message|> <|channel|>", "ends": "<|return|> <|call|> <|end|>"},
    # The user comes first
    "bracket_calls": {"special": "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"},
    "python_calls": LLAMA3,  # arguments as Python writes them
    "llama3_calls": LLAMA3,
    "llama4_calls": {
        "special": "<|header_start|> <|header_end|> <|python_start|> <|python_end|>", "ends": "<|eot|> <|eom|>",
    },
    "role_calls": {"special": "<|start_of_role|> <|end_of_role|>", "ends": "<|end_of_text|>"},
    # Shows tools and no calls; thoughts stay in the content
    "shows_tools": CHATML,
    "plain_roles": {"special": "<|system|> <|user|> <|assistant|>", "ends": "<|endoftext|> <|end|>"},
    # Calls in a form of their own, thoughts in a channel
    "turn_calls": {
        "bos": "<bos>", "ends": "<turn|>",
        "special": '<|turn> <|channel> <channel|> <|tool_call> <tool_call|> <|"|>',
    },
    "empty_blocks": CHATML,  # an empty block for the last turn, whatever its thoughts
    # The prompt opens a block (thinking=True) or writes an empty one; a chat only closes it
    "closes_thoughts": {"special": "<|bot|> <|user|> <|system|> <|tool|> <think> </think>"},
    # The prompt opens a block, and the content of the last turn follows without its end (Nemotron Nano 2)
    "unclosed_thoughts": {"special": "<|bot|> <|user|> <|system|> <|tool|> <|call|> <think> </think>"},
    "calls_first": CHATML,  # calls before the content, so thoughts in the content come too late (MiniCPM3)
    "system_if_asked": CHATML,  # a default system message, only in the prompt
    "own_tags": CHATML | {"special": "<|im_start|> <seed:think> </seed:think>"},
    "next_role_ends": {"special": "<|system|> <|assistant|>", "ends": "<|endoftext|> <|user|> <|observation|>"},
    "inlined_results": CHATML,  # what a tool returns stands inside the assistant's turn
    # Markers around answers and calls, thoughts beside calls only (Command R7B)
    "response_markers": {
        "ends": "<|turn_end|>",
        "special": "<|turn_start|> <|assistant|> <|START_RESPONSE|> <|START_THINKING|> <|END_THINKING|>",
    },
    # The id of a call is written in place of the function's name (Kimi K2)
    "id_calls": {"special": "<|im_assistant|> <|im_middle|> <|call_begin|>", "ends": "<|im_end|>"},
    # Results before the content of their call, no header after another assistant turn (Gemma 4)
    "merged_turns": {
        "bos": "<bos>", "ends": "<turn|> <|tool_response>", "special": "<|turn> <|tool_call> <tool_call|>",
    },
    # Families' own forms, with tools
    "gpt_oss": {"special": "<|start|> <|message|> <|channel|> <|end|>", "ends": "<|return|> <|call|>"},
    "gemma4": {
        "bos": "<bos>", "ends": "<turn|> <|tool_response>",
        "special": '<|turn> <|think|> <|tool> <tool|> <|channel> <channel|> <|tool_call> <tool_call|> <|"|>',
    },
    "qwen3_tools": CHATML,
    "qwen3_5": CHATML,
    "ministral3": {"special": "[INST] [/INST] [THINK] [/THINK] [TOOL_CALLS] [ARGS] [TOOL_RESULTS] [/TOOL_RESULTS]"},
    "olmo3": {"special": "<|im_start|>", "ends": "<|endoftext|> <|im_end|>"},
    "phi4_mini": {"special": "<|system|> <|user|> <|assistant|> <|tool|>", "ends": "<|endoftext|> <|end|>"},
}  # fmt: skip

ARGUMENTS = {
    "city": 'Zürich "Nord" & <Süd> it\'s',
    "days": 37,
    "metric": True,
    "more": [{"deep": "wug"}, None],
}
CALL = {
    "id": "c1a2b3c4d",
    "type": "function",
    "function": {"name": "plover", "arguments": ARGUMENTS},
}
TOOLS = [
    {"type": "function", "function": {"name": "plover", "description": "frotz", "parameters": {}}}
]
SPOKEN = ("Zürich", "37", "wug", "plover")  # of the call, in any writing


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


# kind -> (row, words to learn, thoughts to learn or to note)
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "completion": ({"prompt": "zork?", "completion": "xyzzy"}, ("xyzzy",), ()),
    "completion with a system": ({"system": "grue", "prompt": "zork?", "completion": "xyzzy"}, ("xyzzy",), ()),
    "blanks around": ({"prompt": "zork?\n", "completion": "\n  xyzzy  quux\n\n"}, ("xyzzy  quux",), ()),
    "alpaca": ({"instruction": "zork", "input": "grue", "output": "xyzzy"}, ("xyzzy",), ()),
    "two turns": ({"messages": [user("zork"), bot("xyzzy"), user("grue"), bot("quux")]}, ("xyzzy", "quux"), ()),
    "assistant first": ({"messages": [bot("xyzzy"), user("zork"), bot("quux")]}, ("xyzzy", "quux"), ()),
    "two users": ({"messages": [user("zork"), user("grue"), bot("xyzzy")]}, ("xyzzy",), ()),
    "call, empty content": ({"messages": [user("zork"), bot("", tool_calls=[CALL])], "tools": TOOLS}, SPOKEN, ()),
    "call, null content": ({"messages": [user("zork"), bot(None, tool_calls=[CALL])], "tools": TOOLS}, SPOKEN, ()),
    "two calls": ({"messages": [user("zork"), bot(None, tool_calls=[CALL, CALL])], "tools": TOOLS}, SPOKEN, ()),
    "call, answered": ({
        "messages": [
            user("zork"), bot("xyzzy", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "c1a2b3c4d", "name": "plover", "content": "grue"}, bot("quux"),
        ],
        "tools": TOOLS,
    }, (*SPOKEN, "xyzzy", "quux"), ()),
    "thoughts inside": ({"messages": [user("zork"), bot("<think>\nfrobozz\n</think>\n\nxyzzy")]},
        ("xyzzy",), ("frobozz",)),
    "reasoning_content": ({"messages": [user("zork"), bot("xyzzy", reasoning_content="frobozz")]},
        ("xyzzy",), ("frobozz",)),
    "thinking": ({"messages": [user("zork"), bot("xyzzy", thinking="frobozz")]}, ("xyzzy",), ("frobozz",)),
    "thoughts in two turns": ({"messages": [
        user("zork"), bot("xyzzy", reasoning_content="frobozz"),
        user("grue"), bot("quux", reasoning_content="gnusto"),
    ]}, ("xyzzy", "quux"), ("frobozz", "gnusto")),
    "thoughts before a call": (
        {"messages": [user("zork"), bot("", reasoning_content="frobozz", tool_calls=[CALL])], "tools": TOOLS},
        SPOKEN, ("frobozz",),
    ),
}  # fmt: skip
CALLS = {kind for kind in ROWS if "call" in kind}
WITH_CALLS = {
    "hermes_tools",
    "opens_thoughts",
    "thinking_switch",
    "channels",
    "bracket_calls",
    "python_calls",
    "turn_calls",
    "llama3_calls",
    "llama4_calls",
    "role_calls",
    "inlined_results",
    "next_role_ends",
    "response_markers",
    "id_calls",
    "merged_turns",
    "unclosed_thoughts",
    "calls_first",
    "gpt_oss",
    "gemma4",
    "qwen3_tools",
    "qwen3_5",
    "ministral3",
    "olmo3",
}
CONTENT_WITH_CALL = WITH_CALLS - {
    "bracket_calls", "channels", "inlined_results", "llama3_calls", "merged_turns", "python_calls", "response_markers",
}  # fmt: skip
NO_THOUGHTS = {
    "alpaca", "chatml", "llama2", "llama3", "mistral", "hermes_tools", "gemma3", "phi3", "zephyr", "empty_call",
    "bracket_calls", "python_calls", "llama3_calls", "llama4_calls", "role_calls", "plain_roles",
    "next_role_ends", "inlined_results", "id_calls", "system_if_asked", "calls_first",
    "olmo3", "phi4_mini",
}  # fmt: skip
NO_THOUGHTS_WITHOUT_CALLS = {"cuts_thoughts", "response_markers", "merged_turns", "gemma4"}
THOUGHTS_WITH_CALLS = {"response_markers", "gemma4"}
CUTS_BESIDE_CALLS = ("gpt_oss", "call, answered")  # once an answer follows
STRICT = {"gemma3": {"assistant first", "two users"}, "bracket_calls": {"assistant first"},
    "ministral3": {"assistant first", "two users"}, "qwen3_5": {"assistant first"},
}  # fmt: skip
ASKED = ("zork", "grue", "frotz")


def can_train(template: str, kind: str) -> bool:
    """Return whether a template supports a kind of row, which then has to be trained on."""
    if kind in STRICT.get(template, ()):
        return False
    if kind == "two calls" and template in ("channels", "gpt_oss", "python_calls", "llama3_calls"):
        return False
    if kind == "call, answered":
        return template in CONTENT_WITH_CALL
    return kind not in CALLS or template in WITH_CALLS


def has_no_place(template: str, kind: str) -> bool:
    """Return whether a template has no place for the thoughts of a row."""
    if template in NO_THOUGHTS:  # of a row that has them in its content, they are a part of it
        return kind != "thoughts inside"
    has_call = kind == "thoughts before a call" and template in THOUGHTS_WITH_CALLS
    return template in NO_THOUGHTS_WITHOUT_CALLS and not has_call


def learned(encoded: EncodedRow, tokenizer: TokenizerWrapper) -> str:
    """Return the text of all supervised tokens."""
    return "\n".join(
        tokenizer.decode(example.tokens[example.supervised]) for example in encoded.examples
    )


def encoded_row(
    letters: LetterTokenizer, template: str, kind: str, train_on: Any
) -> tuple[EncodedRow, TokenizerWrapper]:
    tokenizer = letters(template, **TEMPLATES[template])
    return encode_rows([make_row(ROWS[kind][0], 1)], tokenizer, train_on)[0], tokenizer


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_row_is_trained_on_completely_or_refused(
    letters: LetterTokenizer, template: str, kind: str
):
    encoded, tokenizer = encoded_row(letters, template, kind, "turns")
    _, words, thoughts = ROWS[kind]
    assert (encoded.problem is None) == can_train(template, kind), encoded.problem
    if encoded.problem is not None:
        assert not encoded.examples
        assert "\n" not in encoded.problem
        return
    text = learned(encoded, tokenizer)
    assert [word for word in words if word not in text and word.encode("unicode_escape").decode() not in text
            and word.replace("ü", "\\u00fc") not in text] == []  # fmt: skip
    assert [word for word in ASKED if word in text] == [], "the prompt is not trained on"
    assert [word for word in thoughts if word not in text] == []
    is_noted = any("has no place for" in note for note in encoded.notes)
    assert is_noted == (bool(thoughts) and has_no_place(template, kind)), encoded.notes


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_on_everything_loses_nothing_silently(
    letters: LetterTokenizer, template: str, kind: str
):
    encoded, tokenizer = encoded_row(letters, template, kind, "everything")
    _, words, thoughts = ROWS[kind]
    if encoded.problem is not None:
        is_cut = (template, kind) == CUTS_BESIDE_CALLS
        assert is_cut or not can_train(template, kind), encoded.problem
        return
    text = learned(encoded, tokenizer)
    plain = [word for word in words if word not in SPOKEN]
    assert [word for word in plain if word not in text] == []
    assert kind not in CALLS or template in WITH_CALLS, "a call that is not rendered is a bad row"
    lost = [word for word in thoughts if word not in text]
    assert not lost or any("thoughts" in note for note in encoded.notes), (lost, encoded.notes)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_the_same_in_training_and_generation(letters: LetterTokenizer, template: str):
    encoded, tokenizer = encoded_row(letters, template, "completion", "turns")
    (example,) = encoded.examples
    prompt = encode_prompt("zork?", tokenizer)
    trained = example.tokens[: int(np.argmax(example.supervised))].tolist()
    if template in ("channels", "gpt_oss"):  # it writes the date, which is today's in generation
        prompt, trained = (
            tokenizer.decode(ids).partition("<|end|>")[2] for ids in (prompt, trained)
        )
    assert prompt == trained


@pytest.mark.parametrize("kind", ["completion", "two turns", "thoughts inside", "assistant first"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_learned_turn_ends_generation(letters: LetterTokenizer, template: str, kind: str):
    encoded, tokenizer = encoded_row(letters, template, kind, "turns")
    for example in encoded.examples:
        ends = np.flatnonzero(example.supervised & ~np.append(example.supervised[1:], False))
        assert set(example.tokens[ends].tolist()) <= set(tokenizer.eos_token_ids)


@pytest.mark.parametrize("row", ["thoughts inside", "reasoning_content"])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("empty_blocks", "<think>frobozz</think>xyzzy<|im_end|>"),
        ("closes_thoughts", "frobozz</think>xyzzy</s>"),
        ("own_tags", "<seed:think>frobozz</seed:think>xyzzy<|im_end|>"),
    ],
)
def test_thoughts_stand_in_one_block_with_the_tags_of_the_template(
    letters: LetterTokenizer, template: str, text: str, row: str
):
    encoded, tokenizer = encoded_row(letters, template, row, "turns")
    assert learned(encoded, tokenizer).replace("\n", "") == text
    assert not encoded.notes


def test_results_of_tools_inside_a_turn_are_not_learned(letters: LetterTokenizer):
    encoded, _ = encoded_row(letters, "inlined_results", "call, answered", "turns")
    assert encoded.examples == []
    assert "can't be supervised by turn: the text before messages[3]" in str(encoded.problem)


def test_a_template_that_needs_tools_takes_rows_with_tools(letters: LetterTokenizer):
    tokenizer = letters("hermes_tools", **TEMPLATES["hermes_tools"])
    tokenizer.chat_template = (
        "{%- for tool in tools -%}{{- tool.function.name -}}{%- endfor -%}"
        + (tokenizer.chat_template)
    )
    (encoded,) = encode_rows([make_row(ROWS["call, answered"][0], 1)], tokenizer)
    assert encoded.problem is None
    assert not any("leaves out" in note for note in encoded.notes)


def test_calls_of_another_turn_do_not_count(letters: LetterTokenizer):
    """The template shows only the first call, so the second is lost although both are the same."""
    tokenizer = letters("hermes_tools", **TEMPLATES["hermes_tools"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.role == 'assistant' and message.tool_calls",
        "loop.index0 == 1 and message.tool_calls",
    )
    called = bot("", tool_calls=[CALL])
    row = {
        "messages": [user("zork"), called, {"role": "tool", "content": "grue"}, called],
        "tools": TOOLS,
    }
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    assert encoded.examples == []
    assert "messages[3]" in str(encoded.problem)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "chatml",
            bot("I ask plover", tool_calls=[{"function": {"name": "plover", "arguments": {}}}]),
        ),
        (
            "chatml",
            bot("Degrees: 3", tool_calls=[{"function": {"name": "r", "arguments": {"e": 3}}}]),
        ),
    ],
)
def test_words_of_the_content_do_not_count_as_a_call(
    letters: LetterTokenizer, template: str, message: dict[str, Any]
):
    tokenizer = letters(template, **TEMPLATES[template])
    (encoded,) = encode_rows([make_row({"messages": [user("zork"), message]}, 1)], tokenizer)
    assert encoded.examples == []
    assert "tool calls" in str(encoded.problem)


@pytest.mark.parametrize(
    "value",
    ["", "a\nb\t\"c\" 'd' \\ é😀", 1e-7, 1e22, 2.5, -0, None, False, {}, [], [[1], {"a": [2]}]],
)
@pytest.mark.parametrize("template", sorted(WITH_CALLS))
def test_arguments_of_any_type_are_found(letters: LetterTokenizer, template: str, value: object):
    tokenizer = letters(template, **TEMPLATES[template])
    call = {"function": {"name": "plover", "arguments": {"first": value, "second": value}}}
    (encoded,) = encode_rows(
        [make_row({"messages": [user("zork"), bot(None, tool_calls=[call])]}, 1)], tokenizer
    )
    assert encoded.problem is None
    assert learned(encoded, tokenizer).count("plover") == 1


@pytest.mark.parametrize("special", ["<|im_start|> <think> </think>", "<|im_start|>"])
def test_thoughts_are_learned_in_their_block_whether_its_tags_are_tokens_or_not(
    letters: LetterTokenizer, special: str
) -> None:
    """mlx-lm turns thoughts off in the template of a tokenizer that has no tokens for them."""
    tokenizer = letters("qwen3", special=special, ends="<|im_end|>")
    row = {"messages": [user("zork"), bot("xyzzy", reasoning_content="frobozz")]}
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    text = learned(encoded, tokenizer).removesuffix("<|im_end|>")
    assert text == "<think>\nfrobozz\n</think>\n\nxyzzy"
