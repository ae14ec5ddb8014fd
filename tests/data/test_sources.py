"""What ``--data`` may refer to."""

import json
import os
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from mlx_loraplus.data.rows import Row
from mlx_loraplus.data.sources import find_sources
from mlx_loraplus.errors import DataError
from tests.data.reading import GOOD, read, write

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(6)]


def test_a_folder_of_splits(tmp_path: Path):
    folder = write(tmp_path, train=GOOD, test='{"text": "t"}')
    (folder / "validation.csv").write_text("question,answer\nq,a\n")
    assert read(folder)[0] == [Row("completion", {"prompt": "a", "completion": "b"}, 1)]
    assert read(folder, "valid")[0] == [Row("question", {"prompt": "q", "completion": "a"}, 2)]
    assert read(folder, "test")[0] == [Row("text", {"text": "t"}, 1)]


def test_one_file_is_for_training(tmp_path: Path):
    (source,) = find_sources([str(write(tmp_path, rows=GOOD) / "rows.jsonl")])
    assert {split: len(tables) for split, tables in source.items()} == {"train": 1}


def test_of_several_sources_a_row_s_place_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder).mkdir()
        for name in ("train.jsonl", "more.jsonl"):
            (Path(folder) / name).write_text('{"text": "a"}\n')
    sources = find_sources(["one", "two", "two/more.jsonl"])
    assert [source["train"][0].name for source in sources] == [
        "one/train.jsonl",
        "two/train.jsonl",
        "two/more.jsonl",
    ]
    assert find_sources(["one"])[0]["train"][0].name == "train.jsonl"
    Path("one").rename("train")  # as its file is called
    assert find_sources(["train", "two"])[0]["train"][0].name == "train/train.jsonl"


def test_shards_of_a_split_go_together(tmp_path: Path):
    for number in range(2):
        table = pyarrow.Table.from_pylist(ROWS[3 * number : 3 * number + 3])
        parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    records, _ = read(tmp_path)
    assert [record.fields for record in records] == ROWS
    assert records[3].line == 1
    names = [table.name for table in find_sources([str(tmp_path)])[0]["train"]]
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def test_a_missing_shard_is_refused(tmp_path: Path):
    for number in (0, 2):
        (tmp_path / f"valid-0000{number}-of-00003.jsonl").write_text(GOOD)
    write(tmp_path, train=GOOD)
    with pytest.raises(DataError, match="has only 2 of the 3 shards of valid"):
        find_sources([str(tmp_path)])


def test_other_files_beside_the_training_file_are_reported(tmp_path: Path):
    write(tmp_path, train=GOOD, valid=GOOD, heldout=GOOD, train2=GOOD)
    for name in ("test.jsonl.gz", "notes.txt", "config.yaml", "run.zip"):
        (tmp_path / name).write_text("")
    (note,) = find_sources([str(tmp_path)])[0]["train"][0].notes
    assert note == (
        f"training does not read heldout.jsonl, test.jsonl.gz, train2.jsonl in {tmp_path}: it reads"
        " files that are named train, valid or test, and are not compressed"
    )
    (tmp_path / "tools.json").write_text("[]")
    tools, _ = find_sources([str(tmp_path)])[0]["train"][0].notes
    assert tools == (
        f"training does not read tools.json in {tmp_path}: a row's tools are those in its field"
        " 'tools' (generate takes such a file as --tools)"
    )


def test_two_files_for_one_split_are_refused(tmp_path: Path):
    write(tmp_path, train=GOOD, valid=GOOD, validation=GOOD)
    with pytest.raises(
        DataError, match=r"for valid: valid\.jsonl, validation\.jsonl; keep one of them"
    ):
        find_sources([str(tmp_path)])


