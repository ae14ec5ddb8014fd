"""What a model generates, read as an earlier message of the next prompt; prompts of thoughts and calls."""

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.encode_prompt import content_of_answer, encode_prompt
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.data.special_tokens import end_tokens
from mlx_loraplus.data.tokenize import EncodedRow
from mlx_loraplus.models.prompt_format import PromptFormat
from tests.data.conftest import LetterTokenizer
from tests.data.reading import encode_rows
from tests.data.test_template_kinds import (
    CALL,
    CHATML,
    ROWS,
    TEMPLATES,
    TOOLS,
    bot,
    encoded_row,
    learned,
    user,
)


def learned_turns(encoded: EncodedRow, tokenizer: TokenizerWrapper) -> list[str]:
    """Return the text of each run of supervised tokens."""
    turns: list[str] = []
    for example in encoded.examples:
        places = np.flatnonzero(example.supervised)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        turns += [tokenizer.decode(example.tokens[run]) for run in runs]
    return turns


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_second_prompt_of_a_chat_is_that_of_training(letters: LetterTokenizer, template: str):
    """The model has written the first answer as it was trained to."""
    encoded, tokenizer = encoded_row(letters, template, "two turns", "turns")
    texts = [text for text in learned_turns(encoded, tokenizer) if "xyzzy" in text]
    generated = texts[0]
    for end in end_tokens(tokenizer):
        generated = generated.removesuffix(end)

    content = content_of_answer(generated, "zork", tokenizer, form=PromptFormat())
    earlier = [user("zork"), bot(content)]
    prompt = tokenizer.decode(encode_prompt("grue", tokenizer, earlier=earlier))
    example = encoded.examples[0]
    last = np.flatnonzero(example.supervised & ~np.append(False, example.supervised[:-1]))[-1]
    trained = tokenizer.decode(example.tokens[:last])
    if template in ("channels", "gpt_oss"):
        prompt, trained = (text.partition("<|end|>")[2] for text in (prompt, trained))
    assert prompt == trained


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_system_message_is_left_out_as_in_generation(
    letters: LetterTokenizer, template: str
):
    tokenizer = letters(template, **TEMPLATES[template])
    turns = [user("zork"), bot("xyzzy")]
    rows = [
        {"messages": [{"role": "system", "content": empty}, *turns]} for empty in ("", " \n")
    ] + [{"messages": turns}]
    made = [make_row(row, 1) for row in rows]
    assert made[0].notes == ("empty system messages are left out",)
    tokens = [encoded.examples[0].tokens.tolist() for encoded in encode_rows(made, tokenizer)]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize(
    ("template", "generated", "content"),
    [
        ("chatml", "  xyzzy\n", "  xyzzy\n"),
        ("unclosed_thoughts", "frobozz\n</think>\n\nxyzzy", "<think>\nfrobozz\n</think>\n\nxyzzy"),
        ("unclosed_thoughts", "frob", "frob"),  # interrupted
    ],
)
def test_an_answer_keeps_its_blanks_and_thoughts(
    letters: LetterTokenizer, template: str, generated: str, content: str
):
    tokenizer = letters(template, **TEMPLATES[template])
    form = PromptFormat()
    assert content_of_answer(generated, "zork", tokenizer, form=form) == content


def test_a_block_that_the_prompt_opens_is_closed_before_the_answer(letters: LetterTokenizer):
    encoded, tokenizer = encoded_row(letters, "unclosed_thoughts", "two turns", "turns")
    answers = [f"\n</think>\n\n{content}</s>" for content in ("quux", "xyzzy")]
    assert learned(encoded, tokenizer) == "\n".join(answers)
    assert not encoded.notes


def test_thoughts_come_before_calls(letters: LetterTokenizer):
    encoded, tokenizer = encoded_row(letters, "calls_first", "thoughts before a call", "turns")
    text = learned(encoded, tokenizer)
    assert text.index("frobozz") < text.index("</think>") < text.index("plover")

    # Without turns, thoughts can't be put before the answer.
    message = bot("<think>\nfrobozz\n</think>", tool_calls=[CALL])
    row = make_row({"messages": [user("zork"), message]}, 1)
    (encoded,) = encode_rows([row], tokenizer, "everything")
    assert any("thoughts after the content or tool calls" in note for note in encoded.notes)


def test_thoughts_that_are_left_out_are_not_said_to_be_elsewhere(letters: LetterTokenizer):
    """The prompt writes an empty block, and the template removes thoughts."""
    tokenizer = letters("cuts_thoughts", **CHATML)
    tokenizer.chat_template += "{%- if add_generation_prompt %}{{- '<think></think>' }}{%- endif %}"
    (encoded,) = encode_rows([make_row(ROWS["thoughts inside"][0], 1)], tokenizer)
    assert encoded.notes == ["the chat template leaves out thoughts, so they are not trained on"]


def test_thoughts_after_special_tokens_of_the_answer_are_reported(letters: LetterTokenizer):
    """The template renders <|content|> before every answer, and knows no thoughts by a key."""
    tokenizer = letters("cuts_thoughts", **CHATML)
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '<|' + m.role + '|>' }}"
        "{%- if m.role == 'assistant' %}{{- '<|content|>' }}{%- endif %}"
        "{{- m.content + '</s>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    )
    row = make_row({"messages": [user("zork"), bot("<think>\nfrobozz\n</think>\n\nplover")]}, 1)
    (encoded,) = encode_rows([row], tokenizer, "everything")
    assert encoded.notes == [
        "the chat template renders thoughts after the special tokens that begin an answer"
    ]


