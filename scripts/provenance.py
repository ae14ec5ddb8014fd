"""Where a number comes from: the machine, versions, commit and date, kept beside it in its JSON."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = ("mlx_loraplus", "scripts", ":(exclude)scripts/*/results/*")
"""What decides a number: the package and the scripts, but not their results."""
PACKAGES = ("mlx", "mlx-lm", "mlx_loraplus", "numpy")


def provenance(*packages: str) -> dict[str, Any]:
    """Return the machine, versions (also of ``packages``), commit and date of a result."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in (*PACKAGES, *packages)},
        },
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def source_line(result: dict[str, Any]) -> str:
    """Return where and when a result was measured."""
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("mlx", "mlx-lm", "mlx_loraplus"))
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {packages} at {result['commit']};"
        f" {result['date']}."
    )


def commit() -> str:
    """Return the commit's short name, with a plus sign if the package or the scripts differ from it."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode != 0:
        return "unknown"
    return found.stdout.strip() + ("" if same_code("HEAD") else "+")


def same_code(commit: str) -> bool:
    """Return whether the package and the scripts of this checkout are those of a commit."""
    command = ["git", "diff", "--quiet", commit, "--", *CODE]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
