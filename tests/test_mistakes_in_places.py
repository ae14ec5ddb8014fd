"""Models, adapters and data in the place of each other, and nothing in their place."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mlx_loraplus import cli
from scripts.tiny_model import write_sums, write_tiny_model
from tests.mistakes_workshop import error_of
from tests.models.gguf_files import write_gguf

PLACES = [
    ("train --model gguf --data sums", "it holds a LoRA adapter, adapter.gguf: convert it with mlx_loraplus.export --from gguf"),
    ("train --model ggufs --data sums", "it holds model.gguf: give the file, --model ggufs/model.gguf"),
    ("train --model tiny --data sums --resume-adapter-file model.gguf", "model.gguf is a model, not an adapter: give it as --model model.gguf"),
    ("generate ggufs --prompt hi", "ggufs/model.gguf is a model, not an adapter: give it as --model ggufs/model.gguf"),
    ("chat ggufs", "ggufs/model.gguf is a model, not an adapter: give it as --model ggufs/model.gguf"),
    ("generate gguf --prompt hi", "gguf/adapter.gguf is a GGUF file: convert it first, with mlx_loraplus.export --from gguf"),
    ("fuse model.gguf", "--model model.gguf if this is its base; to try the model, mlx_loraplus.generate --model model.gguf"),
    ("export model.gguf --to gguf", "model.gguf is a model, not an adapter: give it as --model model.gguf"),
    # data, and what else is no run
    ("fuse sums", "sums holds no adapter, but data (train.jsonl): rows go to --data of mlx_loraplus.train"),
    ("generate sums --prompt hi", "sums holds no adapter, but data (train.jsonl)"),
    ("generate --model sums --prompt hi", "it holds data (train.jsonl): rows go to --data of mlx_loraplus.train"),
    ("compare sums", "sums holds data (train.jsonl), and no history of a run"),
    ("compare tiny", "tiny holds a model (model.safetensors), and no history of a run"),
    ("serve sums --port 0", "sums holds data (train.jsonl), and no runs: give the folder that holds the runs"),
    ("serve tiny --port 0", "tiny holds a model (model.safetensors), and no runs"),
    # nothing given
    ("fuse", "there is no folder adapters: give the folder of a run or an adapter, as in mlx_loraplus.fuse my_run"),
    ("export", "as in mlx_loraplus.export my_run --to gguf"),
    ("export --to gguf", "as in mlx_loraplus.export my_run --to gguf"),
    ("export run", "give one of --to (peft, gguf, hub) and --from (peft, gguf), as in mlx_loraplus.export run --to gguf"),
    ("generate", "give a run or --model, and a prompt, as in mlx_loraplus.generate my_run --prompt '...'"),
    ("compare", "as in mlx_loraplus.compare run_a run_b"),
    # prompts
    ("chat run --prompt hi", "'--prompt' is a flag of mlx_loraplus.generate, and not of this command"),
    ("chat run -p hi", "'-p' is a flag of mlx_loraplus.generate, and not of this command"),
    ("chat run hello", "for one answer, mlx_loraplus.generate … --prompt hello"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which holds a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tiny_model(tmp_path / "tiny")
    write_sums(tmp_path / "sums")
    return tmp_path


@pytest.mark.parametrize(("line", "told"), PLACES, ids=[line for line, _ in PLACES])
def test_what_stands_in_the_place_of_something_else_is_named(
    in_workshop: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
):
    assert told in error_of(line, capsys)


def test_generate_takes_a_gguf_file_and_the_short_flags_of_mlx_lm(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    write_gguf(here / "model.gguf")
    cli.main(["generate", "model.gguf", "--prompt", "ab", "--max-tokens", "3"])
    said = capsys.readouterr().out
    cli.main(["generate", "--model", "model.gguf", "-p", "ab", "-m", "3"])
    assert capsys.readouterr().out == said


def test_without_a_folder_a_command_uses_the_default_run(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    cli.main(["train", "--model", "tiny", "--data", "sums", "--iters", "1", "--warmup", "0"])
    assert "as in mlx_loraplus.generate adapters --prompt" in error_of("generate", capsys)
    assert "as in mlx_loraplus.export adapters --to gguf" in error_of("export", capsys)
    cli.main(["fuse"])
    assert (here / "fused_model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_broken_adapter_of_a_run_is_written_again(
    in_workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    run = tmp_path / "a run"
    shutil.copytree("run", run)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:20])
    said = error_of(f"generate '{run}' --prompt hi", capsys)
    command = re.search(r"; mlx_loraplus\.(train .*) writes it again", said)
    assert command is not None
    cli.main(shlex.split(command[1]))
    assert (run / name).read_bytes() == whole
    cli.main(["generate", str(run), "--prompt", "hi"])