@pytest.mark.parametrize("thoughts", [(), (1,), (3,), (1, 3)])
@pytest.mark.parametrize("template", ["qwen3_5", "gemma4", "gpt_oss", "qwen3_tools", "ministral3"])
def test_the_prompt_of_a_row_with_a_call_asks_for_its_first_answer(
    letters: LetterTokenizer, template: str, thoughts: tuple[int, ...]
):
    """The answer after the result of a tool may have no thoughts although the call has some."""
    tokenizer = letters(template, **TEMPLATES[template])
    result = {"role": "tool", "name": "plover", "tool_call_id": CALL["id"], "content": "grue"}
    chat = [user("zork"), bot("", tool_calls=[CALL]), result, bot("quux")]
    for turn in thoughts:
        chat[turn] = chat[turn] | {"reasoning_content": "frobozz"}
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)

    form = PromptFormat(thinking=encoded.thinking)
    prompt = tokenizer.decode(encode_prompt("zork", tokenizer, form=form, tools=TOOLS))
    example = encoded.examples[-1]
    trained = tokenizer.decode(example.tokens[: int(np.argmax(example.supervised))])
    if template == "gpt_oss":  # it writes the date
        prompt, trained = (text.partition("<|end|>")[2] for text in (prompt, trained))
    assert prompt == trained


def test_a_template_that_needs_tools_takes_them(letters: LetterTokenizer):
    """It fails without them, so the prompts with and without tools can't be compared."""
    tokenizer = letters("hermes_tools", **TEMPLATES["hermes_tools"])
    shown = "{%- for tool in tools -%}{{- tool.function.name -}}{%- endfor -%}"
    tokenizer.chat_template = shown + str(tokenizer.chat_template)
    prompt = tokenizer.decode(encode_prompt("zork", tokenizer, tools=TOOLS))
    assert prompt.startswith("plover")


def test_thoughts_after_the_result_of_a_tool_are_a_message_of_their_own(letters: LetterTokenizer):
    """The template renders the header twice, and drops the thoughts before the call."""
    tokenizer = letters("gpt_oss", **TEMPLATES["gpt_oss"])
    chat = [
        user("zork"),
        bot("", reasoning_content="frobozz", tool_calls=[CALL]),
        {"role": "tool", "content": "gnusto"},
        bot("quux", reasoning_content="gnusto"),
    ]
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
    text = learned(encoded, tokenizer)
    assert text.startswith("<|channel|>analysis<|message|>frobozz<|end|>")
    assert text.endswith(
        "<|call|><|channel|>analysis<|message|>gnusto<|end|>"
        "<|start|>assistant<|channel|>final<|message|>quux<|return|>"
    )
    assert not encoded.notes

    # The same words in the result alone are no thoughts.
    tokenizer.chat_template = str(tokenizer.chat_template).replace("'thinking' in", "false and")
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
    assert "gnusto" not in learned(encoded, tokenizer)
    assert any("leaves out thoughts" in note for note in encoded.notes)


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_tags_of_other_templates_stay_out_of_a_template_with_a_key(
    letters: LetterTokenizer, key: str
):
    """gpt-oss refuses content and thoughts beside a call: <think> would stand inside its channel."""
    tokenizer = letters("gpt_oss", **TEMPLATES["gpt_oss"])
    spoken = bot("xyzzy", tool_calls=[CALL]) | {key: "frobozz"}
    (encoded,) = encode_rows([make_row({"messages": [user("zork"), spoken]}, 1)], tokenizer)
    assert not encoded.examples
    assert str(encoded.problem).endswith("; remove the content beside tool calls")

    # The advice works.
    silent = spoken | {"content": ""}
    (encoded,) = encode_rows([make_row({"messages": [user("zork"), silent]}, 1)], tokenizer)
    assert learned(encoded, tokenizer).startswith("<|channel|>analysis<|message|>frobozz<|end|>")
    assert not encoded.notes


@pytest.mark.parametrize("writes_ids", [False, True])
def test_results_in_another_order_than_their_calls_are_noted(
    letters: LetterTokenizer, writes_ids: bool
):
    tokenizer = letters("hermes_tools", **CHATML)
    if writes_ids:
        ids = "{% for message in messages %}{{ message.tool_call_id }}{% endfor %}"
        tokenizer.chat_template = ids + str(tokenizer.chat_template)
    calls = [CALL | {"id": name} for name in ("a1b2c3d4e", "f1a2b3c4d")]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "grue"} for call in calls]
    for order in (results, results[::-1]):
        chat = [user("zork"), bot("", tool_calls=calls), *order, bot("quux")]
        (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
        assert encoded.problem is None
        is_noted = any("'tool_call_id'" in note for note in encoded.notes)
        assert is_noted == (order != results and not writes_ids)


def test_an_answer_does_not_count_as_the_same_thought(letters: LetterTokenizer):
    tokenizer = letters("cuts_thoughts", **TEMPLATES["cuts_thoughts"])
    row = {"messages": [user("zork"), bot("xyzzy", reasoning_content="xyzzy")]}
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    assert any("thoughts" in note for note in encoded.notes)
