"""Thoughts stand once in an answer, in the block that a template left empty."""

import pytest

from mlx_loraplus.data.thoughts import ThoughtBlock, fill_empty_block, put_before

EMPTY = "<think>\n\n</think>\n"


@pytest.mark.parametrize(
    ("thoughts", "content", "rest", "is_filled"),
    [
        # The rest holds only the answer, which may have the thoughts' words
        ("it is", "yes", "yes<eos>", True),
        ("yes", "yes, yes", "yes, yes<eos>", True),
        # The rest holds the thoughts too, which may have the answer's words
        ("it is", "yes", "[R]it is[/R]yes<eos>", False),
        ("yes", "yes", "[R]yes[/R]yes<eos>", False),
        ("if it is yes then say so", "yes", "[R]if it is yes then say so[/R]yes<eos>", False),
    ],
)
def test_an_empty_block_is_filled_unless_the_thoughts_follow_it(
    thoughts: str, content: str, rest: str, is_filled: bool
):
    message = {"role": "assistant", "reasoning_content": thoughts, "content": content}
    filled = fill_empty_block(EMPTY + rest, "", message)
    expected = f"<think>\n{thoughts}\n</think>\n{rest}" if is_filled else EMPTY + rest
    assert filled == expected


@pytest.mark.parametrize("answer", ["yes<eos>", "\n</think>\n\nyes<eos>", "</think>yes<eos>"])
def test_thoughts_before_an_answer_are_closed_once(answer: str):
    block = ThoughtBlock.of("{{ '<think>\\n' }} {{ '\\n</think>\\n\\n' }}")
    assert put_before(answer, "", "it is", block) == "<think>\nit is\n</think>\n\nyes<eos>"
