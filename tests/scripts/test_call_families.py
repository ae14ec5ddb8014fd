"""The judge of tool calls reads a call in every form, and knows the end tokens of a family."""

from typing import Any

import pytest

from scripts.judges.call_families import MARK, end_tokens, parser_of, written_form

CALL = {"name": "weather", "arguments": {"city": "Oslo", "note": 'a "b" {c}'}}
NOTE = '"note": "a \\"b\\" {c}"'


class NoParser:
    """A tokenizer for which mlx-lm has no parser."""

    has_tool_calling = False


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", '{"name": "weather", "parameters": {"city": "Oslo", ' + NOTE + "}}<|eot_id|>"),
        ("", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo", ' + NOTE + "}}]"),
        ("", '{"function": {"name": "weather", "arguments": {"city": "Oslo", ' + NOTE + "}}}"),
        ("", '<|tools_prefix|>[{"weather": {"city": "Oslo", ' + NOTE + "}}]<|tools_suffix|>"),
        ("", '<function=weather>{"city": "Oslo", ' + NOTE + "}</function>"),
        ("", 'function<sep>weather\n```json\n{"city": "Oslo", ' + NOTE + "}\n```"),
        (
            "commentary",
            "<|channel|>analysis<|message|>cold<|end|><|start|>assistant to=functions.weather"
            '<|channel|>commentary json<|message|>{"city": "Oslo", ' + NOTE + "}<|call|>",
        ),
        (
            "<function_calls>",
            "<function_calls>\nweather(city='Oslo', note='a \"b\" {c}')\n</function_calls>",
        ),
        ("ythonic", "[weather(city='Oslo', note='a \"b\" {c}')]"),
    ],
)
def test_a_call_is_read(template: str, text: str):
    tokenizer: Any = NoParser()
    _, read = parser_of(template, tokenizer)
    assert read(text) == CALL
    with pytest.raises(ValueError, match="no call"):
        read("It is cold.")


def test_what_a_family_has():
    assert end_tokens("<|eot_id|>") == ["<|eot_id|>", "<|eom_id|>"]
    assert end_tokens("[INST]") == ["</s>"]
    text = "[INST]a<|im_start|><|tool_call>b<tool_call|><think>c</think><city>[a]"
    marks = ["[INST]", "<|im_start|>", "<|tool_call>", "<tool_call|>", "<think>", "</think>"]
    assert MARK.findall(text) == marks
    assert written_form("", CALL, []) is None


@pytest.mark.parametrize("template", ["SmolLM", "<|tool|>", "available_tools", "List of tools: "])
def test_a_written_call_is_read(template: str):
    form = written_form(template, CALL, [{"function": {"name": "weather"}}])
    assert form is not None
    reader = "ythonic" if "List" in template else ""
    tokenizer: Any = NoParser()
    assert parser_of(reader, tokenizer)[1](form.call) == CALL
