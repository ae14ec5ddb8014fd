"""What the tests read files with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.dataset import Examples
from mlx_loraplus.data.load_data import Data, load_data
from mlx_loraplus.data.row_problems import RowProblems
from mlx_loraplus.data.rows import Row, make_rows
from mlx_loraplus.data.sources import SplitName, find_sources
from mlx_loraplus.data.tokenize import EncodedRow, Example, RowRenderer, encode
from mlx_loraplus.settings import configure

GOOD = '{"prompt": "a", "completion": "b"}'
LONG = '{"prompt": "abcdefgh", "completion": "ijklmnop"}'


def read(
    name: Path | str, split: SplitName = "train", names: Mapping[str, str] | None = None
) -> tuple[list[Row], list[str]]:
    """Return the good rows of a split, and what is said about the others, with their lines."""
    findings = RowProblems()
    (source,) = find_sources([str(name)])
    tables = source.get(split, ())
    records = [
        record for table in tables for record in make_rows(table.rows(), names or {}, findings)
    ]
    return records, [f"{line}: {problem}" for line, problem in findings.problems]


def write(folder: Path, **files: str | bytes) -> Path:
    """Write files of JSON lines."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


def load(tokenizer: Any, *data: Path | str, strict: bool = True, **options: Any) -> Data:
    """Load data, of which nothing is held out unless ``valid_split`` says so."""
    settings = {"data": [str(name) for name in data], "valid_split": 0}
    config = configure(TrainConfig, settings | options)
    return load_data(config, tokenizer, strict=strict)


def texts(examples: Examples, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.tokens) for example in examples]


def encode_rows(
    records: Sequence[Row], tokenizer: TokenizerWrapper, train_on: Any = "turns"
) -> list[EncodedRow]:
    """Render records as text and encode them."""
    renderer = RowRenderer(tokenizer, train_on)
    return encode([renderer.render(record) for record in records], tokenizer, train_on)


def encode_one(record: Row, tokenizer: TokenizerWrapper, train_on: Any = "turns") -> Example:
    """Encode a record that becomes one example."""
    (encoded,) = encode_rows([record], tokenizer, train_on)
    assert encoded.problem is None
    (example,) = encoded.examples
    return example
