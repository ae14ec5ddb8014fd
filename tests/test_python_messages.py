"""Messages name flags in commands and keywords in Python."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import inspect
import json
from pathlib import Path

import pytest

from mlx_loraplus.python_messages import in_keywords
from mlx_loraplus.train import main
from scripts.tiny_model import write_tiny_model


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


def test_public_functions_keep_their_names_and_signatures():
    assert ml.finetune is ml.finetune
    assert ml.finetune.__name__ == "finetune"
    assert "settings" in inspect.signature(ml.finetune).parameters
    assert isinstance(ml.Run, type)
