"""The tables about other trainers in docs/benchmarks.md, from the results of scripts/bench/rivals."""

from collections.abc import Callable
from statistics import median
from typing import Any

OURS = "mlx_loraplus"
HEADINGS = (
    "trainer", "s/step", "to ours", "useful tok/s", "peak above weights", "to ours", "padding", "train loss",
    "held-out loss",
)  # fmt: skip

LEGEND = """\
*s/step*: seconds for a step; *to ours*: the column before it, divided by ours, so above 1 the other trainer needs more.
*Useful tok/s*: input tokens that are not padding, for each second; higher is better. *Peak above weights*: the highest
memory, without the weights. *Padding*: the fraction of computed tokens that are padding. Lower is better for these and
for the losses (nats per token), which should be about the same.
"""

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Return the table of each case, what rivals do better, and where the numbers come from."""
    lines: list[str] = [LEGEND]
    for case in result["cases"].values():
        lines += [
            f"**{case['title']}**, batch {case['batch_size']}, {case['data']} rows, {case['updates']} steps",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|---" + "|--:" * (len(HEADINGS) - 1) + "|",
            *(f"| {' | '.join(cells)} |" for cells in rows(case)),
            "",
            *(f"{line}\n" for line in remarks(case)),
        ]
    return "\n".join([*lines, *sources(result)]) + "\n"


def rows(case: Result) -> list[list[str]]:
    """Return the cells of a case's table, the fastest trainer first, and those that did not run last."""
    ours = summary(case, OURS) if case["runs"].get(OURS) else None
    found = sorted((summary(case, name) for name in case["runs"]), key=lambda row: row["seconds"])
    cells = []
    for row in found:
        speed = f"{row['seconds'] / ours['seconds']:.2f}x" if ours else "-"
        memory = f"{row['peak'] / ours['peak']:.2f}x" if ours else "-"
        cells.append(
            [
                row["trainer"],
                f"{row['seconds']:.2f}",
                speed,
                f"{row['useful_per_second']:,.0f}",
                f"{row['peak'] / 1e6:,.0f} MB",
                memory,
                "-" if row["padding"] is None else f"{row['padding']:.1%}",
                f"{row['train_loss']:.3f}",
                f"{row['held_out_loss']:.3f}",
            ]
        )
    empty = [""] * (len(HEADINGS) - 2)
    return cells + [[name, "did not run", *empty] for name in case["errors"]]


def summary(case: Result, trainer: str) -> Result:
    """Return a trainer's medians; seconds are per update."""
    runs = case["runs"][trainer]

    def of(value: Callable[[Result], float]) -> float:
        return median(value(run) for run in runs)

    updates = case["updates"]
    seconds = of(lambda run: run["seconds"])
    padded = runs[0]["padded_tokens"]
    return {
        "trainer": trainer,
        "seconds": seconds / updates,
        "useful_per_second": case["useful_tokens"] / seconds,
        "peak": of(lambda run: run["peak_bytes"] - run["base_bytes"]),
        "padding": None if padded is None else 1 - case["useful_tokens"] / padded,
        "train_loss": of(lambda run: sum(run["losses"][-updates:]) / updates),
        "held_out_loss": of(lambda run: run["held_out_loss"]),
        "matmul_flops_per_second": of(lambda run: run["matmul_flops_per_second"]),
    }


def remarks(case: Result) -> list[str]:
    """Return how ours compares with the fastest rival, what rivals do better, and why some did not run."""
    lines = []
    rivals = [summary(case, name) for name in case["runs"] if name != OURS]
    if rivals and case["runs"].get(OURS):
        ours = summary(case, OURS)
        best = min(rivals, key=lambda row: row["seconds"])
        lean = min(rivals, key=lambda row: row["peak"])
        lines.append(
            f"The fastest rival is {best['trainer']}: its update takes {best['seconds'] / ours['seconds']:.2f}"
            f" times as long as ours. The one with the least memory is {lean['trainer']}, with"
            f" {lean['peak'] / ours['peak']:.2f} times ours."
        )
        tight = [row for row in rivals if row["padding"] is not None]
        better = [
            f"{row['trainer']} ({row['padding']:.1%} against {ours['padding']:.1%})"
            for row in tight
            if round(row["padding"], 3) < round(ours["padding"], 3)
        ]
        if better:
            lines.append(f"Less padding than ours: {', '.join(better)}.")
    lines += [f"{name} did not run: `{line}`" for name, line in case["errors"].items()]
    return lines


def sources(result: Result) -> list[str]:
    """Return the versions and licences of the trainers, and the machine and commits of the cases."""
    lines = [
        f"{name} {trainer['version']} ({trainer['licence']}), mlx {trainer['mlx']}, mlx-lm {trainer['mlx-lm']}"
        for name, trainer in result["trainers"].items()
    ]
    places: dict[str, list[str]] = {}
    for name, case in result["cases"].items():
        machine = case["machine"]
        place = (
            f"{machine['cpu']}, {machine['cores']} cores; commit {case['commit']}; {case['date']}"
        )
        places.setdefault(place, []).append(name)
    return [
        "Trainers: " + "; ".join(lines) + ".",
        "",
        *(
            f"`scripts/bench/rivals`, {', '.join(names)}: {place}."
            for place, names in places.items()
        ),
    ]
