"""The tables of ``bench.py``: what their columns mean, and their rows as Markdown."""

from collections.abc import Sequence
from typing import Any

from scripts.provenance import source_line

Result = dict[str, Any]

HEADINGS = (
    "trainer", "useful tok/s", "to stock", "supervised tok/s", "peak above weights", "to stock", "padding", "shapes",
    "held-out loss", "s/step", "of matmul rate",
)  # fmt: skip
LEGEND = """\
*Stock* is `mlx_lm.lora`; *checkpoint* is with gradient checkpointing, *pack* with packed rows.

| column | meaning | better |
|---|---|---|
| useful tok/s | input tokens that are not padding, for each second of training | higher |
| supervised tok/s | tokens that count for the loss, for each second | higher |
| peak above weights | the highest memory of the run, without the weights | lower |
| to stock | the column before it, divided by stock's | |
| padding | the fraction of computed tokens that are padding | lower |
| shapes | different batch shapes; each one is compiled | lower |
| held-out loss | after the run, in nats per token; it should be about the same, and says nothing about speed | |
| s/step | seconds for a step | lower |
| of matmul rate | the fraction of the machine's speed in large matrix products that a step reaches | higher |
"""


def cells(trainer: str, row: Result) -> list[str]:
    """Return a trainer's row of the table."""
    return [
        trainer,
        f"{row['useful_per_second']:,.0f}",
        f"{row['speed_to_stock']:.2f}x",
        f"{row['supervised_per_second']:,.0f}",
        f"{row['peak_above_weights'] / 1e6:,.0f} MB",
        f"{row['memory_to_stock']:.3f}",
        f"{row['padding']:.1%}",
        f"{row['shapes']:.0f}",
        f"{row['held_out_loss']:.3f}",
        f"{row['seconds']:.2f}",
        f"{row['matmul_share']:.0%}",
    ]


def markdown(results: Sequence[Result]) -> str:
    """Return the table of several cases."""
    lines, sources = [LEGEND], {}
    for result in results:
        repeats = 1 + max(run["repeat"] for run in result["runs"])
        lines += [
            (
                f"**({result['case']}) {result['title']}**, batch {result['batch_size']},"
                f" {result['data']} rows, {result['updates']} steps, median of {repeats}"
            ),
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|---" + "|--:" * (len(HEADINGS) - 1) + "|",
            *(
                "| " + " | ".join(cells(trainer, row)) + " |"
                for trainer, row in result["medians"].items()
            ),
            "",
            *([phases_line(result), ""] if phases_line(result) else []),
        ]
        sources.setdefault(source_line(result), []).append(f"({result['case']})")
    lines += [f"{' '.join(cases)}: {line}" for line, cases in sources.items()]
    return "\n".join(lines) + "\n"


def phases_line(result: Result) -> str:
    """Return the seconds of each phase of our step in one line, or nothing if they were not measured."""
    phases = result["medians"].get("ours", {}).get("phases")
    if not phases:
        return ""
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in phases.items())
    return f"The parts of our step, each timed alone on one batch: {parts}."
