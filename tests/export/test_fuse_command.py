"""The fuse command on a run: what it measures, writes and refuses."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load as stock_load
from mlx_lm.utils import save_config, save_model
from transformers import AutoTokenizer

from mlx_loraplus import fuse, save_adapter, train
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export.fuse import quantization_of
from mlx_loraplus.export.written_files import MODEL, kept_files_note
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.run_argument import spell_out_adapters
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def quantized_model(folder: Path) -> Path:
    """Write a tiny model at 4 bits."""
    write_tiny_model(folder, hidden=64)
    model, _, config = load_folder(folder)
    nn.quantize(model, group_size=32, bits=4)
    save_model(folder, model)
    save_config(config | {"quantization": quantization_of(model)}, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit model, its data and a run."""
    home = tmp_path_factory.mktemp("home")
    words = [
        "--model",
        str(quantized_model(home / "model")),
        "--data",
        str(write_sums(home / "data")),
    ]
    words += [
        "--iters",
        "6",
        "--rank",
        "4",
        "--warmup",
        "0",
        "--alpha",
        "4",
        "--steps-per-eval",
        "100",
    ]
    train.main([*words, "--adapter-path", str(home / "run")])
    return home


def fused(home: Path, out: Path, *words: str) -> dict:
    adapter = [] if "--adapter" in words else ["--adapter-path", str(home / "run")]
    fuse.main(["--model", str(home / "model"), "--save-path", str(out), *adapter, *words])
    return json.loads((out / "fuse.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        fuse.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_is_fused_and_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = fused(trained, tmp_path / "auto")
    said = capsys.readouterr().out
    assert "cosine" in said
    assert "KL(base + adapter || fused)" in said
    assert all(layer["output_cosine"] >= 0.95 for layer in report["layers"].values())
    assert len(report["layers"]) == 14
    answers = report["answers"]
    assert answers["base"] > answers["base + adapter"]
    assert answers["fused"] == pytest.approx(answers["base + adapter"], abs=0.02)
    assert 0 <= answers["kl"] < 0.02
    narrow = fused(trained, tmp_path / "narrow", "--bits", "4")
    assert narrow["bytes_before"] == narrow["bytes_after"] <= report["bytes_after"]
    assert narrow["answers"]["kl"] >= answers["kl"]
    model, _ = stock_load(str(tmp_path / "auto"))
    ours, _, _ = load_folder(tmp_path / "auto")
    assert mx.array_equal(model(TOKENS), ours(TOKENS))


def test_a_run_is_left_with_what_its_fuse_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = fused(trained, tmp_path / "out", "--sample-tokens", "0")
    assert json.loads((trained / "run" / "fuse.json").read_text()) == report
    assert report["schema"] == 1
    assert report["save_path"] == "out"
    assert str(tmp_path.parent) not in json.dumps(report)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (alone / name).write_bytes((trained / "run" / name).read_bytes())
    fused(trained, tmp_path / "again", "--adapter", str(alone))
    assert not (alone / "fuse.json").exists()
    (trained / "run" / "fuse.json").unlink()
    (trained / "run" / "fuse.json").mkdir()  # so that it can't be written
    fused(trained, tmp_path / "still", "--sample-tokens", "0")
    (trained / "run" / "fuse.json").rmdir()
    assert "the run's report does not show fuse.json" in capsys.readouterr().out
    train.main(
        [
            "-c",
            str(trained / "run" / "run.yaml"),
            "--adapter-path",
            str(tmp_path / "run"),
            "--iters",
            "1",
        ]
    )
    (tmp_path / "run" / "fuse.json").write_text("{}")
    train.main(["-c", str(tmp_path / "run" / "run.yaml"), "--overwrite"])
    assert not (tmp_path / "run" / "fuse.json").exists()


def test_data_may_be_named_or_gone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = str(trained / "data")
    with_data = fused(trained, tmp_path / "a", "--data", data, "--sample-tokens", "20")
    assert with_data["answers"].keys() == {"base", "base + adapter", "fused", "kl"}
    assert fused(trained, tmp_path / "b", "--sample-tokens", "0")["answers"] == {}
    (trained / "data").rename(trained / "moved")
    try:
        assert fused(trained, tmp_path / "c")["answers"] == {}
        assert "--data names other examples" in capsys.readouterr().out
        assert data in refused(capsys, "--adapter-path", str(trained / "run"), "--model", str(trained / "model"),
                               "--data", data, "--save-path", str(tmp_path / "d"))  # fmt: skip
    finally:
        (trained / "moved").rename(trained / "data")
    assert not (tmp_path / "d").exists()


def tokens_without_rows(home: Path, folder: Path) -> tuple[Path, Path]:
    """Write the model with a tokenizer that has more tokens than the model, and a row with them."""
    shutil.copytree(home / "model", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.add_tokens([f"<new{number}>" for number in range(40)])
    assert len(tokenizer) > 128
    tokenizer.save_pretrained(folder / "model")

    (folder / "data").mkdir()
    rows = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 +", "completion": " <new39>"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(text)
    return folder / "model", folder / "data"


def test_tokens_that_the_model_has_no_rows_for_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, data = tokens_without_rows(trained, tmp_path)
    out = tmp_path / "out"
    words = ["--model", str(model), "--save-path", str(out)]
    run = ["--adapter-path", str(trained / "run")]
    said = refused(capsys, *words, *run, "--data", str(data))
    assert "train.jsonl:2: token 137 ('<new39>') is beyond the model's embedding" in said
    assert not out.exists()

    shutil.copytree(trained / "run", tmp_path / "run")
    settings = (tmp_path / "run" / "run.yaml").read_text()
    (tmp_path / "run" / "run.yaml").write_text(settings.replace(str(trained / "data"), str(data)))
    fuse.main([*words, "--adapter-path", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "the answers are not compared (--data names other examples)" in said
    assert "is beyond the model's embedding" in said
    assert json.loads((out / "fuse.json").read_text())["answers"] == {}


def test_settings_of_another_version_are_no_hindrance(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(trained / "run", tmp_path / "run")
    with (tmp_path / "run" / "run.yaml").open("a") as file:
        file.write("of_the_future: 1\n")
    assert fused(trained, tmp_path / "out", "--adapter", str(tmp_path / "run"))["answers"] == {}
    told = capsys.readouterr().out
    assert "run.yaml can't be read: of_the_future is not a setting" in told
    assert "the run's report does not show" in told


def test_several_adapters_with_weights(trained: Path, tmp_path: Path):
    asked = ("--sample-tokens", "2048")
    run = str(trained / "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (copy / name).write_bytes((trained / "run" / name).read_bytes())
    half = fused(
        trained,
        tmp_path / "half",
        "--adapter",
        f"{run}:0.25",
        "--adapter",
        f"{copy}:0.75",
        "--dequantize",
        *asked,
    )
    whole = fused(trained, tmp_path / "whole", "--dequantize", *asked)
    assert half["adapters"] == {"run": 0.25, "copy": 0.75}
    models = [load_folder(tmp_path / name)[0] for name in ("half", "whole")]
    assert mx.allclose(models[0](TOKENS), models[1](TOKENS), atol=1e-4)
    assert half["answers"]["base + adapter"] == pytest.approx(
        whole["answers"]["base + adapter"], abs=1e-4
    )


def test_both_spellings_of_several():
    assert spell_out_adapters(["--adapter", "a:0.7", "--bits", "4", "--adapter", "b"]) == [
        "--bits", "4", "--adapter-path", "a:0.7", "b",
    ]  # fmt: skip
    assert spell_out_adapters(["--adapter-path", "a:0.7", "b"]) == ["--adapter-path", "a:0.7", "b"]


def test_a_spelling_without_a_folder_is_told(capsys: pytest.CaptureFixture[str]):
    told = refused(capsys, "--bits", "4", "--adapter")
    assert "'--adapter' is a flag of mlx_loraplus.train, and not of this command" in told
    assert "(did you mean '--adapter-path'?)" in told


def test_an_adapter_of_other_weights_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = write_tiny_model(tmp_path / "other", hidden=64, seed=1)
    model, _, _ = load_folder(write_tiny_model(tmp_path / "mine", hidden=64))
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter-path", str(tmp_path / "adapter"), "--save-path", str(tmp_path / "fused")]
    said = refused(
        capsys, *words, "--model", str(other), "--data", "nowhere"
    )  # told first: asking the base takes long
    assert "it was trained on other weights" in said
    assert not (tmp_path / "fused").exists()
    fuse.main([*words, "--model", str(tmp_path / "mine")])
    fuse.main(
        [*words, "--model", str(trained / "model"), "--overwrite"]
    )  # another width can't be told apart


@pytest.mark.parametrize("place", ["model", "run"])
def test_what_is_fused_is_not_overwritten(
    trained: Path, capsys: pytest.CaptureFixture[str], place: str
):
    words = [
        "--adapter-path",
        str(trained / "run"),
        "--model",
        str(trained / "model"),
        "--overwrite",
    ]
    before = sorted(path.name for path in (trained / place).iterdir())
    assert "is or contains" in refused(capsys, *words, "--save-path", str(trained / place))
    assert sorted(path.name for path in (trained / place).iterdir()) == before


def test_a_place_that_holds_something_is_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [
        "--adapter-path",
        str(trained / "run"),
        "--model",
        str(trained / "model"),
        "--save-path",
        str(tmp_path),
    ]
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty" in refused(capsys, *words)
    assert "is a file" in refused(capsys, *words[:-1], str(tmp_path / "mine.txt"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_other_files_stay_beside_a_model_that_is_replaced(trained: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    fused(trained, out)
    (out / "model-00001-of-00002.safetensors").write_text("of an earlier model in two files")
    for name in ("notes.txt", "my.safetensors", "sub/config.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    capsys.readouterr()
    fused(trained, out, "--overwrite")
    assert (
        f"kept the other files in {out}: my.safetensors, notes.txt, sub/config.json"
        in capsys.readouterr().out
    )
    assert {
        (out / name).read_text() for name in ("notes.txt", "my.safetensors", "sub/config.json")
    } == {"mine"}
    assert not (out / "model-00001-of-00002.safetensors").exists()
    stock_load(str(out))

    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    words = [
        "--adapter-path",
        str(trained / "run"),
        "--model",
        str(trained / "model"),
        "--save-path",
        str(out),
    ]
    assert "config.json is a folder, but a file must be written there" in refused(
        capsys, *words, "--overwrite"
    )


def test_every_file_of_a_fused_model_is_known_as_ours(trained: Path, tmp_path: Path):
    fused(trained, tmp_path / "out")
    assert not kept_files_note(tmp_path / "out", MODEL)


def test_a_folder_that_is_no_run_gets_no_report(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "run", tmp_path / "adapter")
    (tmp_path / "adapter" / "history.jsonl").unlink()
    shutil.rmtree(tmp_path / "adapter" / "checkpoints")
    for name in ("report.html", "fuse.json"):
        (tmp_path / "adapter" / name).write_text("mine")
    words = ["--adapter-path", str(tmp_path / "adapter"), "--model", str(trained / "model")]
    fuse.main([*words, "--save-path", str(tmp_path / "out")])
    assert {(tmp_path / "adapter" / name).read_text() for name in ("report.html", "fuse.json")} == {
        "mine"
    }


def test_a_plain_base_is_fused_without_comparing_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Nothing is rounded, so the comparison would show nothing; it can be asked for."""
    model, data = write_tiny_model(tmp_path / "model"), write_sums(tmp_path / "data")
    run = str(tmp_path / "run")
    train.main(["--model", str(model), "--data", str(data), "--iters", "2", "--adapter-path", run])
    fuse.main([run, "--save-path", str(tmp_path / "a")])
    said = capsys.readouterr()
    assert "the answers are not compared (--sample-tokens 2048 compares them anyway)" in said.out
    assert "fusing layers: 0 of 14" in said.err
    assert "answers of" not in said.err
    assert json.loads((tmp_path / "a" / "fuse.json").read_text())["answers"] == {}

    fuse.main([run, "--save-path", str(tmp_path / "b"), "--sample-tokens", "2048"])
    answers = json.loads((tmp_path / "b" / "fuse.json").read_text())["answers"]
    assert answers["fused"] == pytest.approx(answers["base + adapter"], abs=1e-4)
    said = capsys.readouterr().err
    for name in ("the base", "base + adapter", "the fused model"):
        assert f"answers of {name}: 0 of " in said


def test_a_comparison_that_is_asked_for_or_needed_is_made(trained: Path, tmp_path: Path):
    assert fused(trained, tmp_path / "rounded")["answers"]
    assert not fused(trained, tmp_path / "whole", "--dequantize")["answers"]
    assert fused(trained, tmp_path / "asked", "--dequantize", "--data", str(trained / "data"))[
        "answers"
    ]


def test_settings_of_a_fuse_that_have_no_effect_are_noted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = write_tiny_model(tmp_path / "plain")
    model, _, _ = load_folder(plain)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    words = ["--model", str(plain), "--adapter-path", str(tmp_path / "adapter")]
    fuse.main([*words, "--save-path", str(tmp_path / "a"), "--dequantize"])
    said = capsys.readouterr().out
    assert f"note: --dequantize changes nothing, because no weight of {plain} is quantized" in said
    fuse.main([*words, "--save-path", str(tmp_path / "b"), "--sample-tokens", "100"])
    assert "not compared: no run.yaml names training data; give --data" in capsys.readouterr().out

    # Where they have an effect, nothing is said.
    fused(trained, tmp_path / "c", "--dequantize", "--sample-tokens", "0")
    said = capsys.readouterr().out
    assert "changes nothing" not in said
    assert "not compared" not in said
