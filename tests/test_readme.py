"""The README's generated table is up to date, its code runs, and what it names exists."""

import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mlx_loraplus.data.demo import demo_rows
from mlx_loraplus.models.gguf.convert import write_folder
from scripts.tiny_model import write_sums
from tests.models.gguf_files import write_gguf

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_up_to_date():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"], check=True)


def test_the_notebooks_lines_run(tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    code = code.replace('load("gemma-3"', 'load("smollm2-135m"').replace(
        "iters=100", "iters=2"
    )  # the same, quicker
    (tmp_path / "my_folder").mkdir()
    for name, rows in (("train", demo_rows()["train"][:32]), ("valid", demo_rows()["valid"][:4])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / "my_folder" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning:mlx_loraplus"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-adapter" / "adapters.safetensors").is_file()
    assert (tmp_path / "my_run" / "loss.png").is_file()


COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("mlx_loraplus.")
]
# What only the hub or a multimodal model can do has tests of its own.
QUICKER = {
    "--model gemma-3-4b-it": "--model tiny", "--model llama-3.3-70b": "--model tiny",
    "--model gemma-3 ": "--model tiny ", "--iters 300": "--iters 3 --warmup 0",
    "--iters 60": "--iters 3 --seeds 1 --lr-ratios 1 4", "--keep-vision": "",
    " … ": " --model tiny --adapter-path my_run ",
    "--to hub --repo-id me/my-adapter": "--to peft",
}  # fmt: skip


def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    write_folder(write_gguf(tmp_path / "tiny.gguf"), Path("tiny"), "float32")
    write_sums(Path("my_folder"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for line in COMMANDS:
        typed = line
        for long, quick in QUICKER.items():
            typed = typed.replace(long, quick)
        command, *words = shlex.split(typed, comments=True)
        settings = dict(itertools.pairwise(words))
        written = settings.get("--save-path") or {"fuse": "fused_model", "export": "exported"}.get(
            command[13:]
        )
        if command in ("mlx_loraplus.train", "mlx_loraplus.sweep") and "--resume" not in words:
            written = settings["--adapter-path"]
        for name in ("lora", "lora_plus", "other_run", "theirs"):  # what the reader is said to have
            source = Path("my_peft" if name == "theirs" else "my_run")
            if name in [word.split(":")[0] for word in words] and not Path(name).exists():
                shutil.copytree(source, name)
        if written and Path(written).is_dir():
            shutil.rmtree(written)
        if (
            "--launch" in words
        ):  # it takes the signals of the process that starts others, until that ends
            subprocess.run([sys.executable, "-m", command, *words], check=True)
            continue
        module = f"{command}.__main__" if command == "mlx_loraplus.export" else command
        import_module(module).main(words)
        assert not written or Path(written).exists(), line
    assert len(COMMANDS) >= 14


def test_scripts_and_files_that_are_named_exist():
    for name in set(re.findall(r"scripts/[a-z_]+(?:\.py)?", README)):
        assert (ROOT / name).exists(), name
    inside = README.split("## Inside")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", inside):
        assert list((ROOT / "mlx_loraplus").rglob(name)), name
