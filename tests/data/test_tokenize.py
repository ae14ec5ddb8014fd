from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.data.prompt_tokens import encode_prompt
from mlx_loraplus.data.rows import Row
from mlx_loraplus.data.tokenize import Example, encode
from mlx_loraplus.errors import DataError
from mlx_loraplus.models.loading import load_folder_tokenizer
from mlx_loraplus.models.registry import find_model
from scripts.tiny_model import write_tiny_model
from tests.data.conftest import TEMPLATES
from tests.data.reading import encode_one

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
        (encoded,) = encode(
            [Row("completion", {"prompt": prompt, "completion": completion}, 1)], tokenizer
        )
        return any("are one token" in note for note in encoded.notes)

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


# --- published templates, the learned parts in brackets -------------------------------------------

SYSTEM = {"role": "system", "content": "Be kind"}
THOUGHT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "<think>\nEasy\n</think>\n\n2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4", "reasoning_content": "Easier"},
]
TOOLS = [{"type": "function", "function": {"name": "lamp"}}]
CALLS = [
    {"role": "user", "content": "Dim"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "lamp", "arguments": {"to": 5}}}],
    },
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "Done"},
]
CHATML = {"special": "<|im_start|>", "ends": "<|im_end|>"}
QWEN3 = CHATML | {"special": "<|im_start|> <think> </think>"}
LLAMA3 = {
    "bos": "<|begin_of_text|>",
    "special": "<|start_header_id|> <|end_header_id|>",
    "ends": "<|end_of_text|> <|eot_id|>",
}
PHI3 = {"special": "<|system|> <|user|> <|assistant|>", "ends": "<|endoftext|> <|end|>"}
TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED: dict[str, tuple[str, dict[str, str], list[dict[str, Any]], list[str]]] = {
    "Llama 3": ("llama3", LLAMA3, [SYSTEM, *TWO_TURNS], [
        f"<|begin_of_text|>{TURN.format('system')}Be kind<|eot_id|>{TURN.format('user')}Hi<|eot_id|>"
        f"{TURN.format('assistant')}⟦Hello you<|eot_id|>⟧{TURN.format('user')}Bye<|eot_id|>"
        f"{TURN.format('assistant')}⟦See you<|eot_id|>⟧",
    ]),
    "ChatML": ("chatml", CHATML, [SYSTEM, *TWO_TURNS], [
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello you<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you<|im_end|>⟧\n",
    ]),
    "Gemma 3": ("gemma3", {"bos": "<bos>", "special": "<start_of_turn>", "ends": "<eos> <end_of_turn>"},
        [SYSTEM, *TWO_TURNS], [
        "<bos><start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello you<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you<end_of_turn>⟧\n",
    ]),
    "Mistral": ("mistral", {}, TWO_TURNS, [
        "<s>[INST] Hi[/INST]⟦ Hello you</s>⟧[INST] Bye[/INST]⟦ See you</s>⟧",
    ]),
    "Mistral with a system message, which only the last question shows": ("mistral", {}, [SYSTEM, *TWO_TURNS], [
        "<s>[INST] Hi[/INST] Hello you</s>[INST] Be kind\n\nBye[/INST]⟦ See you</s>⟧",
        "<s>[INST] Be kind\n\nHi[/INST]⟦ Hello you</s>⟧",
    ]),
    "Llama 2": ("llama2", {}, [SYSTEM, *TWO_TURNS], [
        "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST]⟦ Hello you </s>⟧<s>[INST] Bye [/INST]⟦ See you </s>⟧",
    ]),
    "Qwen 3, which forgets earlier thoughts": ("qwen3", QWEN3, THOUGHT, [
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n⟦<think>\nEasier\n</think>\n\n4<|im_end|>⟧\n",
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n⟦<think>\nEasy\n</think>\n\n2<|im_end|>⟧\n",
    ]),
    "Qwen 3 without thoughts": ("qwen3", QWEN3, TWO_TURNS[:2], [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello you<|im_end|>⟧\n",
    ]),
    "tools": ("hermes_tools", CHATML | {"special": "<|im_start|> <tool_call> </tool_call>"}, CALLS, [
        '<|im_start|>system\n# Tools\n<tools>\n{"type": "function", "function": {"name": "lamp"}}\n</tools><|im_end|>\n'
        '<|im_start|>user\nDim<|im_end|>\n<|im_start|>assistant\n'
        '⟦<tool_call>\n{"name": "lamp", "arguments": {"to": 5}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Done<|im_end|>⟧\n",
    ]),
    "Phi 3, which ends a chat once more": ("phi3", PHI3, [SYSTEM, *TWO_TURNS], [
        "<|system|>\nBe kind<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello you<|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n⟦See you<|end|>⟧\n<|endoftext|>",
    ]),
    "Zephyr": ("zephyr", {"special": "<|system|> <|user|> <|assistant|>"}, [SYSTEM, *TWO_TURNS], [
        "<|system|>\nBe kind</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello you</s>⟧\n"
        "<|user|>\nBye</s>\n<|assistant|>\n⟦See you</s>⟧\n",
    ]),
    "Alpaca": ("alpaca", {}, TWO_TURNS, [
        "<s>### Instruction:\nHi\n\n### Response:\n⟦Hello you</s>⟧\n\n"
        "### Instruction:\nBye\n\n### Response:\n⟦See you</s>⟧\n\n",
    ]),
}  # fmt: skip


