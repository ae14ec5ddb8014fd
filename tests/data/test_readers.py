"""Files of every format, encoding and line end, also huge, deeply nested and corrupt ones."""

import ast
import json
import os
import random
import shlex
import subprocess
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.open_text import TO_UTF8
from mlx_loraplus.data.readers import read_csv, read_json, read_jsonl, read_text
from mlx_loraplus.errors import DataError
from tests.conftest import cpu_limit
from tests.data.reading import GOOD, read, write

ROWS = [{"prompt": f"Größe {n}?", "completion": f'"{n}",\n{n};'} for n in range(1, 8)]


def write_as(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format of a file's name."""
    import csv

    match path.suffix:
        case ".jsonl":
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                encoding="utf-8",
            )
        case ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        case suffix:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(
                    file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ","
                )
                writer.writeheader()
                writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_holds_the_same_rows(tmp_path: Path, suffix: str):
    records, problems = read(write_as(tmp_path / f"rows{suffix}", ROWS))
    assert [record.fields for record in records] == ROWS
    assert problems == []
    assert records[0].line in (1, 2, 3)


def test_places_are_lines(tmp_path: Path):
    records, problems = read(write(tmp_path, train=f"{GOOD}\n\n  \n{{\n{GOOD}"))
    assert [record.line for record in records] == [1, 5]
    assert problems[0].startswith("4: not JSON")
    (tmp_path / "a.json").write_text(f"\n[\n{GOOD},\n\n  {GOOD}, [1],\n{GOOD}]\n")
    records, problems = read(tmp_path / "a.json")
    assert [record.line for record in records] == [3, 5, 6]
    assert problems == ["5: a list, not an object"]
    (tmp_path / "a.csv").write_text('prompt,completion\na,"b\nb"\n\nc,d,e\nf\n')
    records, problems = read(tmp_path / "a.csv")
    assert [(record.line, record.fields["completion"]) for record in records] == [(2, "b\nb")]
    assert problems == [
        "5: 3 values, but the header has 2 columns: put double quotes around a value that contains"
        " a comma",
        "6: no 'completion' (it has 'prompt')",
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, suffix: str, mark: bytes, end: str):
    content = {
        ".jsonl": f"{GOOD}\n{GOOD}\n", ".json": f"[\n{GOOD},\n{GOOD}\n]", ".csv": "prompt,completion\na,b\na,b\n",
        ".txt": "a\nb\n",
    }[suffix]  # fmt: skip
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(mark + content.replace("\n", end).encode())
    if suffix == ".txt":
        assert "".join(read_text(path)) == content
    else:
        records, problems = read(path)
        assert [record.fields for record in records] == [{"prompt": "a", "completion": "b"}] * 2
        assert problems == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_wide_encodings_are_refused(tmp_path: Path, suffix: str, mark: str, encoding: str):
    path = tmp_path / f"rows{suffix}"
    mark = mark if encoding[-2:] in ("le", "be") else ""  # the others write one themselves
    path.write_bytes(f"{mark}{GOOD}\n".encode(encoding))
    with pytest.raises(DataError, match="is UTF-16 or UTF-32: save it as UTF-8") as error:
        list(read_text(path)) if suffix == ".txt" else read(path)

    # The advice is right when followed.
    command = shlex.split(str(error.value).partition("such as with ")[2].partition(" >")[0])
    path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert path.read_text("utf-8-sig") == f"{GOOD}\n"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, indent=1),
        json.dumps(ROWS),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "[" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
    ],
)
def test_an_array_in_a_jsonl_file_is_read(tmp_path: Path, text: str):
    (tmp_path / "rows.jsonl").write_text(text)
    records, problems = read(tmp_path / "rows.jsonl")
    assert [record.fields for record in records] == ROWS
    assert problems == []


def test_an_infinite_weight_is_not_read_as_no_weight(tmp_path: Path):
    turns = (
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": %s}]'
    )
    row = f'{{"messages": {turns}}}'
    _, problems = read(write(tmp_path, train=row % "Infinity"))
    assert "has weight inf; use 0 or false" in problems[0]
    assert read(write(tmp_path, train=row % "NaN"))[1] == []


