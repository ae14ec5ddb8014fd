"""Write the generated parts of the README and of docs/; with --check only compare them, and exit with 1 if one differs.

A part is the text between the markers ``<!-- name:start -->`` and ``<!-- name:end -->`` of its
page. Scripts that measure something write their tables into docs/ themselves.
"""

import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_loraplus import command_config as commands
from mlx_loraplus import config
from mlx_loraplus.foreign_names import NESTED, PROGRAMS, ForeignSetting
from mlx_loraplus.help_text import GROUPS, field_helps
from mlx_loraplus.settings import configure, settings_of
from scripts.all_numbers import origins_table
from scripts.readme_plans import memory_plan, models_table, readme_plan
from scripts.readme_results import (
    demo_part,
    experts_table,
    full_tables,
    fuse_table,
    gguf_table,
    gguf_types_table,
    launches_table,
    memory_accuracy,
    preference_steps_table,
    rivals_tables,
    speed_table,
    tool_calls_table,
)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SCRIPTS = ROOT / "scripts"
PACKAGE = ROOT / "mlx_loraplus"

COMMANDS = {
    "train": config.TrainConfig, "generate": commands.GenerateConfig, "chat": commands.ChatConfig,
    "compare": commands.CompareConfig, "fuse": commands.FuseConfig, "export": commands.ExportConfig,
    "sweep": commands.SweepConfig, "doctor": commands.DoctorConfig, "serve": commands.ServeConfig,
}  # fmt: skip
SHARED = (config.AdapterConfig, config.OptimizerConfig, config.ObjectiveConfig, config.DataConfig)


def settings_table() -> str:
    """Return every setting of the commands as Markdown tables: flag, default, meaning; a sweep's own alone."""
    shared: dict[str, str] = {}
    for part in SHARED:
        shared |= field_helps(part)

    lines: list[str] = []
    for command, kind in COMMANDS.items():
        own = field_helps(kind)
        lines += [f"`mlx_loraplus.{command}`", "", "| flag | default | meaning |", "|---|---|---|"]

        title = ""
        for name, default in _grouped(settings_of(configure(kind, {}))):
            if kind is config.TrainConfig and _group_of(name) != title:
                title = _group_of(name)
                lines.append(f"| **{title}** | | |")
            if kind is commands.SweepConfig and name not in own:
                continue
            meaning = (shared | own)[name].replace("|", "\\|")
            lines.append(f"| `{_flag(name)}` | {_shown(default)} | {meaning} |")

        if kind is commands.SweepConfig:
            lines.append(
                "\nIt also takes train's settings of the adapter, the optimizer, the objective and the data."
            )
        lines.append("")
    return "\n".join(lines)


def _group_of(name: str) -> str:
    """Return the title of a setting's group in --help."""
    return next((title for title, names in GROUPS.items() if name in names), "")


