"""Find the thoughts of an assistant message, and the tags around them in a prompt.

A message stores its thoughts under a separate key, such as ``reasoning_content``, or at the start
of its content, between tags such as ``<think>`` and ``</think>``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = Mapping[str, Any]

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""The tags that open and close a block of thoughts, in the templates of public models."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts", "tool_plan")
"""The keys of a message that may hold its thoughts."""


@dataclass(frozen=True)
class ThoughtBlock:
    """How a chat template renders thoughts: tags, and the line breaks around them.

    Attributes:
        opening: The tag that opens the block.
        closing: The tag that closes the block.
        is_own: Whether the template itself renders these tags; else they are the usual ones.
        on_lines: Whether the tags stand on lines of their own.
        after: The line breaks after the block.
    """

    opening: str
    closing: str
    is_own: bool
    on_lines: bool
    after: str

    @classmethod
    def of(cls, template: str) -> "ThoughtBlock":
        """Return the block of a chat template; the usual one if it renders no tags."""
        own_tags = next((tags for tags in THOUGHT_TAGS if tags[1] in template), None)
        if own_tags is None:
            opening, closing = THOUGHT_TAGS[0]
            return cls(opening, closing, is_own=False, on_lines=True, after="\n\n")

        # A line break stands as such, or as \n inside a string of the template.
        opening, closing = own_tags
        text = template.replace("\\n", "\n")
        is_word = opening[-1].isalnum()
        on_lines = is_word or f"{opening}\n" in text or f"\n{closing}" in text
        after = next((breaks for breaks in ("\n\n", "\n") if closing + breaks in text), "")
        return cls(opening, closing, is_own=True, on_lines=on_lines, after=after)

    @property
    def is_usual(self) -> bool:
        """Whether the tags are the most common ones."""
        return (self.opening, self.closing) == THOUGHT_TAGS[0]

    def render(self, thoughts: str) -> str:
        """Return thoughts as a block."""
        space = "\n" if self.on_lines else ""
        return f"{self.opening}{space}{thoughts}{space}{self.closing}{self.after}"


def thoughts_of(message: Message) -> str:
    """Return an assistant message's thoughts, from a separate key or from the content."""
    for key in THOUGHT_KEYS:
        thoughts = message.get(key)
        if isinstance(thoughts, str) and thoughts.strip():
            return thoughts
    return _split_content(message)[0]


def thought_places(message: Message) -> list[str]:
    """Return the keys of a message that hold thoughts; of equal thoughts, only the first key."""
    held = {key: message.get(key) for key in THOUGHT_KEYS}
    held["content"] = _split_content(message)[0]

    places: list[str] = []
    seen: set[str] = set()
    for place, thoughts in held.items():
        text = thoughts.strip() if isinstance(thoughts, str) else ""
        if text and text not in seen:
            places.append(place)
            seen.add(text)
    return places


def answer_of(message: Message) -> str:
    """Return a message's content without its thoughts."""
    return _split_content(message)[1]


def answer_only(message: Message) -> dict[str, Any]:
    """Return a message without its thoughts."""
    fields = {name: value for name, value in message.items() if name not in THOUGHT_KEYS}
    return {**fields, "content": answer_of(message)}


def _split_content(message: Message) -> tuple[str, str]:
    """Return the thoughts at the start of a message's content, and the rest of the content.

    Later tags are ordinary text.
    """
    content = str(message.get("content") or "")

    for opening, closing in THOUGHT_TAGS:
        before, found, after = content.partition(closing)
        if not found:
            continue
        if before.lstrip().startswith(opening):
            return before.lstrip().removeprefix(opening), after

        # The opening tag may be part of the prompt. The closing tag is then on a separate line.
        ends_line = before.endswith("\n") or after.startswith("\n")
        if ends_line and opening not in content:
            return before, after

    return "", content


def find_open_tags(prompt: str) -> tuple[str, str] | None:
    """Return the tags of a block of thoughts that is opened at the end of a prompt, or None."""
    for opening, closing in THOUGHT_TAGS:
        if prompt.rstrip().endswith(opening):
            return opening, closing
    return None