def test_bytes_that_are_not_utf8(tmp_path: Path):
    folder = write(tmp_path, train=GOOD.encode() + b'\n{"text": "caf\xe9"}\n' + GOOD.encode())
    records, problems = read(folder)
    assert len(records) == 2
    assert problems == [f"2: not UTF-8 (byte 0xe9 at column 14): {TO_UTF8}"]
    (tmp_path / "a.json").write_bytes(b'[{"text": "caf\xe9"},\n{"text": "b"}]')
    records, problems = read(tmp_path / "a.json")
    assert (len(records), problems) == (1, [f"1: not UTF-8: {TO_UTF8}"])
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\na,caf\xe9\na,b\n")
    records, problems = read(tmp_path / "a.csv")
    assert (len(records), problems) == (1, [f"2: not UTF-8: {TO_UTF8}"])
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"is not UTF-8: .*iconv -f WINDOWS-1252"):
        list(read_text(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("nonsense", "not JSON (Expecting value at column 1)"),
        ("[" * 100_000, "not JSON (nested too deep)"),
        ('{"text": ' + "[" * 100_000, "not JSON (nested too deep)"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON (a number has thousands of digits)"),
        ('{"text": "a\0b"}', "not JSON (Invalid control character"),
        ("\0" * 50, "not JSON"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"text": "a"} {"text": "b"}', "not JSON (Extra data at column 15)"),
    ],
    ids=range(9),
)
def test_lines_that_are_no_rows(tmp_path: Path, line: str, problem: str):
    records, problems = read(write(tmp_path, train=f"{GOOD}\n{line}\n{GOOD}\n"))
    assert len(records) == 2
    assert len(problems) == 1
    assert problems[0].startswith("2: ")
    assert problem in problems[0]
    assert len(problems[0]) < 300
    (tmp_path / "a.json").write_text(f"[{GOOD},\n{line},\n{GOOD}]")
    records, problems = read(tmp_path / "a.json")
    assert len(records) == 4 if "Extra data" in problem else problems[0].startswith("2: ")


def test_huge_lines_are_reported_and_do_not_fill_the_memory(tmp_path: Path):
    long = json.dumps({"text": "x" * 3000})
    path = write(tmp_path, train=f"{GOOD}\n{long}\n{GOOD}\n{long}") / "train.jsonl"
    rows = list(read_jsonl(path, longest=1024))
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert [isinstance(row, BadRowError) for _, row in rows] == [False, True, False, True]
    assert len(list(read_jsonl(path))) == 4
    path.write_text(
        f"{long}\n{GOOD}\n"
    )  # what is too long by its line's end alone takes no other row with it
    assert [number for number, _ in read_jsonl(path, longest=len(long))] == [1, 2]
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,completion\na,"{"x" * 3000}"\n')
    assert "field larger than field limit" in str(next(read_csv(path, longest=1024))[1])


def test_a_json_array_longer_than_what_is_read_at_once(tmp_path: Path):
    rows = [{"text": "x" * 700_000, "n": n} for n in range(5)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    assert [row for _, row in read_json(path)] == rows
    path.write_text(json.dumps(rows)[:-1])
    assert "the array is not closed" in str(list(read_json(path))[-1][1])


def test_a_json_file_of_lines(tmp_path: Path):
    (tmp_path / "a.json").write_text(f"{GOOD}\n{GOOD}\n")
    assert len(read(tmp_path / "a.json")[0]) == 2


def test_separators_and_headers_of_tables(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('prompt;completion\n"a;a";"b,b"\n')
    assert read(path)[0][0].fields == {"prompt": "a;a", "completion": "b,b"}
    path.write_text("prompt|completion\na,b;c|b\n")
    assert read(path)[0][0].fields == {"prompt": "a,b;c", "completion": "b"}
    path.write_text("sep=;\nprompt;completion\na,b;c\n\nd;e;f\n")
    records, problems = read(path)
    assert records[0].fields == {"prompt": "a,b", "completion": "c"}
    assert problems == [
        "5: 3 values, but the header has 2 columns: put double quotes around a value that contains"
        " a semicolon"
    ]
    path.write_text("prompt,completion,,\na,b,,\n")
    assert read(path)[0][0].fields == {"prompt": "a", "completion": "b"}
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match=r"same name \(prompt\): rename or remove one of them"):
        read(path)
    path.write_text('prompt,completion\na,"b"c\n')
    assert "write each double quote twice" in read(path)[1][0]
    path.write_text('prompt,completion\na,"b\n')
    assert "unexpected end of data" in read(path)[1][0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_that_python_printed(tmp_path: Path, suffix: str):
    path = tmp_path / f"rows{suffix}"
    text = str(ROWS) if suffix == ".json" else "".join(f"{row}\n" for row in ROWS)
    path.write_text(text)
    _, problems = read(path)
    assert all("json.dumps(ast.literal_eval(TEXT))" in problem for problem in problems)

    # The advice is right when followed.
    texts = [text] if suffix == ".json" else text.splitlines()
    path.write_text("\n".join(json.dumps(ast.literal_eval(each)) for each in texts))
    assert [record.fields for record in read(path)[0]] == ROWS


def test_a_parquet_file_with_a_day_beyond_all_calendars(tmp_path: Path):
    days = pyarrow.array([2**30], pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["a"], "day": days}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet can't be read as Parquet: days=1073741824"):
        read(tmp_path / "a.parquet")


def test_a_document_with_a_nul_byte_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="contains a NUL byte"):
        list(read_text(tmp_path / "a.txt"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path):
    (write(tmp_path, train=GOOD) / "train.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"can't read .*: Permission denied"):
        read(tmp_path)


def read_corrupt(path: Path) -> None:
    """Read a file; every error and every reported problem must be one short line."""
    said: list[str] = []
    try:
        said = list(read_text(path))[:0] if path.suffix == ".txt" else read(path)[1]
    except DataError as error:
        said = [str(error)]
    assert all("\n" not in line and len(line) < 700 for line in said), said


def test_ten_thousand_corrupt_files(tmp_path: Path):
    chance = random.Random(0)
    sound = [
        write_as(tmp_path / f"sound{suffix}", ROWS)
        for suffix in (".jsonl", ".json", ".csv", ".parquet")
    ]
    (tmp_path / "sound.txt").write_text("Größe, und so weiter.\n" * 20, encoding="utf-8")
    sound.append(tmp_path / "sound.txt")
    contents = {path.suffix: path.read_bytes() for path in sound}
    for _ in range(10_000):
        suffix = chance.choices(list(contents), (4, 4, 4, 1, 2))[0]
        content = bytearray(contents[suffix])
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(content) + 1)
            match chance.randrange(5):
                case 0:
                    content[at : at + chance.randrange(1, 30)] = b""
                case 1:
                    content[at:at] = chance.randbytes(chance.randrange(1, 9))
                case 2:
                    content[at:at] = chance.choice(
                        [b'"', b"{", b"[", b"}", b"]", b",", b"\n", b"\r", b"\0", b"\\", b"\xff"]
                    )
                case 3:
                    content[at : at + 1] = chance.randbytes(1)
                case 4:
                    del content[at:]
        path = tmp_path / f"corrupt{suffix}"
        path.write_bytes(content)
        with cpu_limit():
            read_corrupt(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "conversations",
                    "role",
                    "content",
                    "prompt",
                    "completion",
                    "text",
                    "tools",
                    "from",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20),
        max_size=4,
    )
)
def test_any_file_loads_or_gives_clear_lines(tmp_path: Path, lines: list[bytes]):
    for suffix, content in (
        (".jsonl", b"\n".join(lines)),
        (".json", b"[" + b",\n".join(lines) + b"]"),
    ):
        path = tmp_path / f"any{suffix}"
        path.write_bytes(content)
        read_corrupt(path)
