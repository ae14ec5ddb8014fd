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

_ROLES = r"(user|human|assistant|model|system|developer|tool|ipython)"
# The beginning of a turn: ChatML, Gemma, Llama 3 and gpt-oss; Phi and Zephyr; Mistral.
_TURN = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|turn>|<\|start_header_id\|>|<\|start\|>)\s*"
    + _ROLES
    + r"(?:<\|end_header_id\|>)?|<\|"
    + _ROLES
    + r"\|>|(\[/?INST\])"
)
_MARKERS = re.compile(
    r"<\|[\w.-]{1,40}\|>|<(?:bos|eos|pad|s|/s|start_of_turn|end_of_turn|turn\||\|turn)>"
)
_SPECIAL_PARTS = re.compile(r"<think>(.*?)</think>|<tool_call>(.*?)</tool_call>", re.DOTALL)
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MIN_LIKENESS = 0.5  # share of words that two answers have in common
_MAX_WORDS = 2000  # longer answers are not compared word by word

PartKind = Literal["text", "thought", "call"]
ChangeKind = Literal["same", "extra", "missing"]


@dataclass(frozen=True)
class ShownTurn:
    """One turn of a chat: its role, and its text in parts."""

    role: str
    parts: Sequence[tuple[PartKind, str]]


def chat_of(prompt: str) -> list[ShownTurn]:
    """Return the turns of a prompt; text without known markers is one turn of role "prompt"."""
    # Between two matches of _TURN lies the text of a turn; before the first there are only markers.
    found = list(_TURN.finditer(prompt))
    if not found:
        return [ShownTurn("prompt", parts_of(prompt))]

    turns: list[ShownTurn] = []
    ends = [match.start() for match in found[1:]] + [len(prompt)]
    for match, end in zip(found, ends, strict=True):
        role = match[1] or match[2] or ("user" if match[3] == "[INST]" else "assistant")
        parts = parts_of(prompt[match.end() : end])

        # The last turn is empty if the prompt asks the model to begin it.
        if parts:
            turns.append(ShownTurn("assistant" if role == "model" else role, parts))
    return turns or [ShownTurn("prompt", parts_of(prompt))]


def parts_of(text: str) -> list[tuple[PartKind, str]]:
    """Split a text into thoughts, tool calls and plain text, without the template's markers."""
    parts: list[tuple[PartKind, str]] = []

    def add(kind: PartKind, piece: str) -> None:
        piece = _MARKERS.sub("", piece).strip()
        if piece:
            parts.append((kind, piece))

    done = 0
    for match in _SPECIAL_PARTS.finditer(text):
        add("text", text[done : match.start()])
        if match[1] is not None:
            add("thought", match[1])
        else:
            add("call", match[2])
        done = match.end()
    add("text", text[done:])
    return parts


def differences(expected: str, answer: str) -> list[tuple[ChangeKind, str]]:
    """Return an answer in pieces, marked by how they differ from the expected answer.

    "extra" pieces are only in the answer, and "missing" pieces only in the expected one. Other
    white space does not count as a difference: crossed-out spaces would look like dashes.
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
