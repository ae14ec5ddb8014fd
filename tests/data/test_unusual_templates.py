"""Templates that write no chat, and templates that write turns, headers and thoughts in unusual places."""

import pytest

from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.rows import Row
from mlx_loraplus.errors import ModelError
from tests.data.reading import encode_one, encode_rows
from tests.data.test_chat_templates import CHATML, bracketed
from tests.data.test_tokenize import CHAT, TWO_TURNS


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{", "fails for every chat at line 1 (unexpected 'end of template')"),
        ("{% for message in messages %}\n{{ say(message) }}", "fails for every chat at line 2"),
        ("\n{{ messages[0].content|shout }}", "fails for every chat at line 2 (No filter named"),
        ("{{ messages[0].content|dictsort }}", "fails for every chat at line 1"),
        ("{{ raise_exception('a\nb') }}", "fails for every chat at line 1 (a b)"),
        ("{{ messages[0].content.x.y }}", "fails for every chat at line 1"),
        (" \n", "is empty"),
        ("{{ bos_token }}", "renders none of a chat's messages"),
        ({"rag": "{{ messages }}"}, "fails for every chat (This model has"),
    ],
)
def test_a_template_that_renders_no_chat_is_no_problem_of_the_rows(letters, template, reason):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        encode_rows([CHAT, CHAT], tokenizer)
    assert str(caught.value).startswith(f"the model's chat template {reason}")
    assert str(caught.value).endswith("correct the template, or use a model with another one")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="the model's chat template"):
        encode_prompt("Hi", tokenizer)

    # Text is rendered without the template
    assert encode_one(Row("text", {"text": "Hi"}, 1), tokenizer).tokens.size
    assert encode_prompt("Hi", tokenizer, chat=False)


def test_the_file_of_a_broken_template_is_named(letters, tmp_path):
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = "{% if %}"
    tokenizer.name_or_path = str(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ModelError, match=f"the chat template in {tmp_path / name} fails"):
            encode_rows([CHAT], tokenizer)


@pytest.mark.parametrize("field", ["name", "speaker"])
def test_a_field_that_makes_a_template_refuse_a_chat_is_named(letters, field):
    tokenizer = letters("chatml", **CHATML)
    question, answer = CHAT.fields["messages"][:2]
    chat = [question, answer | {field: "Zoe"}]

    # Into the header of the turn, as in Kimi K2's template, or not at all
    for text in (
        f"message.get('{field}') or message.role",
        f"raise_exception('no names') if '{field}' in message else message.role",
    ):
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ "
            + text
            + " }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], tokenizer)
        assert encoded.examples == []
        assert str(encoded.problem).endswith(
            f"; remove the field '{field}' from assistant messages"
        )
        (encoded,) = encode_rows([Row("chat", {"messages": [question, answer]}, 1)], tokenizer)
        assert encoded.problem is None


def test_a_header_that_the_prompt_lacks_is_not_learned(letters):
    """A prompt that goes on with thoughts after a tool's result, where the chat has a header."""
    tokenizer = letters("chatml", special="<|im_start|> <think> </think>", ends="<|im_end|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    question, answer = CHAT.fields["messages"][:2]
    chat = [question, answer | {"reasoning_content": "Why"}]
    (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], tokenizer)
    assert encoded.examples == []
    assert "can't be supervised by turn" in str(encoded.problem)


def test_the_header_between_two_assistant_turns_is_not_learned(letters):
    tokenizer = letters("chatml", **CHATML)
    condition = "add_generation_prompt and messages[-1].role != 'assistant'"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "add_generation_prompt", condition
    )
    assert condition in tokenizer.chat_template
    question, answer = CHAT.fields["messages"][:2]
    (encoded,) = encode_rows([Row("chat", {"messages": [question, answer, answer]}, 1)], tokenizer)
    (example,) = encoded.examples
    turn = "<|im_start|>assistant\n⟦Hello you<|im_end|>⟧\n"
    assert bracketed(example, tokenizer).endswith(turn + turn)


