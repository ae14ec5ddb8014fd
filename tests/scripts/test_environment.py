"""scripts/environment picks the extra with MLX's backend by what nvidia-smi says."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The driver and the compute capability as nvidia-smi prints them, a line a GPU → the extra.
DRIVERS = {
    "580.65.06, 9.0": "cuda13",
    "580.65.06, 12.0\n580.65.06, 8.6": "cuda13",
    "570.133.20, 8.9": "cuda12",
    "550.54.14, 7.5": "cuda12",
    "550.40.07, 8.0": "cpu",  # MLX needs 550.54.14
    "535.183.01, 9.0": "cpu",
    "580.65.06, 7.0": "cpu",  # a Volta
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.": "cpu",
    "": "cpu",
}


def shell(command: str, folder: Path, system: str = "Linux") -> str:
    """Run a function of scripts/environment, with programs in ``folder`` before all others."""
    script = (
        f"set -euo pipefail; uname() {{ echo {system}; }}; source scripts/environment; {command}"
    )
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_nvidia_smi(folder: Path, printed: str) -> None:
    (folder / "printed").write_text(printed)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat '{folder}/printed'\n")
    program.chmod(0o755)


@pytest.mark.parametrize("printed", DRIVERS)
def test_the_driver_decides(printed: str, tmp_path: Path):
    write_nvidia_smi(tmp_path, printed)
    assert shell("backend", tmp_path) == DRIVERS[printed]


def test_a_driver_that_does_not_answer_is_none(tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    assert shell("package demo dev", tmp_path) == ".[demo,cpu]"


def test_a_mac_needs_no_extra(tmp_path: Path):
    assert shell("package demo dev", tmp_path, "Darwin") == ".[demo]"
    assert shell("package dev", tmp_path, "Darwin") == "."