def _grouped(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return settings in the order of --help."""
    order = [name for names in GROUPS.values() for name in names]
    last = len(order)
    return sorted(
        settings.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else last
    )


def _flag(name: str) -> str:
    if name in ("runs", "folder"):  # what compare and serve take without a flag
        return name.upper()
    return "--" + name.rstrip("_").replace("_", "-")


def _shown(default: Any) -> str:
    """Return a default as a cell of a table, which is empty for None."""
    text = " ".join(map(str, default)) if isinstance(default, list) else default
    return "" if text in (None, "") else f"`{text}`"


def rates_table() -> str:
    """Return the default eta and lambda of each kind of adapter, start and objective."""
    lines = ["| | η | λ |", "|---|--:|--:|"]
    for flags in (
        "--init init1",
        "--init init2",
        "--init pissa",
        "--init loftq",
        "--adapter vera",
        "--adapter full",
        "--objective dpo",
        "--objective orpo",
    ):
        rates = configure(config.TrainConfig, dict([flags.removeprefix("--").split()])).optimizer
        lines.append(f"| `{flags}` | {rates.learning_rate:g} | {rates.lr_ratio:g} |")
    return "\n".join(lines) + "\n"


def migration_tables() -> str:
    """Return a table of each program's settings: their names, ours, and notes."""
    lines: list[str] = []
    for program, settings in PROGRAMS.items():
        lines += [f"## From {program}", "", f"| {program} | here | note |", "|---|---|---|"]
        rows: dict[tuple[str, str], list[str]] = {}  # names of the same meaning share a row
        for name, setting in settings.items():
            ours = f"`{_flag(setting.ours)}`" if setting.ours else ""
            rows.setdefault((ours, _foreign_note(name, setting)), []).append(f"`{name}`")
        for (ours, note), names in rows.items():
            lines.append(f"| {', '.join(names)} | {ours} | {note} |")
        lines.append("")
    return "\n".join(lines)


def _foreign_note(name: str, setting: ForeignSetting) -> str:
    """Return what happens to the values of another program's setting."""
    note = setting.note.replace("<", "&lt;")
    if name in NESTED and setting.values is None:
        return f"its contents: {note}"
    if setting.refused:
        return f"refused: {note}"
    if setting.ours is None:
        if setting.values is None:
            return f"left out: {note}"
        allowed = ", ".join(dict.fromkeys(f"`{value}`" for value in setting.values))
        return f"only {allowed}: {note}"

    parts: list[str] = []
    if isinstance(setting.values, Mapping):
        for theirs, here in setting.values.items():
            if theirs != here and here is not None and theirs is not here:
                parts.append(f"`{theirs}` is `{here}`")
    return "; ".join([*parts, note] if note else parts)


def file_tree() -> str:
    """Return the files of every room of the package, as a list."""
    width = 100
    lines = ["```text", "mlx_loraplus/"]
    for room in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        names = sorted(
            str(path.relative_to(room).with_suffix(""))
            for path in room.rglob("*.py")
            if not path.name.startswith("__")
        )
        indent = " " * 14
        text = textwrap.fill(
            ", ".join(names), width, initial_indent=indent, subsequent_indent=indent
        )
        lines.append(f"  {room.name + '/':11} {text.strip()}")
    return "\n".join([*lines, "```", ""])


PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "settings": (ROOT / "docs" / "settings.md", settings_table),
    "migration": (ROOT / "docs" / "migration.md", migration_tables),
    "rates": (ROOT / "docs" / "rates.md", rates_table),
    "fuse": (ROOT / "docs" / "fuse.md", fuse_table),
    "demo": (README, demo_part),
    "speed": (README, speed_table),
    "plan": (README, readme_plan),
    "memory plan": (ROOT / "docs" / "memory.md", memory_plan),
    "memory accuracy": (ROOT / "docs" / "memory.md", memory_accuracy),
    "models": (ROOT / "docs" / "models.md", models_table),
    "gguf": (ROOT / "docs" / "models.md", gguf_table),
    "gguf types": (ROOT / "docs" / "models.md", gguf_types_table),
    "tool calls": (ROOT / "docs" / "data.md", tool_calls_table),
    "experts": (ROOT / "docs" / "adapters.md", experts_table),
    "launches": (ROOT / "docs" / "benchmarks.md", launches_table),
    "rivals": (ROOT / "docs" / "benchmarks.md", rivals_tables),
    "origins": (ROOT / "docs" / "benchmarks.md", origins_table),
    "preference steps": (ROOT / "docs" / "preferences.md", preference_steps_table),
    "full": (ROOT / "docs" / "full.md", full_tables),
    "tree": (ROOT / "docs" / "architecture.md", file_tree),
}
"""Part → the page that holds it, and what makes it."""


def main() -> None:
    """Write or compare."""
    pages: dict[Path, str] = {}
    for name, (page, make) in PARTS.items():
        text = pages.get(page) or page.read_text(encoding="utf-8")
        pages[page] = _with_part(text, name, make())
    pages[README] = with_addresses(pages[README], repository())

    changed = [page for page, text in pages.items() if text != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv and changed:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(
            f"{names}: a generated part is out of date: run .venv/bin/python scripts/readme.py"
        )
    for page in changed:
        page.write_text(pages[page], encoding="utf-8")


def repository() -> str | None:
    """Return owner/name of the project on GitHub, from pyproject.toml's project.urls, if it is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "")
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    return found[1] if found else None


def with_addresses(text: str, name: str | None) -> str:
    """Return the README with absolute addresses of its pictures and pages, which a package index needs.

    Without the repository's ``name``, the links stay relative to the checkout.
    """
    absolute = r"https://(?:raw\.githubusercontent\.com/[^/\s)]+/[^/\s)]+/main|github\.com/[^/\s)]+/[^/\s)]+/blob/main)/"
    text = re.sub(rf"\]\({absolute}", "](", text)
    if name is None:
        return text
    text = re.sub(
        r"(!\[[^\]]*\])\((?!https?:|#)", rf"\1(https://raw.githubusercontent.com/{name}/main/", text
    )
    return re.sub(
        r"((?<!!)\[[^\]]*\])\((?!https?:|#)", rf"\1(https://github.com/{name}/blob/main/", text
    )


def _with_part(text: str, name: str, part: str) -> str:
    """Return a page with what is between a part's markers replaced."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{part}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
