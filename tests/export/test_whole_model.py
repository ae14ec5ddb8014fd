"""What the commands make of the folder of a run with adapter full, which is a model."""

from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

from mlx_loraplus.cli import chat, export, fuse, generate, train
from mlx_loraplus.errors import AdapterError
from scripts.judges.gguf_families import SIZE, byte_level_tokenizer
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import same
from tests.export.test_gguf_lora import converted
from tests.models.gguf_files import write_gguf
from tests.training.tiny_runs import (
    Place,
)

FULL: dict[str, Any] = {"adapter": "full", "dropout": 0.0}
TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))  # pyright: ignore


def refused(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that refuses, and return its only line."""
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with adapter full."""
    home = tmp_path_factory.mktemp("full")
    write_tiny_model(home / "model", hidden=64)
    write_sums(home / "data")
    Place(home).run(**FULL)
    return home / "run"


def test_generate_and_chat(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    generate([str(trained), "--prompt", "1 + 2 =", "--max-tokens", "4"])
    answer = capsys.readouterr().out
    generate(["--model", str(trained), "--prompt", "1 + 2 =", "--max-tokens", "4"])
    assert capsys.readouterr().out == answer

    lines = iter(["1 + 2 =", "/both"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines, None) or _end())
    chat([str(trained), "--max-tokens", "4"])
    told = capsys.readouterr().out
    assert told.startswith("model: ")
    assert "no base and no adapter are loaded" in told


def _end() -> str:
    raise EOFError


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]):
    train(["--test", "--adapter-path", str(trained)])
    told = capsys.readouterr().out
    (losses,) = [line.split() for line in told.splitlines() if " loss " in line]
    numbers = [float(word) for word in losses if word.replace(".", "").isdigit()]
    assert numbers[1] < numbers[0]


def test_fuse_copies_and_quantizes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fuse([str(trained), "--save-path", str(tmp_path / "copy")])
    assert same(weights_of(trained), weights_of(tmp_path / "copy"))
    fuse([str(trained), "--save-path", str(tmp_path / "small"), "--bits", "8"])
    assert "KL(before || quantized)" in capsys.readouterr().out
    stock, _ = stock_load(str(tmp_path / "small"))
    full_model, _ = stock_load(str(trained))
    assert mx.allclose(stock(TOKENS), full_model(TOKENS), atol=0.1).item()
    line = refused(fuse, [f"{trained}:0.5", "--save-path", str(tmp_path / "half")], capsys)
    assert "is a whole model, which can't be added to others or weighted" in line


def test_a_trained_model_becomes_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Characters alone are no tokenizer that GGUF knows, so the model gets another one.
    model_folder = write_tiny_model(tmp_path / "model", hidden=64, vocabulary=SIZE)
    tokenizer: Any = byte_level_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model_folder)
    write_sums(tmp_path / "data")
    run = Place(tmp_path).run(**FULL, learning_rate=1e-2)

    export([str(run.folder), "--to", "gguf", "--save-path", str(tmp_path / "gguf")])
    assert "the whole model is written as f16" in capsys.readouterr().out
    base, _ = ml.load(str(model_folder))
    trained, ours = ml.load(str(run.folder))
    written, theirs = ml.load(str(tmp_path / "gguf" / "model.gguf"))
    assert mx.allclose(written(TOKENS), trained(TOKENS), atol=0.02).item()
    assert not mx.allclose(written(TOKENS), base(TOKENS), atol=0.2).item()
    assert theirs.encode("12 + 7 = 19") == ours.encode("12 + 7 = 19")
    assert (tmp_path / "gguf" / "Modelfile").is_file()


def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours, _ = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    export([str(tmp_path / "model"), "--to", "gguf", "--save-path", str(tmp_path / "gguf")])
    assert "the whole model is written as f16" in capsys.readouterr().out
    model, _ = ml.load(str(tmp_path / "gguf" / "model.gguf"))
    assert mx.allclose(model(TOKENS % 8), ours(TOKENS % 8), atol=0.02).item()
    assert (tmp_path / "gguf" / "Modelfile").is_file()

    line = refused(
        export, [str(trained), "--to", "peft", "--save-path", str(tmp_path / "peft")], capsys
    )
    assert "is a whole model, not an adapter: export it alone with --to gguf or --to hub" in line


def test_the_hub_gets_the_model_and_a_card(trained: Path, tmp_path: Path):
    from mlx_loraplus.export.whole_model import write_model_repository
    from mlx_loraplus.models.loading import load_folder

    model, tokenizer, config = load_folder(trained)
    write_model_repository(model, tokenizer, config, trained, "me/mine", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "all of its weights trained further" in card
    assert "mlx_lm.generate --model me/mine" in card
    assert "adapter is used" not in card
    assert same(weights_of(tmp_path / "hub"), weights_of(trained))


def test_it_is_no_adapter(trained: Path):
    place = Place(trained.parent)
    with pytest.raises(AdapterError, match="is a model, not an adapter: give it as model="):
        ml.load(str(place.folder / "model"), trained)
    run = place.run("further", model=str(trained))
    assert (run.folder / "adapters.safetensors").is_file()
