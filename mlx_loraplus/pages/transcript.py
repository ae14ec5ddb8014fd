"""Show a prompt as a chat, and an answer as its differences from the expected one.

A history holds prompts as the text that the model reads, with the markers of its chat template.
The markers of common templates are recognized here, only for display. All other text is shown as
it is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

PartKind = Literal["text", "thought", "call", "result"]
Part = tuple[PartKind, str]

# Names of roles in templates; the names that pages show are in _SHOWN_ROLES.
_ROLE_NAMES = (
    "((?i:user|human|assistant|model|chatbot|bot|system|developer|tool|tools|available_tools|ipython"
    "|observation|functions|environment))"
)
_SHOWN_ROLES = {
    "model": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "human": "user",
    "ipython": "tool",
    "observation": "tool",
    "functions": "tool",
    "environment": "tool",
    "available_tools": "tools",
}
# The beginning of a turn. ChatML, Gemma, Llama 3 and 4, Granite and gpt-oss; Kimi; Phi, Zephyr,
# GLM, DeepSeek, EXAONE and Command; Mistral and Llama 2.
_TURN = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|turn>|<\|start_header_id\|>|<\|header_start\|>"
    rf"|<\|start_of_role\|>|<\|start\|>)\s*{_ROLE_NAMES}\b(?:\.[\w.-]+)?(?: to=assistant)?"
    r"(?:<\|end_header_id\|>|<\|header_end\|>|[^<\n]*<\|end_of_role\|>)?"
    rf"|<\|im_{_ROLE_NAMES}\|>\w*<\|im_middle\|>"
    rf"|[<\[][|\uff5c]{_ROLE_NAMES}(?i:_token)?[|\uff5c][>\]]"
    r"|(\[/?INST\]|\[SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]|\[/?TOOL_RESULTS\]|<</?SYS>>)"
)
_ROLE_OF_MARKER = {
    "[INST]": "user",
    "[/INST]": "assistant",
    "[SYSTEM_PROMPT]": "system",
    "[AVAILABLE_TOOLS]": "tools",
    "[TOOL_RESULTS]": "tool",
    "[/TOOL_RESULTS]": "assistant",
    "<<SYS>>": "system",
    "<</SYS>>": "user",
}
# Alpaca's headings begin turns only if a prompt has both of them.
_ALPACA_TURN = re.compile(r"(?:^|(?<=>))### (Instruction|Response):[ \t]*(?:\n|\Z)", re.MULTILINE)
_ALPACA_ROLES = {"Instruction": "user", "Response": "assistant"}

# Hunyuan marks the end of a turn, and has tags around an answer.
_ENDED_TURN = re.compile(r"(.*?)(<\|extra_4\|>|<\|extra_0\|>|<\|eos\|>|\Z)", re.DOTALL)
_ROLE_OF_END = {"<|extra_4|>": "system", "<|extra_0|>": "user"}
_ANSWER_TAGS = re.compile(r"<answer>\n|\n</answer>\Z")

# What is left out: the header of a message of gpt-oss, and other special tokens. \uff5c and \u2581
# are the bar and the blank of DeepSeek's.
_MARKERS = re.compile(
    r"(?:<\|start\|>assistant|<\|channel\|>\s*(?:analysis|commentary|final)(?:\s+json)?"
    r"|<\|constrain\|>\s*\w+|<[|\uff5c]/?[\w.\u2581-]{1,40}[|\uff5c]>"
    r"|\[\|endofturn\|\]|\[gMASK\]<sop>"
    r"|\[/(?:SYSTEM_PROMPT|AVAILABLE_TOOLS)\]"
    r"|<(?:bos|eos|BOS_TOKEN|start_of_turn|end_of_turn|turn\||\|turn|\|channel|channel\|"
    r"|\|tool_response)>)+"
)
_AROUND = ("<s>", "</s>", "<pad>")  # tokens around a text; inside it they may be HTML
_SEPARATORS = re.compile(r" ?" + _MARKERS.pattern)
_TOOL_CALL = r"(?:\w+:)?(?:tool_?calls?|function_calls?)"
_BEGINS_CALLS = (
    r"(?:START_ACTION|call|calls_begin|tool_call|tool_call_start|python_tag"
    r"|tool[_\u2581]calls(?:_section)?[_\u2581]begin)"
)
_ENDS_CALLS = (
    r"(?:END_ACTION|calls_end|/tool_call|tool_call_end|eo[mt]_id"
    r"|tool[_\u2581]calls(?:_section)?[_\u2581]end)"
)
# The parts of a turn: a kind, and a pattern whose one group holds the part's text.
_PARTS: tuple[tuple[PartKind, str], ...] = (
    ("result", r"<tool_response>(.*?)(?:</tool_response>|\Z)"),  # Qwen
    ("result", r"<\|tool_response>(.*?)(?:<tool_response\|>|\Z)"),  # Gemma 4
    ("thought", r"<(?:\w+:)?think>(.*?)(?:</(?:\w+:)?think>|\Z)"),  # Qwen, DeepSeek and others
    # The prompt began the thoughts.
    ("thought", r"\A((?:(?!<think>|<\|channel>).)*?)(?:</think>|<channel\|>)"),
    ("thought", r"<\|channel>thought\b(.*?)(?:<channel\|>|\Z)"),  # Gemma 4
    # gpt-oss
    ("thought", r"<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|(?=<\|start\|>)|\Z)"),
    ("thought", r"\[THINK\](.*?)(?:\[/THINK\]|\Z)"),  # Magistral
    ("thought", r"<\|START_THINKING\|>(.*?)(?:<\|END_THINKING\|>|\Z)"),  # Command
    ("call", rf"<{_TOOL_CALL}>(.*?)(?:</{_TOOL_CALL}>|\Z)"),  # Qwen, Granite 4, GLM
    ("call", r"<\|tool_call>(.*?)(?:<tool_call\|>|\Z)"),  # Gemma 4
    # gpt-oss
    (
        "call",
        r"(?<=to=)([\w.-]++[^<]*+(?:<\|(?:channel|constrain)\|>[^<]*+)*<\|message\|>.*?)"
        r"(?:<\|call\|>|\Z)",
    ),
    ("call", r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|</s>|\Z)"),  # Mistral
    ("call", r"<\|python_end\|>(\s*\{.*?)(?:<\|eo[tm]\|>|\Z)"),  # Llama 4: a text comes before it
    ("call", r"<\|python_start\|>([^<]*)<\|python_end\|>(?!\s*\{)"),  # Llama 4
    # Command, Kimi, DeepSeek, LFM2, Phi 4, Llama 3
    (
        "call",
        rf"<[|\uff5c]{_BEGINS_CALLS}[|\uff5c]>(.*?)"
        rf"(?:<[|\uff5c]{_ENDS_CALLS}[|\uff5c]>|(?=<\|call\|>)|\Z)",
    ),
    # Llama 3, which writes a call without markers
    (
        "call",
        r'\A\s*(\{\s*"name":\s*"[^"]+",\s*"(?:parameters|arguments)":.*\})\s*(?:<\|eo[tm]_id\|>)?\s*\Z',
    ),
)
_CALL_HEADER = re.compile(r"(?:<\|channel\|>commentary)?\s*\bto=\Z")  # gpt-oss, before the name
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MIN_LIKENESS = 0.5  # fraction of words that two answers have in common
_MAX_WORDS = 2000  # longer answers are not compared word by word

ChangeKind = Literal["same", "extra", "missing"]

# Only the model thinks and calls: a system prompt may show how a call is written. Results come
# first in _PARTS, so that a group has the same number in both patterns.
_PARTS_OF_MODEL = re.compile("|".join(pattern for _, pattern in _PARTS), re.DOTALL)
_PARTS_OF_OTHERS = re.compile(
    "|".join(pattern for kind, pattern in _PARTS if kind == "result"), re.DOTALL
)


@dataclass(frozen=True)
class ShownTurn:
    """One turn of a chat: its role, and its text in parts."""

    role: str
    parts: Sequence[Part]


def chat_of(prompt: str) -> list[ShownTurn]:
    """Return the turns of a prompt; text without known markers is one turn of role "prompt"."""
    turns: list[ShownTurn] = []
    for role, text in _divide(prompt):
        parts = parts_of(text, role)

        # The last turn is empty if the prompt asks the model to begin it.
        if not parts:
            continue

        # gpt-oss writes the thoughts of a turn as a message of their own.
        if turns and turns[-1].role == role and _kinds(turns[-1].parts) == {"thought"}:
            parts = [*turns.pop().parts, *parts]
        is_tool = role == "user" and _kinds(parts) == {"result"}
        turns.append(ShownTurn("tool" if is_tool else role, parts))
    return turns or [ShownTurn("prompt", parts_of(prompt))]


def _divide(prompt: str) -> list[tuple[str, str]]:
    """Return the role and the text of each turn, with markers; no turns if no marker is known."""
    # A text may name the markers of other templates.
    matches = list(_TURN.finditer(prompt))
    own = [match for match in matches if _marker_of(match) == _marker_of(matches[0])]
    found = [(match.start(), match.end(), _role_of(match)) for match in own]
    headings = list(_ALPACA_TURN.finditer(prompt))
    if not found and {each[1] for each in headings} == _ALPACA_ROLES.keys():
        found = [(each.start(), each.end(), _ALPACA_ROLES[each[1]]) for each in headings]
    if not found and "<|extra_0|>" in prompt:
        return [
            (_ROLE_OF_END.get(end, "assistant"), _ANSWER_TAGS.sub("", text))
            for text, end in _ENDED_TURN.findall(prompt)
        ]
    if not found:
        return []

    # Between two markers lies the text of a turn. What stands before the first is a system prompt.
    ends = [start for start, _, _ in found[1:]] + [len(prompt)]
    pieces = [("system", prompt[: found[0][0]])]
    return pieces + [
        (role, prompt[start:end]) for (_, start, role), end in zip(found, ends, strict=True)
    ]


def _role_of(match: re.Match[str]) -> str:
    """Return the role of the turn that a marker begins, in the words that pages show."""
    *names, marker = match.groups()
    if marker is not None:
        return _ROLE_OF_MARKER[marker]
    name = next(name for name in names if name is not None).lower()
    return _SHOWN_ROLES.get(name, name)


def _marker_of(match: re.Match[str]) -> str:
    """Return the marker of a turn up to the name of its role; "" for a marker without one."""
    role = next((n for n in range(1, match.re.groups) if match[n] is not None), None)
    return "" if role is None else match.string[match.start() : match.start(role)].strip()


def _kinds(parts: Sequence[Part]) -> set[PartKind]:
    return {kind for kind, _ in parts}


def parts_of(text: str, role: str = "assistant") -> list[Part]:
    """Split a turn into thoughts, tool calls, their results and plain text, without markers.

    Args:
        text: The text of a turn, or of an answer.
        role: Whose turn it is. Thoughts and calls are looked for in turns of the model only.
    """
    parts: list[Part] = []

    def add(kind: PartKind, piece: str) -> None:
        # Within a call, a marker separates the name from the arguments; Gemma 4 has its own quotes.
        if kind in ("call", "result"):
            piece = piece.replace('<|"|>', '"')
        piece = _SEPARATORS.sub(" ", piece) if kind == "call" else _MARKERS.sub("", piece)
        piece = _strip(piece)
        if piece:
            parts.append((kind, piece))

    done = 0
    is_model = role in ("assistant", "prompt")
    for match in (_PARTS_OF_MODEL if is_model else _PARTS_OF_OTHERS).finditer(text):
        assert match.lastindex is not None
        kind = _PARTS[match.lastindex - 1][0]
        add("text", _CALL_HEADER.sub("", text[done : match.start()]))
        add(kind, match[match.lastindex])
        done = match.end()
    add("text", text[done:])
    return parts


def _strip(text: str) -> str:
    """Return a text without blanks and tokens around it."""
    before = ""
    while text != before:
        before, text = text, text.strip()
        for token in _AROUND:
            text = text.removeprefix(token).removesuffix(token)
    return text


def differences(expected: str, answer: str) -> list[tuple[ChangeKind, str]]:
    """Return an answer in pieces, marked by how they differ from the expected answer.

    "extra" pieces are only in the answer, and "missing" pieces only in the expected one. A
    difference in white space alone does not count: crossed-out spaces would look like dashes.
    """
    wanted, given = _WORDS.findall(expected), _WORDS.findall(answer)
    if max(len(wanted), len(given)) > _MAX_WORDS:
        return [("same" if expected == answer else "extra", answer)]

    # Between two unlike answers, single words that both have say nothing, unless they are all of
    # the expected answer.
    matcher = SequenceMatcher(None, wanted, given, autojunk=False)
    if matcher.ratio() < _MIN_LIKENESS and expected not in answer:
        return [("extra", answer)]

    pieces: list[tuple[ChangeKind, str]] = []
    for kind, first, last, start, stop in matcher.get_opcodes():
        missing, extra = "".join(wanted[first:last]), "".join(given[start:stop])
        if kind == "equal" or not (missing + extra).strip():
            pieces.append(("same", extra))
            continue
        if missing.strip():
            pieces.append(("missing", missing))
        if extra:
            pieces.append(("extra" if extra.strip() else "same", extra))
    return pieces
