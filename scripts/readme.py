"""Write the generated parts of the README and of docs/; with --check only compare them, and exit with 1 if one differs.

A part stands between the markers ``<!-- name:start -->`` and ``<!-- name:end -->`` of its page. The
tables that measuring scripts write into docs/ themselves are not made here.
"""

import json
import math
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_loraplus import command_config as commands
from mlx_loraplus import config
from mlx_loraplus.device import simulate_mac
from mlx_loraplus.foreign_names import NESTED, PROGRAMS, ForeignSetting
from mlx_loraplus.help_text import GROUPS, field_helps
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.models.known_models import KNOWN, sizes
from mlx_loraplus.models.skeleton import make_skeleton
from mlx_loraplus.settings import configure, settings_of

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
MACS = ("8GB", "16GB", "24GB", "32GB", "36GB", "48GB", "64GB", "96GB", "128GB", "192GB")
SPEED_CASES = {
    "a": "Gemma 3 270M, completions, batch 8",
    "b": "SmolLM2 135M, text, batch 8",
    "c": "4-bit Llama of 1.3M parameters, completions, batch 8",
    "d": "Gemma 3 270M, rows of 2,048 tokens, batch 1",
}


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
                "\nIt also takes train's settings of the adapter, the optimizer and the data."
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
    """Return a default as a cell of a table, empty where there is none."""
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
    """Return a table of each program's settings: theirs, ours, and what is to be known."""
    lines: list[str] = []
    for program, settings in PROGRAMS.items():
        lines += [f"## From {program}", "", f"| {program} | here | note |", "|---|---|---|"]
        for name, setting in settings.items():
            ours = f"`{_flag(setting.ours)}`" if setting.ours else ""
            lines.append(f"| `{name}` | {ours} | {_foreign_note(name, setting)} |")
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


def fuse_table() -> str:
    """Return how much of a change stock's rounding and ours keep, from scripts/study/fuse_rounding."""
    result = _result("study", "rounding")
    rows: dict[tuple[int, float], dict[str, dict[str, float]]] = {}
    for row in result["results"]:
        rows.setdefault((row["bits"], row["ratio"]), {})[row["method"]] = row

    lines = [
        "| bits | change | weights' cosine: stock | ours | outputs' cosine: stock | ours | KL: dropped"
        " | stock | ours | KL elsewhere: stock | ours |",
        "|--:" * 11 + "|",
    ]
    for (bits, ratio), methods in sorted(rows.items()):
        drop, stock, ours = (methods[name] for name in ("drop", "stock", "gptq"))
        values = [
            stock["cosine"], ours["cosine"], stock["output_cosine"], ours["output_cosine"],
            drop["kl"], stock["kl"], ours["kl"], stock["kl_elsewhere"], ours["kl_elsewhere"],
        ]  # fmt: skip
        cells = [str(bits), f"{ratio:.1%}", *(f"{value:.3f}" for value in values)]
        lines.append(f"| {' | '.join(cells)} |")

    source = (
        f"{result['machine']['cpu']}; mlx {result['versions']['mlx']}; {result['commit']},"
        f" {result['date']}"
    )
    return "\n".join([*lines, "", f"`scripts/study/fuse_rounding`: {source}.\n"])


