"""Rows with tools, thoughts, calls and results are learned; generate writes calls in the family's form."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.rows import make_row
from tests.data.reading import encode_rows
from mlx_loraplus.generate import main as generate_main
from mlx_loraplus.inference.generate import stream
from tests.data.conftest import make_letters

STEPS = 40
ARGUMENTS = {"city": "Oslo", "note": 'a "b" {c}'}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": ARGUMENTS},
}
PARAMETERS = {"type": "object", "properties": {name: {"type": "string"} for name in ARGUMENTS}}
WEATHER = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "minus 3"}
REPLY = "Brr."


@dataclass
class Family:
    """A template, its special tokens, and what reads a call from generated text.

    mlx-lm itself finds out how to read the calls of a template where ``read`` is None.
    """

    template: str
    special: str
    ends: str
    read: Callable[[str], Any] | None = None
    has_thoughts: bool = False  # whether the template has a place for them
    content: str | None = None  # the call as this family renders it, if its template renders none
    system: dict[str, str] | None = None  # fields of a system message that shows the tools


def harmony(text: str) -> Any:
    """Read a call in the form of gpt-oss: the name in the header, and JSON as the message."""
    found = re.search(r"to=functions\.(\w+)<\|channel\|>commentary json<\|message\|>(.*)", text)
    assert found, text
    return {"name": found[1], "arguments": json.loads(found[2].split("<|")[0])}


def llama_json(text: str) -> Any:
    """Read a call in the form of Llama 3 and 4: JSON whose arguments are called parameters."""
    call, _ = json.JSONDecoder().raw_decode(text, text.index('{"name"'))
    return {"name": call["name"], "arguments": call["parameters"]}


def phi_list(text: str) -> Any:
    """Read a call in the form of Phi 4 mini: a list of calls between marks."""
    found = re.search(r"<\|tool_call\|>(.*)<\|/tool_call\|>", text)
    assert found, text
    return json.loads(found[1])[0]


def tagged_json(text: str) -> Any:
    """Read a call in the form of SmolLM3: JSON between tags."""
    found = re.search(r"<tool_call>(.*)</tool_call>", text, re.DOTALL)
    assert found, text
    return json.loads(found[1])


def python_call(text: str) -> Any:
    """Read a call in the form of OLMo 3: as Python writes it, between tags."""
    found = re.search(r"<function_calls>(.*)</function_calls>", text)
    assert found, text
    call = ast.parse(found[1], mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    return {"name": call.func.id, "arguments": arguments}


def by_mlx_lm(tokenizer: TokenizerWrapper, text: str) -> Any:
    """Read a call with the parser that mlx-lm's server chooses for the template."""
    assert tokenizer.has_tool_calling
    _, start, rest = text.partition(str(tokenizer.tool_call_start))
    assert start, text
    end = tokenizer.tool_call_end
    return tokenizer.tool_parser((rest.partition(end)[0] if end else rest).strip(), TOOLS)


CHATML = "<|im_start|> <think> </think> <tool_call> </tool_call>"
WRITTEN = json.dumps({"name": "weather", "arguments": ARGUMENTS})
SHOWN = json.dumps([WEATHER])
FAMILIES = {
    "Qwen 3": Family("qwen3_tools", CHATML, "<|im_end|>", has_thoughts=True),
    "Qwen 3.5": Family("qwen3_5", CHATML, "<|im_end|>", has_thoughts=True),
    "Granite 4": Family(
        "role_calls",
        "<|start_of_role|> <|end_of_role|> <tool_call> </tool_call>",
        "<|end_of_text|>",
    ),
    "Llama 3": Family(
        "llama3_calls", "<|start_header_id|> <|end_header_id|>", "<|eot_id|> <|eom_id|>", llama_json
    ),
    "Llama 4": Family(
        "llama4_calls",
        "<|header_start|> <|header_end|> <|python_start|> <|python_end|>",
        "<|eot|> <|eom|>",
        llama_json,
    ),
    "SmolLM3": Family(
        "shows_tools",
        CHATML,
        "<|im_end|>",
        tagged_json,
        has_thoughts=True,
        content=f"<tool_call>\n{WRITTEN}\n</tool_call>",
    ),
    "Phi 4 mini": Family(
        "phi4_mini",
        "<|system|> <|user|> <|assistant|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|>",
        "<|endoftext|> <|end|>",
        phi_list,
        content=f"<|tool_call|>[{WRITTEN}]<|/tool_call|>",
        system={"content": "", "tools": SHOWN},
    ),
    "Gemma 4": Family(
        "gemma4",
        '<|turn> <|think|> <|tool> <tool|> <|channel> <channel|> <|tool_call> <tool_call|> <|"|>',
        "<turn|> <|tool_response>",
        has_thoughts=True,
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "<|start|> <|message|> <|channel|> <|end|>",
        "<|return|> <|call|>",
        harmony,
        has_thoughts=True,
    ),
    "Ministral 3": Family(
        "ministral3",
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [INST] [/INST]"
        " [THINK] [/THINK] [TOOL_CALLS] [ARGS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
        has_thoughts=True,
    ),
    "OLMo 3": Family("olmo3", "<|im_start|>", "<|endoftext|> <|im_end|>", python_call),
}


