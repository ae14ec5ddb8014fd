"""Growing prefixes given as plain text stay together in a split, and are reported across splits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_loraplus.data.conversation_groups import (
    MOST_BRANCHES,
    find_conversations,
    group_examples,
)
from mlx_loraplus.data.load_data import Data
from mlx_loraplus.data.overlaps import find_overlaps
from mlx_loraplus.data.prefix_digests import LONGEST, SHORTEST, text_digests
from mlx_loraplus.data.rows import make_row
from tests.data.conftest import LetterTokenizer
from tests.data.reading import load, write

CHATML = {"special": "<|im_start|>", "ends": "<|im_end|>"}


def lines(number: int, turns: int) -> str:
    return "".join(f"User: is it {number}.{turn}?\nBot: It is {turn}.\n" for turn in range(turns))


def words(number: int, turns: int) -> str:
    return " ".join(f"tell me fact {number} {turn} it is {turn}" for turn in range(turns))


def tags(number: int, turns: int) -> str:
    return "".join(f"<s>[INST]is it {number}.{turn}?[/INST]yes</s>" for turn in range(turns))


def sentences(number: int, turns: int) -> str:
    """Return turns that are longer than the beginnings that may end at any word."""
    return " ".join(f"Fact {number}.{turn}: " + "so it is " * 30 + "." for turn in range(turns))


def chinese(number: int, turns: int) -> str:
    return "".join(f"第{number}个城市在哪里。它在{turn}号地图的上面。" for turn in range(turns))


def prompt_row(number: int, turns: int) -> dict[str, Any]:
    return {"prompt": lines(number, turns) + f"User: is it {number}.{turns}?\nBot:",
            "completion": f" It is {turns}."}  # fmt: skip


def chat_row(number: int, turns: int) -> dict[str, Any]:
    """Return a chat of one turn, whose user message holds the earlier turns."""
    row = prompt_row(number, turns)
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def pair_row(number: int, turns: int) -> dict[str, Any]:
    row = prompt_row(number, turns)
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " It is not."}


FORMS = {
    "lines": lambda number, turns: {"text": lines(number, turns + 1)},
    "words": lambda number, turns: {"text": words(number, turns + 1)},
    "tags": lambda number, turns: {"text": tags(number, turns + 1)},
    "sentences": lambda number, turns: {"text": sentences(number, turns + 1)},
    "chinese": lambda number, turns: {"text": chinese(number, turns + 1)},
    "prompts": prompt_row,
    "chats of one turn": chat_row,
    "pairs": pair_row,
    "text and prompts": lambda number, turns: (
        prompt_row(number, turns) if turns % 2 else {"text": lines(number, turns + 1)}
    ),
}


def load_rows(letters: LetterTokenizer, folder: Path, form: str, **rows: Any) -> Data:
    """Load rows of several splits."""
    files = {name: "\n".join(map(json.dumps, of_split)) for name, of_split in rows.items()}
    tokenizer = letters("chatml", **CHATML) if "chats" in form else letters()
    options: dict[str, Any] = {"objective": "dpo"} if form == "pairs" else {}
    if list(files) == ["train"]:
        options["valid_split"] = 0.3
    return load(tokenizer, write(folder, **files), **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_growing_conversation_stays_on_one_side(
    tmp_path: Path, letters: LetterTokenizer, form: str
):
    make = FORMS[form]
    rows = [make(number, turns) for turns in (2, 0, 1) for number in range(10)]
    split = load_rows(letters, tmp_path / "data", form, train=rows).examples
    sides = [
        {(int(split[name].place(i).split(":")[1]) - 1) % 10 for i in range(len(split[name]))}
        for name in ("train", "valid")
    ]
    assert (len(sides[0]), len(sides[1])) == (7, 3)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("turns", [(0, 2), (2, 0)], ids=["continued", "begun"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_continues_or_begins_one_of_train_is_reported(
    tmp_path: Path, letters: LetterTokenizer, form: str, turns: tuple[int, int]
):
    make = FORMS[form]
    train = [make(number, turns[0]) for number in range(4)]
    valid = [make(number, turns[1]) for number in (9, 2)]
    data = load_rows(letters, tmp_path / "data", form, train=train, valid=valid)
    assert [str(overlap) for overlap in find_overlaps(data.examples) if overlap.count] == [
        "1 valid row whose conversation or text is partly in train (valid.jsonl:2 = train.jsonl:3)"
    ]


def group(tmp_path: Path, letters: LetterTokenizer, *texts: str) -> list[int]:
    """Return the conversation of each text, as numbers in the order of the first texts."""
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    (table,) = load(letters(), write(tmp_path / "data", train=rows)).examples["train"].tables
    (found,) = find_conversations([table])
    return [found.tolist().index(number) for number in found]


@pytest.mark.parametrize(
    ("texts", "conversations"),
    [
        # A short beginning, and one inside a word
        (("The", "The cat sat on the mat"), [0, 1]),
        (("I think that this is a cat", "I think that this is a catalogue"), [0, 1]),
        (("I think that this is a cat", "I think that this is a cat, not a dog"), [0, 0]),
        # White space and case do not count
        (("What  is it that is here?\n", "what is it that\n\nis here? This."), [0, 0]),
        # Nor does the Unicode form
        (("Caf\u00e9 is a place to drink", "CAFE\u0301 is a place to drink. Tea."), [0, 0]),
        # Beginnings in common, but none is the other's
        (("Once upon a time there was a king", "Once upon a time there was a frog"), [0, 1]),
        # Through a third row
        (("It was a dark night. Rain fell.", "Not here at all, ever", "It was a dark night.",
          "It was a dark night. Snow fell."), [0, 1, 0, 0]),
    ],
)  # fmt: skip
def test_what_belongs_together(
    tmp_path: Path, letters: LetterTokenizer, texts: tuple[str, ...], conversations: list[int]
):
    assert group(tmp_path, letters, *texts) == conversations


def test_a_common_opening_ties_nothing(tmp_path: Path, letters: LetterTokenizer):
    opening = "Translate the following text into French:\n"
    texts = [opening, *(f"{opening}{number} cats" for number in range(MOST_BRANCHES))]
    assert set(group(tmp_path, letters, *texts)) == {0}
    assert len(set(group(tmp_path, letters, *texts, f"{opening}a dog"))) == len(texts) + 1

    # A long conversation has as many rows, but each continues only the one before
    turns = [lines(1, number) for number in range(1, 4 * MOST_BRANCHES)]
    assert set(group(tmp_path, letters, *turns)) == {0}


def test_prompts_with_many_answers_are_no_common_opening(tmp_path: Path, letters: LetterTokenizer):
    prompt = "Tell me a joke about cats."
    rows = [{"prompt": prompt, "completion": f"joke {n}"} for n in range(20)]
    rows.append({"prompt": f"{prompt} It must be short.", "completion": "no"})
    file = write(tmp_path / "data", train="\n".join(map(json.dumps, rows))) / "train.jsonl"
    tables = load(letters(), file).examples["train"].tables
    assert len(set(find_conversations(tables)[0].tolist())) == 1


@pytest.mark.parametrize(
    "text", ["", " ", "a" * (SHORTEST - 1), "\0" * 40, "é\u0301" * 40, "İ" * 40, "😀 " * 40, "\u3000" * 99]
)  # fmt: skip
def test_any_text_has_digests(text: str):
    row = make_row({"prompt": text, "completion": f"{text}."}, 1)
    digests = text_digests(row)
    assert digests.beginnings.dtype == np.uint64
    assert (digests.text > 0) == (len("".join(f"{text}{text}.".split())) >= SHORTEST)


def test_memory_and_time_are_bounded_by_the_first_characters():
    word = make_row({"text": "word " * LONGEST}, 1)
    line = make_row({"text": "a line\n" * LONGEST}, 1)
    longer = make_row({"text": "word " * LONGEST + "end"}, 1)
    assert text_digests(word).text == text_digests(longer).text
    assert len(text_digests(word).beginnings) <= 1100
    assert len(text_digests(line).beginnings) <= 2048
    assert len(text_digests(line).parts) <= 2048


def test_long_texts_that_begin_alike_belong_together(tmp_path: Path, letters: LetterTokenizer):
    """Only the first characters and lines of a text are compared, which is enough to join them."""
    book = "".join(f"Line {number} of the book\n" for number in range(1600))
    cuts = [book[: book.rindex("\n", 0, size)] for size in (20_000, 30_000, 35_000)]
    assert group(tmp_path, letters, *cuts, book, book[200:]) == [0, 0, 0, 0, 4]


OPENINGS = {
    "menu": "".join(f'<li><a href="/p{i}">Page {i}</a></li>' for i in range(300)),
    "code": "struct X { int a[3]; };\n" * 300,
    "licence": "".join(f"Line {i} of the licence\n" for i in range(1100)),
    "prose": "and so it is " * 8000,
}


@pytest.mark.parametrize("form", ["text", "prompt", "chat", "documents"])
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_long_opening_that_many_rows_share_ties_nothing(
    tmp_path: Path, letters: LetterTokenizer, form: str, opening: str
):
    texts = [f"{OPENINGS[opening]}Article {n}: about {n * 7919}" for n in range(2 * MOST_BRANCHES)]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text} for text in texts],
        "prompt": [{"prompt": text, "completion": "Yes."} for text in texts],
        "chat": [
            {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
            for text in texts
        ],
    }
    if form == "documents":
        folder = documents(tmp_path / "data", **{f"d{n}": text for n, text in enumerate(texts)})
    else:
        folder = write(tmp_path / "data", train="\n".join(map(json.dumps, rows[form])))

    tokenizer = letters("chatml", **CHATML) if form == "chat" else letters()
    tables = load(tokenizer, folder, max_seq_length=2**17).examples["train"].tables
    (found,) = find_conversations(tables)
    assert len(set(found.tolist())) == len(texts)


@pytest.mark.parametrize("separator", [" | ", " USER: ", " → ", " » ", " </s> ", "<u>"])
def test_turns_on_one_line_are_found_at_their_separators(
    tmp_path: Path, letters: LetterTokenizer, separator: str
):
    turns = [f"turn {number} says so" + " and more" * 30 for number in range(4)]
    texts = [separator.join(turns[:count]) for count in (3, 4)]
    assert group(tmp_path, letters, *texts) == [0, 0]


@pytest.mark.parametrize(
    "other",
    [
        "it\u2019s \u201chere\u201d \u2013 so",
        'it\'s\u200b "here" -\ufeff so',
        "it\u00b4s \u00abhere\u00bb \u2015 so",
        "it`s \u00abhere\u00bb \ufe58 so",
        "it\uff40s \uff02here\uff02 \uff0d so",
    ],
)
def test_quotes_dashes_and_invisible_characters_do_not_count(
    tmp_path: Path, letters: LetterTokenizer, other: str
):
    rows = [
        {"prompt": "What is the text?", "completion": text} for text in ('it\'s "here" - so', other)
    ]
    train, valid = (json.dumps(row) for row in rows)
    data = load(letters(), write(tmp_path / "data", train=train, valid=valid))
    (found,) = [overlap for overlap in find_overlaps(data.examples) if overlap.count]
    assert str(found).startswith("1 valid row that is in train")


def persona(number: int, turns: int) -> dict[str, Any]:
    """Return a chat whose system message is of one of several personas, or missing."""
    messages = [{"role": "system", "content": f"You are persona {number}."}] if number else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"What is the number {turn}?"})
        messages.append({"role": "assistant", "content": f"That is {turn}."})
    return {"messages": messages}


def test_a_conversation_with_other_system_messages_stays_together(
    tmp_path: Path, letters: LetterTokenizer
):
    """But a question that many system messages share, such as "Summarize the article", is common.

    Chats of two turns are more than a question, so all of these stay together.
    """
    tokenizer = letters("chatml", **CHATML)
    for count in (MOST_BRANCHES, 2 * MOST_BRANCHES + 4):
        rows = [persona(number, 1 + number % 2) for number in range(count)]
        folder = write(tmp_path / str(count), train="\n".join(map(json.dumps, rows)))
        (found,) = find_conversations(load(tokenizer, folder).examples["train"].tables)
        questions = count // 2
        assert len(set(found.tolist())) == (1 if count == MOST_BRANCHES else questions + 1)


@pytest.mark.parametrize("on_long", ["truncate", "split"])
def test_rows_that_are_equal_once_they_are_cut_belong_together(
    tmp_path: Path, letters: LetterTokenizer, on_long: str
):
    """They differ only after the maximum length, so the same example would be on both sides."""
    texts = [f"{number} " * 20 + end for number in range(8) for end in ("one", "other")]
    rows = [json.dumps({"text": text}) for text in texts]
    options: dict[str, Any] = {"max_seq_length": 32, "on_long": on_long}
    split = load(
        letters(), write(tmp_path / "data", train="\n".join(rows)), valid_split=0.5, **options
    ).examples
    sides = [{split[name][i].tokens.tobytes() for i in split[name].first_of_rows()}
             for name in ("train", "valid")]  # fmt: skip
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (4, 4, set())

    folder = write(tmp_path / "files", train=rows[0], valid=f"{rows[1]}\n{rows[2]}")
    overlaps = find_overlaps(load(letters(), folder, **options).examples)
    assert [str(overlap) for overlap in overlaps if overlap.count] == [
        "1 valid row whose conversation or text is partly in train (valid.jsonl:1 = train.jsonl:1)"
    ]


def test_pairs_that_are_equal_once_they_are_cut_belong_together(
    tmp_path: Path, letters: LetterTokenizer
):
    options: dict[str, Any] = {"objective": "dpo", "max_seq_length": 48}
    for middle, conversations in (("A" * 40, 8), ("", 16)):
        rows = [
            {
                "prompt": " ",
                "chosen": f"{n}" * 20 + middle + end,
                "rejected": f"{n}" * 20 + "B" * 40 + end,
            }
            for n in range(8)
            for end in ("one", "other")
        ]
        folder = write(tmp_path / str(conversations), train="\n".join(map(json.dumps, rows)))
        (found,) = group_examples(load(letters(), folder, **options).examples["train"])
        assert len(set(found.tolist())) == conversations


def test_parts_that_many_split_rows_share_tie_nothing(tmp_path: Path, letters: LetterTokenizer):
    texts = [
        "This licence text is shared by all files. " * 4 + f"File {n} holds {n * n} items of {n}."
        for n in range(40)
    ]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    options: dict[str, Any] = {"max_seq_length": 64}
    split = load(letters(), write(tmp_path / "data", train=rows), on_long="split", valid_split=0.25,
                 **options).examples  # fmt: skip
    counts = [len(split[name].first_of_rows()) for name in ("train", "valid")]
    assert counts == [30, 10]
    assert not [str(each) for each in find_overlaps(split) if each.count]

    # Truncated rows are equal examples, however many there are
    truncated = load(letters(), tmp_path / "data", on_long="truncate", **options).examples["train"]
    assert len(set(group_examples(truncated)[0].tolist())) == 1


def documents(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_document_and_its_copy_or_continuation_are_on_one_side(
    tmp_path: Path, letters: LetterTokenizer
):
    texts = [lines(number, 40) for number in range(3)]
    for name, other in (("copy", texts[0]), ("longer", texts[0] + texts[1])):
        folder = documents(tmp_path / name, a=texts[0], b=other, c=texts[2])
        data = load(letters(), folder, valid_split=None, max_seq_length=64)
        valid = data.examples["valid"]
        assert {valid.place(index) for index in range(len(valid))} == {"3 documents:3"}
        assert not [str(each) for each in find_overlaps(data.examples) if each.leak and each.count]


def test_documents_of_given_files_are_compared(tmp_path: Path, letters: LetterTokenizer):
    text = lines(1, 40)
    for name, valid, kind in (
        ("same", text, "row that is in train"),
        ("begun", lines(1, 10), "row whose conversation or text is partly in train"),
        ("other", lines(2, 10), ""),
    ):
        folder = documents(tmp_path / name, train=text, valid=valid)
        found = find_overlaps(load(letters(), folder, max_seq_length=64).examples)
        expected = [f"1 valid {kind} (valid.txt:1 = train.txt:1)"] if kind else []
        assert [str(overlap) for overlap in found if overlap.count] == expected
