import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.data.records import Record
from mlx_loraplus.data.templates import Example, encode, encode_all, encode_prompt
from mlx_loraplus.errors import DataError
from mlx_loraplus.models.names import find_model

# Gemma 3's chat template for text, after its model card: no system role (a system message goes in front of the first
# user turn), "model" for the assistant, content trimmed, BOS in the template.
GEMMA_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

# What Qwen 3 and DeepSeek R1 do: thoughts are shown in the last turn only, so earlier turns change with what follows.
FORGETFUL_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

COMPLETION = Record("completion", {"prompt": "Dim the hall\nCommand:", "completion": ' {"level": 5}'}, "train.jsonl:1")
TEXT = Record("text", {"text": "Rain, again."}, "train.jsonl:2")
TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
CHAT = Record("chat", {"messages": TWO_TURNS}, "train.jsonl:3")
SMOLLM2_SYSTEM = (
    "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH ugging ĠFace "
    "<|im_end|> Ċ"
)


@pytest.fixture(scope="module")
def gemma_it() -> TokenizerWrapper:
    """Gemma 3's tokenizer with the template of its instruction-tuned models."""
    return load_tokenizer(find_model("gemma-3-270m").path, {"chat_template": GEMMA_TEMPLATE})


def marked(example: Example, tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens, with a + in front of the supervised ones and Ċ for a line's end."""
    tokens = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    return [
        "+" * bool(supervised) + token.replace("\n", "Ċ")
        for token, supervised in zip(tokens, example.supervised, strict=True)
    ]


def check(record: Record, tokenizer: TokenizerWrapper, expected: str) -> None:
    example = encode(record, tokenizer, mask_prompt=True, max_seq_length=100)
    assert marked(example, tokenizer) == expected.split()
    assert (example.source, example.truncated) == (record.source, 0)
    assert (example.tokens.dtype, example.supervised.dtype) == (np.int32, np.bool_)


# --- positions by hand ------------------------------------------------------------------------------------------------


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
        "<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ +Hello +▁you +<end_of_turn> Ċ "
        "<start_of_turn> user Ċ Bye <end_of_turn> Ċ <start_of_turn> model Ċ +See +▁you +<end_of_turn> Ċ",
    )


def test_chat_on_smollm2(smollm2):
    check(
        CHAT,
        smollm2,
        f"{SMOLLM2_SYSTEM} <|im_start|> user Ċ Hi <|im_end|> Ċ "
        "<|im_start|> ass istant Ċ +Hello +Ġyou +<|im_end|> Ċ <|im_start|> user Ċ By e <|im_end|> Ċ "
        "<|im_start|> ass istant Ċ +See +Ġyou +<|im_end|> Ċ",
    )


def test_system_messages(gemma_it, smollm2):
    system = Record("chat", {"messages": [{"role": "system", "content": "Be kind"}, *TWO_TURNS[:2]]}, "train.jsonl:1")
    check(
        system,
        gemma_it,
        "<bos> <start_of_turn> user Ċ Be ▁kind ĊĊ Hi <end_of_turn> Ċ <start_of_turn> model Ċ +Hello +▁you "
        "+<end_of_turn> Ċ",
    )
    check(
        system,
        smollm2,
        "<|im_start|> system Ċ Be Ġkind <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ "
        "<|im_start|> ass istant Ċ +Hello +Ġyou +<|im_end|> Ċ",
    )


def test_a_chat_that_ends_with_the_user(smollm2):
    example = encode(
        Record("chat", {"messages": TWO_TURNS[:3]}, "train.jsonl:1"), smollm2, mask_prompt=True, max_seq_length=100
    )
    assert " ".join(marked(example, smollm2)[-9:]) == "+<|im_end|> Ċ <|im_start|> user Ċ By e <|im_end|> Ċ"
    assert example.supervised.sum() == 3


def test_a_token_on_the_seam_belongs_to_the_completion(gemma):
    record = Record("completion", {"prompt": "The answer is un", "completion": "believable"}, "train.jsonl:1")
    check(record, gemma, "<bos> The ▁answer ▁is +▁unbelievable +<eos>")


