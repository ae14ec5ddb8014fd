"""A folder with what people have, in which mistakes are made."""

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
}


def make_workshop(folder: Path) -> Path:
    """Make models, data, runs, adapters of other programs, and files of settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny_model(Path("tiny"))
        write_tiny_model(Path("other"), hidden=64)
        write_sums(Path("sums"))
        write_gguf(Path("model.gguf"))
        Path("text").mkdir()
        Path("text/a.txt").write_text("a document " * 50)
        Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": }\n')
        Path("empty.jsonl").write_text("")
        Path("odd.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n')
        for name, text in YAML.items():
            Path(f"{name}.yaml").write_text(text)

        for line in MAKE:
            cli.main(shlex.split(line))
        Path("swept").mkdir()
        Path("swept/trials.jsonl").write_text("")
    return folder
