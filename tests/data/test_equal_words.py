"""Chats in which thoughts, answers and questions are the same word."""

import pytest

from mlx_loraplus.data.rows import make_row
from tests.data.conftest import LetterTokenizer
from tests.data.reading import encode_rows
from tests.data.test_template_kinds import TEMPLATES, bot, user

EQUAL_WORDS = TEMPLATES | {
    # Tags around the answer, which follow an empty block of thoughts (Hunyuan)
    "answer_tags": {"ends": "<|eos|>", "special": "<|startoftext|> <|extra_0|> <|extra_4|>"},
}


@pytest.mark.parametrize("first_thought", [True, False])
@pytest.mark.parametrize("template", EQUAL_WORDS)
def test_equal_words_do_not_change_how_a_row_is_written(
    letters: LetterTokenizer, template: str, first_thought: bool
):
    """A chat whose thoughts, answers and questions are one word is written like any other."""
    tokenizer = letters(template, **EQUAL_WORDS[template])
    words = ("zork", "frobozz", "xyzzy", "grue", "gnusto", "quux")
    texts: list[list[str]] = []
    for asked, thought, answer, then, thought_then, last in (words, ["xyzzy"] * 6):
        first = bot(answer, reasoning_content=thought) if first_thought else bot(answer)
        chat = [
            user(asked), first, user(then), bot(last, reasoning_content=thought_then),
        ]  # fmt: skip
        (encoded,) = encode_rows([make_row({"messages": chat}, 1)], tokenizer)
        assert encoded.problem is None
        texts.append(
            [
                tokenizer.decode(tokens)
                for example in encoded.examples
                for tokens in (example.tokens, example.tokens[example.supervised])
            ]
        )
    for word in words:
        texts[0] = [text.replace(word, "xyzzy") for text in texts[0]]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("template", EQUAL_WORDS)
def test_words_of_the_question_are_not_learned_as_thoughts(letters: LetterTokenizer, template: str):
    tokenizer = letters(template, **EQUAL_WORDS[template])
    chat = [
        user("Please continue, and say continue"), bot("continue"),
        user("continue"), bot("the end", reasoning_content="continue"),
    ]  # fmt: skip
    (encoded,) = encode_rows([make_row({"messages": chat}, 1)], tokenizer)
    for example in encoded.examples:
        learned = tokenizer.decode(example.tokens[example.supervised])
        assert learned.count("continue") <= 2
        assert "say" not in learned
