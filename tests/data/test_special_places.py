"""Templates with special places for thoughts, calls and headers, and the advice for chats they refuse."""

from typing import Any

import pytest

from mlx_loraplus.data.rows import make_row
from tests.data.conftest import LetterTokenizer
from tests.data.reading import encode_rows
from tests.data.test_template_kinds import (
    CALL,
    CHATML,
    ROWS,
    TEMPLATES,
    TOOLS,
    bot,
    learned,
    user,
)


def without_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each | ({"content": ""} if each.get("tool_calls") else {}) for each in messages]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, *pair = messages[-3:]
    return [
        *messages[:-3],
        first,
        pair[0] | {"content": "\n\n".join(each["content"] for each in pair)},
    ]


def system_in_question(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system, question, *rest = messages
    return [user(f"{system['content']}\n\n{question['content']}"), *rest]


TWO_ANSWERS = [user("zork"), bot("xyzzy"), bot("quux")]
ANSWERED = ROWS["call, answered"][0]["messages"]


@pytest.mark.parametrize(
    ("template", "messages", "advice", "follow"),
    [
        ("bracket_calls", ANSWERED, "remove the content beside tool calls", without_content),
        ("merged_turns", ANSWERED, "remove the content beside tool calls", without_content),
        ("merged_turns", TWO_ANSWERS, "join assistant messages that follow each other into one", joined),
        ("gemma3", TWO_ANSWERS, "join assistant messages that follow each other into one", joined),
        (
            "gemma3", [user("zork"), user("grue"), bot("xyzzy")],
            "join user messages that follow each other into one",
            lambda messages: [user("zork\n\ngrue"), messages[2]],
        ),
        (
            "no system", [system("grue"), user("zork"), bot("xyzzy")],
            "put the system message at the start of the first user message", system_in_question,
        ),
        (
            "gemma3", [bot("quux"), user("zork"), bot("xyzzy")],
            "remove the assistant messages before the first user message",
            lambda messages: messages[1:],
        ),
        (
            "gemma3", [bot("xyzzy")], "add a user message before the first answer",
            lambda messages: [user("zork"), *messages],
        ),
        (
            "mistral", [user("zork"), system("grue"), bot("xyzzy"), user("frotz"), bot("quux")],
            "join the system messages into one, and put it at the start of the chat",
            lambda messages: [messages[1], messages[0], *messages[2:]],
        ),
        (
            "gemma3", [bot("quux"), system("grue"), user("zork"), system("frotz"), bot("xyzzy")],
            "remove the assistant messages before the first user message and join the system"
            " messages into one, and put it at the start of the chat",
            lambda messages: [system("grue\n\nfrotz"), messages[2], messages[4]],
        ),
        (
            "no system", [user("zork"), bot("xyzzy"), system("grue"), user("frotz"), bot("quux")],
            "put each system message at the start of the user message after it",
            lambda messages: [*messages[:2], user("grue\n\nfrotz"), messages[4]],
        ),
        (
            "no system", [system("grue"), bot("quux"), user("zork"), bot("xyzzy")],
            "remove the assistant messages before the first user message and put each system"
            " message at the start of the user message after it",
            lambda messages: [user("grue\n\nzork"), messages[3]],
        ),
    ],
)  # fmt: skip
def test_advice_for_a_refused_chat_is_right_when_it_is_followed(
    letters: LetterTokenizer, template: str, messages: Any, advice: str, follow: Any
):
    if template == "no system":
        tokenizer = letters("chatml", **CHATML)
        refuse = "{{ raise_exception('no system') if messages | selectattr('role', 'eq', 'system') | list }}"
        tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    else:
        tokenizer = letters(template, **TEMPLATES[template])
    (encoded,) = encode_rows([make_row({"messages": messages}, 1)], tokenizer)
    assert str(encoded.problem).endswith(f"; {advice}")

    (encoded,) = encode_rows([make_row({"messages": follow(messages)}, 1)], tokenizer)
    assert encoded.problem is None
    words = [word for word in ("xyzzy", "quux") if word in str(follow(messages))]
    assert [word for word in words if word not in learned(encoded, tokenizer)] == []


def test_what_templates_may_not_do_is_no_problem_of_the_rows(letters: LetterTokenizer):
    """Changed copies of Kimi K2's template append to a list, which transformers refuses."""
    tokenizer = letters("chatml", **TEMPLATES["chatml"])
    tokenizer.chat_template = (
        "{% set ids = [] %}{% for message in messages %}"
        "{% if message.tool_calls %}{% set _ = ids.append(1) %}{% endif %}{% endfor %}"
        + str(tokenizer.chat_template)
    )
    row = ROWS["call, null content"][0]
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    assert "access to attribute 'append' of 'list'" in str(encoded.problem)
    assert "use the current template of the model's publisher" in str(encoded.problem)


@pytest.mark.parametrize(
    ("template", "message", "text"),
    [
        (
            "response_markers", bot("xyzzy", reasoning_content="frobozz"),
            "<|START_THINKING|>frobozz<|END_THINKING|><|START_RESPONSE|>xyzzy<|END_RESPONSE|><|turn_end|>",
        ),
        (
            "response_markers", bot("<think>\nfrobozz\n</think>\n\nxyzzy"),
            "<|START_THINKING|>frobozz<|END_THINKING|><|START_RESPONSE|>xyzzy<|END_RESPONSE|><|turn_end|>",
        ),
        (
            "response_markers",
            bot(None, tool_plan="frobozz", tool_calls=[{"function": {"name": "plover", "arguments": {}}}]),
            '<|START_THINKING|>frobozz<|END_THINKING|><|START_ACTION|>[{"tool_name": "plover", "parameters": {}}]'
            "<|END_ACTION|><|turn_end|>",
        ),
        (
            "llama4_calls",
            bot("", reasoning_content="frobozz", tool_calls=[{"function": {"name": "plover", "arguments": {}}}]),
            '<think>\nfrobozz\n</think>\n\n<|python_start|><|python_end|>{"name": "plover", "parameters": {}}<|eot|>',
        ),
        (
            "merged_turns", bot("xyzzy", reasoning_content="frobozz"),
            "<|channel>thought\nfrobozz\n<channel|>xyzzy<turn|>",
        ),
    ],
)  # fmt: skip
def test_thoughts_come_before_the_markers_of_an_answer(
    letters: LetterTokenizer, template: str, message: dict[str, Any], text: str
):
    tokenizer = letters(template, **TEMPLATES[template])
    (encoded,) = encode_rows([make_row({"messages": [user("zork"), message]}, 1)], tokenizer)
    assert learned(encoded, tokenizer) == text


def test_functions_are_named_by_ids_where_a_template_writes_no_other_name(letters: LetterTokenizer):
    tokenizer = letters("id_calls", **TEMPLATES["id_calls"])
    calls = [CALL | {"id": name} for name in ("a1", "b2")]
    results = [{"role": "tool", "tool_call_id": name, "content": name * 2} for name in ("b2", "a1")]
    chat = [user("zork"), bot("", tool_calls=calls), *results, bot("", tool_calls=calls[:1])]
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
    text = tokenizer.decode(encoded.examples[0].tokens)
    for part in ("plover:0<|call_arg", "plover:1<|call_arg", "plover:2<|call_arg"):
        assert f"<|call_begin|>functions.{part}" in text
    assert "Return of functions.plover:1\nb2b2" in text
    assert "Return of functions.plover:0\na1a1" in text
    assert any("ids are rendered as functions.NAME:NUMBER" in note for note in encoded.notes)

    # Ids in the model's own form are not changed
    chat = [user("zork"), bot("", tool_calls=[CALL | {"id": "functions.plover:7"}])]
    (encoded,) = encode_rows([make_row({"messages": chat, "tools": TOOLS}, 1)], tokenizer)
    assert "<|call_begin|>functions.plover:7<|call_arg" in learned(encoded, tokenizer)
    assert encoded.notes == []


def test_no_end_token_is_learned_that_a_template_does_not_write(letters: LetterTokenizer):
    special = TEMPLATES["merged_turns"] | {"ends": "<turn|>"}
    tokenizer = letters("merged_turns", **special)
    (encoded,) = encode_rows([make_row(ROWS["call, null content"][0], 1)], tokenizer)
    assert learned(encoded, tokenizer).endswith("<tool_call|><|tool_response>")


@pytest.mark.parametrize("header", ["bot:", "bot: {{ '<think>\n' if enable_thinking }}"])
def test_two_answers_in_a_row_are_learned_without_the_header_between_them(
    letters: LetterTokenizer, header: str
):
    """In Reka's template, a prompt after an answer has no header, and the header opens thoughts."""
    tokenizer = letters("chatml", special="<think> </think>", ends="<sep>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ 'bot: ' if message.role == 'assistant' else 'human: ' }}"
        "{{ message.content }}<sep>{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        + header
        + "{% endif %}"
    )
    (encoded,) = encode_rows([make_row({"messages": TWO_ANSWERS}, 1)], tokenizer)
    assert encoded.problem is None
    spans = learned(encoded, tokenizer)
    assert "bot" not in spans
    assert spans.count("<sep>") == 2


def test_two_answers_without_a_header_each_have_their_end(letters: LetterTokenizer):
    """In Mistral's templates, an answer has no header, so the second one begins after the first."""
    tokenizer = letters("mistral")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST]{{ message.content }}[/INST]{% else %}{{ message.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    (encoded,) = encode_rows([make_row({"messages": TWO_ANSWERS}, 1)], tokenizer)
    assert learned(encoded, tokenizer) == "xyzzy</s>quux</s>"
    prompt = tokenizer.apply_chat_template(TWO_ANSWERS[:2], add_generation_prompt=True)
    assert encoded.examples[0].tokens[: len(prompt)].tolist() == prompt
