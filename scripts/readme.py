"""Write the README's generated parts: settings, rates, what fusing keeps; --check only tells if they are up to date."""

import ast
import inspect
import json
import sys
from pathlib import Path

from mlx_loraplus import config as config_module
from mlx_loraplus.config import (
    AdapterConfig,
    ChatConfig,
    CompareConfig,
    DataConfig,
    ExportConfig,
    FuseConfig,
    GenerateConfig,
    OptimizerConfig,
    RunConfig,
    SweepConfig,
)
from mlx_loraplus.settings import configure, settings_of

README = Path(__file__).parent.parent / "README.md"
ROUNDING = Path(__file__).parent / "study" / "results" / "rounding.json"


COMMANDS = {
    "train": RunConfig, "generate": GenerateConfig, "chat": ChatConfig, "compare": CompareConfig, "fuse": FuseConfig,
    "export": ExportConfig, "sweep": SweepConfig,
}  # fmt: skip


def settings_table() -> str:
    """Return every setting of the commands as Markdown tables: flag, default, meaning; a sweep's own alone."""
    helps = _helps()
    parts = (AdapterConfig, OptimizerConfig, DataConfig)
    lines = []
    for command, kind in COMMANDS.items():
        lines += [f"`mlx_loraplus.{command}`", "", "| flag | default | meaning |", "|---|---|---|"]
        for name, default in settings_of(configure(kind, {})).items():
            if kind is SweepConfig and name not in helps["SweepConfig"]:
                continue
            home = next(
                (part for part in (kind, *parts, ChatConfig) if name in helps[part.__name__]), kind
            )
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            meaning = helps[home.__name__][name].replace("|", "\\|")
            flag = name.upper() if name == "runs" else "--" + name.rstrip("_").replace("_", "-")
            lines.append(
                f"| `{flag}` | {'' if shown in (None, '') else f'`{shown}`'} | {meaning} |"
            )
        if kind is SweepConfig:
            lines.append("\nand train's own on the adapter, the optimizer and the data.")
        lines.append("")
    return "\n".join(lines)


def rates_table() -> str:
    """Return eta and lambda of each kind of adapter and start, as they are where nobody gives them."""
    lines = ["| | η | λ |", "|---|--:|--:|"]
    for flags in ("--init init1", "--init init2", "--init pissa", "--init loftq", "--adapter vera"):
        rates = configure(RunConfig, dict([flags.removeprefix("--").split()])).optimizer
        lines.append(f"| `{flags}` | {rates.learning_rate:g} | {rates.lr_ratio:g} |")
    return "\n".join(lines) + "\n"


def fuse_table() -> str:
    """Return what stock's rounding and ours keep of a change of some size, by scripts/study/fuse_rounding."""
    result = json.loads(ROUNDING.read_text(encoding="utf-8"))
    rows: dict[tuple[int, float], dict[str, dict]] = {}
    for row in result["results"]:
        rows.setdefault((row["bits"], row["ratio"]), {})[row["method"]] = row
    lines = [
        (
            "| bits | change | weights' cosine: stock | ours | outputs' cosine: stock | ours | KL:"
            " dropped | stock | ours | KL elsewhere: stock | ours |"
        ),
        "|--:" * 11 + "|",
    ]
    for (bits, ratio), methods in sorted(rows.items()):
        drop, stock, ours = (methods[name] for name in ("drop", "stock", "gptq"))
        cosines = (stock["cosine"], ours["cosine"], stock["output_cosine"], ours["output_cosine"])
        divergences = (
            drop["kl"],
            stock["kl"],
            ours["kl"],
            stock["kl_elsewhere"],
            ours["kl_elsewhere"],
        )
        cells = [
            str(bits),
            f"{ratio:.1%}",
            *(f"{x:.3f}" for x in cosines),
            *(f"{x:.3f}" for x in divergences),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    source = (
        f"{result['machine']['cpu']}; mlx {result['versions']['mlx']}; {result['commit']},"
        f" {result['date']}"
    )
    return "\n".join([*lines, "", f"`scripts/study/fuse_rounding`: {source}.\n"])


def _helps() -> dict[str, dict[str, str]]:
    """Return class → field → the string below it, read from the source: dataclasses do not keep it."""
    helps: dict[str, dict[str, str]] = {}
    modules = (config_module,)
    for node in (node for module in modules for node in ast.parse(inspect.getsource(module)).body):
        if isinstance(node, ast.ClassDef):
            fields = helps.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    # A text may span several lines of the source.
                    help_text = " ".join(ast.literal_eval(text.value).split())
                    fields[ast.unparse(field.target)] = help_text
    return helps


def main() -> None:
    """Write or check."""
    text = README.read_text(encoding="utf-8")
    wanted = text
    for name, part in {
        "rates": rates_table(),
        "fuse": fuse_table(),
        "settings": settings_table(),
    }.items():
        wanted = _with_part(wanted, name, part)
    if wanted == text:
        return
    if "--check" in sys.argv:
        sys.exit(
            "README.md: its generated tables are out of date: run .venv/bin/python"
            " scripts/readme.py"
        )
    README.write_text(wanted, encoding="utf-8")


def _with_part(text: str, name: str, part: str) -> str:
    """Return the README with what is between a part's markers replaced."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{part}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
