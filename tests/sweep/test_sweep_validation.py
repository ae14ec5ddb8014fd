"""A sweep without validation examples is refused before the model is loaded."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus import cli
from mlx_loraplus.data.first_rows import check_validates
from mlx_loraplus.errors import DataError
from mlx_loraplus.settings import configure
from mlx_loraplus.config import TrainConfig
from scripts.tiny_model import write_sums, write_tiny_model

ROW = json.dumps({"prompt": "1 + 1 =", "completion": " 2"})
OTHER = json.dumps({"prompt": "1 + 2 =", "completion": " 3"})


def write_rows(path: Path, *rows: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def test_the_model_is_not_loaded_for_a_sweep_that_can_not_be_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    model = str(write_tiny_model(tmp_path / "model"))
    data = write_sums(tmp_path / "data")
    (data / "valid.jsonl").unlink()
    words = ["--model", model, "--data", str(data), "--adapter-path", str(tmp_path / "sweep")]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_loraplus.inference.generate.load", fail)
        with pytest.raises(SystemExit) as stop:
            cli.sweep([*words, "--valid-split", "0"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told == (
        "error: a sweep needs validation examples: add a valid file, or give --valid-split 0.25\n"
    )

    # The advice is right when followed, in a notebook too.
    loaded = ml.load(model)
    settings = {"data": data, "adapter_path": tmp_path / "other", "iters": 1, "rounds": 1}
    with pytest.raises(DataError, match=r"or give valid_split=0.25$"):
        ml.sweep_rates(*loaded, valid_split=0, **settings)
    short = ["--iters", "1", "--rounds", "1", "--seeds", "1", "--learning-rates", "1e-3"]
    cli.sweep([*words, *short, "--valid-split", "0.25"])
    assert (tmp_path / "sweep" / "best.yaml").is_file()


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([ROW], {}, "add a valid file$"),
        ([ROW, OTHER], {}, "add a valid file, or give valid_split=0.25|--valid-split 0.25$"),
        ([ROW] * 9, {}, "--valid-split 0.25$"),
        ([ROW, OTHER] * 10, {"valid_split": 0}, "--valid-split 0.25$"),
        ([ROW, OTHER], {"valid_split": 0.5}, None),
        ([ROW, OTHER] * 5, {}, None),
        ([ROW], {"on_long": "split"}, None),
    ],
)
def test_rows_that_will_be_held_out_are_known_before(
    rows: list[str], settings: dict[str, Any], told: str | None, tmp_path: Path
):
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    config = configure(TrainConfig, {"data": data} | settings)
    if told is None:
        check_validates(config)
        return
    with pytest.raises(DataError, match=told):
        check_validates(config)


def test_a_file_of_validation_rows_counts_if_it_has_rows(tmp_path: Path):
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", ROW)
    write_rows(folder / "valid.jsonl", OTHER)
    config = configure(TrainConfig, {"data": str(folder)})
    check_validates(config)
    write_rows(folder / "valid.jsonl")
    with pytest.raises(DataError, match="a sweep needs validation examples"):
        check_validates(config)
