"""Prompts as chats, and answers as differences."""

from typing import Any

import pytest

from mlx_loraplus.pages.transcript import PartKind, chat_of, differences, parts_of
from tests.data.conftest import TEMPLATES as FOLDER
from tests.data.conftest import make_letters
from tests.data.test_template_kinds import ARGUMENTS, TEMPLATES, TOOLS, WITH_CALLS, bot, user


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    ],
)
def test_the_turns_of_common_templates(prompt: str):
    turns = [(turn.role, turn.parts) for turn in chat_of(prompt)]
    assert turns == [("system", [("text", "Be brief.")]), ("user", [("text", "Hi")])]


def test_mistral_and_gemma_have_no_system_turn():
    turns = chat_of("<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]")
    assert [(turn.role, turn.parts[0][1]) for turn in turns] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
    ]
    turns = chat_of("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n")
    assert [turn.role for turn in turns] == ["user"]


@pytest.mark.parametrize("text", ["2 + 2 =", "if a < b and b > c: <tag>", "user: hi", " "])
def test_other_text_stays_as_it_is(text: str):
    (turn,) = chat_of(text)
    assert turn.role == "prompt"
    assert "".join(piece for _, piece in turn.parts) == text.strip()


def test_thoughts_and_calls_are_parts():
    text = "<think>\nHm.\n</think>\n\nYes.<tool_call>\n{}\n</tool_call><|im_end|>"
    assert parts_of(text) == [("thought", "Hm."), ("text", "Yes."), ("call", "{}")]


NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CALL = {
    "id": "c1a2b3c4d",
    "type": "function",
    "function": {"name": "plover", "arguments": ARGUMENTS},
}
TOOL = {"role": "tool", "tool_call_id": "c1a2b3c4d", "name": "plover", "content": "grue"}
# Templates that write a system prompt into the user's turn, or not at all.
NO_SYSTEM = {"gemma3", "mistral", "bracket_calls", "system_last", "shows_tools"}
NO_ROLE_OF_RESULTS = {
    "gemma4",
    "inlined_results",
    "merged_turns",
}  # they are in the assistant's turn


def rendered(name: str, messages: list[dict[str, Any]], **others: Any) -> str:
    """Write a chat by a template of tests/data/templates, up to where the model answers."""
    tokenizer = make_letters(name, **TEMPLATES.get(name, {}))
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **others
    )
    return str(text)


def told(prompt: str) -> list[tuple[str, str, str]]:
    """Return (role, kind, text) of each part of a prompt."""
    return [(turn.role, kind, text) for turn in chat_of(prompt) for kind, text in turn.parts]


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_shown_as_a_chat(name: str):
    prompt = rendered(name, [user("zork"), bot("xyzzy"), user("grue")])
    shown = told(prompt)
    turns = [part for part in shown if part[0] not in ("system", "tools")]
    assert turns == [
        ("user", "text", "zork"),
        ("assistant", "text", "xyzzy"),
        ("user", "text", "grue"),
    ]


@pytest.mark.parametrize("name", sorted(set(NAMES) - NO_SYSTEM))
def test_a_system_prompt_is_a_turn(name: str):
    system = {"role": "system", "content": "frotz"}
    shown = told(rendered(name, [system, user("zork")]))
    assert any(role in ("system", "developer") and "frotz" in text for role, _, text in shown)
    assert shown[-1] == ("user", "text", "zork")


@pytest.mark.parametrize("name", sorted(WITH_CALLS))
def test_calls_are_parts_of_their_turn(name: str):
    messages = [user("zork"), bot("", tool_calls=[CALL], tool_plan=""), TOOL]
    if name == "ministral3":  # it takes no other chat
        messages.append(bot("xyzzy"))
    shown = told(rendered(name, [*messages, user("quux")], tools=TOOLS))
    (call,) = [text for role, kind, text in shown if (role, kind) == ("assistant", "call")]
    for word in ("Zürich", "37", "wug"):
        assert word in call
    assert "<|" not in call
    # Real templates of Kimi write the id of a call in place of the function's name.
    assert ("c1a2b3c4d" if name == "id_calls" else "plover") in call
    if name not in NO_ROLE_OF_RESULTS:
        (result,) = [text for role, _, text in shown if role == "tool"]
        assert "grue" in result
    assert shown[-1] == ("user", "text", "quux")


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nHm.\n</think>\n\nYes.",
        "\nHm.\n</think>\n\nYes.<|im_end|>",  # the prompt began the thoughts
        "<seed:think>Hm.</seed:think>Yes.",
        "<|channel>thought\nHm.\n<channel|>Yes.<turn|>",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "[THINK]Hm.[/THINK]Yes.</s>",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
    ],
)
def test_thoughts_of_an_answer(answer: str):
    assert parts_of(answer) == [("thought", "Hm."), ("text", "Yes.")]


