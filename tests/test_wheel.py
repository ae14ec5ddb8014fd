"""The built wheel in an environment of its own, used from elsewhere: the checkout is not in reach."""

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlx_loraplus
from scripts.tiny_model import write_sums, write_tiny_model

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train",
    "generate",
    "fuse",
    "export",
    "plan",
    "compare",
    "chat",
    "sweep",
    "doctor",
    "serve",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with this one's libraries: they are the same, and installing takes minutes."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    uv = [sys.executable, "-m", "uv", "--quiet", "--offline", "--no-cache"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(home)], check=True)
    install = ["pip", "install", "--no-deps", "--python", str(home / "bin" / "python"), str(wheel)]
    subprocess.run([*uv, *install], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its own .pth, the checkout's, is not read
    return home


def run(clean: Path, folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(clean / "bin" / words[0]), *words[1:]], cwd=folder, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mlx_loraplus/py.typed", "mlx_loraplus/models/models.toml"} <= names
    assert {name.split("/")[0] for name in names} == {
        "mlx_loraplus",
        f"mlx_loraplus-{mlx_loraplus.__version__}.dist-info",
    }
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "mlx_loraplus").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == here
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_one_of_three_extras_brings_mlx_s_backend(wheel: Path):
    """MLX itself has none on Linux, and two would replace each other's files."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [each for each in archive.namelist() if each.endswith("/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    brought: dict[str, list[str]] = {}
    for extra in ("", "cpu", "cuda12", "cuda13"):
        for platform in ("linux", "darwin"):
            place = {"extra": extra, "sys_platform": platform, "platform_machine": "x86_64"}
            brought[f"{extra} {platform}"] = [
                f"{need.name}[{','.join(need.extras)}]" if need.extras else need.name
                for need in needs
                if need.name in ("mlx", "ngsolve-openblas")
                and (need.marker is None or need.marker.evaluate(place))
            ]
    assert brought == {
        " linux": ["mlx"],
        " darwin": ["mlx"],
        "cpu linux": ["mlx", "mlx[cpu]", "ngsolve-openblas"],
        "cpu darwin": ["mlx"],
        "cuda12 linux": ["mlx", "mlx[cuda12]"],
        "cuda12 darwin": ["mlx"],
        "cuda13 linux": ["mlx", "mlx[cuda13]"],
        "cuda13 darwin": ["mlx"],
    }
    assert {"cpu", "cuda12", "cuda13"} <= set(metadata.get_all("Provides-Extra", []))


def test_it_is_what_is_imported_and_has_every_command(clean: Path, tmp_path: Path):
    said = run(
        clean,
        tmp_path,
        "python",
        "-c",
        "import mlx_loraplus as m; print(m.__file__, m.__version__)",
    )
    file, version = said.split()
    assert Path(file).is_relative_to(clean)
    assert version == mlx_loraplus.__version__
    assert {path.name for path in (clean / "bin").glob("mlx_loraplus*")} == {
        "mlx_loraplus",
        *(f"mlx_loraplus.{c}" for c in COMMANDS),
    }
    assert run(clean, tmp_path, "mlx_loraplus", "--version").split()[-1] == mlx_loraplus.__version__
    assert "--lr-ratio" in run(clean, tmp_path, "mlx_loraplus", "train", "--help")
    assert "--lr-ratio" in run(clean, tmp_path, "mlx_loraplus.train", "--help")


def test_it_trains_answers_and_fuses(clean: Path, tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    train = ["--data", "data", "--iters", "2", "--warmup", "0", "--adapter-path", "run"]
    assert "step 2/2" in run(clean, tmp_path, "mlx_loraplus.train", "--model", "model", *train)
    assert (tmp_path / "run" / "adapters.safetensors").is_file()
    run(
        clean,
        tmp_path,
        "mlx_loraplus.fuse",
        "--model",
        "model",
        "--adapter-path",
        "run",
        "--save-path",
        "fused",
    )
    run(
        clean,
        tmp_path,
        "mlx_loraplus.generate",
        "--model",
        "fused",
        "--prompt",
        "1 + 2 =",
        "--max-tokens",
        "3",
    )
