import json
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.rows import Row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.errors import DataError
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.models.loading import load_folder_tokenizer
from mlx_loraplus.models.prompt_format import PromptFormat
from scripts.tiny_model import write_tiny_model
from tests.data.conftest import TEMPLATES
from tests.data.reading import encode_one, encode_rows

COMPLETION = Row(
    "completion", {"prompt": "Dim the hall\nCommand:", "completion": ' {"level": 5}'}, 1
)
TEXT = Row("text", {"text": "Rain, again."}, 2)
TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
CHAT = Row("chat", {"messages": TWO_TURNS}, 3)
SMOLLM2_SYSTEM = (
    "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH"
    " ugging ĠFace <|im_end|> Ċ"
)


@pytest.fixture(scope="module")
def gemma_it() -> TokenizerWrapper:
    """Gemma 3's tokenizer with the template of its instruction-tuned models."""
    template = (TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8")
    return load_tokenizer(find_model("gemma-3-270m").path, {"chat_template": template})


def marked(example: Example, tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens, with a + in front of the supervised ones and Ċ for a line's end."""
    tokens = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    return [
        "+" * bool(supervised) + token.replace("\n", "Ċ")
        for token, supervised in zip(tokens, example.supervised, strict=True)
    ]


def check(record: Row, tokenizer: TokenizerWrapper, expected: str) -> None:
    example = encode_one(record, tokenizer)
    assert marked(example, tokenizer) == expected.split()
    assert (example.tokens.dtype, example.supervised.dtype) == (np.int32, np.bool_)


# --- positions by hand ----------------------------------------------------------------------------


def test_completion_on_gemma(gemma):
    check(COMPLETION, gemma, '<bos> Dim ▁the ▁hall Ċ Command : +▁{" +level +": +▁ +5 +} +<eos>')


def test_completion_on_smollm2_is_a_chat_of_one_turn(smollm2):
    check(
        COMPLETION,
        smollm2,
        f"{SMOLLM2_SYSTEM} <|im_start|> user Ċ Dim Ġthe Ġhall Ċ Command : <|im_end|> Ċ "
        '<|im_start|> ass istant Ċ +Ġ{" +level +": +Ġ +5 +} +<|im_end|> Ċ',
    )


def test_completion_on_gemma_it(gemma_it):
    check(
        COMPLETION,
        gemma_it,
        "<bos> <start_of_turn> user Ċ Dim ▁the ▁hall Ċ Command : <end_of_turn> Ċ "
        '<start_of_turn> model Ċ +{" +level +": +▁ +5 +} +<end_of_turn> Ċ',
    )


def test_text_on_gemma(gemma):
    check(TEXT, gemma, "<bos> +Rain +, +▁again +. +<eos>")


def test_text_on_smollm2(smollm2):
    check(TEXT, smollm2, "Rain +, +Ġagain +. +<|im_end|>")


def test_chat_on_gemma_it(gemma_it):
    check(
        CHAT,
        gemma_it,
        "<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ +Hello +▁you"
        " +<end_of_turn> Ċ <start_of_turn> user Ċ Bye <end_of_turn> Ċ <start_of_turn> model Ċ +See"
        " +▁you +<end_of_turn> Ċ",
    )


def test_chat_on_smollm2(smollm2):
    check(
        CHAT,
        smollm2,
        f"{SMOLLM2_SYSTEM} <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> ass istant Ċ +Hello"
        " +Ġyou +<|im_end|> Ċ <|im_start|> user Ċ By e <|im_end|> Ċ <|im_start|> ass istant Ċ +See"
        " +Ġyou +<|im_end|> Ċ",
    )


def test_system_messages(gemma_it, smollm2):
    system = Row(
        "chat", {"messages": [{"role": "system", "content": "Be kind"}, *TWO_TURNS[:2]]}, 1
    )
    check(
        system,
        gemma_it,
        "<bos> <start_of_turn> user Ċ Be ▁kind ĊĊ Hi <end_of_turn> Ċ <start_of_turn> model Ċ +Hello"
        " +▁you +<end_of_turn> Ċ",
    )
    check(
        system,
        smollm2,
        "<|im_start|> system Ċ Be Ġkind <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ "
        "<|im_start|> ass istant Ċ +Hello +Ġyou +<|im_end|> Ċ",
    )


def test_a_chat_that_ends_with_the_user(smollm2):
    example = encode_one(Row("chat", {"messages": TWO_TURNS[:3]}, 1), smollm2)
    assert " ".join(marked(example, smollm2)[-4:]) == "+Hello +Ġyou +<|im_end|> Ċ", (
        "the rest is not trained on"
    )
    assert example.supervised.sum() == 3


def test_a_token_across_the_seam_belongs_to_the_completion(gemma):
    record = Row("completion", {"prompt": "The answer is un", "completion": "believable"}, 1)
    check(record, gemma, "<bos> The ▁answer ▁is +▁unbelievable +<eos>")


def test_a_token_across_the_seam_is_noted(gemma, smollm2):
    def noted(prompt: str, completion: str, tokenizer) -> bool:
        (encoded,) = encode_rows(
            [Row("completion", {"prompt": prompt, "completion": completion}, 1)], tokenizer
        )
        return any("form one token" in note for note in encoded.notes)

    assert noted("my parcel is late", "delivery", gemma)
    assert noted("Label: ", "delivery", gemma)
    assert not noted("my parcel is late", " delivery", gemma)
    assert not noted("Label:", "\ndelivery", gemma)
    assert not noted("my parcel is late", "delivery", smollm2)  # its template stands between them


def test_special_tokens_are_not_added_twice(gemma):
    check(Row("text", {"text": "<bos>Rain<eos>"}, 1), gemma, "<bos> +Rain +<eos>")


def test_training_on_everything_supervises_all_but_the_first_token(gemma, gemma_it, smollm2):
    for record, tokenizer in (
        (COMPLETION, gemma),
        (TEXT, gemma),
        (CHAT, gemma_it),
        (CHAT, smollm2),
        (TEXT, smollm2),
    ):
        masked = encode_one(record, tokenizer)
        example = encode_one(record, tokenizer, "everything")
        assert example.tokens.tolist() == masked.tokens.tolist()
        assert example.supervised.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_a_prompt_is_encoded_as_in_training(gemma, gemma_it, smollm2):
    for tokenizer in (gemma, gemma_it, smollm2):
        example = encode_one(COMPLETION, tokenizer)
        prompt = encode_prompt(COMPLETION.fields["prompt"], tokenizer)
        assert prompt == example.tokens[: np.argmax(example.supervised)].tolist()
    assert (
        encode_prompt("Hi", gemma_it, chat=False)
        == gemma_it.encode("Hi")
        == [gemma_it.bos_token_id, 10979]
    )
    assert encode_prompt("Hi", smollm2, chat=False) == smollm2.encode("Hi")


def test_characters_without_a_token_are_noted(tmp_path: Path):
    tokenizer = load_folder_tokenizer(write_tiny_model(tmp_path))
    rows = [Row("text", {"text": text}, 1) for text in ("plain", "日本")]
    plain, unknown = encode_rows(rows, tokenizer)
    assert plain.notes == []
    assert unknown.notes == [
        "the tokenizer has no token for some characters, and replaces them with its token for unknown"
        " text"
    ]


def test_a_tokenizer_that_drops_every_character_leaves_only_the_end(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    example = encode_one(TEXT, load_folder_tokenizer(folder))
    assert not example.supervised[:1].any()
    assert len(example.tokens) <= 2


def test_a_prompt_without_a_token_is_refused(letters, smollm2):
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt("", smollm2, chat=False)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_message_of_a_chat_is_refused(smollm2, gemma, prompt: str):
    with pytest.raises(DataError, match="the prompt is empty; give at least one word"):
        encode_prompt(prompt, smollm2)
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt(prompt, gemma, form=PromptFormat(form="alpaca"))
    # A model without a template begins a text after BOS.
    assert encode_prompt("", gemma) == [gemma.bos_token_id]


def test_a_chat_on_a_base_model_is_a_problem(gemma):
    (encoded,) = encode_rows([CHAT], gemma)
    assert encoded.examples == []
    assert "chat rows need a chat template" in str(encoded.problem)
    assert str(encoded.problem).endswith("or write the rows as prompt and completion")


# --- templates that refuse ------------------------------------------------------------------------


def test_a_template_that_refuses_a_row(gemma_it):
    record = Row("chat", {"messages": [{"role": "user", "content": "Hm"}, *TWO_TURNS]}, 1)
    bad, good = encode_rows([record, CHAT], gemma_it)
    assert (
        bad.problem == "the chat template refuses it (Conversation roles must alternate"
        " user/assistant/user/assistant/...); join user messages that follow each other into one"
    )
    assert len(good.examples) == 1


def test_messages_after_the_last_answer_are_noted(smollm2):
    (plain,) = encode_rows([CHAT], smollm2)
    for extra in ({"role": "user", "content": "And?"}, {"role": "system", "content": "Be brief."}):
        row = Row("chat", {"messages": [*CHAT.fields["messages"], extra]}, 1)
        (encoded,) = encode_rows([row], smollm2)
        assert encoded.notes == ["messages after the last answer are left out: they have no effect"]
        assert (encoded.examples[0].tokens == plain.examples[0].tokens).all()
        (encoded,) = encode_rows([row], smollm2, "everything")
        assert encoded.notes == []


def test_an_answer_before_the_first_question_is_noted(smollm2):
    greeting, question, answer = (
        {"role": "assistant", "content": "Hello"},
        *CHAT.fields["messages"][-2:],
    )
    for messages, untrained, is_noted in (
        ([greeting, question, answer], (), True),
        ([greeting, question, answer], (0,), False),
        ([question, answer], (), False),
    ):
        row = Row("chat", {"messages": messages}, 1, untrained=untrained)
        (encoded,) = encode_rows([row], smollm2)
        noted = [note for note in encoded.notes if "before the first user message" in note]
        assert len(noted) == is_noted
        assert not encode_rows([row], smollm2, "everything")[0].notes


def test_a_prompt_has_the_tokens_that_it_has_on_its_own():
    """Alone, the two line breaks form one token; before the answer, they are two."""
    tokenizer = load_tokenizer(find_model("smollm2-135m").path)
    fields = {"prompt": "Is it so?\n\n", "completion": "Yes"}
    tokenizer.has_chat_template = False
    (encoded,) = encode_rows([Row("completion", fields, 1)], tokenizer)
    (example,) = encoded.examples
    asked = tokenizer.encode(fields["prompt"])
    assert example.tokens[: len(asked)].tolist() == asked
    assert not example.supervised[: len(asked)].any()
    assert tokenizer.decode(example.tokens[example.supervised]).startswith("Yes")
    assert any(
        "splits the end of the prompt differently when no answer follows" in note
        for note in encoded.notes
    )
