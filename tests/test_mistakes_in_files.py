"""Damaged files of a run: the message says how to get them again, and that is right when followed."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import re
import resource
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_loraplus import cli


def _without_a_tensor(run: Path) -> None:
    weights = dict(mx.load(str(run / "adapters.safetensors")))  # pyright: ignore
    del weights[min(weights)]
    mx.save_safetensors(str(run / "adapters.safetensors"), weights)


# A name → what happens to the adapter's files, and what the message says about it.
ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights deleted": (
        lambda run: (run / "adapters.safetensors").unlink(),
        "holds no adapter: there is no adapters.safetensors;",
    ),
    "weights of a model": (
        lambda run: shutil.copy("tiny/model.safetensors", run / "adapters.safetensors"),
        "is not known;",
    ),
    "weights incomplete": (_without_a_tensor, "is missing from the file;"),
    "config is a list": (
        lambda run: (run / "adapter_config.json").write_text("[]"),
        "is not an adapter's config: its content must be an object, {…};",
    ),
    "config is empty": (
        lambda run: (run / "adapter_config.json").write_text("{}"),
        "is not an adapter's config: lora_parameters is missing;",
    ),
    "config has another type": (
        lambda run: (run / "adapter_config.json").write_text('{"lora_parameters": 7}'),
        "lora_parameters must be an object, {…};",
    ),
}

HISTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a line of garbage": (
        lambda run: (run / "history.jsonl").write_text('{"step": 0, "schema": 2}\ngarbage\n'),
        r"history.jsonl:\d+ is not an event .*: remove this line, or to write the file again",
    ),
    "no first line": (
        lambda run: (run / "history.jsonl").write_text('{"step": 1}\n'),
        "history.jsonl:1 is not the start of a run, which is lost: to write the file again",
    ),
    "binary": (
        lambda run: (run / "history.jsonl").write_bytes(b"\xff\0" * 9),
        "history.jsonl holds no events: to write the file again",
    ),
    "settings deleted": (
        lambda run: (run / "run.yaml").unlink(),
        "holds no complete run: run.yaml is missing; copy it, or resume the run",
    ),
    "settings empty": (
        lambda run: (run / "run.yaml").write_text(""),
        "run.yaml is empty.*; correct the file, or resume the run with its settings",
    ),
}


@pytest.fixture
def run(in_workshop: Path, tmp_path: Path) -> Path:
    """Return a copy of a run, which a test may damage."""
    return Path(shutil.copytree("run", tmp_path / "run"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_of_a_run_is_written_again(run: Path, name: str):
    damage, told = ADAPTERS[name]
    damage(run)
    with pytest.raises(ml.AdapterError) as error:
        ml.load(run)
    assert told in str(error.value)
    command = re.search(r"; mlx_loraplus\.(train .*) writes it again", str(error.value))
    assert command is not None
    cli.main(shlex.split(command[1]))
    ml.load(run)


@pytest.mark.parametrize("name", HISTORIES)
def test_a_damaged_record_of_a_run_is_written_again(run: Path, name: str):
    damage, told = HISTORIES[name]
    damage(run)
    with pytest.raises(ml.OutputError, match=told):
        ml.Run.load(run)
    model, tokenizer = ml.load("tiny")
    ml.finetune(
        model, tokenizer, data="sums", iters=1, warmup=0, adapter_path=str(run), resume=True
    )
    assert ml.Run.load(run).finished


def test_an_adapter_of_peft_under_our_name(in_workshop: Path, tmp_path: Path):
    shutil.copy("run/adapter_config.json", tmp_path)
    shutil.copy("peft/adapter_model.safetensors", tmp_path / "adapters.safetensors")
    with pytest.raises(ml.AdapterError, match=r"it is of PEFT: mlx_loraplus\.export --from peft"):
        ml.load(tmp_path)


def test_rows_of_which_the_last_do_not_fit_on_the_disk(in_workshop: Path):
    """They are written when the file is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(ml.OutputError, match=r"can't write .*File too large"):
            ml.preview([{"text": f"a row, number {number}"} for number in range(99)], model="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_folder_for_temporary_files(
    in_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    tuned, _ = ml.load("run")
    assert ml.save_adapter(tuned, tmp_path / "new").is_dir()
