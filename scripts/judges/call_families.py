# ruff: noqa: RUF001  DeepSeek writes marks with wide bars
"""What the chat templates of model families need from a tokenizer, and what reads their calls of tools."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

Call = dict[str, Any]
"""A call: its name and its arguments."""

ENDS = {
    "<|im_end|>": "<|im_end|>",
    "<|eot_id|>": "<|eot_id|> <|eom_id|>",
    "<atem:": "<|eot|>",
    "<|eot|>": "<|eot|> <|eom|>",
    "<turn|>": "<turn|> <|tool_response>",
    "<|call|>": "<|return|> <|call|>",
    "<|end_of_role|>": "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>": "<|END_OF_TURN_TOKEN|>",
    "<|assistant_end|>": "<|assistant_end|> <|tools_suffix|>",
    "<|message_sep|>": "<|message_sep|>",
    "<|tool_calls|>": "<|end|> <|calls|>",
    "<|end|>": "<|end|> <|endoftext|>",
    "<end_of_turn>": "<end_of_turn> <eos>",
    "<｜end▁of▁sentence｜>": "<｜end▁of▁sentence｜>",
    "<｜Assistant｜>": "<｜end▁of▁sentence｜>",
    "[e~[": "[e~[",
    "<seed:eos>": "<seed:eos>",
    "<|observation|>": "<|endoftext|> <|user|> <|observation|>",
    "<SPECIAL_12>": "<SPECIAL_12>",
    "<|eos|>": "<|eos|>",
    "<sep>": "<sep>",
}
"""A mark of a template → the tokens that end a turn in its family; for other templates </s>."""

MARK = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>"  # most families
    r'|<\|[a-z_"]+>|<[a-z_]+\|>'  # Gemma 4
    r"|\[/?[A-Z_]{3,}\]"  # Mistral
    r"|<SPECIAL_\d+>|\]?[\[\]][~!a-z]+\[|</?seed:[a-z_]+>"
    r"|<(?:start|end)_of_turn>|<(?:start|end)_function_(?:call|declaration|response)>|<escape>"
    r"|</?(?:minimax:)?(?:think|tool_calls?|tool_response|arg_key|arg_value|TOOLCALL)>"
)
"""What the tokenizers of families have as one token each."""


def end_tokens(template: str) -> list[str]:
    """Return the tokens that end a turn in the family of a template."""
    ends = next((ends for mark, ends in ENDS.items() if mark in template), "</s>")
    return ends.split()


def call_id(template: str) -> str:
    """Return the id of a call in the family's form: Mistral wants nine letters, Kimi the name."""
    return "functions.weather:0" if "tool_calls_section_begin" in template else "call00001"


def parser_of(template: str, tokenizer: TokenizerWrapper) -> tuple[str, Callable[[str], Call]]:
    """Return what reads a call from generated text, and its name: mlx-lm's parser if it has one."""
    if tokenizer.has_tool_calling:
        name = tokenizer.tool_parser.__module__.rsplit(".", 1)[-1]
        return f"mlx-lm: {name}", lambda text: _by_mlx_lm(tokenizer, text)
    if "commentary" in template:
        return "harmony", _harmony
    if "<function_calls>" in template and "DSML" not in template:
        return "Python call", _python_call
    if "ythonic" in template:
        return "list of Python calls", _python_call
    return "JSON", _json_call


@dataclass
class WrittenForm:
    """A call as the text of an answer, and the system message that shows the tools if the template does not."""

    call: str
    system: str | None


def written_form(template: str, call: Call, tools: Sequence[Any]) -> WrittenForm | None:
    """Return how to write a call into the content for a template that writes no calls, where it is known."""
    as_json = json.dumps(call, ensure_ascii=False)
    shown = json.dumps([tool["function"] for tool in tools])
    if "SmolLM" in template:
        return WrittenForm(f"<tool_call>\n{as_json}\n</tool_call>", f"<tools>{shown}</tools>")
    if "<|tool|>" in template:
        return WrittenForm(f"<|tool_call|>[{as_json}]<|/tool_call|>", f"<|tool|>{shown}<|/tool|>")
    if "available_tools" in template:
        return WrittenForm(f"<|tool_call|>[{as_json}]", None)
    if "List of tools: " in template:
        values = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
        python = f"{call['name']}({values})"
        return WrittenForm(f"<|tool_call_start|>[{python}]<|tool_call_end|>", None)
    return None


TOOLS_FOR_PARSER: list[Any] = []
"""The tools that mlx-lm's parsers look up types in; ``tool_calls`` fills it."""


def _by_mlx_lm(tokenizer: TokenizerWrapper, text: str) -> Call:
    """Read a call as mlx-lm's server does: the text between its marks."""
    _, start, rest = text.partition(str(tokenizer.tool_call_start))
    if not start:
        raise ValueError(f"no {tokenizer.tool_call_start}")
    end = tokenizer.tool_call_end
    inner = rest.partition(end)[0] if end else rest
    parse: Any = tokenizer.tool_parser
    found = parse(inner.strip(), TOOLS_FOR_PARSER)
    call = found[0] if isinstance(found, Sequence) else found
    return {"name": call["name"], "arguments": call["arguments"]}


def _harmony(text: str) -> Call:
    """Read a call of gpt-oss: the name in the header, and JSON as the message."""
    found = re.search(r"to=functions\.(\w+)(?:<\|channel\|>commentary)? .*?<\|message\|>(.*)", text)
    if found is None:
        raise ValueError("no call in the form of harmony")
    return {"name": found[1], "arguments": json.loads(found[2].split("<|")[0])}


def _python_call(text: str) -> Call:
    """Read the first call that is written as in Python."""
    found = re.search(r"\w+\(.*\)", text, re.DOTALL)
    if found is None:
        raise ValueError("no call as in Python")
    call = ast.parse(found[0], mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("no call as in Python")
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    return {"name": call.func.id, "arguments": arguments}


def _json_call(text: str) -> Call:
    """Read the first call in JSON, of which families have many forms."""
    decoder = json.JSONDecoder()
    for at in (found.start() for found in re.finditer(r"[{\[]", text)):
        try:
            value, _ = decoder.raw_decode(text, at)
        except ValueError:
            continue
        call = value[0] if isinstance(value, list) and value else value
        if isinstance(call, Mapping):
            return _from_object(call, text[:at])
    raise ValueError("no call in JSON")


def _from_object(call: Mapping[str, Any], before: str) -> Call:
    """Return a call from its object: with a name, with the name as its key, or after the name."""
    call = call.get("function", call) if isinstance(call.get("function"), Mapping) else call
    name = call.get("name", call.get("tool_name"))
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if isinstance(name, str):
        return {"name": name, "arguments": arguments}
    if len(call) == 1 and isinstance(inner := next(iter(call.values())), Mapping):
        return {"name": next(iter(call)), "arguments": inner}
    words = [word for word in re.findall(r"\w+", before) if word not in ("json", "args", "ARGS")]
    return {"name": words[-1] if words else "", "arguments": dict(call)}
