"""What the tests read files with."""

from collections.abc import Mapping
from pathlib import Path

from mlx_loraplus.data.records import Findings, Record, read_records
from mlx_loraplus.data.sources import Split, find_sources

GOOD = '{"prompt": "a", "completion": "b"}'


def read(
    name: Path | str, split: Split = "train", names: Mapping[str, str] | None = None
) -> tuple[list[Record], list[str]]:
    """Return the good rows of a split, and what is said about the others, with their lines."""
    findings = Findings()
    (source,) = find_sources([str(name)])
    found = (read_records(table.rows(), table.name, names or {}, findings) for table in source.tables[split])
    records = [record for each in found for _, record in each]
    return records, [f"{line}: {problem}" for line, problem in findings.problems]


def write(folder: Path, **files: str | bytes) -> Path:
    """Write files of JSON lines."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