def speed_table() -> str:
    """Return speed and memory beside stock's, a line for each case of scripts/bench/run."""
    lines = [
        "| | useful tokens a second: stock | ours | | memory above the weights: stock | ours | |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, title in SPEED_CASES.items():
        medians = _result("bench", case)["medians"]
        stock, ours = medians["stock"], medians["ours"]
        speed = ours["useful_per_second"] / stock["useful_per_second"]
        memory = ours["peak_above_weights"] / stock["peak_above_weights"]
        lines.append(
            f"| {title} | {stock['useful_per_second']:.0f} | {ours['useful_per_second']:.0f}"
            f" | {speed:.1f}x | {stock['peak_above_weights'] / 1e9:.2f} GB"
            f" | {ours['peak_above_weights'] / 1e9:.2f} GB | {memory:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def demo_part() -> str:
    """Return what the demo did: its picture, its time and its answers, as scripts/demo stored them."""
    result = _result("study", "demo")
    first, last = result["losses"]
    before, after = result["correct"]
    rows, example = result["rows"], result["example"]
    return f"""\
![Loss of the demo run: it falls from {first:.2f} to {last:.2f} in {result["steps"]} steps](.github/images/demo-loss.png)

This is the demo, on two CPU cores in {result["seconds"] / 60:.1f} minutes. It teaches Gemma 3 270M to turn requests into
JSON:

```text
{example["prompt"].splitlines()[0]}
  before: {example["before"][:70]!r}
  after:  {example["after"]!r}

exact answers: {before} of {rows} before ({before / rows:.0%}), {after} of {rows} after ({after / rows:.0%})
```
"""


def models_table() -> str:
    """Return the size, the memory and the smallest Mac of every size that has a short name."""
    lines = [
        "| model | parameters | 4 bits, 8 x 512 tokens | smallest Mac | hub repository | |",
        "|---|--:|--:|--:|---|---|",
    ]
    settings = configure(config.TrainConfig, {})
    for name in sizes():
        known = KNOWN[name]
        arrays: Any = tree_flatten(make_skeleton(known.config).parameters())
        billions = sum(array.size for _, array in arrays) / 1e9
        needed, smallest = 0, "none"
        for size in MACS:
            plan = memory_plan_of(replace(settings, model=name), machine=simulate_mac(size))
            needed = plan.memory(8, 512, checkpoint=True).total
            if needed <= plan.budget:
                smallest = size.removesuffix("GB") + " GB"
                break
        note = "" if known.verified else "dimensions not verified"
        lines.append(
            f"| `{name}` | {billions:.2f} B | {needed / 1e9:.1f} GB | {smallest} | {known.repo} | {note} |"
        )
    return "\n".join(lines) + "\n"


def gguf_table() -> str:
    """Return how llama.cpp judged each architecture, as scripts/judges/check_gguf_families stored it."""
    lines = [
        "| tiny model | base | base + LoRA | merged | KL of q8_0 | of q5_1 | of q4_1 | exact GELU |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, judged in _result("judges", "gguf_families")["families"].items():
        errors = " | ".join(f"{judged[row]['error']:.0e}" for row in ("base", "lora", "merged"))
        losses = " | ".join(f"{judged[row]['kl']:.4f}" for row in ("q8_0", "q5_1", "q4_1"))
        exact = f"{judged['saturated']['error']:.0e}" if "saturated" in judged else ""
        lines.append(f"| {name} | {errors} | {losses} | {exact} |")
    return "\n".join(lines) + "\n"


def gguf_types_table() -> str:
    """Return what the types of a merged GGUF lose, as scripts/judges/gguf_types measured it."""
    result = _result("judges", "gguf_types")
    lines = [
        "| model | type | KL in nats | same next token | perplexity |",
        "|---|---|--:|--:|--:|",
    ]
    for title, kinds in result["models"].items():
        lines += [
            f"| {title} | {kind} | {found['kl']:.5f} | {found['same']:.1%} | x {found['perplexity']:.3f} |"
            for kind, found in kinds.items()
        ]
    return "\n".join(lines) + "\n"


def launches_table() -> str:
    """Return the launches of a step on a GPU, as scripts/bench/launches counts them."""
    result = _result("bench", "launches")
    lines = [
        "| model | rows | tokens in a row | mlx_lm | ours | |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['model']} | {row['rows']} | {row['length']:,} | {row['stock']:,}"
        f" | {row['ours']:,} | {row['ours'] / row['stock']:.2f}x |"
        for row in result["counts"]
    ]
    versions = result["versions"]
    source = f"mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']} at {result['commit']}"
    return "\n".join([*lines, "", f"`scripts/bench/launches`: {source}; {result['date']}.\n"])


def full_tables() -> str:
    """Return how training all weights compares, as scripts/bench/full measures it."""
    result = _result("bench", "full")
    lines = [
        "| weights | rows | s/step, mlx_lm | ours | | peak, mlx_lm | ours | | largest difference of a loss |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for dtype, both in result["training"].items():
        stock, ours = both["stock"], both["ours"]
        times = [min(each["seconds"], default=math.nan) for each in (stock, ours)]
        peaks = [each["peak_bytes"] / 1e6 for each in (stock, ours)]
        pairs = zip(stock["losses"], ours["losses"], strict=True)
        off = max(abs(one - other) / one for one, other in pairs)
        speed = f"{times[0]:.2f} | {times[1]:.2f} | {times[1] / times[0]:.2f}x"
        if math.isnan(times[0]):
            speed = "- | - | -"
        lines.append(
            f"| {dtype} | {both['rows']} | {speed}"
            f" | {peaks[0]:,.0f} MB | {peaks[1]:,.0f} MB | {peaks[1] / peaks[0]:.2f}x | {off:.1e} |"
        )

    rounding = result["rounding"]
    before = next(iter(rounding.values()))[0]
    lines += [
        "",
        f"{result['model']}, every weight, {result['steps']} steps at {result['rate']:g}; held-out loss"
        f" before: {before:.4f}",
        "",
        "| the weights are kept in | held-out loss after |",
        "|---|--:|",
    ]
    lines += [f"| {kept} | {after:.4f} |" for kept, (_, after) in rounding.items()]
    cpu, versions = result["machine"]["cpu"], result["versions"]
    source = f"{cpu}; mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']} at {result['commit']}"
    return "\n".join([*lines, "", f"`scripts/bench/full`: {source}; {result['date']}.\n"])


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


def _result(room: str, name: str) -> dict[str, Any]:
    """Return what a script measured."""
    file = SCRIPTS / room / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "settings": (ROOT / "docs" / "settings.md", settings_table),
    "migration": (ROOT / "docs" / "migration.md", migration_tables),
    "rates": (ROOT / "docs" / "rates.md", rates_table),
    "fuse": (ROOT / "docs" / "fuse.md", fuse_table),
    "speed": (README, speed_table),
    "models": (ROOT / "docs" / "models.md", models_table),
    "gguf": (ROOT / "docs" / "models.md", gguf_table),
    "gguf types": (ROOT / "docs" / "models.md", gguf_types_table),
    "launches": (ROOT / "docs" / "benchmarks.md", launches_table),
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
    """Return the README with absolute addresses of its pictures and pages, which a package index needs too.

    Without the repository's ``name`` the links stay relative to the checkout.
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
