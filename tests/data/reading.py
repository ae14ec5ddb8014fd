"""What the tests read files with."""

from collections.abc import Mapping
from pathlib import Path

from mlx_loraplus.data.records import Record
from mlx_loraplus.data.shards import Told, read_records
from mlx_loraplus.data.sources import Split, find_sources

GOOD = '{"prompt": "a", "completion": "b"}'


def read(
    name: Path | str, split: Split = "train", names: Mapping[str, str] | None = None
) -> tuple[list[Record], list[str]]:
    """Return the good rows of a split, and what is said about the others, with their lines."""
    told = Told()
    (source,) = find_sources([str(name)])
    records = [record for table in source.tables[split] for _, record in read_records(table, names or {}, told)]
    return records, [f"{line}: {problem}" for line, problem in told.problems]


def write(folder: Path, **files: str | bytes) -> Path:
    """Write files of JSON lines."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
