"""Hold validation examples out of the training examples."""

from collections.abc import Sequence

import numpy as np

from ..config import DataConfig, TrainConfig
from ..errors import DataError
from .conversation_groups import group_examples
from .dataset import Examples
from .sources import Source, Table
from .split_report import SplitReport

# Without validation rows, this fraction of the training examples is held out
_HELD_OUT = 0.1
# With fewer training examples, none are held out
FEWEST = 10

# Makes this choice independent of other random choices with the same seed
_VALID_STREAM = 1


def validation_advice(examples: int) -> str:
    """Return how to get validation examples, for data with this many training examples."""
    return "add a valid file" + (", or give --valid-split 0.25" if examples > 1 else "")


def has_holdout(settings: DataConfig, sources: Sequence[Source]) -> bool:
    """Return whether validation examples are held out of the training examples.

    Raises:
        DataError: ``valid_split`` is set although there are validation rows.
    """
    tables = [table for source in sources for table in source.get("valid", ())]
    has_train = any("train" in source for source in sources)
    if not settings.valid_split:
        return has_train and not tables and settings.valid_split is None

    # A validation split without rows does not contradict the setting.
    if any(map(_has_rows, tables)):
        raise DataError(
            "--valid-split holds out training rows, but the data already has a validation split:"
            " leave --valid-split out, or remove that split"
        )
    return has_train


def _has_rows(table: Table) -> bool:
    """Return whether a table has a row, good or bad."""
    return bool(table.documents) or next(iter(table.rows()), None) is not None


def hold_out(
    train: Examples, config: TrainConfig, report: SplitReport
) -> tuple[Examples, Examples]:
    """Divide the training examples into training and validation examples, and report it.

    Without ``valid_split``, data with few examples is not divided.
    """
    fraction = config.data.valid_split
    conversations = group_conversations(train)

    # Rows that hold examples from other rows may join nearly all rows. Then they can't stay
    # together, and ``find_overlaps`` reports the validation rows that are in training rows
    _, sizes = np.unique(conversations, return_counts=True)
    if len(train) - sizes.max(initial=0) < (fraction or _HELD_OUT) * len(train):
        conversations = group_conversations(train, with_parts=False)

    if fraction is not None:
        return split_holdout(train, conversations, fraction, config.seed)

    if len(train) < FEWEST or len(np.unique(conversations)) < 2:
        return train, train.take(np.arange(0))
    report.notes.append(
        f"held out of the {len(train):,} training examples, because there is no validation file"
        " (--valid-split 0 trains on all of them)"
    )
    return split_holdout(train, conversations, _HELD_OUT, config.seed)


def group_conversations(examples: Examples, *, with_parts: bool = True) -> np.ndarray:
    """Return the conversation of each example, as a number; see ``group_examples``.

    The parts of a document count as different conversations, unless the document belongs to the
    same conversation as another row.
    """
    (conversations,) = group_examples(examples, with_parts=with_parts)
    rows = examples.row_numbers()
    _, groups = np.unique(conversations, return_inverse=True)
    pairs = np.unique(np.stack([groups, rows], axis=1), axis=0)
    rows_of_group = np.bincount(pairs[:, 0])
    is_single = rows_of_group[groups] == 1

    has_documents = np.array([table.documents for table in examples.tables], bool)
    is_divided = has_documents[examples.spans["table"]] & is_single
    conversations[is_divided] = -1 - np.flatnonzero(is_divided)
    return conversations


def split_holdout(
    examples: Examples, conversations: np.ndarray, fraction: float, seed: int
) -> tuple[Examples, Examples]:
    """Divide examples at random into training and validation examples.

    The rows of a conversation stay together, so that no training row also appears in validation. A
    conversation with more examples than validation should have is used for training.

    Args:
        examples: The examples to divide.
        conversations: From ``group_conversations``.
        fraction: Fraction of validation examples, in (0, 1).
        seed: Seed of the choice.

    Raises:
        DataError: All rows belong to one conversation.
    """
    _, groups, sizes = np.unique(conversations, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"--valid-split {fraction} needs rows with at least two different prompts, but there is"
            " only one (rows of one conversation count as one): provide a"
            " validation file instead"
        )

    # Take groups in random order until there are enough examples, but leave one for training
    order = np.random.default_rng([seed, _VALID_STREAM]).permutation(len(sizes))
    wanted = max(1, round(fraction * len(examples)), int(sizes.min()))
    order = order[sizes[order] <= wanted]
    enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = order[: min(enough, len(sizes) - 1)]
    is_valid = np.isin(groups, chosen)
    return examples.take(np.flatnonzero(~is_valid)), examples.take(np.flatnonzero(is_valid))
