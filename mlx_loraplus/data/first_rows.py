"""Check the first rows of a run's or a sweep's data before the model is downloaded."""

from itertools import islice

from ..config import TrainConfig
from ..errors import DataError
from .data_problems import describe_bad_rows, no_training_rows
from .fields_setting import parse_names
from .holdout import FEWEST, has_holdout, validation_advice
from .load_data import row_format
from .row_problems import RowProblems
from .rows import make_rows
from .sources import SplitName, find_sources

# Maximum number of valid rows of each file that are read
_FIRST_ROWS = 100_000


def check_rows(config: TrainConfig) -> None:
    """Check the first rows of every file without a tokenizer, before the model is downloaded.

    Raises:
        ConfigError: The setting ``fields`` is wrong.
        DataError: The data can't be found or read, ``valid_split`` is set although there are
            validation files, there are no training rows, or ``on_bad`` is "error" and there are
            bad rows. One message reports the bad rows of all files.
    """
    names = parse_names(config.data.fields)
    make, needed = row_format(config.objective)
    sources = find_sources(config.data.data)

    # Raise an error if valid_split contradicts the files; the result is not needed
    has_holdout(config.data, sources)

    bad = rows = 0
    places: list[str] = []
    can_train = lacks_fields = False
    for source in sources:
        for split, tables in source.items():
            for table in tables:
                # Reading the rows collects their problems
                problems = RowProblems()
                first = islice(make_rows(table.rows(), names, problems, make), _FIRST_ROWS)
                found = sum(1 for _ in first)
                rows += found
                bad += problems.bad
                places += problems.places(table.name)
                lacks_fields |= problems.lacks_fields
                if split == "train":
                    can_train |= bool(found or problems.bad or table.documents)

    if not can_train:
        raise DataError(no_training_rows(config.data.data, sources, needed))
    if bad and config.data.on_bad == "error":
        lacking = needed if lacks_fields else ""
        raise DataError(describe_bad_rows(places, bad, lacking, are_all=not rows))


def check_validates(config: TrainConfig) -> None:
    """Check, for a sweep, that its data will have validation examples.

    Raises:
        DataError: There are no validation rows, and none are held out of the training rows.
    """
    names = parse_names(config.data.fields)
    make, _ = row_format(config.objective)
    sources = find_sources(config.data.data)

    def first(split: SplitName, most: int) -> int:
        """Return how many rows a split has, up to a maximum."""
        tables = [table for source in sources for table in source.get(split, [])]
        # A document or a long row may become many examples.
        if tables and (config.data.on_long == "split" or any(table.documents for table in tables)):
            return most
        made = (
            row for table in tables for row in make_rows(table.rows(), names, RowProblems(), make)
        )
        return sum(1 for _ in islice(made, most))

    train = first("train", FEWEST)
    is_divided = has_holdout(config.data, sources)
    is_enough = train > 1 if config.data.valid_split else train >= FEWEST
    if not (first("valid", 1) or (is_divided and is_enough)):
        raise DataError(lacks_validation(train))


def lacks_validation(examples: int) -> str:
    """Return the message for a sweep without validation examples."""
    return f"a sweep needs validation examples: {validation_advice(examples)}"