def test_special_tokens_that_are_there_already(gemma):
    check(Record("text", {"text": "<bos>Rain<eos>"}, "train.jsonl:1"), gemma, "<bos> +Rain +<eos>")


def test_without_mask_prompt_all_but_the_first_token_is_learned(gemma, gemma_it, smollm2):
    for record, tokenizer in ((COMPLETION, gemma), (TEXT, gemma), (CHAT, gemma_it), (CHAT, smollm2), (TEXT, smollm2)):
        masked = encode(record, tokenizer, mask_prompt=True, max_seq_length=100)
        example = encode(record, tokenizer, mask_prompt=False, max_seq_length=100)
        assert example.tokens.tolist() == masked.tokens.tolist()
        assert example.supervised.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_a_prompt_is_encoded_as_in_training(gemma, gemma_it, smollm2):
    for tokenizer in (gemma, gemma_it, smollm2):
        example = encode(COMPLETION, tokenizer, mask_prompt=True, max_seq_length=100)
        prompt = encode_prompt(COMPLETION.fields["prompt"], tokenizer)
        assert prompt == example.tokens[: np.argmax(example.supervised)].tolist()
    assert encode_prompt("Hi", gemma_it, chat=False) == gemma_it.encode("Hi") == [gemma_it.bos_token_id, 10979]
    assert encode_prompt("Hi", smollm2, chat=False) == smollm2.encode("Hi")


# --- templates that say no --------------------------------------------------------------------------------------------


def test_chat_without_a_template_is_said_once(gemma):
    with pytest.raises(
        DataError, match=r"chat rows need a chat template.*or write the rows as prompt and completion"
    ) as e:
        encode_all([CHAT] * 50, gemma, mask_prompt=True, max_seq_length=100)
    assert len(str(e.value)) < 250


def test_a_template_that_refuses_rows_names_them(gemma_it):
    def starting_with(role: str, row: int) -> Record:
        return Record("chat", {"messages": [{"role": role, "content": "Hm"}, *TWO_TURNS]}, f"train.jsonl:{row}")

    records = [starting_with("system", row) if row % 2 else starting_with("user", row) for row in range(1, 15)]
    with pytest.raises(DataError) as error:
        encode_all(records, gemma_it, mask_prompt=True, max_seq_length=100)
    assert str(error.value) == (
        "train.jsonl:2, train.jsonl:4, train.jsonl:6, train.jsonl:8, train.jsonl:10 and 2 more rows: the chat template "
        "refuses it (Conversation roles must alternate user/assistant/user/assistant/...)"
    )


def test_a_template_that_rewrites_earlier_turns(smollm2):
    tokenizer = load_tokenizer(find_model("smollm2-135m").path, {"chat_template": FORGETFUL_TEMPLATE})
    thinking = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>easy</think>2"}] * 2
    record = Record("chat", {"messages": thinking}, "train.jsonl:1")
    with pytest.raises(DataError, match=r"can't be supervised by turn \(.*messages\[1\].*--no-mask-prompt"):
        encode(record, tokenizer, mask_prompt=True, max_seq_length=100)
    assert encode(record, tokenizer, mask_prompt=False, max_seq_length=100).supervised[1:].all()
    check(
        Record("chat", {"messages": thinking[:2]}, "train.jsonl:1"),
        tokenizer,
        "<|im_start|> user Ċ 1 + 1 ? <|im_end|> Ċ <|im_start|> ass istant Ċ "
        "+< +think +> +easy +</ +think +> +2 +<|im_end|> Ċ",
    )


# --- long rows --------------------------------------------------------------------------------------------------------


