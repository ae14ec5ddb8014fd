"""Messages name flags in commands and keywords in Python."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.python_messages import in_keywords
from mlx_loraplus.train import main
from scripts.tiny_model import write_sums, write_tiny_model
from tests.training.tiny_runs import write_pairs


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("--on-bad drop skips bad rows", 'on_bad="drop" skips bad rows'),
        (
            "choose --on-long truncate, drop or split",
            'choose on_long="truncate", "drop" or "split"',
        ),
        ("use --max-seq-length 64", "use max_seq_length=64"),
        ("--max-seq-length below 1,024", "max_seq_length below 1,024"),
        ("--grad-checkpoint on --batch-size 2,", 'grad_checkpoint="on", batch_size=2,'),
        ("a lower --learning-rate or --lr-ratio, and", "a lower learning_rate or lr_ratio, and"),
        ("--resume continues it, --overwrite replaces it", "resume=True continues it, overwrite="
         "True replaces it"),
        ("(then continue with --resume)", "(then continue with resume=True)"),
        ("separate ones; leave --pack off", "separate ones; leave pack off"),
        ("give the run's --adapter-path, or", "give the run's adapter_path, or"),
        ("--resume-adapter-file a/b with another --adapter-path", 'resume_adapter_file="a/b" with'
         " another adapter_path"),
        ("the weights of --model x are not", 'the weights of model="x" are not'),
        ("give the saved model as --model", "give the saved model as model"),
        ("use --fields prompt=q completion='the answer'; or", 'use fields={"prompt": "q", "complet'
         'ion": "the answer"}; or'),
        ("such as --fields 'prompt={a} {b}'", 'such as fields={"prompt": "{a} {b}"}'),
        ("none of the columns named by --fields (a, b)", "none of the columns named by fields (a"
         ", b)"),
        ("give the folder instead: --data a/b", 'give the folder instead: data="a/b"'),
        ("the rows of --data, or their", "the rows of data, or their"),
        ("give lower --learning-rates", "give lower learning_rates"),
        ("resume:  mlx_loraplus.train -c a --resume", "resume:  mlx_loraplus.train -c a --resume"),
        ("a name from --list-models; --backend ring", "a name from --list-models; --backend ring"),
        ("because --train-on is everything", "because train_on is everything"),
        ("such as --fields prompt=q 'completion=Agent'\"'\"'s Reply'; or", 'such as fields={"prompt": '
         '"q", "completion": "Agent\'s Reply"}; or'),
    ],
)  # fmt: skip
def test_flags_become_keywords(flags: str, keywords: str):
    assert in_keywords(flags) == keywords


def test_errors_of_public_functions_name_keywords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    folder = str(write_tiny_model(tmp_path / "model"))
    model, tokenizer = ml.load(folder)
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in ({"prompt": "a"}, {"text": "b"})]
    rows.write_text("".join(lines))
    with pytest.raises(ml.DataError, match='on_bad="drop" skips bad rows') as error:
        ml.evaluate(model, tokenizer, split="train", data=rows)
    assert "--" not in str(error.value)

    # The command still names its flag, also where the cached rows have been read in Python
    with pytest.raises(SystemExit):
        main(["--data", str(rows), "--model", folder, "--dry-run"])
    assert "--on-bad drop skips bad rows" in "".join(capsys.readouterr().out.split("\n"))


HELD_UP = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPU)."
SET_UP = {
    "caches": "mlx_loraplus.training.finetune.check_caches",
    "probes": "mlx_loraplus.training.finetune.probe_model",
    "the reference": "mlx_loraplus.training.reference.answer_log_probs",
    "the self-check": "mlx_loraplus.training.step_choices.check_step",
}


@pytest.mark.parametrize("part", SET_UP)
def test_a_gpu_that_fails_before_the_first_step_is_one_line(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = ml.load(str(write_tiny_model(tmp_path / "model")))
    write_pairs(tmp_path / "data")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(HELD_UP)

    monkeypatch.setattr(SET_UP[part], fail)
    with pytest.raises(ml.DeviceError) as error:
        ml.finetune(
            model, tokenizer, data=str(tmp_path / "data"), objective="dpo", iters=1, warmup=0,
            selfcheck="on", adapter_path=str(tmp_path / "run"),
        )  # fmt: skip
    assert str(error.value).startswith(
        "macOS stopped the GPU's work because it held up the display"
    )
    assert HELD_UP in str(error.value)
    assert "caffeinate -i" in str(error.value)


def test_a_gpu_that_fails_in_a_sweep_or_an_evaluation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = ml.load(str(write_tiny_model(tmp_path / "model")))
    data = str(write_sums(tmp_path / "data"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(HELD_UP)

    for module, name in (("sweep.sweep", "score_trial"), ("training.evaluate", "score")):
        monkeypatch.setattr(import_module(f"mlx_loraplus.{module}"), name, fail)
    with pytest.raises(ml.DeviceError, match="caffeinate -i"):
        ml.sweep_rates(model, tokenizer, data=data, adapter_path=str(tmp_path / "sweep"))
    with pytest.raises(ml.DeviceError, match="caffeinate -i"):
        ml.evaluate(model, tokenizer, data=data)


def test_public_functions_keep_their_names_and_signatures():
    assert ml.finetune is ml.finetune
    assert ml.finetune.__name__ == "finetune"
    assert "settings" in inspect.signature(ml.finetune).parameters
    assert isinstance(ml.Run, type)