THINKING = [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "Why"}]
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
CLOSED = "<think>\n\n</think>\n\n"
REST = "{{ message.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "end"),
    [
        # The chat repeats the tag that the prompt opens
        (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n"
            "{{ '<think>\n' if message.role == 'assistant' }}" + REST + OPENS,
            THINKING,
            "assistant\n<think>\n⟦Why\n</think>\n\nHello you<|im_end|>⟧\n",
        ),
        # Thoughts are a message of their own, which ends with the same token
        (
            "{% for message in messages %}{% if message.reasoning_content %}"
            "<|im_start|>thoughts\n{{ message.reasoning_content }}<|im_end|>\n{% endif %}"
            "<|im_start|>{{ message.role }}\n" + REST
            + "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            THINKING,
            "<|im_start|>⟦thoughts\nWhy<|im_end|>\n<|im_start|>assistant\nHello you<|im_end|>⟧\n",
        ),
        # The last turn has an empty block, which the prompt writes, too, and earlier turns have none
        (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ '" + CLOSED
            + "' if loop.last and message.role == 'assistant' }}" + REST
            + "{% if add_generation_prompt %}<|im_start|>assistant\n" + CLOSED + "{% endif %}",
            [*TWO_TURNS[:2], TWO_TURNS[1]],
            "assistant\n" + CLOSED + "⟦Hello you<|im_end|>⟧",
        ),
    ],
)  # fmt: skip
def test_no_block_of_thoughts_is_learned_twice_or_in_the_wrong_place(
    letters, template, messages, end
):
    tokenizer = letters("chatml", special="<|im_start|> <think> </think>", ends="<|im_end|>")
    tokenizer.chat_template = template
    (encoded,) = encode_rows([Row("chat", {"messages": messages}, 1)], tokenizer)
    assert bracketed(encoded.examples[0], tokenizer).endswith(end)
    is_noted = any("<|im_end|> inside an answer" in note for note in encoded.notes)
    assert is_noted == ("<|im_start|>assistant" in end and "Why<|im_end|>" in end)


def test_the_end_of_thoughts_inside_an_answer_is_noted(letters):
    tokenizer = letters("qwen3", special="<|im_start|>", ends="<|im_end|>")
    chat = [TWO_TURNS[0], {"role": "assistant", "content": "Write </think> there"}]
    (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], tokenizer)
    assert any(note.startswith("an answer contains </think>") for note in encoded.notes)


def test_thoughts_in_other_tags_than_the_templates_get_its_tags(letters):
    tokenizer = letters("opens_thoughts", special="<|bot|> <|user|> <think> </think>")
    chat = [TWO_TURNS[0], {"role": "assistant", "content": "<thinking>\nWhy\n</thinking>\nHello"}]
    (encoded,) = encode_rows([Row("chat", {"messages": chat}, 1)], tokenizer)
    text = bracketed(encoded.examples[0], tokenizer)
    assert "thinking>" not in text
    assert "Why\n</think>" in text


def test_a_first_turn_without_any_text_before_it_is_refused(letters):
    """The model could not be asked for it, and its first token could not be learned."""
    tokenizer = letters("chatml", **CHATML)
    tokenizer.chat_template = (
        "{%- for message in messages if message.content %}{{- message.content + '<|im_end|>' }}"
        "{%- if message.role == 'user' %}{{- '<|im_start|>' }}{%- endif %}{%- endfor %}"
    )
    question, answer = CHAT.fields["messages"][:2]
    system = {"role": "system", "content": ""}
    for first in ([answer], [system, answer]):
        row = Row("chat", {"messages": [*first, question, answer]}, 1)
        (encoded,) = encode_rows([row], tokenizer)
        assert str(encoded.problem).endswith(
            "; remove the assistant messages before the first user message"
        )
        assert not encoded.examples
