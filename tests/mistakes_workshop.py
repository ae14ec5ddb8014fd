"""A folder with what people have, in which mistakes are made."""

import json
import shlex
from pathlib import Path

import pytest

from mlx_loraplus import cli
from scripts.tiny_model import write_sums, write_tiny_model
from tests.models.gguf_files import write_gguf

MAKE = [
    "train --model tiny --data sums --adapter-path run --iters 1 --warmup 0",
    "train --model model.gguf --data sums --adapter-path grun --iters 1 --warmup 0",
    "export grun --to gguf --save-path gguf",
    "export run --to peft --save-path peft",
    "fuse run --save-path fused",
]

YAML = {
    "typo": "modelx: tiny\ndata: sums\n",
    "values": 'model: tiny\ndata: sums\nrank: "eight"\niters: 0\n',
    "indent": "model: tiny\n  data: sums\n",
    "list": "- model: tiny\n",
    "both": "model: tiny\ndata: sums\nepochs: 1\niters: 3\n",
    "nested": "model: tiny\ntraining:\n  iters: [1, [2]]\n",
    "none": "model: tiny\ndata: sums\nlr_ratio: high\n",
    "percent": "model: tiny\ndata: sums\nvalid_split: 10%\n",
    "dashes": "model: tiny\ndata: sums\nbatch-size: 2\nbatch_size: 4\n",
    "upper": "Model: tiny\nData: sums\n",
    "axolotl": "base_model: tiny\nmicro_batch_size: 2\ndatasets:\n  - path: sums\n    type: alpaca\n",
    "preferences": "model_name_or_path: tiny\ndataset_name: sums\nmax_steps: 2\nbeta: 0.1\n",
    "equals": "model = tiny\ndata = sums\n",
    "block": "model: tiny\ntrain: {rank: 8, lr_ratio: 4}\n",
    "kind": "model: tiny\noptimizer:\n  learning-rate: 1e-4\n",
    "peft": "model: tiny\nlora_config: {r: 8, lora_alpha: 16}\n",
    "all": "wandb: x\nfoo: 2\nlora: {rank: 8}\nalpha: high\nrank: 0\n",
    "several": "model: tiny\nrank: 8, 16\nlr_ratio: [4, 16]\n",
    "system": "model: tiny\nsystem: Be kind.\nprompt: hi\n",
    "maybe": "model: tiny\npack: maybe\n",
    "mapping": "model: tiny\ndata: {train: sums}\n",
}

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
PAIR = '{"prompt": "1 + 1 =", "completion": " 2"}\n'
ROWS = {
    "commas.jsonl": f"{PAIR.strip()},\n{PAIR}".encode(),
    "utf16.jsonl": PAIR.encode("utf-16"),
    "utf16.yaml": "model: tiny\n".encode("utf-16"),
    "latin.csv": "prompt,completion\ncafé,thé\n".encode("latin-1"),
    "labels.csv": b"review,label\ngreat film with a story,1\nno story,0\n",
    "mails.csv": b"id,subject,body,reply\n1,hi,please help me,we will\n2,a longer subject,x,yes\n",
    "inside.json": b'{"data": [{"prompt": "a", "completion": "b"}]}',
    "lines.txt": PAIR.encode() * 9,
    "packed.jsonl": b"\x1f\x8b\x08\x00",
    "quotes.jsonl": b"{'prompt': 'a', 'completion': 'b'}\n",
    "number.jsonl": b'{"prompt": "a", "completion": 5}\n',
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "ragged.csv": b"prompt,completion\na,b,c\n",
    "two words.jsonl": PAIR.encode(),
    "rows.jsonl.gz": b"x",
    "table.xlsx": b"x",
    "pointer.jsonl": POINTER,
    "pointer.gguf": POINTER,
    "pointed/model.safetensors": POINTER,
    "pickled/config.json": b'{"model_type": "llama"}',
    "pickled/pytorch_model.bin": b"x",
}


def swap_tokens(path: Path, one: str, other: str) -> None:
    """Exchange the ids of two tokens of a tokenizer."""
    stored = json.loads(path.read_text())
    ids = stored["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    path.write_text(json.dumps(stored))


def make_workshop(folder: Path) -> Path:
    """Make models, data, runs, adapters of other programs, and files of settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny_model(Path("tiny"))
        write_tiny_model(Path("other"), hidden=64)
        swap_tokens(write_tiny_model(Path("swapped")) / "tokenizer.json", "1", "2")
        write_sums(Path("sums"))
        write_gguf(Path("model.gguf"))
        Path("ggufs").mkdir()
        write_gguf(Path("ggufs/model.gguf"))
        Path("text").mkdir()
        Path("text/a.txt").write_text("a document " * 50)
        Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": }\n')
        Path("empty.jsonl").write_text("")
        Path("odd.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n')
        write_tiny_model(Path("pointed"))
        for name, content in ROWS.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(content)
        for name, text in YAML.items():
            Path(f"{name}.yaml").write_text(text)

        for line in MAKE:
            cli.main(shlex.split(line))
        Path("swept").mkdir()
        Path("swept/trials.jsonl").write_text("")
    return folder


def error_of(line: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error of a command, which must leave all files as they are."""

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}

    before = files()
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(line), *words])
    assert stop.value.code == 2
    assert files() == before
    (said,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("error")]
    return said
