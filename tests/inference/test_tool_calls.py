"""A row with thoughts and a call is learned, and generate shows a call that parses in the family's own form."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_loraplus.generate import main as generate_main
from tests.data.conftest import make_letters

STEPS = 60
ARGUMENTS = {"city": "Oslo", "note": 'a "b" {c}'}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@dataclass
class Family:
    """A template, its special tokens, and what reads a call from generated text."""

    template: str
    special: str
    ends: str
    read: Callable[[str], Any]
    thoughts: str | None = None  # the field of a message with thoughts, if the template has one
    content: str | None = (
        None  # thoughts and call as this family writes them, if no field is rendered
    )
    system: str | None = None  # the system message that shows the tools, if the template does not


def by_mlx_lm(name: str) -> Callable[[str], Any]:
    """Return a reader that finds the marks of a call, and gives what is between to mlx-lm's parser."""
    parser = import_module(f"mlx_lm.tool_parsers.{name}")

    def read(text: str) -> Any:
        _, start, rest = text.partition(parser.tool_call_start)
        assert start, text
        inside = rest.partition(parser.tool_call_end)[0] if parser.tool_call_end else rest
        return parser.parse_tool_call(inside.strip(), TOOLS)

    return read


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


CHATML = "<|im_start|> <think> </think> <tool_call> </tool_call>"
WRITTEN = json.dumps({"name": "weather", "arguments": ARGUMENTS})
FAMILIES = {
    "Qwen 3": Family("hermes_tools", CHATML, "<|im_end|>", by_mlx_lm("json_tools")),
    "Granite 4": Family(
        "role_calls",
        "<|start_of_role|> <|end_of_role|> <tool_call> </tool_call>",
        "<|end_of_text|>",
        by_mlx_lm("json_tools"),
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
        by_mlx_lm("json_tools"),
        content=f"<think>\ncold\n</think>\n<tool_call>\n{WRITTEN}\n</tool_call>",
    ),
    "Phi 4 mini": Family(
        "plain_roles",
        "<|system|> <|user|> <|assistant|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|>",
        "<|endoftext|> <|end|>",
        phi_list,
        content=f"<|tool_call|>[{WRITTEN}]<|/tool_call|>",
        system=f"<|tool|>{json.dumps(TOOLS)}<|/tool|>",
    ),
    "Qwen 3.5": Family(
        "thinking_switch", CHATML, "<|im_end|>", by_mlx_lm("qwen3_coder"), "reasoning_content"
    ),
    "Gemma 4": Family(
        "turn_calls",
        '<|turn> <|channel> <channel|> <|tool_call> <tool_call|> <|"|>',
        "<turn|>",
        by_mlx_lm("gemma4"),
        "reasoning_content",
    ),
    "gpt-oss": Family(
        "channels",
        "<|start|> <|message|> <|channel|>",
        "<|return|> <|call|>",
        harmony,
        "thinking",
    ),
    "Ministral 3": Family(
        "bracket_calls", "[INST] [/INST] [TOOL_CALLS]", "</s>", by_mlx_lm("mistral")
    ),
}


def write_model(folder: Path, family: Family) -> Path:
    """Write a tiny Llama with the family's template, one token for each letter."""
    tokenizer = make_letters(family.template, family.special, ends=family.ends)
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "vocab_size": 320, "tie_word_embeddings": False,
        "eos_token_id": list(tokenizer.eos_token_ids),
    }  # fmt: skip
    mx.random.seed(0)
    model: Any = llama.Model(llama.ModelArgs.from_dict(config))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_with_a_call_is_learned_and_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    family = FAMILIES[name]
    answer: dict[str, Any] = {"role": "assistant", "content": family.content or ""}
    if not family.content:
        answer["tool_calls"] = [CALL]
    if family.thoughts:
        answer[family.thoughts] = "cold"
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "Oslo?"}, answer]}
    if family.system:
        row["messages"].insert(0, {"role": "system", "content": family.system})
    else:
        row["tools"] = TOOLS

    model, tokenizer = ml.load(write_model(tmp_path / "model", family))
    ml.finetune(
        model, tokenizer, data=[row] * 8, valid_split=0, batch_size=2, iters=STEPS, rank=16,
        learning_rate=2e-3, lr_ratio=4.0, warmup=0, schedule="constant", max_seq_length=512,
        train_modules=("embed_tokens", "lm_head", "norms"), embedding_learning_rate=1e-2,
        adapter_path=tmp_path / "run", report_to=(),
    )  # fmt: skip
    capsys.readouterr()

    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    words = [str(tmp_path / "run"), "--prompt", "Oslo?", "--max-tokens", "300"]
    # Some of the templates are shortened, and write calls but no tools.
    if "tools" in str(tokenizer.chat_template):
        words += ["--tools", str(tmp_path / "tools.json")]
    generate_main(words)
    said = capsys.readouterr().out
    assert family.read(said) == {"name": "weather", "arguments": ARGUMENTS}
    if family.thoughts or "cold" in (family.content or ""):
        assert "cold" in said


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        ("{", (), "can't be read as JSON"),
        ('{"name": "weather"}', (), "does not hold a list of tools"),
        ("[]", ("--no-chat",), "--no-chat leaves the prompt as it is"),
    ],
)
def test_tools_that_cannot_reach_the_model_are_refused(
    content: str, words: tuple[str, ...], told: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    folder = write_model(tmp_path / "model", FAMILIES["Qwen 3.5"])
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
    assert family.system is not None
    folder = str(write_model(tmp_path / "model", family))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    words = ["--model", folder, "--prompt", "Oslo?", "--max-tokens", "2"]
    with pytest.raises(SystemExit, match="2"):
        generate_main([*words, "--tools", str(tmp_path / "tools.json")])
    assert "its chat template writes none; leave them out, or" in capsys.readouterr().err

    # The advice works.
    generate_main([*words, "--system", family.system])
