"""The parts of the README and of docs/ that plan memory; ``readme.py`` writes them."""

import contextlib
import io
import os
from dataclasses import replace
from typing import Any

from mlx.utils import tree_flatten

from mlx_loraplus import cli, config
from mlx_loraplus.device import simulate_mac
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.models.known_models import KNOWN, sizes
from mlx_loraplus.models.skeleton import make_skeleton
from mlx_loraplus.settings import configure

MACS = ("8GB", "16GB", "24GB", "32GB", "36GB", "48GB", "64GB", "96GB", "128GB", "192GB")


def readme_plan() -> str:
    """Return what README's command plans: the models, without the largest in detail."""
    words = "gemma-3 llama-3 --memory 16GB --batch-size 4 --max-seq-length 1024"
    table, _ = _planned(words).split("\n\n", maxsplit=1)
    return f"```text\n$ mlx_loraplus.plan {words}\n{table}\n…\n```\n"


def memory_plan() -> str:
    """Return what the command of docs/memory.md plans."""
    words = "--memory 16GB --batch-size 4 --max-seq-length 1024"
    return f"```bash\nmlx_loraplus.plan {words}\n```\n\n```text\n{_planned(words)}\n```\n"


def _planned(words: str) -> str:
    """Return what ``mlx_loraplus.plan`` prints."""
    os.environ["COLUMNS"] = "100"  # of the terminal, which rich asks
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.plan(words.split())
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def models_table() -> str:
    """Return the size, the memory and the smallest Mac of every size that has a short name."""
    lines = [
        "| model | parameters | peak memory at 4 bits | smallest Mac | hub repository | note |",
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