def test_long_rows_are_cut_dropped_and_counted(gemma):
    records = [COMPLETION, TEXT, COMPLETION]  # 14 tokens (7 supervised), 6 tokens (5 supervised)
    examples, report = encode_all(records, gemma, mask_prompt=True, max_seq_length=10)
    assert [len(example.tokens) for example in examples] == [10, 6, 10]
    assert [example.truncated for example in examples] == [4, 0, 4]
    assert [int(example.supervised.sum()) for example in examples] == [3, 5, 3]
    assert str(report) == "3 rows, 26 tokens, 11 supervised; 2 rows cut at 10 tokens (8 lost)"

    examples, report = encode_all(records, gemma, mask_prompt=True, max_seq_length=7)
    assert [example.source for example in examples] == [TEXT.source]
    assert str(report) == "1 rows, 6 tokens, 5 supervised; 2 rows dropped (nothing to learn in their first 7 tokens)"

    with pytest.raises(DataError, match=r"no row is left of 2: .* first 7 tokens; raise --max-seq-length"):
        encode_all([COMPLETION] * 2, gemma, mask_prompt=True, max_seq_length=7)


# --- for any text -----------------------------------------------------------------------------------------------------

characters = st.characters(codec="utf-8", max_codepoint=0xFFFF)
texts = st.text(characters, min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(characters, max_size=40), completion=texts)
def test_any_completion_on_gemma(gemma, prompt, completion):
    record = Record("completion", {"prompt": prompt, "completion": completion}, "train.jsonl:1")
    example = encode(record, gemma, mask_prompt=True, max_seq_length=1000)
    joined = gemma.encode(prompt + completion, add_special_tokens=False)
    assert example.tokens.tolist() == [gemma.bos_token_id, *joined, gemma.eos_token_id]
    learned = np.flatnonzero(example.supervised)
    assert learned.tolist() == list(range(learned[0], len(example.tokens)))  # one run, up to EOS
    assert len(gemma.decode(example.tokens[1 : learned[0]])) <= len(prompt)  # no more than the prompt is unlearned
    assert len(gemma.decode(example.tokens[1 : learned[0] + 1])) > len(prompt) or "�" in gemma.decode(joined)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6))
def test_any_chat_on_smollm2(smollm2, contents):
    assume(all(smollm2.decode(smollm2.encode(content)) == content for content in contents))  # it lacks some bytes
    messages = [
        {"role": "assistant" if turn % 2 else "user", "content": content} for turn, content in enumerate(contents)
    ]
    example = encode(
        Record("chat", {"messages": messages}, "train.jsonl:1"), smollm2, mask_prompt=True, max_seq_length=9999
    )
    assert example.tokens.tolist() == smollm2.apply_chat_template(messages)
    assert not example.supervised[0]
    learned = np.flatnonzero(example.supervised)
    turns = np.split(example.tokens[learned], np.flatnonzero(np.diff(learned) > 1) + 1)
    for turn, content in zip(turns, contents[1::2], strict=True):
        text = smollm2.decode(turn)
        seam = "\n" if content[0].isspace() and not text.startswith(content) else ""  # one token with the header's end
        assert text == f"{seam}{content}<|im_end|>"


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    mask_prompt=st.booleans(),
    max_seq_length=st.integers(2, 40),
)
def test_all_at_once_is_one_by_one(gemma, rows, mask_prompt, max_seq_length):
    records = [
        Record("completion", {"prompt": prompt, "completion": completion}, f"train.jsonl:{row}")
        for row, (prompt, completion) in enumerate(rows)
    ]
    options = {"mask_prompt": mask_prompt, "max_seq_length": max_seq_length}
    singles = [encode(record, gemma, **options) for record in records]
    kept = [example for example in singles if example.supervised.any()]
    if not kept:
        with pytest.raises(DataError, match=r"no row is left"):
            encode_all(records, gemma, **options)
        return
    examples, report = encode_all(records, gemma, **options)
    for example, single in zip(examples, kept, strict=True):
        assert example.tokens.tolist() == single.tokens.tolist()
        assert example.supervised.tolist() == single.supervised.tolist()
        assert (example.source, example.truncated) == (single.source, single.truncated)
    whole = [encode(record, gemma, mask_prompt=mask_prompt, max_seq_length=9999) for record in records]
    dropped = sum(len(row.tokens) for row, cut in zip(whole, singles, strict=True) if not cut.supervised.any())
    assert report.tokens + report.cut_tokens + dropped == sum(len(row.tokens) for row in whole)
    assert report.rows + report.dropped_rows == len(records)
