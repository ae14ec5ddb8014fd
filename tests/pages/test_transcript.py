"""Prompts as chats, and answers as differences."""

import pytest

from mlx_loraplus.pages.transcript import chat_of, differences, parts_of


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
