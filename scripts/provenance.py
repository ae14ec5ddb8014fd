"""Where a number comes from: the machine, versions, commit and date, kept beside it in its JSON."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
    code = ("mlx_loraplus", "scripts", ":(exclude)scripts/*/results/*")
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=ROOT)
    return found.stdout.strip() + ("+" if changed.returncode else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