def test_documents(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    (source,) = find_sources([str(tmp_path)])
    (table,) = source["train"]
    assert [path.name for path in table.documents] == ["a.txt", "b.txt"]
    (tmp_path / "train.txt").write_text("t")
    (table,) = find_sources([str(tmp_path)])[0]["train"]
    assert [path.name for path in table.documents] == ["train.txt"], "a name says which"


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        DataError, match=r"not found: '.*gone'; give a folder that contains train\.jsonl, a file, "
    ):
        find_sources([str(tmp_path / "gone")])
    with pytest.raises(
        DataError,
        match=r"no train\.jsonl \(or .*\) in .*, which contains nothing; save the training rows",
    ):
        find_sources([str(tmp_path)])
    write(tmp_path, exercises=GOOD)
    (tmp_path / "exercises").mkdir()
    with pytest.raises(DataError, match=r"which contains exercises, exercises\.jsonl; "):
        find_sources([str(tmp_path)])
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(
        DataError,
        match=r"unsupported file type: .*; give one of \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt",
    ):
        find_sources([str(tmp_path / "rows.xlsx")])
    with pytest.raises(DataError, match=r"data not found: '~nobody-of-this-name/data'"):
        find_sources(["~nobody-of-this-name/data"])
    with pytest.raises(DataError, match=r"can't read 'a/a/.*: File name too long") as error:
        find_sources(["a/" * 3000])
    assert len(str(error.value)) < 400


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``datasets`` also finds a repository as a folder in the working directory."""
    repository = tmp_path / "org" / "name"
    repository.mkdir(parents=True)
    for split, rows in (("train", ROWS[:4]), ("validation", ROWS[4:5]), ("test", ROWS[5:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (repository / f"{split}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    from mlx_loraplus.data.sources import _dataset_source, _load_dataset_dict

    source = _dataset_source("org/name", _load_dataset_dict("org/name"))
    found = {
        split: [row for table in tables for _, row in table.rows()]
        for split, tables in source.items()
    }
    assert found == {"train": ROWS[:4], "valid": ROWS[4:5], "test": ROWS[5:]}
    assert len({table.identity() for tables in source.values() for table in tables}) == 3

    with pytest.raises(
        DataError,
        match=r"^'org/other' is not a local file or folder, and can't be loaded from the Hugging Face hub: ",
    ):
        find_sources(["org/other"])
    with pytest.raises(DataError, match=r"has no split named train; its splits are test"):
        _dataset_source("org/name", {"test": []})


def test_a_data_set_that_datasets_saved(tmp_path: Path):
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "validation": datasets.Dataset.from_list(ROWS[:2]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [record.fields for record in read(tmp_path / "saved")[0]] == ROWS
    assert read(tmp_path / "saved", "valid")[0][1].line == 2
    (table,) = find_sources([str(tmp_path / "saved")])[0]["valid"]
    assert table.name == f"{tmp_path / 'saved'} validation"
    for broken in ('{"splits": ["train", "gone"]}', "{"):
        (tmp_path / "saved" / "dataset_dict.json").write_text(broken)
        with pytest.raises(DataError, match=r"saved' can't be loaded as a saved data set: "):
            read(tmp_path / "saved")


def test_columns_that_are_not_used_are_not_decoded(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    rows = {"text": ["a"], "picture": [{"bytes": b"no picture", "path": None}]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "saved")
    (record,), problems = read(tmp_path / "saved")
    assert (record.fields, record.unused, problems) == ({"text": "a"}, ("picture",), [])
    features = datasets.Features({"text": datasets.Value("string"), "pictures": [datasets.Image()]})
    split = datasets.Dataset.from_dict(
        {"text": ["a"], "pictures": [rows["picture"]]}, features=features
    )
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "nested")
    with pytest.raises(DataError, match=r"nested train can't be read: cannot identify image"):
        read(tmp_path / "nested")


def test_columns_of_mixed_types_are_decoded(tmp_path: Path):
    """``datasets`` stores them as strings of JSON."""
    call = {"function": {"name": "lamp", "arguments": {"to": 5}}}
    turns = [
        {"role": "user", "content": "Dim"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    other = [
        {
            "role": "assistant",
            "content": "b",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
        }
    ]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"messages": rows}) + "\n" for rows in (turns, other))
    )
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(tmp_path / "saved")
    (record, _), problems = read(tmp_path / "saved")
    assert (record.fields, problems) == ({"messages": turns}, [])


def test_without_the_packages_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import builtins

    real = builtins.__import__

    def refuse(name: str, *rest):
        if name in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in ("org/name", str(tmp_path / "rows.parquet")):
        with pytest.raises(DataError, match=r"pip install 'mlx_loraplus\[datasets\]'"):
            read(name)


@pytest.mark.parametrize("what", ["dangling", "circle", "pipe", "folder"])
@pytest.mark.parametrize("name", ["train", "valid", "test", "eval"])
def test_a_split_that_is_no_file_is_told_and_not_left_out(tmp_path: Path, name: str, what: str):
    file = write(tmp_path / "data", train=GOOD) / f"{name}.jsonl"
    file.unlink(missing_ok=True)
    {
        "dangling": lambda: file.symlink_to("nowhere"),
        "circle": lambda: file.symlink_to(file.name),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[what]()
    found = {"pipe": "not an ordinary file", "folder": "a folder"}.get(what, "a link that leads")
    for data in (file.parent, file):
        if data == file and what == "folder":
            continue
        with pytest.raises(DataError, match=f"can't read .*: it is {found}") as raised:
            find_sources([str(data)])
        assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ("sub/train.jsonl sub/valid.jsonl", "give the folder that holds train.jsonl: --data sub"),
        ("a/b/train-00000-of-00001.csv", "give the folder that holds train-00000-of-00001.csv: --data a/b"),
        ("b/train.jsonl a/train.csv", "give one or several of the folders in it, as in --data a b"),
        ("sub/rows.jsonl", "give files in its folders, as in --data sub/rows.jsonl"),
        ("train/a.jsonl valid/a.jsonl", "give files in its folders, as in --data train/a.jsonl"),
        (".git/train.jsonl", "save the training rows there, for example in train.jsonl"),
        ("rows.csv", "rename it to train.csv, or give the file: --data rows.csv"),
        ("a.jsonl b.jsonl", "or give only what to train on, as in --data a.jsonl b.jsonl"),
        ("a.jsonl my_val.jsonl", "rename the file to train on to train.jsonl and the file to validate on, if there is one,"
            " to valid.jsonl, or give only what to train on, as in --data a.jsonl"),
        ("valid.jsonl test.jsonl", "save the training rows there too, for example in train.jsonl"),
        ("train.jsonl.gz", "'train.jsonl.gz' is not read (decompress it first)"),
    ],
)  # fmt: skip
def test_a_folder_without_a_training_file_names_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str, advice: str
):
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{GOOD}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        find_sources(["."])
    assert advice in str(error.value)

    # The advice is right when followed.
    given = str(error.value).partition("--data ")[2].split()
    if given:
        assert all(source["train"] for source in find_sources(given))
