"""Encode the prompts of a row as generation does: without the answers that follow them."""

import numpy as np
from tokenizers import Tokenizer

from .rendered_chat import RenderedText

_TAIL = 16
"""Number of tokens at the end of a prompt that are encoded again for comparison."""


def encode_end_alone(
    prompt: str, ids: list[int], offsets: np.ndarray, backend: Tokenizer
) -> tuple[int, int, list[int]]:
    """Return the ids at the end of a later prompt when it is encoded without its answer.

    Args:
        prompt: The text of a row before an answer.
        ids: The token ids of the whole row.
        offsets: Start and stop of each token's characters, shape (length, 2).
        backend: The fast tokenizer.

    Returns:
        The places of the row's tokens that differ, first and stop, and the ids to put there.
    """
    ends = offsets[:, 1]
    stop = int(np.searchsorted(ends, len(prompt), side="right"))
    tail_start = max(0, stop - _TAIL)
    tail = prompt[int(offsets[tail_start, 0]) :]
    if backend.encode(tail, add_special_tokens=False).ids == ids[tail_start:stop]:
        return stop, stop, []

    # Compare from the end of the last token that both have.
    alone = backend.encode(prompt, add_special_tokens=False)
    places = {end: place for place, (_, end) in enumerate(alone.offsets)}
    for place in range(stop - 1, tail_start - 1, -1):
        same = places.get(int(ends[place]))
        if same is None or ends[place] == len(prompt):
            continue
        if alone.ids[same] == ids[place]:
            return place + 1, stop, alone.ids[same + 1 :]
    return stop, stop, []


def encode_prompt_alone(
    rendered: RenderedText, prompt_ids: list[int], offsets: np.ndarray, backend: Tokenizer
) -> list[int]:
    """Return the token ids of a row's first prompt when it is encoded separately.

    The whole prompt is only encoded again if separate encoding changes the tokens at its end.

    Args:
        rendered: The text of the row.
        prompt_ids: The token ids of the prompt when it is encoded with its answer.
        offsets: Start and stop of each token's characters, shape (length, 2).
        backend: The fast tokenizer.
    """
    if not prompt_ids:
        return prompt_ids

    start = rendered.learned[0][0]
    tail_start = max(0, len(prompt_ids) - _TAIL)
    tail = rendered.text[int(offsets[tail_start, 0]) : start]
    if backend.encode(tail, add_special_tokens=False).ids == prompt_ids[tail_start:]:
        return prompt_ids

    alone = backend.encode(rendered.text[:start], add_special_tokens=False).ids
    return alone or prompt_ids
