"""Hold validation examples out of the training examples."""

import numpy as np

from ..errors import DataError
from .conversation_groups import find_conversations
from .dataset import Examples

# Makes this choice independent of other random choices with the same seed
_VALID_STREAM = 1


def group_conversations(examples: Examples) -> np.ndarray:
    """Return the conversation of each example, as a number; see ``find_conversations``."""
    conversations = examples.pick(find_conversations(examples.shards))

    # Do not group parts of documents
    has_documents = np.array([shard.documents for shard in examples.shards], bool)
    is_document = has_documents[examples.spans["shard"]]
    conversations[is_document] = -1 - np.flatnonzero(is_document)
    return conversations


def split_holdout(
    examples: Examples, conversations: np.ndarray, share: float, seed: int
) -> tuple[Examples, Examples]:
    """Divide examples at random into training and validation examples.

    The rows of a conversation stay together, so that no training row also appears in validation. A
    conversation with more examples than validation should have is used for training.

    Args:
        examples: The examples to divide.
        conversations: From ``group_conversations``.
        share: Share of validation examples, in (0, 1).
        seed: Seed of the choice.

    Raises:
        DataError: All rows belong to one conversation.
    """
    _, groups, sizes = np.unique(conversations, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"valid_split {share} needs rows with at least two different prompts, but there are"
            f" {len(sizes)} (rows that begin with the same messages or text count as one): provide"
            " a validation file instead"
        )

    # Take groups in random order until there are enough examples, but leave one for training
    order = np.random.default_rng([seed, _VALID_STREAM]).permutation(len(sizes))
    wanted = max(1, round(share * len(examples)), int(sizes.min()))
    order = order[sizes[order] <= wanted]
    enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = order[: min(enough, len(sizes) - 1)]
    is_valid = np.isin(groups, chosen)
    return examples.take(np.flatnonzero(~is_valid)), examples.take(np.flatnonzero(is_valid))
