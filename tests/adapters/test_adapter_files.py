"""Every command accepts an adapter by its weights file, as mlx-lm names it, and uses that file."""

import io
import json
import shutil
from pathlib import Path

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus import chat, fuse, generate, train
from mlx_loraplus.adapters.stored_files import read_weights
from mlx_loraplus.export.__main__ import main as export
from mlx_loraplus.export.peft import load_peft
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import same

NAMES = ("adapters.safetensors", "0000100_adapters.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data, a run with two adapters, and each adapter in a separate folder."""
    home = tmp_path_factory.mktemp("home")
    write_tiny_model(home / "model")
    write_sums(home / "data")
    words = [
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data"),
        "--iters",
        "2",
        "--rank",
        "4",
    ]
    train.main([*words, "--alpha", "12", "--warmup", "0", "--adapter-path", str(home / "run")])
    latest, earlier = (home / "run" / name for name in NAMES)
    arrays = read_weights(latest)
    mx.save_safetensors(str(earlier), {name: array + 0.05 for name, array in arrays.items()})
    for name in NAMES:
        (home / name).mkdir()
        shutil.copy(home / "run" / name, home / name / NAMES[0])
        shutil.copy(home / "run" / "adapter_config.json", home / name)
    return home


def only(home: Path, name: str) -> str:
    """Return a folder that holds only this adapter."""
    return str(home / name)


@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_from_the_file(
    home: Path,
    name: str,
    tmp_path: Path,
):
    words = [
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data"),
        "--iters",
        "1",
        "--learning-rate",
        "1e-9",
    ]
    train.main(
        [
            *words,
            "--resume-adapter-file",
            str(home / "run" / name),
            "--adapter-path",
            str(tmp_path / "new"),
        ]
    )
    began, ended = (
        read_weights(home / "run" / name),
        read_weights(tmp_path / "new" / "adapters.safetensors"),
    )

    assert all(mx.allclose(began[key], ended[key], atol=1e-6) for key in began)
    assert "alpha: 12.0" in (tmp_path / "new" / "run.yaml").read_text(), (
        "as the run beside the file has it"
    )


@pytest.mark.parametrize("name", NAMES)
def test_generate_chat_and_test_use_the_file(
    home: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    said = []
    for adapter in (only(home, name), str(home / "run" / name)):
        words = ["--model", str(home / "model"), "--adapter-path", adapter]
        generate.main([*words, "--prompt", "1 + 2 =", "--max-tokens", "6"])
        monkeypatch.setattr("sys.stdin", io.StringIO("3 + 4 =\n"))
        chat.main([*words, "--max-tokens", "6"])
        shutil.copy(home / "data" / "valid.jsonl", home / "data" / "test.jsonl")
        train.main([*words, "--data", str(home / "data"), "--test"])
        said.append(capsys.readouterr().out)

    assert said[0] == said[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_fused_and_measured_on_its_runs_data(
    home: Path,
    name: str,
    tmp_path: Path,
):
    base = ["--model", str(home / "model")]
    fuse.main([*base, "--adapter-path", only(home, name), "--save-path", str(tmp_path / "folder")])
    fuse.main(
        [
            *base,
            "--adapter-path",
            str(home / "run" / name),
            "--save-path",
            str(tmp_path / "file"),
            "--sample-tokens",
            "200",
        ]
    )
    folder, file = (ml.load(str(tmp_path / each))[0].parameters() for each in ("folder", "file"))

    assert same(folder, file)

    report = json.loads((tmp_path / "file" / "fuse.json").read_text())

    assert report["answers"], "measured on the data of the run that holds the file"
    assert json.loads((home / "run" / "fuse.json").read_text()) == report

    mixed = [f"{home / 'run' / other}:0.5" for other in NAMES]
    fuse.main([*base, "--adapter-path", *mixed, "--save-path", str(tmp_path / "both")])

    assert len(json.loads((tmp_path / "both" / "fuse.json").read_text())["adapters"]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_exported(
    home: Path,
    name: str,
    tmp_path: Path,
):
    words = ["--model", str(home / "model"), "--adapter-path", str(home / "run" / name)]
    export([*words, "--to", "peft", "--save-path", str(tmp_path / "peft")])
    model, _ = ml.load(str(home / "model"))
    load_peft(
        model, tmp_path / "peft" / "adapter_model.safetensors"
    )  # a PEFT adapter can be given by its file, too
    wanted, _ = ml.load(str(home / "model"), only(home, name))

    assert [key for key, _ in tree_flatten(model.trainable_parameters())]
    assert same(model.trainable_parameters(), wanted.trainable_parameters())

    export([*words, "--to", "gguf", "--save-path", str(tmp_path / "gguf")])

    assert (tmp_path / "gguf" / "adapter.gguf").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "is a file other than adapters.safetensors"),
        ("modules.safetensors", "is not named like an adapter of mlx-lm"),
        ("0000200_adapters.safetensors", "holds no adapter"),
        ("loss.png", "is a file other than adapters.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["train", "test", "fuse", "generate", "export"])
def test_another_file_is_a_one_line_error(
    home: Path,
    name: str,
    message: str,
    command: str,
    tmp_path: Path,
    capsys,
):
    file, base = str(home / "run" / name), ["--model", str(home / "model")]
    out = str(tmp_path / "out")
    act = {
        "train": lambda: train.main([*base, "--resume-adapter-file", file, "--adapter-path", out]),
        "test": lambda: train.main(
            [*base, "--adapter-path", file, "--data", str(home / "data"), "--test"]
        ),
        "fuse": lambda: fuse.main([*base, "--adapter-path", file, "--save-path", out]),
        "generate": lambda: generate.main([*base, "--adapter-path", file, "--prompt", "1"]),
        "export": lambda: export(
            [*base, "--adapter-path", file, "--to", "peft", "--save-path", out]
        ),
    }[command]

    with pytest.raises(SystemExit) as stop:
        act()

    said = capsys.readouterr().err.strip().splitlines()

    assert (stop.value.code, message in said[-1]) == (2, True), said


def test_a_config_beside_an_adapter_does_not_make_it_a_model(home: Path, tmp_path: Path):
    """Some programs store the config.json of the base with its adapter."""
    folder = tmp_path / "adapter"
    shutil.copytree(home / "run", folder)
    tokens = mx.array([[5, 9, 17, 33]])
    expected = ml.load(str(folder))[0](tokens)
    shutil.copy(home / "model" / "config.json", folder)
    assert mx.array_equal(ml.load(str(folder))[0](tokens), expected)
