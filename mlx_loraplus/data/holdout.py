"""Hold validation examples out of the training examples."""

import numpy as np

from ..errors import DataError
from .dataset import Examples

# Makes this choice independent of other random choices with the same seed
_VALID_STREAM = 1


def can_hold_out(examples: Examples) -> bool:
    """Return whether ``split_holdout`` can divide examples: not all of them begin alike."""
    _, sizes = _group_conversations(examples)
    return len(sizes) > 1


def _group_conversations(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Group examples whose conversations have the same beginning.

    Returns:
        The group of each example, (examples,), and the size of each group, (groups,).
    """
    beginnings = examples.of_rows("begins")

    # Do not group parts of documents
    has_documents = np.array([shard.documents for shard in examples.shards], bool)
    is_document = has_documents[examples.spans["shard"]]
    beginnings[is_document] = np.flatnonzero(is_document)
    _, groups, sizes = np.unique(beginnings, return_inverse=True, return_counts=True)
    return groups, sizes


def split_holdout(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Divide examples at random into training and validation examples.

    Rows whose conversations have the same beginning stay together, so that no training row also
    appears in validation.

    Args:
        examples: The examples to divide.
        share: Share of validation examples, in (0, 1).
        seed: Seed of the choice.

    Raises:
        DataError: The conversations of all rows have the same beginning.
    """
    groups, sizes = _group_conversations(examples)
    if len(sizes) < 2:
        raise DataError(
            f"valid_split {share} needs rows with at least two different prompts, but there are"
            f" {len(sizes)} (chats that begin with the same messages count as one): provide a"
            " validation file instead"
        )

    # Take groups in random order until there are enough examples, but leave one for training
    order = np.random.default_rng([seed, _VALID_STREAM]).permutation(len(sizes))
    wanted = max(1, round(share * len(examples)))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = order[: min(enough, len(sizes) - 1)]
    is_valid = np.isin(groups, chosen)
    return examples.take(np.flatnonzero(~is_valid)), examples.take(np.flatnonzero(is_valid))
