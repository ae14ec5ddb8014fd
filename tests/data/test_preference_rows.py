"""Rows with two answers, and what is wrong with some."""

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_loraplus as ml
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.fields_setting import parse_names
from mlx_loraplus.data.first_rows import check_rows
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.pairs import PairBatches, Pairs
from mlx_loraplus.data.preference_rows import make_pair
from mlx_loraplus.data.row_digests import row_digests
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.data.tokenize import RowRenderer
from mlx_loraplus.errors import DataError
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import plan_batches
from scripts.tiny_model import write_tiny_model
from tests.data.conftest import LetterTokenizer
from tests.data.test_template_kinds import TEMPLATES

USER = {"role": "user", "content": "Hi"}
GOOD, BAD = (
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "Go away"},
)
PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"}


def answers_of(row: dict, names: list[str] | None = None) -> tuple[dict, dict]:
    made = make_pair(row, 7, parse_names(names or []))
    assert (made.kind, made.line) == ("preference", 7)
    assert made.rejected is not None
    return dict(made.fields), dict(made.rejected.fields)


def test_texts():
    chosen, rejected = answers_of(PLAIN | {"system": "Be brief."})
    assert chosen == {"prompt": "2 + 2 =", "completion": " 4", "system": "Be brief."}
    assert rejected == chosen | {"completion": " five"}
    assert make_pair(PLAIN | {"score": 3}, 1).unused == ("score",)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "Go away"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
    ],
)
def test_messages(row: dict):
    chosen, rejected = answers_of(row)
    assert chosen == {"messages": [USER, GOOD]}
    assert rejected == {"messages": [USER, BAD]}
    noted = any("share" in note for note in make_pair(row, 1).notes)
    assert noted == ("prompt" not in row)


def test_pairs_that_share_an_answer_are_no_duplicates():
    one, other = make_pair(PLAIN, 1), make_pair(PLAIN | {"rejected": " 3"}, 2)
    (whole, *prompt), (other_whole, *other_prompt) = row_digests(one), row_digests(other)
    assert whole != other_whole
    assert prompt == other_prompt
    assert row_digests(make_pair(PLAIN | {"chosen": " 4 "}, 3))[0] == whole


def test_tools_make_a_chat_of_texts():
    tools = [{"type": "function", "function": {"name": "f"}}]
    chosen, _ = answers_of(PLAIN | {"tools": tools})
    assert chosen["tools"] == tools
    assert chosen["messages"][0] == {"role": "user", "content": "2 + 2 ="}


def test_fields_name_the_columns():
    row = {"q": "a", "better": "b", "worse": "c"}
    chosen, rejected = answers_of(row, ["prompt=q", "chosen=better", "rejected=worse"])
    assert (chosen["completion"], rejected["completion"]) == ("b", "c")
    templated, _ = answers_of(row, ["prompt=<{q}>", "chosen=better", "rejected=worse"])
    assert templated["prompt"] == "<a>"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (PLAIN | {"rejected": " 4"}, "chosen and rejected are equal"),
        (PLAIN | {"rejected": " "}, "'rejected' is empty"),
        (PLAIN | {"chosen": 3}, "'chosen'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are equal"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "do not begin with the same prompt"),
        (
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER | {"content": "?"}, BAD]},
            "although 'prompt' has the question",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "is the beginning of"),
        ({"chosen": "Hello", "rejected": "Go"}, "have no prompt"),
        ({"prompt": "a", "completion": "b"}, "a completion row suits --objective sft"),
        ({"messages": [USER, GOOD]}, "a chat row suits --objective sft"),
        ({"q": "a", "b": "c"}, "--fields chosen=COLUMN rejected=COLUMN"),
        ("text", "not an object with chosen and rejected"),
    ],
)
def test_what_is_wrong_with_a_row(row: object, problem: str):
    with pytest.raises(BadRowError, match=problem):
        make_pair(row, 1)


def test_sft_names_the_objective_that_pairs_suit():
    with pytest.raises(BadRowError, match="suits --objective dpo, ipo, orpo or simpo"):
        make_row(PLAIN, 1)


