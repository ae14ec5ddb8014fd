"""Find where a turn begins in a chat that does not begin with the turn's prompt."""

from collections.abc import Sequence

from .lost_content import find_lost
from .thoughts import (
    THOUGHT_TAGS,
    Message,
    answer_of,
    find_open_tags,
    has_only_thought_tags,
    remove_thought_tags,
    thoughts_of,
)


def find_seam(prompt: str, whole: str, header: str) -> int | None:
    """Return where a turn begins in a chat that does not begin with the turn's prompt.

    There are two reasons for this. The prompt may have a block of thoughts or white space that the
    chat does not have. The template may also rewrite earlier messages when it renders the turn.

    Args:
        prompt: The prompt that asks for the turn.
        whole: The chat up to and including the turn.
        header: The text of the prompt after which the turn begins.
    """
    # The turn begins where the texts differ. If this is inside a tag, because two tags begin with
    # the same characters, the turn begins at the start of the tag.
    seam = common_length(prompt, whole)
    for opening, _ in THOUGHT_TAGS:
        start = prompt.rfind(opening)
        if 0 <= start < seam < start + len(opening):
            seam = start
    if has_only_thought_tags(prompt[seam:]):
        return seam

    # Earlier messages were rewritten, so the turn begins after the last occurrence of the header.
    header = remove_thought_tags(header).strip()
    place = whole.rfind(header) if header else -1
    if place < 0:
        return None
    seam = place + len(header)
    return seam + 1 if whole[seam:].startswith("\n") else seam


def after_last_message(prompt: str, message: Message) -> str:
    """Return the last message of a prompt as the template renders it, with the text that follows.

    This text serves as a turn's header if the template renders none, as in Mistral's templates.
    """
    content = answer_of(message).strip()
    place = prompt.rfind(content) if content else -1
    return prompt[place:] if place >= 0 else ""


def shows_later(history: Sequence[Message], whole: str, seam: int) -> bool:
    """Return whether a chat shows a message of the history only after the place of the turn.

    The turn would then include this message, such as the result of a tool between two calls.
    """
    for message in history:
        is_before = "content" not in find_lost(message, whole[:seam])
        if not is_before and "content" not in find_lost(message, whole):
            return True
    return False


def before_thoughts(messages: Sequence[Message], whole: str, seam: int, header: str) -> int:
    """Return where a turn begins whose thoughts are a message of their own, as in gpt-oss.

    Such a turn holds the header twice, and the seam may be after the second one.

    Args:
        messages: The messages; the last one is the turn.
        whole: The messages, rendered.
        seam: Where the content or the calls of the turn begin.
        header: The text of the prompt after which the turn begins.
    """
    *history, message = messages
    if "thoughts" not in find_lost(message, whole[seam:]):
        return seam
    header = remove_thought_tags(header).strip()
    thoughts = whole.rfind(thoughts_of(message).strip(), 0, seam)
    place = whole.rfind(header, 0, thoughts) if header and thoughts >= 0 else -1

    # The same words may belong to an earlier message, after which more of the history follows.
    start = place + len(header)
    return start if place >= 0 and start >= _end_of(history, whole) else seam


def _end_of(history: Sequence[Message], whole: str) -> int:
    """Return the first place at which a chat can have shown its history, in order."""
    end = 0
    for message in history:
        content = answer_of(message).strip()
        place = whole.find(content, end)
        if content and place >= 0:
            end = place + len(content)
    return end


def opens_later(answer: str, prompt: str) -> bool:
    """Return whether an answer opens the block of thoughts that the prompt opens, but later.

    The answer would then begin with a header, and repeat the block.
    """
    tags = find_open_tags(prompt)
    return tags is not None and tags[0] in answer and not answer.lstrip().startswith(tags[0])


def without_second_opening(answer: str, prompt: str) -> str:
    """Return an answer without the tag that opens a block of thoughts, if the prompt opens it."""
    tags = find_open_tags(prompt)
    if tags is None or not answer.lstrip().startswith(tags[0]):
        return answer
    return answer.lstrip().removeprefix(tags[0]).lstrip("\n")


def close_block(answer: str, prompt: str, message: Message) -> str:
    """Return an answer that closes the block of thoughts that its prompt opens.

    Some templates open the block and render the content directly after it.

    Args:
        answer: The text of the turn after its prompt.
        prompt: The prompt, which may open the block.
        message: The message of the turn.
    """
    tags = find_open_tags(prompt)
    content = answer_of(message).strip()
    if tags is None or content.startswith(tags[0]):
        return answer

    # A closing tag inside the content is ordinary text.
    thoughts = thoughts_of(message).strip()
    begins_with_content = bool(content) and answer.lstrip().startswith(content)
    if tags[1] in answer and (thoughts or not begins_with_content):
        return answer
    return f"{thoughts}\n{tags[1]}\n\n{answer.lstrip()}"


def fit_to_prompt(answer: str, prompt: str, message: Message) -> str:
    """Return the answer as the continuation of a block of thoughts that the prompt opens."""
    # The prompt may have closed the block that the answer closes again, or opens again.
    tags = find_open_tags(prompt)
    if tags is None:
        for opening, closing in THOUGHT_TAGS:
            inside = answer.lstrip().removeprefix(opening).lstrip()
            if prompt.rstrip().endswith(closing) and inside.startswith(closing):
                rest = inside.removeprefix(closing)
                return rest.lstrip("\n") if prompt.endswith("\n") else rest
        return answer

    # The prompt has opened a block: the answer has to continue with thoughts and close the block.
    opening, closing = tags
    answer = answer.lstrip()
    if answer.startswith(opening):
        return answer.removeprefix(opening).lstrip("\n")
    thoughts = thoughts_of(message).strip()
    if closing in answer and answer.startswith((closing, thoughts)):
        return answer
    return f"{thoughts}\n{closing}\n\n{answer_of({'content': answer})}"


def common_length(one: str, other: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