@pytest.mark.parametrize("begin", ["<think>\n", "<|channel>thought\n", "[THINK]"])
def test_thoughts_that_were_cut(begin: str):
    assert parts_of(f"{begin}Hm …") == [("thought", "Hm …")]


@pytest.mark.parametrize(
    ("answer", "call"),
    [
        ('<tool_call>\n{"name": "on"}\n</tool_call>', '{"name": "on"}'),
        ('<|tool_call>call:on{room:<|"|>hall<|"|>}<tool_call|>', 'call:on{room:"hall"}'),
        (
            "<|channel|>commentary to=functions.on <|constrain|>json<|message|>{}<|call|>",
            "functions.on {}",
        ),
        ('[TOOL_CALLS]on[ARGS]{"room": 1}</s>', 'on[ARGS]{"room": 1}'),
        ('{"name": "on", "parameters": {}}<|eot_id|>', '{"name": "on", "parameters": {}}'),
        ("<|python_start|>[on(room=1)]<|python_end|><|eom|>", "[on(room=1)]"),
        ('<|python_start|>Yes.<|python_end|>{"name": "on"}<|eot|>', '{"name": "on"}'),
        (
            "<\uff5ctool▁calls▁begin\uff5c>on<\uff5ctool▁sep\uff5c>{}<\uff5ctool▁calls▁end\uff5c>",
            "on {}",
        ),
    ],
)
def test_calls_of_an_answer(answer: str, call: str):
    assert [text for kind, text in parts_of(answer) if kind == "call"] == [call]


def test_harmony_joins_thoughts_and_answer_in_one_turn():
    """gpt-oss writes each as a message of its own."""
    messages = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    turns = chat_of(f"<|start|>user<|message|>Hi<|end|><|start|>assistant{messages}<|end|>")
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[1].parts == [("thought", "Hm."), ("text", "Yes.")]


def test_only_turns_of_the_model_have_thoughts_and_calls():
    """Qwen's system prompt shows how a call is written."""
    example = "Write <tool_call>\n{}\n</tool_call>"
    (turn,) = chat_of(f"<|im_start|>system\n{example}<|im_end|>\n<|im_start|>assistant\n")
    kinds: list[PartKind] = [kind for kind, _ in turn.parts]
    assert kinds == ["text"]


def test_text_before_the_first_turn_is_kept():
    turns = chat_of(
        "<\uff5cbegin▁of▁sentence\uff5c>Be brief.<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>"
    )
    assert [(turn.role, turn.parts[0][1]) for turn in turns] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


def test_differences_rebuild_both_answers():
    expected, answer = '{"room": "kitchen", "level": 40}', '{"room": "hall", "level": 40, "x": 1}'
    pieces = differences(expected, answer)
    assert "".join(text for kind, text in pieces if kind != "missing") == answer
    assert "".join(text for kind, text in pieces if kind != "extra") == expected
    assert ("missing", "kitchen") in pieces
    assert differences(expected, expected) == [("same", expected)]
    assert differences("", "") == []


def test_unlike_and_very_long_answers_are_not_compared_by_word():
    assert differences("one two three", "I am sorry, but no") == [("extra", "I am sorry, but no")]
    assert differences("69", "37 + 32 = 69") == [("extra", "37 + 32 = "), ("same", "69")]
    long = "word " * 5000
    assert differences(long, long) == [("same", long)]
    assert differences(long, long + "x") == [("extra", long + "x")]


def test_a_text_may_name_the_markers_of_other_templates():
    prompt = (
        "<|im_start|>user\nExplain the [INST] marker. Does <|system|> mark a turn?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (turn,) = chat_of(prompt)
    assert turn.role == "user"
    assert "[INST] marker" in turn.parts[0][1]


@pytest.mark.parametrize("text", ["https://x.y/?to=" + "a" * 200_000, "mail to=a " * 5_000])
def test_a_long_text_after_a_recipient_is_read_once(text: str):
    """With a pattern that goes back, this would take many minutes."""
    assert parts_of(text) == [("text", text.strip())]
