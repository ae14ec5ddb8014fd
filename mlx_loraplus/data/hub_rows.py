"""Read the rows of a data set of the ``datasets`` library."""

from collections.abc import Iterator
from typing import Any

from ..errors import DataError
from .readers import RawRow


def dataset_rows(name: str, rows: Any) -> Iterator[RawRow]:
    """Yield the numbered rows of a datasets.Dataset, with images and audio as they are stored.

    Raises:
        DataError: A row can't be decoded.
    """
    # Do not decode images and audio
    for column, feature in (rows.features or {}).items():
        if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
            rows = rows.cast_column(column, type(feature)(decode=False))

    try:
        yield from enumerate(rows, start=1)
    # Other features are decoded by libraries whose errors have no common base class
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{name} can't be read: {' '.join(str(error).split()):.300}") from None
