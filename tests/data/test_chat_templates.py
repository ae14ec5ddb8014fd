"""Published chat templates, the learned parts in brackets, and templates that leave out or refuse."""

from datetime import date, timedelta
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.rows import Row
from mlx_loraplus.data.tokenize import Example
from tests.data.reading import encode_one, encode_rows
from tests.data.test_tokenize import CHAT, TWO_TURNS

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
GLM = {"special": "<|system|> <|assistant|>", "ends": "<|endoftext|> <|user|> <|observation|>"}
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
    "a system message that only an unanswered question shows": ("system_last", {}, [SYSTEM, *TWO_TURNS], [
        "<s>[INST]Hi[/INST]Hello you</s>[INST]Be kind\n\nBye[/INST]⟦See you</s>⟧",
        "<s>[INST]Be kind\n\nHi[/INST]⟦Hello you</s>⟧",
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
    "GLM, whose turns end with the token of the next role": ("next_role_ends", GLM, [SYSTEM, *TWO_TURNS], [
        "[gMASK]<sop><|system|>\nBe kind<|user|>\nHi<|assistant|>\n⟦Hello you<|user|>⟧\nBye<|assistant|>\n⟦See you<|user|>⟧",
    ]),
    "GLM's tool calls": ("next_role_ends", GLM, CALLS, [
        "[gMASK]<sop><|user|>\nDim<|assistant|>\n⟦\n<tool_call>lamp\n<arg_key>to</arg_key>\n<arg_value>5</arg_value>"
        "\n</tool_call><|observation|>⟧\n<tool_response>\nok\n</tool_response><|assistant|>\n⟦Done<|user|>⟧",
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
    (encoded,) = encode_rows([Row("chat", fields, 1)], tokenizer)
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
    if special.get("bos") or template in ("mistral", "system_last", "alpaca"):
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
    (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], letters("chatml", **CHATML))
    assert encoded.notes == []


def test_names_that_a_template_leaves_out_are_noted(letters):
    chat = [
        {"role": "user", "content": "Hi", "name": "Zoe"},
        {"role": "assistant", "content": "Yo"},
    ]
    (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], letters("chatml", **CHATML))
    assert encoded.notes == ["the chat template leaves out or rewrites names of speakers ('name')"]


def test_what_a_template_leaves_out_is_noted(letters):
    tokenizer = letters("chatml", **CHATML)
    chat = [
        SYSTEM,
        *CALLS[:1],
        {"role": "assistant", "content": "So"},
        {"role": "tool", "content": "ok"},
        *CALLS[3:],
    ]
    (encoded,) = encode_rows(
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
    (encoded,) = encode_rows([Row("chat", {"messages": turns}, 1)], tokenizer)
    assert [note.partition("; ")[2] for note in encoded.notes] == [
        "<|im_end|> ends the message where it occurs"
    ]


@pytest.mark.parametrize(
    "tools", [[{"function": "lamp"}], [{"name": 5}], [{"type": "search"}], ["lamp"], [3]]
)
def test_tools_of_any_form_are_rendered_or_refused(letters, tools):
    (encoded,) = encode_rows(
        [Row("chat", {"messages": TWO_TURNS, "tools": tools}, 1)], letters("chatml", **CHATML)
    )
    assert len(encoded.examples) == (encoded.problem is None)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a\nb') if messages[0].content == 'Hi' }}",
        "{% for message in messages %}{{ message.content|dictsort if message.content == 'Hi' }}{% endfor %}",
    ],
)
def test_any_failure_of_a_template_is_reported_in_one_line(letters, template):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = template + tokenizer.chat_template
    (encoded,) = encode_rows([CHAT], tokenizer)
    assert encoded.examples == []
    assert str(encoded.problem).startswith("the chat template refuses it (")
    assert "\n" not in str(encoded.problem)


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
    (encoded,) = encode_rows([Row(kind, fields, 1)], letters())
    assert bracketed(encoded.examples[0], letters()) == expected
    assert all(
        note.startswith(f"no chat template, so {kind} rows are rendered as")
        for note in encoded.notes
    )
    assert len(encoded.notes) == (kind != "completion")


def test_a_call_that_a_template_leaves_out_is_a_bad_row(letters, smollm2):
    called = {**CALLS[1], "content": "So"}
    for tokenizer in (letters("phi3", **PHI3), smollm2):
        for turn in (CALLS[1], called):
            for train_on in ("turns", "everything"):
                chat = Row("chat", {"messages": [*CALLS[:1], turn, *CALLS[2:]], "tools": TOOLS}, 1)
                (encoded,) = encode_rows([chat], tokenizer, train_on)
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
    (encoded,) = encode_rows([CHAT], tokenizer)
    assert [bracketed(example, tokenizer)[:1] for example in encoded.examples] == ["3", "1"]
    for example, turns in zip(encoded.examples, (TWO_TURNS[:3], TWO_TURNS[:1]), strict=True):
        start = int(np.argmax(example.supervised))
        assert example.tokens[:start].tolist() == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True
        )


def test_a_template_that_can_not_be_supervised_by_turn(letters):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %}{{ loop.revindex }}{{ message.content }}{{ loop.revindex }}{% endfor %}"
    (encoded,) = encode_rows([CHAT], tokenizer)
    assert encoded.examples == []
    assert "can't be supervised by turn" in str(encoded.problem)
    assert "--train-on everything" in str(encoded.problem)
    assert encode_one(CHAT, tokenizer, "everything").supervised[1:].all()


@pytest.mark.parametrize(
    "turns",
    [
        [*TWO_TURNS[:3], {"role": "tool", "content": "5"}, TWO_TURNS[3]],
        [*TWO_TURNS[:3], {**TWO_TURNS[3], "reasoning_content": "Hm."}],
    ],
    ids=["the results of a tool would be learned", "thoughts would be lost"],
)
def test_everything_is_not_advised_where_it_would_learn_too_much_or_too_little(letters, turns):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %}{{ loop.revindex }}{{ message.content }}{{ loop.revindex }}{% endfor %}"
    (encoded,) = encode_rows([Row("chat", {"messages": turns}, 1)], tokenizer)
    assert "can't be supervised by turn" in str(encoded.problem)
    assert str(encoded.problem).endswith("; use a model with another chat template")


def test_control_tokens_in_a_row_are_noted(letters):
    turns = [
        {"role": "user", "content": "a <|im_start|>system b"},
        {"role": "assistant", "content": "Yes"},
    ]
    (encoded,) = encode_rows([Row("chat", {"messages": turns}, 1)], letters("chatml", **CHATML))
    assert encoded.notes == [
        "a message contains control tokens, which the model reads as such and not as text:"
        " <|im_start|>"
    ]


def test_each_row_has_one_note_on_its_control_tokens(letters):
    tokenizer = letters("chatml", special="<|im_start|> <|im_end|>", ends="<|im_end|>")
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    turns = [{"role": "user", "content": chat}, {"role": "assistant", "content": "Yes"}]
    rows = [Row("text", {"text": chat}, 1), Row("chat", {"messages": turns}, 2)]
    text, message = encode_rows(rows, tokenizer)
    assert text.notes == [
        "the text contains control tokens, which the model reads as such: <|im_end|>, <|im_start|>;"
        " all of the text is learned, so write a chat as messages if only its answers are to be"
        " learned"
    ]
    assert message.notes == [
        "a message contains control tokens, which the model reads as such and not as text:"
        " <|im_end|>, <|im_start|>; <|im_end|> ends the message where it occurs"
    ]
