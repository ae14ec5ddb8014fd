"""The tables in docs/research.md and the picture of what ``evidence.py`` has measured."""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlx_loraplus.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "research.md"
Line = dict[str, Any]
Method = tuple[str, float, str]  # start, lambda, update rule
LORA: Method = ("init1", 1.0, "adam")


LEGEND = """\
Each cell is the mean over the seeds ± their standard deviation. *Validation loss*: at the end, in nats per token; lower
is better. *Gain over LoRA*: how much lower the loss is than LoRA's with the same seed; above 0, the method is better
than LoRA. *Steps to LoRA's loss*: the step at which the method reaches the loss that LoRA has at the end; fewer is
better. *Exact answers*: generated answers that equal the expected ones; higher is better.

The next table shows the search before it: for each method the best η of the grid, and the validation loss there."""


def write_findings(lines: Sequence[Line]) -> None:
    """Write the tables in docs/research.md and the picture."""
    names = list(dict.fromkeys(line["pair"] for line in lines))
    compared = [name for name in names if len(methods_of(name, "final", lines)) > 1]
    picture = io.BytesIO()
    draw(compared or names, lines).savefig(picture, format="png", dpi=110)
    write_atomically(RESULTS / "evidence.png", picture.getvalue())
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- evidence:start -->", "<!-- evidence:end -->"
    if start in text:
        tables = "\n\n".join([finals_table(compared, lines), LEGEND, search_table(names, lines)])
        write_atomically(
            PAGE,
            f"{text.split(start)[0]}{start}\n\n{tables}\n\n{end}{text.split(end)[1]}".encode(),
        )


def methods_of(name: str, stage: str, lines: Sequence[Line]) -> dict[Method, list[Line]]:
    """Return each method's lines of a pair and a stage, seeds ascending, without those that diverged."""
    found: dict[Method, list[Line]] = {}
    for line in sorted(
        lines, key=lambda line: (line["rule"], line["lr_ratio"], line["init"], line["seed"])
    ):
        if line["pair"] == name and line["stage"] == stage and line["loss"] is not None:
            found.setdefault((line["init"], line["lr_ratio"], line["rule"]), []).append(line)
    return found


def updates_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Return after how many updates a curve is at ``loss``, between two points on the straight line."""
    for (early, high), (late, low) in pairwise(curve):
        if low <= loss:
            return early + (late - early) * (high - loss) / (high - low) if high > loss else early
    return None


def finals_table(names: Sequence[str], lines: Sequence[Line]) -> str:
    """Return the finals: losses with their spread, updates to LoRA's last loss, exact answers."""
    rows = [
        (
            "| model, data | method | best η | validation loss | gain over LoRA | steps to LoRA's loss |"
            " exact answers | seeds |"
        ),
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        found = methods_of(name, "final", lines)
        lora = {line["seed"]: line for line in found.get(LORA, [])}
        for method, mine in found.items():
            beside = [(line, lora[line["seed"]]["loss"]) for line in mine if line["seed"] in lora]
            gains = [loss - line["loss"] for line, loss in beside]
            reached = [updates_to_reach(line["curve"], loss) for line, loss in beside]
            in_time = [update for update in reached if update is not None]
            soon = f"{fmean(in_time):.0f} of {mine[0]['updates']}" if in_time else "not reached"
            if 0 < len(in_time) < len(mine):
                soon += f" ({len(in_time)} of {len(mine)} seeds)"
            exact = [100 * line["exact"] for line in mine if line.get("exact") is not None]
            rows.append(
                f"| {name} | {label(*method)} | {mine[0]['learning_rate']:.1e} |"
                f" {with_spread([line['loss'] for line in mine], '.4f')} |"
                f" {with_spread(gains, '+.4f')} | {soon} | {with_spread(exact, '.0f')}% |"
                f" {len(mine)} |"
            )
    return "\n".join(rows)


def search_table(names: Sequence[str], lines: Sequence[Line]) -> str:
    """Return the search: each method's best rate and its loss there, one seed."""
    rows = ["| model, data | steps | method: best η, loss (one seed) |", "|---|--:|---|"]
    for name in names:
        best = {
            m: min(found, key=lambda line: line["loss"])
            for m, found in methods_of(name, "search", lines).items()
        }
        cells = [
            f"{label(*m)}: {line['learning_rate']:.1e}, {line['loss']:.4f}"
            for m, line in best.items()
        ]
        if best:
            rows.append(f"| {name} | {next(iter(best.values()))['updates']} | {'; '.join(cells)} |")
    return "\n".join(rows)


def draw(names: Sequence[str], lines: Sequence[Line]) -> Figure:
    """Draw the finals' validation losses against updates, the mean over the seeds and their range."""
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method, mine in methods_of(name, "final", lines).items():
            curves = np.array([line["curve"] for line in mine])  # (seeds, points, 2)
            x, y = curves[0, 1:, 0], curves[:, 1:, 1]
            (line,) = axes.plot(
                x, y.mean(0), ".-", label=f"{label(*method)}, η {mine[0]['learning_rate']:.1e}"
            )
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, lw=0)
        axes.set(title=name, xlabel="step", ylabel="validation loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def label(init: str, ratio: float, rule: str) -> str:
    """Return a method's name."""
    if rule != "adam":
        return {"riemannian": "Riemannian Adam", "rite": "LoRA-RITE"}[rule]
    start = f"Init[{init[-1]}]"
    return f"LoRA, {start}" if ratio == 1 else f"LoRA+ λ {ratio:g}, {start}"


def with_spread(values: Sequence[float], form: str) -> str:
    """Return the mean, ± the standard deviation over the seeds."""
    if not values:
        return ""
    spread = f" ± {stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"
