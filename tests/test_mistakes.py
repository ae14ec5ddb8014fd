"""Plausible mistakes at the commands: exit code 2, one right next step, and nothing left behind."""

import json
import types
from collections.abc import Callable
from pathlib import Path

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest

from mlx_loraplus import cli
from mlx_loraplus.arguments import parse
from mlx_loraplus.cli import TrainSwitches
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.errors import counted
from mlx_loraplus.launching import LAUNCHED
from scripts.tiny_model import write_sums, write_tiny_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which holds a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tiny_model(tmp_path / "tiny")
    write_sums(tmp_path / "sums")
    return tmp_path


def error_of(line: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error of a command, which must leave all files as they are."""

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}

    before = files()
    with pytest.raises(SystemExit) as stop:
        cli.main([*line.split(), *words])
    assert stop.value.code == 2
    assert files() == before
    (said,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("error")]
    return said


TRAIN = "train --model tiny --data sums --adapter-path out --iters 2"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("finetune --model tiny", "did you mean 'train'?"),
        ("train --model sums/train.jsonl --data sums", "is a file, not a model"),
        ("generate --model sums/train.jsonl --prompt hi", "rows go to --data"),
        ("train --model ./tinny --data sums", "there is no folder or file './tinny' (did you mean 'tiny'?)"),
        ("generate --model ./tinny --prompt hi", "(did you mean 'tiny'?)"),
        ("train --model sums --data tiny", "are --model and --data swapped?"),
        ("train --model sums/train.jsonl --data tiny", "is a file, not a model"),
        ("train --model tiny --data tiny", "are --model and --data swapped?"),
        ("train --model tiny --data sums/trian.jsonl", "(did you mean 'train.jsonl'"),
        ("train tiny sums", "values follow their flags"),
        ("train --pack true", "a flag that is on or off has no value"),
        ("train —model tiny", "'—model' is no flag (did you mean '--model'"),
        ("train --launch two", "--launch takes a whole number, not 'two'"),
        ("sweep --learning-rates 1e-4,1e-3", "with spaces between them"),
        ("train --fields prompt={Ticket Subject} --data sums --model tiny", "put quotes around a pair with spaces"),
        ("train --fields prompt=Ticket Subject --data sums --model tiny", "put quotes around a pair with spaces"),
        (f"{TRAIN} --rank 100000", "rank 100000 is above 32"),
        (f"{TRAIN} --adapter-path deep/er/out --init loftq", "group size"),
        (f"{TRAIN} --resume", "out holds no run to resume"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
):
    assert told in error_of(line, capsys)


def test_a_name_given_twice_in_a_yaml_file_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "twice.yaml").write_text("model: tiny\nrank: 4\ndata: sums\nrank: 8\n")
    assert "rank is given twice" in error_of("train -c twice.yaml", capsys)


def test_an_adapter_of_peft_is_converted_as_the_error_says(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    cli.main(f"{TRAIN} --warmup 0".split())
    cli.main(["export", "out", "--to", "peft", "--save-path", "peft"])
    for line in (
        "train --model peft --data sums",
        "generate peft --prompt hi",
        "train --model tiny --data sums --resume-adapter-file peft --adapter-path more",
    ):
        said = error_of(line, capsys)
        assert "peft holds an adapter in PEFT's format" in said

    # The advice is right when followed.
    command = said.partition("mlx_loraplus.")[2]
    cli.main(command.split())
    cli.main(["generate", "imported", "--prompt", "1 + 1 =", "--max-tokens", "2"])


def test_an_adapter_that_mlx_lm_trained_works_in_every_command(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    from mlx_lm.lora import CONFIG_DEFAULTS, run

    (here / "text").mkdir()
    for name in ("train", "valid"):
        rows = [json.dumps({"text": f"{number} and {number}"}) + "\n" for number in range(8)]
        (here / "text" / f"{name}.jsonl").write_text("".join(rows))
    settings = {"model": "tiny", "train": True, "data": "text", "adapter_path": "stock"}
    settings |= {"iters": 2, "batch_size": 2, "num_layers": 2, "steps_per_report": 1}
    run(types.SimpleNamespace(**CONFIG_DEFAULTS | settings))
    capsys.readouterr()

    # It is no run, so it is not resumed; the advice is right when followed.
    said = error_of("train --model tiny --data sums --adapter-path stock --resume", capsys)
    assert "leave out --resume, and --resume-adapter-file stock with another" in said
    cli.main(f"{TRAIN} --warmup 0 --resume-adapter-file stock".split())
    assert "training starts from stock" in capsys.readouterr().out

    cli.main(["generate", "stock", "--prompt", "1 and", "--max-tokens", "2"])
    cli.main(["fuse", "stock", "--save-path", "fused"])
    cli.main(["export", "stock", "--to", "peft", "--save-path", "as_peft"])
    cli.main(["export", "stock", "--to", "gguf", "--save-path", "as_gguf"])
    assert ml.load("fused")[0] is not None
    for made in ("as_peft/adapter_model.safetensors", "as_gguf/adapter.gguf"):
        assert (here / made).is_file()


@pytest.mark.parametrize(
    ("environment", "lines"), [({}, 1), ({LAUNCHED: "1"}, 0), ({"MLX_RANK": "1"}, 0)]
)
def test_of_several_processes_one_reports_the_translation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    lines: int,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config, _ = parse(TrainConfig, TrainSwitches, ["--max-steps", "3"], "train")
    assert config.iters == 3
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize("call", [ml.finetune, ml.evaluate])
def test_a_name_or_a_tokenizer_is_no_model(here: Path, call: Callable[..., object]):
    model, tokenizer = ml.load("tiny")
    with pytest.raises(ml.ModelError, match=r"the name 'tiny', not a model: .*load\('tiny'\)"):
        call("tiny", tokenizer, data="sums")
    with pytest.raises(ml.ModelError, match="not a model"):
        call(tokenizer, model, data="sums")
    with pytest.raises(ml.ModelError, match="the name 'tiny', not a model"):
        ml.complete("tiny", tokenizer, "hi")  # pyright: ignore[reportArgumentType]


def test_a_number_and_its_noun_agree():
    assert [counted(number, "row") for number in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