def bracketed(example: Example, tokenizer: TokenizerWrapper) -> str:
    """Return an example's text with brackets around what is learned."""
    seams = np.flatnonzero(np.diff(example.supervised)) + 1
    runs = zip(np.split(example.tokens, seams), np.split(example.supervised, seams), strict=True)
    return "".join(
        f"⟦{tokenizer.decode(run)}⟧" if learned[0] else tokenizer.decode(run)
        for run, learned in runs
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_positions_written_by_hand(letters, name):
    template, special, messages, expected = EXPECTED[name]
    tokenizer = letters(template, **special)
    fields = {"messages": messages} | ({"tools": TOOLS} if name == "tools" else {})
    (encoded,) = encode([Row("chat", fields, 1)], tokenizer)
    assert [bracketed(example, tokenizer) for example in encoded.examples] == expected
    assert (encoded.problem, encoded.notes) == (None, [])
    starts = [int(np.argmax(example.supervised)) for example in encoded.examples]
    shown = [message for message in messages if message["role"] != "system"][:1]
    asked = [SYSTEM, *shown] if SYSTEM in messages else shown
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, **({"tools": TOOLS} if name == "tools" else {})
    )
    assert encoded.examples[-1].tokens[: starts[-1]].tolist() == prompt, (
        "what the model sees in generation"
    )
    if special.get("bos") or template in ("mistral", "alpaca"):
        assert all(
            (example.tokens == tokenizer.bos_token_id).sum() == 1 for example in encoded.examples
        ), "BOS once"


@pytest.mark.parametrize("name", EXPECTED)
def test_the_last_turn_alone(letters, name):
    template, special, messages, expected = EXPECTED[name]
    tokenizer = letters(template, **special)
    fields = {"messages": messages} | ({"tools": TOOLS} if name == "tools" else {})
    example = encode_one(Row("chat", fields, 1), tokenizer, "last")
    before, _, last = expected[0].rpartition("⟦")
    assert bracketed(example, tokenizer) == before.replace("⟦", "").replace("⟧", "") + "⟦" + last


def test_a_question_in_the_words_of_an_answer_is_not_left_out(letters):
    chat = [{"role": role, "content": "yes"} for role in ("user", "assistant") * 2]
    (encoded,) = encode([Row("chat", {"messages": chat}, 1)], letters("chatml", **CHATML))
    assert encoded.notes == []


def test_characters_without_a_token_are_noted(tmp_path: Path):
    tokenizer = load_folder_tokenizer(write_tiny_model(tmp_path))
    rows = [Row("text", {"text": text}, 1) for text in ("plain", "日本")]
    plain, unknown = encode(rows, tokenizer)
    assert plain.notes == []
    assert unknown.notes == [
        "the tokenizer has no token for some characters, and replaces them by its token for unknown"
        " text"
    ]


def test_names_that_a_template_leaves_out_are_noted(letters):
    chat = [
        {"role": "user", "content": "Hi", "name": "Zoe"},
        {"role": "assistant", "content": "Yo"},
    ]
    (encoded,) = encode([Row("chat", {"messages": chat}, 1)], letters("chatml", **CHATML))
    assert encoded.notes == ["the chat template leaves out or rewrites names of speakers"]


def test_what_a_template_leaves_out_is_noted(letters):
    tokenizer = letters("chatml", **CHATML)
    chat = [
        SYSTEM,
        *CALLS[:1],
        {"role": "assistant", "content": "So"},
        {"role": "tool", "content": "ok"},
        *CALLS[3:],
    ]
    (encoded,) = encode(
        [Row("chat", {"messages": chat, "tools": TOOLS}, 1)], letters("phi3", **PHI3)
    )
    assert encoded.notes == [
        "the chat template leaves out or rewrites tool messages",
        "the chat template leaves out or rewrites tools",
    ]
    turns = [
        {"role": "user", "content": "What is <|im_end|>?"},
        {"role": "assistant", "content": "An end"},
    ]
    (encoded,) = encode([Row("chat", {"messages": turns}, 1)], tokenizer)
    assert encoded.notes == ["<|im_end|> occurs inside a message, and ends it there"]


