"""The README's generated table is up to date, its code runs, and what it names exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mlx_loraplus.data.demo import demo_splits

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_up_to_date():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"], check=True)


def test_the_notebooks_lines_run(tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    code = code.replace('load("gemma-3"', 'load("smollm2-135m"').replace("iters=100", "iters=2")  # the same, quicker
    (tmp_path / "my_folder").mkdir()
    for name, records in (("train", demo_splits().train[:32]), ("valid", demo_splits().valid[:4])):
        lines = [json.dumps(dict(record.fields)) + "\n" for record in records]
        (tmp_path / "my_folder" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    environment = os.environ | {"PYTHONWARNINGS": "error::UserWarning:mlx_loraplus"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-adapter" / "adapters.safetensors").is_file()
    assert (tmp_path / "my_run" / "loss.png").is_file()


def test_scripts_and_files_that_are_named_exist():
    for name in set(re.findall(r"`?(scripts/[a-z_]+)`?", README)):
        assert (ROOT / name).exists(), name
    inside = README.split("## Inside")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", inside):
        assert list((ROOT / "mlx_loraplus").rglob(name)), name