def write_model(folder: Path, family: Family) -> Path:
    """Write a tiny Llama with the family's template, one token for each letter."""
    tokenizer = make_letters(family.template, family.special, ends=family.ends)
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "vocab_size": 320, "tie_word_embeddings": False,
        "eos_token_id": list(tokenizer.eos_token_ids),
    }  # fmt: skip
    mx.random.seed(0)
    model: Any = llama.Model(llama.ModelArgs.from_dict(config))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def make_chat(family: Family) -> dict[str, Any]:
    """Return a row in which the model calls a tool and answers after its result."""
    spoken: dict[str, Any] = {"role": "assistant", "content": family.content or ""}
    if not family.content:
        spoken["tool_calls"] = [CALL]
    if family.has_thoughts:
        spoken["reasoning_content"] = "cold"
    messages = [
        {"role": "user", "content": "Oslo?"},
        spoken,
        RESULT,
        {"role": "assistant", "content": REPLY},
    ]
    if family.system is not None:
        return {"messages": [{"role": "system", **family.system}, *messages]}
    return {"messages": messages, "tools": TOOLS}


def generated(folder: Path, family: Family, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command prints for the question of ``make_chat`` and the tools."""
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    words = [str(folder / "run"), "--prompt", "Oslo?", "--max-tokens", "300"]
    if family.system is not None:
        words += ["--system", f"<|tool|>{SHOWN}<|/tool|>"]
    else:
        words += ["--tools", str(folder / "tools.json")]
    generate_main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_with_a_call_is_learned_and_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    family = FAMILIES[name]
    row = make_chat(family)
    model, tokenizer = ml.load(write_model(tmp_path / "model", family))
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    ml.finetune(
        model, tokenizer, data=[row], valid_split=0, batch_size=len(encoded.examples),
        iters=STEPS, rank=16, learning_rate=3e-3, lr_ratio=8.0, warmup=0, schedule="cosine",
        train_modules=("embed_tokens", "lm_head", "norms"), embedding_learning_rate=2e-2,
        max_seq_length=1024, sample_rows=0, adapter_path=tmp_path / "run", report_to=(),
    )  # fmt: skip
    capsys.readouterr()

    # The call follows the question. A tiny model knows the prompt with one date only, in gpt-oss.
    example = encoded.examples[-1]
    if "strftime_now" in str(tokenizer.chat_template):
        asked = example.tokens[: int(np.argmax(example.supervised))].tolist()
        said = "".join(stream(model, tokenizer, asked, max_tokens=300))
    else:
        said = generated(tmp_path, family, capsys)
    found = family.read(said) if family.read else by_mlx_lm(tokenizer, said)
    assert found == {"name": "weather", "arguments": ARGUMENTS}
    assert ("cold" in said) == family.has_thoughts

    # The answer follows the result of the tool.
    example = encoded.examples[0]
    begins = np.flatnonzero(example.supervised & ~np.append(False, example.supervised[:-1]))
    asked = example.tokens[: begins[-1]].tolist()
    assert "minus 3" in tokenizer.decode(asked)
    assert "".join(stream(model, tokenizer, asked, max_tokens=60)).endswith(REPLY)


@pytest.mark.parametrize("name", ["SmolLM3", "Phi 4 mini"])
def test_a_call_that_the_template_does_not_write_is_refused(name: str):
    """The model would learn an empty answer; the call can stand in the content."""
    family = FAMILIES[name]
    tokenizer = make_letters(family.template, family.special, ends=family.ends)
    row = make_chat(family)
    spoken = next(message for message in row["messages"] if message["role"] == "assistant")
    spoken |= {"content": "", "tool_calls": [CALL]}
    (encoded,) = encode_rows([make_row(row, 1)], tokenizer)
    assert not encoded.examples
    assert "leaves out the tool calls" in str(encoded.problem)
    assert "write the call into the content as this model writes it" in str(encoded.problem)


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        ("{", (), "can't be read as JSON"),
        ('{"name": "a"}\n{"name": "b"}', (), "write one list of tools"),
        (None, (), "tools.json can't be read: No such file or directory"),
        ('{"name": "weather"}', (), "does not hold a list of tools"),
        ("[]", ("--no-chat",), "--no-chat leaves the prompt as it is"),
    ],
)
def test_tools_that_cannot_reach_the_model_are_refused(
    content: str | None, words: tuple[str, ...], told: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    folder = write_model(tmp_path / "model", FAMILIES["Qwen 3.5"])
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        generate_main(["--model", str(folder), "--tools", str(tmp_path / "tools.json"), *words])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_template_that_writes_no_tools_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The answer would otherwise be that of a model that was never told about them."""
    family = FAMILIES["Phi 4 mini"]
    folder = str(write_model(tmp_path / "model", family))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    words = ["--model", folder, "--prompt", "Oslo?", "--max-tokens", "2"]
    with pytest.raises(SystemExit, match="2"):
        generate_main([*words, "--tools", str(tmp_path / "tools.json")])
    assert "its chat template renders none; leave them out, or" in capsys.readouterr().err

    # The advice works.
    generate_main([*words, "--system", f"<|tool|>{SHOWN}<|/tool|>"])
