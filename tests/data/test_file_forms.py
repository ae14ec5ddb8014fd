"""Files whose content is not what their names say."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet

from mlx_loraplus.data.file_forms import find_form
from mlx_loraplus.data.readers import read_text
from mlx_loraplus.errors import DataError
from tests.data.reading import read

ROWS = [{"prompt": f"what is {n}, then?", "completion": f"it is {n}"} for n in range(12)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)
TABLE = "prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in ROWS)
PAGE = "<!DOCTYPE html>\n<html><body>Not found, sorry</body></html>\n"


def as_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def as_arrow(*, is_file: bool) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    with (ipc.new_file if is_file else ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("train.jsonl", LINES)
    return sink.getvalue()


def read_any(path: Path) -> list[object]:
    if path.suffix == ".txt":
        return list(read_text(path))
    rows, problems = read(path)
    assert problems == []
    return [row.fields for row in rows]


WRONG: list[tuple[str, str | bytes, str]] = [
    ("a.txt", LINES, "holds JSON lines, but its name ends in .txt: rename it to a.jsonl; to learn"),
    ("a.txt", LINES.replace("\n", "\r\n"), "holds JSON lines"),
    ("a.txt", f"# rows\n{LINES}", "holds JSON lines"),
    ("a.txt", '{"a": 1}', "holds JSON lines"),
    ("a.txt", ARRAY, "holds a JSON array, but its name ends in .txt: rename it to a.json; to"),
    ("a.txt", json.dumps(ROWS), "holds a JSON array"),
    ("a.txt", TABLE, "holds a table, but its name ends in .txt: rename it to a.csv; to learn"),
    ("a.txt", TABLE.replace(",", "\t"), "holds a table"),
    ("a.csv", LINES, "holds JSON lines, but its name ends in .csv: rename it to a.jsonl"),
    ("a.tsv", ARRAY, "holds a JSON array, but its name ends in .tsv: rename it to a.json"),
    ("a.csv", PAGE, "is a web page: download the file itself"),
    ("a.jsonl", PAGE, "is a web page: download the file itself"),
    ("a.jsonl", TABLE, "holds a table, but its name ends in .jsonl: rename it to a.csv"),
    ("a.json", TABLE, "holds a table, but its name ends in .json: rename it to a.csv"),
    ("a.parquet", LINES, "holds JSON lines, but its name ends in .parquet: rename it to a.jsonl"),
    ("a.parquet", TABLE, "holds a table, but its name ends in .parquet: rename it to a.csv"),
    ("a.parquet", as_arrow(is_file=True), "is an Arrow file: save it as Parquet"),
    ("a.parquet", as_arrow(is_file=False), "is an Arrow stream: save it as Parquet"),
    ("a.parquet", gzip.compress(b"a", mtime=0), "is compressed by gzip: decompress it first"),
    ("a.parquet", "hm", "can't be read as Parquet"),
    ("a.txt", ("\u4f60\u597d\u4e16\u754c" * 30).encode("utf-16-le"), "holds control characters"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    *(
        (f"a{suffix}", content, found)
        for suffix in (".jsonl", ".json", ".csv", ".txt")
        for content, found in (
            (gzip.compress(LINES.encode()), "is compressed by gzip: decompress it first"),
            (bz2.compress(LINES.encode()), "is compressed by bzip2: decompress it first"),
            (lzma.compress(LINES.encode()), "is compressed by xz: decompress it first"),
            (as_zip(), "is a zip archive or a spreadsheet: unpack it"),
            (as_parquet(), "is a Parquet file: rename it to a.parquet"),
        )
    ),
]


@pytest.mark.parametrize(("name", "content", "found"), WRONG)
def test_a_file_that_is_not_what_its_name_says_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, found: str
):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as problem:
        read_any(path)
    assert str(problem.value).startswith(f"{path} {found}")


@pytest.mark.parametrize("content", [LINES, ARRAY, TABLE, as_parquet()])
@pytest.mark.parametrize("name", ["train.txt", "train.csv", "train.jsonl", "train.parquet"])
def test_the_name_that_the_message_gives_is_right(tmp_path: Path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert read_any(path) == ROWS
    except DataError as problem:
        _, _, advice = str(problem).partition("rename it to ")
        assert read_any(path.rename(tmp_path / advice.split(";")[0])) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        ARRAY,
        json.dumps(ROWS),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "".join(map(json.dumps, ROWS)),
        " ".join(map(json.dumps, ROWS)),
    ],
    ids=["lines", "array", "array in a line", "over lines", "without lines", "with spaces"],
)
def test_json_is_read_however_it_is_divided(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    assert read_any(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", list(",;\t|"))
def test_a_table_is_read_with_any_delimiter(tmp_path: Path, name: str, delimiter: str):
    rows = [delimiter.join(("prompt", "completion")), delimiter.join("ab")]
    (tmp_path / name).write_text("\n".join(rows))
    assert read_any(tmp_path / name) == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just a text.\n",
        f"How to write rows:\n{LINES}\nThat is all.\nSo it goes.\n",
        f"{LINES}" + "And here a long text follows.\n" * 9,
        "[1, 2]\n",
        "[a note] this is it\n",
        '[{"a": 1}] is a list\n',
        "{\n  not json\n}\n",
        "question, answer\nThey spoke of it.\nThen, after a while, they slept.\nSo it was.\n",
        "name,age\nAnn,3\nBob,4\n",
        "prompt completion\n",
        "PAR1 is the name of a place\n",
        "BZh is a name\n",
        PAGE,
    ],
)
def test_a_text_stays_a_text(tmp_path: Path, text: str):
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read_text(tmp_path / "a.txt")) == text


def test_a_sample_may_end_anywhere():
    for stop in range(60, len(LINES), 7):
        assert find_form(LINES[:stop]) == ".jsonl"
    for stop in range(70, len(ARRAY), 7):
        assert find_form(ARRAY[:stop]) == ".json"
    for stop in range(60, len(TABLE), 7):
        assert find_form(TABLE[:stop]) == ".csv"
