"""Check the first rows of a run's data before the model is downloaded."""

from itertools import islice

from ..config import TrainConfig
from ..errors import DataError
from .data_problems import describe_bad_rows, no_training_rows
from .fields_setting import parse_names
from .holdout import has_holdout
from .load_data import row_format
from .row_problems import RowProblems
from .rows import make_rows
from .sources import find_sources

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
