"""What is set before MLX starts, on each kind of machine, and what is said where it can't start."""

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mlx_loraplus import _runtime
from mlx_loraplus._runtime import _explain, installed_backends

ROOT = Path(__file__).parent.parent

WIDTH, PATIENCE = "MLX_BFS_MAX_WIDTH", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a new process; MLX itself is not touched."""
    found: dict[str, str] = {}
    monkeypatch.setattr(_runtime.os, "environ", found)
    monkeypatch.setattr(_runtime, "_load_openblas", lambda: None)
    monkeypatch.setattr(_runtime, "_keep_freed_memory", lambda: None)
    install(monkeypatch, "mlx-cpu")
    monkeypatch.delitem(_runtime.sys.modules, "mlx.core", raising=False)
    return found


def install(monkeypatch: pytest.MonkeyPatch, *wheels: str) -> None:
    """Make these the only installed backends."""

    def distribution(name: str) -> object:
        if name not in wheels:
            raise PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(_runtime, "distribution", distribution)


def set_in(environment: dict[str, str]) -> dict[str, str]:
    """Return what is set for MLX and macOS."""
    return {name: environment[name] for name in (WIDTH, PATIENCE) if name in environment}


def test_a_mac_gets_a_wider_search_and_more_patience(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_runtime.sys, "platform", "darwin")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "10", PATIENCE: "1"}


@pytest.mark.parametrize("wheel", ["mlx-cuda-12", "mlx-cuda-13"])
def test_cuda_gets_a_wider_search(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, wheel: str
):
    monkeypatch.setattr(_runtime.sys, "platform", "linux")
    install(monkeypatch, wheel)
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "10"}


def test_a_cpu_gets_the_narrow_search(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_runtime.sys, "platform", "linux")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "1"}


def test_what_the_user_has_set_stays(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    environment |= {WIDTH: "3", PATIENCE: "0"}
    monkeypatch.setattr(_runtime.sys, "platform", "darwin")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "3", PATIENCE: "0"}


def test_two_backends_are_one_too_many(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_runtime.sys, "platform", "linux")
    install(monkeypatch, "mlx-cpu", "mlx-cuda-13")
    with pytest.warns(UserWarning, match="pip uninstall -y mlx-cpu mlx-cuda-13, then pip install"):
        _runtime.prepare()


def test_this_environment_has_one_backend():
    assert len(installed_backends()) == (0 if sys.platform == "darwin" else 1)


# What the wheels of mlx 0.32.4 say on Linux: without a backend; CUDA without a driver; CUDA with an old driver.
REASONS = {
    "libmlx.so: cannot open shared object file: No such file or directory": (
        [],
        "MLX has no backend (libmlx.so: cannot open shared object file: No such file or directory):"
        " pip install 'mlx_loraplus[cpu]'; with an NVIDIA GPU, pip install 'mlx_loraplus[cuda12]'"
        " (driver 550 or newer) or 'mlx_loraplus[cuda13]' (driver 580 or newer)",
    ),
    "libcuda.so.1: cannot open shared object file: No such file or directory": (
        ["mlx-cuda-12"],
        "MLX's backend is CUDA, but this machine has no NVIDIA driver: install one, or pip uninstall"
        " -y mlx-cuda-12, then pip install 'mlx_loraplus[cpu]'",
    ),
    "cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient": (
        ["mlx-cuda-13"],
        "MLX can't start (cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient):"
        " pip uninstall -y mlx-cuda-13, then pip install 'mlx_loraplus[cpu]'; with an NVIDIA GPU,"
        " pip install 'mlx_loraplus[cuda12]' (driver 550 or newer) or 'mlx_loraplus[cuda13]' (driver"
        " 580 or newer)",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_mlx_cannot_start_and_what_to_do(reason: str):
    backends, line = REASONS[reason]
    assert _explain(reason, backends) == line


@pytest.fixture
def without_backend(tmp_path: Path) -> dict[str, str]:
    """An environment whose MLX fails as the wheel `mlx` does without a backend; the other libraries are there."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(
        "raise ImportError('libmlx.so: cannot open shared object file: No such file or directory')"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), sysconfig.get_path("purelib")])
    return os.environ | {"PYTHONPATH": path}


def say(environment: dict[str, str], *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


COMMANDS = [
    ["train", "--model", "tiny", "--data", "."],
    ["generate", "--model", "tiny", "--prompt", "hello"],
    ["fuse", "--model", "tiny", "--adapter-path", "run"],
    ["plan", "--model", "gemma-3"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_commands_without_a_backend_end_in_one_line(
    without_backend: dict[str, str], words: list[str]
):
    code, _, said = say(without_backend, "-W", "ignore", "-m", "mlx_loraplus", *words)
    assert code == 2
    assert said.startswith(("error: MLX can't start", "error: MLX has no backend"))
    assert said.count("\n") == 1
    assert "pip install 'mlx_loraplus[cpu]'" in said


def test_without_a_backend_help_works_and_python_gets_the_line(without_backend: dict[str, str]):
    assert say(without_backend, "-W", "ignore", "-m", "mlx_loraplus", "--help")[0] == 0
    code = (
        "import mlx_loraplus as ml\n"
        "try: ml.load\n"
        "except ml.BackendError as error: print(isinstance(error, ImportError), error)"
    )
    _, printed, said = say(without_backend, "-W", "ignore", "-c", code)
    assert printed.startswith("True MLX"), said
    assert "pip install 'mlx_loraplus[cpu]'" in printed
