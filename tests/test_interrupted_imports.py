"""Ctrl-C while a command imports its modules."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CTRL_C = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


def run(
    words: list[str], folder: Path, at: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with a module that presses Ctrl-C in place of the module ``at``."""
    (folder / f"{at}.py").write_text(CTRL_C)
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    ("words", "at"),
    [
        (["-m", "mlx_loraplus", "doctor"], "filelock"),
        (["-m", "mlx_loraplus.train"], "tyro"),
        ([str(Path(sys.executable).parent / "mlx_loraplus.generate")], "tyro"),
    ],
)
def test_a_command_ends_with_one_line(words: list[str], at: str, tmp_path: Path):
    done = run(words, tmp_path, at)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_in_a_terminal_the_line_is_below_the_keys_that_it_echoes(tmp_path: Path):
    (tmp_path / "tyro.py").write_text(CTRL_C)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    main, side = pty.openpty()
    words = [sys.executable, "-m", "mlx_loraplus.train"]
    done = subprocess.run(words, stderr=side, check=False, env=environment)
    os.close(side)
    printed = os.read(main, 1000)
    os.close(main)
    assert (done.returncode, printed) == (130, b"\r\ninterrupted\r\n")


def test_one_of_several_processes_says_nothing(tmp_path: Path):
    done = run(["-m", "mlx_loraplus.train"], tmp_path, "tyro", MLX_LORAPLUS_LAUNCHED="1")
    assert (done.returncode, done.stderr) == (130, "")


def test_a_program_that_imports_the_package_keeps_its_own_handling(tmp_path: Path):
    done = run(["-c", "import mlx_loraplus.cli"], tmp_path, "tyro")
    assert done.returncode < 0 or done.returncode == 130
    assert "KeyboardInterrupt" in done.stderr