def fill_empty_block(answer: str, prompt: str, message: Message) -> str:
    """Return an answer with the message's thoughts in the block that the template left empty.

    Some templates render an empty block for every turn that they count as an earlier one. If a
    block with the thoughts follows the empty block, the empty block is removed.

    Args:
        answer: The text of the turn after its prompt.
        prompt: The prompt, which may open the block.
        message: The message of the turn.
    """
    thoughts = thoughts_of(message).strip()
    block = _find_empty_block(answer, prompt)
    if not thoughts or block is None:
        return answer

    # If another block follows, remove the empty one. If the prompt has opened the empty block, that
    # tag now opens the other block, whose own tag is removed instead.
    is_open = find_open_tags(prompt) is not None
    other = block.rest.lstrip()
    if other.startswith(block.opening):
        return other.removeprefix(block.opening).lstrip("\n") if is_open else other

    # The rest holds the thoughts already if they are there more often than in the message's answer
    if block.rest.count(thoughts) > answer_of(message).count(thoughts):
        return answer

    # Fill the block. The tags stay on separate lines if they were.
    has_lines = "\n" in block.space or (is_open and prompt.endswith("\n"))
    separator = "\n" if has_lines else ""
    filled = f"{thoughts}{separator}{block.closing}{block.rest}"
    return filled if is_open else f"{block.opening}{separator}{filled}"


def put_before(answer: str, prompt: str, thoughts: str, block: ThoughtBlock) -> str:
    """Return an answer that begins with these thoughts.

    Args:
        answer: The text of the turn after its prompt. It may begin with the thoughts already.
        prompt: The prompt. If it ends with a tag of the block, the answer is returned unchanged.
        thoughts: The thoughts to add; may be empty.
        block: How the chat template renders thoughts.
    """
    thoughts = thoughts.strip()
    has_block = prompt.rstrip().endswith((block.opening, block.closing))
    if not thoughts or has_block:
        return answer
    inside = answer.lstrip().removeprefix(block.opening).lstrip()
    if inside.startswith(thoughts) and block.closing in inside:
        return answer

    # Some templates close a block in every answer, also if nothing opens it
    if inside.startswith(block.closing):
        answer = inside.removeprefix(block.closing).lstrip("\n")
    return block.render(thoughts) + answer


class _EmptyBlock(NamedTuple):
    """An empty block of thoughts at the start of an answer.

    Attributes:
        opening: The opening tag, which may be in the prompt.
        space: The white space after the opening tag.
        closing: The closing tag.
        rest: The text after the block.
    """

    opening: str
    space: str
    closing: str
    rest: str


def _find_empty_block(answer: str, prompt: str) -> _EmptyBlock | None:
    """Return the empty block that an answer begins with, or None.

    If the prompt has opened a block, the answer only has to close it.
    """
    open_tags = find_open_tags(prompt)
    possible_tags = THOUGHT_TAGS if open_tags is None else (open_tags,)
    answer = answer.lstrip()

    for opening, closing in possible_tags:
        is_block = open_tags is not None or answer.startswith(opening)
        inside = answer.removeprefix(opening)
        after_space = inside.lstrip()
        if is_block and after_space.startswith(closing):
            space = inside[: len(inside) - len(after_space)]
            return _EmptyBlock(opening, space, closing, after_space.removeprefix(closing))
    return None


def has_block_after_empty_block(text: str) -> bool:
    """Return whether an empty block of thoughts comes directly before another block."""
    squeezed = "".join(text.split())
    return any(f"{opening}{closing}{opening}" in squeezed for opening, closing in THOUGHT_TAGS)


def remove_thought_tags(text: str) -> str:
    """Return a text without the tags around thoughts."""
    for opening, closing in THOUGHT_TAGS:
        text = text.replace(opening, "").replace(closing, "")
    return text


def has_only_thought_tags(text: str) -> bool:
    """Return whether a text contains only white space and the tags around thoughts."""
    return not remove_thought_tags(text).strip()