@pytest.mark.parametrize(
    "tools", [[{"function": "lamp"}], [{"name": 5}], [{"type": "search"}], ["lamp"], [3]]
)
def test_tools_of_any_form_are_rendered_or_refused(letters, tools):
    (encoded,) = encode(
        [Row("chat", {"messages": TWO_TURNS, "tools": tools}, 1)], letters("chatml", **CHATML)
    )
    assert len(encoded.examples) == (encoded.problem is None)


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content|dictsort }}", "{{ raise_exception('a\\nb') }}", "{{"]
)
def test_any_failure_of_a_template_is_reported_in_one_line(letters, template):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = template
    (encoded,) = encode([CHAT], tokenizer)
    assert encoded.examples == []
    assert str(encoded.problem).startswith("the chat template refuses it (")
    assert "\n" not in str(encoded.problem)


def test_a_prompt_without_a_token_is_refused(letters, smollm2):
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt("", smollm2, chat=False)
    assert encode_prompt("", smollm2)


def test_rows_have_a_fixed_date_and_prompts_have_todays(letters):
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert tokenizer.decode(encode_one(CHAT, tokenizer).tokens.tolist()).startswith(
        "26 Jul 2024<|im_start|>"
    )
    days = {
        date.today().strftime("%d %b %Y"),
        (date.today() - timedelta(days=1)).strftime("%d %b %Y"),
    }  # at midnight
    assert tokenizer.decode(encode_prompt("Hi", tokenizer)).partition("<")[0] in days


# --- without a chat template ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "system", "expected"),
    [
        ("completion", False, "Hi⟦Yo</s>⟧"),
        ("alpaca", False, "### Instruction:\nHi\n\n### Response:\n⟦Yo</s>⟧"),
        ("question", False, "Question: Hi\nAnswer:⟦ Yo</s>⟧"),
        ("question", True, "Be kind\n\nQuestion: Hi\nAnswer:⟦ Yo</s>⟧"),
    ],
)
def test_a_base_model_gets_a_documented_form(letters, kind, system, expected):
    fields = {"prompt": "Hi", "completion": "Yo"} | ({"system": "Be kind"} if system else {})
    (encoded,) = encode([Row(kind, fields, 1)], letters())
    assert bracketed(encoded.examples[0], letters()) == expected
    assert all(
        note.startswith(f"no chat template, so {kind} rows are written as")
        for note in encoded.notes
    )
    assert len(encoded.notes) == (kind != "completion")


def test_a_chat_on_a_base_model_is_a_problem(gemma):
    (encoded,) = encode([CHAT], gemma)
    assert encoded.examples == []
    assert "chat rows need a chat template" in str(encoded.problem)
    assert str(encoded.problem).endswith("or write the rows as prompt and completion")


# --- templates that refuse ------------------------------------------------------------------------


def test_a_template_that_refuses_a_row(gemma_it):
    record = Row("chat", {"messages": [{"role": "user", "content": "Hm"}, *TWO_TURNS]}, 1)
    bad, good = encode([record, CHAT], gemma_it)
    assert (
        bad.problem == "the chat template refuses it (Conversation roles must alternate"
        " user/assistant/user/assistant/...)"
    )
    assert len(good.examples) == 1


def test_a_call_that_a_template_leaves_out_is_a_bad_row(letters, smollm2):
    called = {**CALLS[1], "content": "So"}
    for tokenizer in (letters("phi3", **PHI3), smollm2):
        for turn in (CALLS[1], called):
            for train_on in ("turns", "everything"):
                chat = Row("chat", {"messages": [*CALLS[:1], turn, *CALLS[2:]], "tools": TOOLS}, 1)
                (encoded,) = encode([chat], tokenizer, train_on)
                assert encoded.examples == []
                assert str(encoded.problem).startswith(
                    "the chat template leaves out the tool calls of messages[1] (assistant); use a"
                    " model whose"
                )


def test_a_chat_that_the_template_rewrites_is_trained_turn_by_turn(letters):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = (
        "{{ messages | length }}" + tokenizer.chat_template
    )  # what comes first counts the turns
    (encoded,) = encode([CHAT], tokenizer)
    assert [bracketed(example, tokenizer)[:1] for example in encoded.examples] == ["3", "1"]
    for example, turns in zip(encoded.examples, (TWO_TURNS[:3], TWO_TURNS[:1]), strict=True):
        start = int(np.argmax(example.supervised))
        assert example.tokens[:start].tolist() == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True
        )


def test_a_template_that_can_not_be_supervised_by_turn(letters):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    (encoded,) = encode([CHAT], tokenizer)
    assert encoded.examples == []
    assert "can't be supervised by turn" in str(encoded.problem)
    assert "--train-on everything" in str(encoded.problem)
    assert encode_one(CHAT, tokenizer, "everything").supervised[1:].all()
