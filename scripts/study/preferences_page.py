"""The tables in docs/preferences.md and docs/rate_studies.md of what ``preferences.py`` has measured."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_loraplus.files import write_atomically
from scripts.provenance import source_line

DOCS = Path(__file__).resolve().parents[2] / "docs"
WEIGHTS = {
    "dpo": "beta",
    "orpo": "orpo_lambda",
    "ipo": "beta",
    "simpo": "beta",
    "kto": "beta",
}
"""Objective → the setting of its strength; the order is that of the table."""
LEGEND = """\
*Chosen preferred*: test pairs whose chosen answer is more likely per token than the rejected one. *Right content* and
*on one line*: generated answers whose JSON has the expected values, and that have the chosen style. Higher is better
for these three. *Loss of the chosen*: in nats per token of the chosen test answers; lower is better."""

Line = dict[str, Any]


def write_tables(lines: Sequence[Line]) -> None:
    """Write the tables between their markers in docs/; one without results is left."""
    for part, name, write in (
        ("demo", "preferences.md", demo_table),
        ("search", "rate_studies.md", search_table),
    ):
        found = [line for line in lines if line["part"] == part]
        if found:
            start, end = f"<!-- {part}:start -->", f"<!-- {part}:end -->"
            before, rest = (DOCS / name).read_text(encoding="utf-8").split(start)
            text = f"{before}{start}\n\n{write(found)}\n\n{end}{rest.split(end)[1]}"
            write_atomically(DOCS / name, text.encode())


def demo_table(lines: Sequence[Line]) -> str:
    """Return the table of the demo's models: a row for each, with the means over its seeds."""
    names = {
        "base": "SmolLM2 135M",
        "first": "SFT on both styles",
        "dpo": "DPO after it, β 0.5",
        "weak": "DPO after it, β 0.1",
        # Measured by an older demo, with 60 test pairs.
        "weak-60": "DPO after it, β 0.1, 60 steps",
        "fast-60": "the same at four times the default rate",
        "orpo": "ORPO alone",
    }
    rows = [
        (
            "| model | seeds | test pairs | chosen preferred | right content | on one line |"
            " loss of the chosen |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model, title in names.items():
        mine = [line for line in lines if line["model"] == model]
        if mine:
            pairs = mine[0]["pairs"]
            rows.append(f"| {title} | {len(mine)} | {pairs} | {scores(means_of(mine))} |")
    return "\n".join([*rows, "", LEGEND, "", source_line(lines[0])])


def scores(line: Line) -> str:
    """Return a result's cells of a table."""
    parts = [f"{line[name]:.0%}" for name in ("preferred", "right", "one_line")]
    return " | ".join([*parts, f"{line['chosen_loss']:.3f}"])


def means_of(lines: Sequence[Line]) -> Line:
    """Return the means of the scores of several results."""
    names = ("preferred", "right", "one_line", "chosen_loss")
    return {name: fmean(line[name] for line in lines) for name in names}


def search_table(lines: Sequence[Line]) -> str:
    """Return the table of the search: a row for each cell, with the means over its seeds."""
    cells_found: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        key = (line["objective"], line["lr_ratio"], line["learning_rate"], line["weight"] or 0)
        cells_found.setdefault(key, []).append(line)

    rows = [
        (
            "| objective | λ | η | strength | seeds | chosen preferred | right content | on one line |"
            " loss of the chosen |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = list(WEIGHTS)
    for key in sorted(cells_found, key=lambda key: (order.index(key[0]), *key[1:])):
        mine = cells_found[key]
        objective, ratio, rate, weight = key
        setting = f"`{WEIGHTS[objective]}` {weight:g}" if weight else "default"
        rows.append(
            f"| {objective} | {ratio:g} | {rate:g} | {setting} | {len(mine)} | {scores(means_of(mine))} |"
        )
    size = f"{lines[0]['pairs']} test pairs; {lines[0]['steps']} steps of {lines[0]['batch_size']}"
    return "\n".join([*rows, "", LEGEND, "", f"{size} pairs. {source_line(lines[-1])}"])
