"""Rows that are a part of another, or that have another form, are found; common parts are not."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.data.conversation_groups import MOST_BRANCHES, find_conversations
from mlx_loraplus.data.holdout import group_conversations
from mlx_loraplus.data.overlaps import find_overlaps
from tests.data.conftest import LetterTokenizer
from tests.data.reading import load, write

Messages = list[dict[str, str]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turns(story: int, first: int, stop: int) -> Messages:
    """Return some turns of a conversation; each has a question and an answer."""
    return [
        message
        for turn in range(first, stop)
        for message in (
            user(f"Question {turn}: where is town {story}.{turn}?"),
            bot(f"Town {story}.{turn} is north of here.\nIt is small."),
        )
    ]


def tagged(messages: Messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def gemma(messages: Messages) -> str:
    return "<bos>" + "".join(
        f"<start_of_turn>{m['role'].replace('assistant', 'model')}\n{m['content']}<end_of_turn>\n"
        for m in messages
    )


def llama(messages: Messages) -> str:
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>"
        for m in messages
    )


def instructions(messages: Messages) -> str:
    return "<s>" + "".join(
        f"[INST] {m['content']} [/INST]" if m["role"] == "user" else f" {m['content']}</s>"
        for m in messages
    )


def labels(messages: Messages, mark: str = "", end: str = "\n\n") -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"{mark}{names[m['role']]}: {m['content']}{end}" for m in messages)


def thinking(messages: Messages) -> Messages:
    return [
        bot(f"<think>\nHm, let me see.\n</think>\n\n{m['content']}") if m["role"] != "user" else m
        for m in messages
    ]


def vicuna(messages: Messages) -> str:
    """Return a chat on one line, with the system message before it."""
    turns = [
        f"USER: {m['content']}" if m["role"] == "user" else f"ASSISTANT: {m['content']}</s>"
        for m in messages
    ]
    return " ".join(["A chat between a user and an assistant.", *turns])


def llama2(messages: Messages) -> str:
    return f"<s>[INST] <<SYS>>\n{PIRATE}\n<</SYS>>\n\n" + instructions(messages).removeprefix(
        "<s>[INST] "
    )


def named(messages: Messages, names: tuple[str, str], form: str) -> str:
    """Return a chat whose turns begin with other names of the roles."""
    turns = [(names[m["role"] != "user"], m["content"]) for m in messages]
    return "\n".join(form.format(name=name, content=content) for name, content in turns)


def quoted(messages: Messages) -> Messages:
    """Return messages with other punctuation around their words."""
    return [{**m, "content": f'"{m["content"].rstrip(".?")}"'} for m in messages]


def numbers(count: int, seed: int = 0) -> str:
    """Return words without punctuation."""
    chance = random.Random(seed)
    return " ".join(f"w{chance.randrange(10_000)}" for _ in range(count))


def characters(count: int) -> str:
    """Return Chinese characters without punctuation."""
    chance = random.Random(0)
    return "".join(chr(chance.randrange(0x4E00, 0x9000)) for _ in range(count))


PIRATE = "You are a pirate who tells of towns."
TEACHER = "Answer as a patient teacher of geography would."
CHAT = turns(1, 0, 6)
SAME = "row that is in train"
PART = "row whose conversation or text is partly in train"

ALIKE: dict[str, tuple[Any, Any, str]] = {
    # Text that continues, without punctuation
    "100 words": ({"text": numbers(100)}, {"text": numbers(160)}, PART),
    "900 words": ({"text": numbers(900)}, {"text": numbers(960)}, PART),
    "2,000 words": ({"text": numbers(2000)}, {"text": numbers(2900)}, PART),
    "Chinese": ({"text": characters(90)}, {"text": characters(120)}, PART),
    # Parts of a conversation
    "middle": ({"messages": CHAT}, {"messages": CHAT[4:8]}, PART),
    "around": ({"messages": CHAT[4:8]}, {"messages": CHAT}, PART),
    "end": ({"messages": CHAT}, {"messages": CHAT[8:]}, PART),
    "sliding": ({"messages": CHAT[:8]}, {"messages": CHAT[4:]}, PART),
    "one answer": (
        {"messages": CHAT},
        {"prompt": CHAT[6]["content"], "completion": CHAT[7]["content"]},
        PART,
    ),
    # Other forms
    "ChatML": ({"messages": CHAT}, {"text": tagged([system("Be kind."), *CHAT])}, PART),
    "part of ChatML": ({"text": tagged(CHAT)}, {"messages": CHAT[4:8]}, PART),
    "Gemma": ({"messages": CHAT}, {"text": gemma(CHAT)}, PART),
    "Llama 3": ({"messages": [system("Hm"), *CHAT]}, {"text": llama([system("Hm"), *CHAT])}, PART),
    "Llama 2": ({"messages": CHAT}, {"text": instructions(CHAT)}, PART),
    "labels": ({"messages": CHAT}, {"text": labels(CHAT)}, PART),
    "headings": ({"messages": CHAT}, {"text": labels(CHAT, "### ", "")}, PART),
    "prompt": (
        {"messages": CHAT},
        {
            "prompt": f"{tagged(CHAT[:-1])}<|im_start|>assistant\n",
            "completion": CHAT[-1]["content"],
        },
        PART,
    ),
    "Alpaca": (
        {"instruction": "Name three big cats", "output": "Lion, tiger, jaguar"},
        {
            "text": "Below is an instruction.\n\n### Instruction:\nName three big cats\n\n"
            "### Response:\nLion, tiger, jaguar"
        },
        PART,
    ),
    "ShareGPT": (
        {"messages": CHAT[:2]},
        {
            "conversations": [
                {"from": "human", "value": CHAT[0]["content"]},
                {"from": "gpt", "value": CHAT[1]["content"]},
            ]
        },
        SAME,
    ),
    # The system message in the user's first one
    "system": (
        {"messages": [system(PIRATE), *CHAT[:2]]},
        {"messages": [user(f"{PIRATE}\n\n{CHAT[0]['content']}"), CHAT[1]]},
        PART,
    ),
    "system on the same line": (
        {"messages": CHAT[:2]},
        {"messages": [user(f"{PIRATE} {CHAT[0]['content']}"), CHAT[1]]},
        PART,
    ),
    # Chats that a template has rendered, with other system messages
    "two systems": (
        {"text": tagged([system(PIRATE), *CHAT])},
        {"text": tagged([system(TEACHER), *CHAT])},
        PART,
    ),
    "middle, two systems": (
        {"text": llama([system(PIRATE), *CHAT])},
        {"text": tagged([system(TEACHER), *CHAT[4:8]])},
        PART,
    ),
    "middle, one system": (
        {"text": tagged([system(PIRATE), *CHAT])},
        {"text": tagged([system(PIRATE), *CHAT[4:8]])},
        PART,
    ),
    "sliding, one system": (
        {"text": tagged([system(PIRATE), *CHAT[:8]])},
        {"text": tagged([system(PIRATE), *CHAT[4:]])},
        PART,
    ),
    "middle, Llama 2": ({"messages": CHAT}, {"text": llama2(CHAT[4:8])}, PART),
    "another last answer, two systems": (
        {"messages": [system(PIRATE), *CHAT]},
        {"messages": [system(TEACHER), *CHAT[:-1], bot("I do not know that town.")]},
        PART,
    ),
    # Thoughts in one of them
    "thoughts": ({"messages": CHAT}, {"messages": thinking(CHAT)}, PART),
    "middle with thoughts": ({"messages": CHAT}, {"messages": thinking(CHAT[4:8])}, PART),
    "rendered thoughts": ({"messages": CHAT}, {"text": tagged(thinking(CHAT))}, PART),
    # Other names of roles
    "one line": ({"messages": CHAT}, {"text": vicuna(CHAT)}, PART),
    "names": (
        {"messages": CHAT},
        {"text": named(CHAT, ("Alice", "Bob"), "{name}: {content}")},
        PART,
    ),
    "numbers": (
        {"messages": CHAT},
        {"text": named(CHAT, ("User", "Bot"), "3. {name}: {content}")},
        PART,
    ),
    "brackets": (
        {"messages": CHAT},
        {"text": named(CHAT, ("USER", "BOT"), "[{name}]: {content}")},
        PART,
    ),
    "bars": (
        {"messages": CHAT},
        {"text": named(CHAT, ("user", "assistant"), "[|{name}|]{content}[|endofturn|]")},
        PART,
    ),
    "XML": (
        {"messages": CHAT},
        {"text": named(CHAT, ("user", "assistant"), "<{name}>{content}</{name}>")},
        PART,
    ),
    "JSON": ({"messages": CHAT}, {"text": json.dumps([system(PIRATE), *CHAT])}, PART),
    "JSON row": ({"messages": CHAT}, {"text": json.dumps({"messages": CHAT[4:8]})}, PART),
    # Punctuation
    "quoted": ({"messages": CHAT}, {"messages": quoted(CHAT)}, PART),
    "middle, quoted": ({"messages": CHAT}, {"messages": quoted(CHAT[4:8])}, PART),
    # Characters that look alike
    "braille blank": ({"text": "what is it"}, {"text": "what\u2800is it"}, SAME),
    "Hangul filler": ({"text": "what is it"}, {"text": "what\u3164is it"}, SAME),
    "no-break space": ({"text": "what is it"}, {"text": "what\u00a0is\u202fit"}, SAME),
    "zero width": ({"text": "what"}, {"text": "wh\u200ba\u2060\ufe0ft\U000e0041\u00ad"}, SAME),
    "Turkish": ({"text": "\u0130STANBUL \u0131l\u0131k"}, {"text": "istanbul ilik"}, SAME),
    "Turkish, decomposed": ({"text": "I\u0307stanbul"}, {"text": "i\u0307stanbul"}, SAME),
    "sharp s": ({"text": "Straße"}, {"text": "STRASSE"}, SAME),
    "decomposed": ({"text": "Café ﬁ"}, {"text": "Cafe\u0301 fi"}, SAME),
}


def examples_of(letters: LetterTokenizer, folder: Path, rows: list[Any], **options: Any) -> Any:
    file = write(folder, train="\n".join(map(json.dumps, rows)))
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    return load(tokenizer, file, max_seq_length=2**15, **options).examples


def count_groups(letters: LetterTokenizer, folder: Path, rows: list[Any]) -> int:
    (found,) = find_conversations(examples_of(letters, folder, rows)["train"].tables)
    return len(set(found.tolist()))


@pytest.mark.parametrize("kind", ALIKE)
def test_rows_of_one_conversation_are_reported_and_stay_together(
    tmp_path: Path, letters: LetterTokenizer, kind: str
):
    train, valid, what = ALIKE[kind]
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    folder = write(tmp_path / "data", train=json.dumps(train), valid=json.dumps(valid))
    data = load(tokenizer, folder, max_seq_length=2**15)
    assert [str(overlap) for overlap in find_overlaps(data.examples) if overlap.count] == [
        f"1 valid {what} (valid.jsonl:1 = train.jsonl:1)"
    ]
    assert count_groups(letters, tmp_path / "one", [train, valid]) == 1


def test_windows_that_slide_over_a_conversation_are_one(tmp_path: Path, letters: LetterTokenizer):
    windows = [turns(story, first, first + 4) for story in range(3) for first in range(12)]
    rows = [{"messages": messages} for messages in windows]
    assert count_groups(letters, tmp_path / "data", rows[::-1]) == 3


HONEST: dict[str, list[Any]] = {
    # Questions about the documents in system messages, and one about texts after a label
    "documents": [
        {"messages": [system(f"Town {n} lies at river {n}."), user("At which river does the town lie?"),
                      bot(f"The town lies at river number {n}.")]}
        for n in range(MOST_BRANCHES)
    ],
    "tasks": [
        {"prompt": f"{task}:\n{numbers(30)}", "completion": f"{task} done."}
        for task in ("Summarize", "Translate", "Shorten")
    ],
    "sums": [
        {"prompt": f"What is {a} {sign} {b}?", "completion": "I do not know it."}
        for a, sign, b in (("1.5", "*", "2"), ("15", "*", "2"), ("15", "-", "2"), ("15", "", "2"))
    ],
    # A system message, in its place or in the user's first message
    "system": [
        {"messages": [system(PIRATE), *turns(n, 0, 2)]} for n in range(3 * MOST_BRANCHES)
    ],
    "system in front": [
        {"messages": [user(f"{PIRATE}\n\nWhat is {n}?"), bot(f"It is {n * n}.")]}
        for n in range(3 * MOST_BRANCHES)
    ],
    # A greeting, and its answer
    "greeting": [
        {"messages": [user("Hi"), bot("Hello! How can I help you today?"), *turns(n, 0, 2)]}
        for n in range(3 * MOST_BRANCHES)
    ],
    "greeting that grows": [
        {"messages": [user("Hi"), bot(f"Hello! I am agent number {n}."), *turns(n, 0, stop)]}
        for n in range(3 * MOST_BRANCHES)
        for stop in (1, 2)
    ],
    # The same end
    "farewell": [
        {"messages": [*turns(n, 0, 2), user("Thanks a lot!"), bot("You are welcome! Anything else?")]}
        for n in range(3 * MOST_BRANCHES)
    ],
    # Conversations that only share a sentence, one with another
    "sentence": [
        {"text": f"{numbers(20, n)}. The {n}th sentence is in two. {numbers(20, -n)}."
                 f" The {n + 1}th sentence is in two. {numbers(9, 99 * n)}."}
        for n in range(1, 9)
    ],
    "examples in front": [
        {"prompt": f"Q: {numbers(6, 1)}?\nA: {numbers(2, 2)}\nQ: {numbers(6, n)}?\nA:", "completion": f" {n}."}
        for n in range(10, 10 + 3 * MOST_BRANCHES)
    ],
}  # fmt: skip


def test_many_system_messages_before_one_conversation(tmp_path: Path, letters: LetterTokenizer):
    systems = [system(f"You are guide number {n}.") for n in range(3 * MOST_BRANCHES)]
    rows = [{"messages": [each, *CHAT]} for each in systems]
    assert count_groups(letters, tmp_path / "chats", rows) == 1

    # The document that a question is about may stand in the system message
    rows = [{"messages": [each, *CHAT[:2]]} for each in systems]
    assert count_groups(letters, tmp_path / "questions", rows) == len(rows)


def test_a_part_of_a_long_conversation_is_found(tmp_path: Path, letters: LetterTokenizer):
    chat = turns(1, 0, 200)
    rows = [{"messages": chat}, {"messages": chat[380:382]}, {"messages": turns(2, 0, 1)}]
    assert count_groups(letters, tmp_path / "data", rows) == 2


@pytest.mark.parametrize("kind", HONEST)
def test_what_many_conversations_share_ties_nothing(
    tmp_path: Path, letters: LetterTokenizer, kind: str
):
    rows = HONEST[kind]
    rows_each = 2 if kind == "greeting that grows" else 1
    assert count_groups(letters, tmp_path / "data", rows) == len(rows) / rows_each


def test_a_short_greeting_and_its_answers_are_one_conversation(
    tmp_path: Path, letters: LetterTokenizer
):
    """They have the same prompt, but join none of the chats that go on."""
    answers = [f"Hello! I am agent number {n}. How can I help you today?" for n in range(20)]
    short = [{"messages": [user("Hi"), bot(answer)]} for answer in answers]
    long = [
        {"messages": [*turns(99 + n, 0, 1), user("Hi"), bot(answer)]}
        for n, answer in enumerate(answers)
    ]
    long += [
        {"messages": [user("Hi"), bot(answer), *turns(n, 0, 1)]} for n, answer in enumerate(answers)
    ]
    assert count_groups(letters, tmp_path / "data", short + long) == 1 + len(long)


def test_rows_that_hold_examples_of_other_rows_can_be_held_out(
    tmp_path: Path, letters: LetterTokenizer
):
    """All of them hang together, so the rows are divided, and what is in both is reported."""
    pairs = [(f"{numbers(6, n)}?", f"{numbers(3, 100 + n)}.") for n in range(20)]
    rows = [
        {"prompt": f"Q: {before[0]}\nA: {before[1]}\nQ: {own[0]}\nA:", "completion": f" {own[1]}"}
        for before, own in zip(pairs[-1:] + pairs, pairs, strict=False)
    ]
    rows += [{"prompt": question, "completion": answer} for question, answer in pairs]
    examples = examples_of(letters, tmp_path / "data", rows, valid_split=0.2)
    assert len(set(group_conversations(examples["train"]).tolist())) < 10
    assert (len(examples["train"]), len(examples["valid"])) == (32, 8)
    (found,) = [str(each) for each in find_overlaps(examples) if each.count]
    assert " valid rows whose conversation or text is partly in train (" in found