# In files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_tiny_model(folder / "model", hidden=32)
    rows = [
        {
            "prompt": f"{number} + 1 =",
            "chosen": f" {number + 1}",
            "rejected": " no" * (number % 7 + 1),
        }
        for number in range(30)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(folder: Path, file: str = "pairs.jsonl", **settings):
    _, tokenizer = ml.load(str(folder / "model"))
    plain = {"data": str(folder / file), "objective": "dpo", "valid_split": 0}
    config = configure(TrainConfig, plain | settings)
    check_rows(config)
    return load_data(config, tokenizer, "train"), config


def test_pairs_stay_together_in_batches_of_similar_lengths(folder: Path):
    data, config = load(folder, batch_size=4)
    pairs = data.examples["train"]
    assert isinstance(pairs, Pairs)
    assert data.reports["train"].kinds == {"preference": 30}
    batches = plan_batches(pairs, config.data, 0)
    assert isinstance(batches, PairBatches)

    pairs.reference = np.arange(60, dtype=np.float32).reshape(30, 2)
    seen = []
    for number in range(batches.per_epoch):
        batch = batches[number]
        assert batch.tokens.shape[0] == 8
        assert batch.places[::2] == batch.places[1::2]
        members = np.concatenate(batches.rows_of(number))
        assert batch.pairs == len(members)
        assert batch.reference is not None
        assert batch.reference[: 2 * len(members)].reshape(-1, 2).tolist() == (
            pairs.reference[members].tolist()
        )
        seen += members.tolist()
    assert sorted(seen) == list(range(30))


def test_each_answer_is_encoded_as_if_alone(folder: Path):
    _, tokenizer = ml.load(str(folder / "model"))
    pairs = load(folder)[0].examples["train"]
    assert isinstance(pairs, Pairs)
    for index in (0, 17, 29):
        chosen, rejected = pairs.chosen[index], pairs.rejected[index]
        first = int(chosen.supervised.argmax())
        assert chosen.tokens[:first].tolist() == rejected.tokens[:first].tolist()
        learned = [tokenizer.decode(one.tokens[one.supervised][:-1]) for one in (chosen, rejected)]
        assert learned[0].replace(" ", "") == str(index + 1)
        assert learned[1].replace(" ", "") == "no" * (index % 7 + 1)
        assert pairs[index].tokens.tolist() == chosen.tokens.tolist()


def test_long_answers_are_cut_and_equal_ones_are_dropped(folder: Path):
    rows = [
        PLAIN,
        {"prompt": "a", "chosen": "b" * 40 + "c", "rejected": "b" * 40 + "d"},
        {"prompt": "a", "chosen": "b" * 40, "rejected": "e"},
    ]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, _ = load(folder, "long.jsonl", max_seq_length=20)
    report = data.reports["train"]
    assert len(data.examples["train"]) == 2
    assert report.dropped_rows() == ["1 pair dropped (equal answers in their first 20 tokens)"]
    assert int(data.examples["train"].lengths.max()) < 20

    dropped, _ = load(folder, "long.jsonl", max_seq_length=20, on_long="drop")
    assert len(dropped.examples["train"]) == 1
    assert dropped.reports["train"].dropped == 2
    with pytest.raises(DataError, match=r"raise it, or choose --on-long truncate or drop$"):
        load(folder, "long.jsonl", max_seq_length=20, on_long="error")

    (folder / "equal.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(
        DataError, match=r"\(1 pair dropped .*\); raise --max-seq-length, which is 20$"
    ):
        load(folder, "equal.jsonl", max_seq_length=20)


def test_problems_are_reported_by_line(folder: Path):
    rows = [PLAIN, PLAIN | {"rejected": " 4"}, PLAIN | {"chosen": ""}, {"text": "t"}]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        load(folder, "bad.jsonl")
    for words in ("bad.jsonl:2: chosen and rejected are equal", "bad.jsonl:3", "bad.jsonl:4"):
        assert words in str(caught.value)
    assert "a row needs prompt + chosen + rejected" in str(caught.value)
    data, _ = load(folder, "bad.jsonl", on_bad="drop")
    assert len(data.examples["train"]) == 1


def test_pairs_that_the_template_makes_equal_are_bad_rows(letters: LetterTokenizer):
    tokenizer = letters("gemma3", **TEMPLATES["gemma3"])  # it strips contents
    row = make_pair({"prompt": "a", "chosen": "b", "rejected": " b\n"}, 1)
    rendered = RowRenderer(tokenizer).render(row)
    assert "equal once the chat template has rendered them" in str(rendered.problem)
    assert not rendered.texts


def test_a_prompt_is_rendered_once():
    system = {"role": "system", "content": "Be kind"}
    chats = {"chosen": [USER | {"content": "Hi\n"}, GOOD], "rejected": [USER, BAD]}
    for prompt in ("Hi", [USER], [system, USER]):
        messages = make_pair({"prompt": prompt} | chats, 1).fields["messages"]
        assert [each["role"] for each in messages if each != system] == ["user", "assistant"]

    # An answer may go on with questions, and the prompt may be the system message
    for prompt in ([system], [USER, BAD]):
        row = {"prompt": prompt, "completion": [USER, GOOD, USER, BAD]}
        assert len(make_row(row, 1).fields["messages"]) == len(prompt) + 4
    with pytest.raises(BadRowError, match="'completion' begins with a user message"):
        make_row({"prompt": "Why?", "completion": [USER, GOOD]}, 1)


def test_documents_have_no_pairs(folder: Path):
    (folder / "book.txt").write_text("words " * 50)
    with pytest.raises(DataError, match=r"book\.txt .*no preferences"):
        load(folder, "book.txt")
