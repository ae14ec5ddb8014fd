"""What LoRA+ does where the answer is known: the paper's toys on MLX, and LoRA+ beside LoRA with a larger scale.

    scripts/study/run delta         the three parts of a step against the width, with exponents (Propositions 1, 2)
    scripts/study/run figure2       the paper's Figure 2: test losses over (eta_A, eta_B) after 10 and 200 updates
    scripts/study/run width         the best ratio of the rates against the width, Adam, both starts
    scripts/study/run equivalence   LoRA+ with (eta, lambda eta, s) against LoRA with (eta, eta, lambda s)
    scripts/study/run scaling       how far more Macs speed an update up, on paper
    scripts/study/run --table       the tables in docs/ again, from the JSON

Each takes minutes, and writes JSON and a picture to scripts/study/results.
"""

import argparse
import io
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlx_loraplus.files import write_atomically
from mlx_loraplus.sweep.heatmap import Heatmap
from scripts.provenance import provenance
from scripts.study.equivalence import equivalence_table, run_equivalence
from scripts.study.scaling import run_scaling, scaling_table
from scripts.study.width import (
    Init,
    adam_losses,
    deltas,
    exponents,
    figure_losses,
)  # isort: skip  before mlx

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
DOCS = ROOT / "docs"
SEEDS, FIGURE_SEEDS = 3, 9

DELTA_WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
KAPPA = 0.2
# Name → start, eta_a(n), eta_b(n), and the exponents of delta 1, 2, 3 that follow from the paper's
# Section 3.
DELTA_CASES: dict[
    str, tuple[Init, Callable[[int], float], Callable[[int], float], tuple[float, float, float]]
] = {
    "Init[1], both κ n^-1": ("init1", lambda n: KAPPA / n, lambda n: KAPPA / n, (-2, -1, -2)),
    "Init[1], both κ n^-1/2": (
        "init1",
        lambda n: KAPPA * n**-0.5,
        lambda n: KAPPA * n**-0.5,
        (-0.5, -0.5, -0.5),
    ),
    "Init[1], κ n^-1 and κ": ("init1", lambda n: KAPPA / n, lambda _: KAPPA, (0, 0, 0)),
    "Init[2], both κ n^-1": ("init2", lambda n: KAPPA / n, lambda n: KAPPA / n, (0, -1, -1)),
    "Init[2], κ n^-1 and κ": ("init2", lambda n: KAPPA / n, lambda _: KAPPA, (0, 0, 0)),
}

# Rates of A, 1e-4 to 0.1, and of B, 1e-4 to 10; the paper's 2.15e-2 is 10^(-5/3).
FIGURE_RATES = tuple(tuple(10 ** (k / 3) for k in range(-12, end)) for end in (-2, 4))
FIGURE_UPDATES = (10, 200)

WIDTHS = (64, 128, 256, 512, 1024)
WIDTH_UPDATES = 100
WIDTH_RATES_A, WIDTH_RATES_B = (
    tuple(10 ** (k / 4) for k in range(*span)) for span in ((-18, -1), (-10, 7))
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies: dict[str, Callable[[], tuple[dict[str, Any], Figure | None]]] = {
        "delta": run_delta, "figure2": run_figure2, "width": run_width, "equivalence": run_equivalence,
        "scaling": run_scaling,
    }  # fmt: skip
    parser.add_argument("what", nargs="?", choices=studies)
    parser.add_argument(
        "--table", action="store_true", help="only write the tables in docs/, from the JSON"
    )
    options = parser.parse_args(arguments)
    if options.what:
        started = time.perf_counter()
        result, figure = studies[options.what]()
        result |= provenance()
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_atomically(
            RESULTS / f"{options.what}.json", (json.dumps(result, indent=1) + "\n").encode()
        )
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            write_atomically(RESULTS / f"{options.what}.png", picture.getvalue())
        print(f"{options.what}: {result['seconds']} s")
    elif not options.table:
        parser.error("say which study, or --table")
    write_tables()


def run_delta() -> tuple[dict[str, Any], Figure]:
    """Fit the exponents of the median |delta| at the third update."""
    figure = Figure(figsize=(3.1 * len(DELTA_CASES), 3.4), layout="constrained")
    cases = {}
    for axes, (name, (init, eta_a, eta_b, expected)) in zip(
        figure.subplots(1, len(DELTA_CASES), sharey=True), DELTA_CASES.items(), strict=True
    ):
        found = [deltas(n, init, eta_a(n), eta_b(n)) for n in DELTA_WIDTHS]
        sizes = np.array([np.median(np.abs(parts[:3]), axis=1) for parts in found])  # (widths, 3)
        slopes = exponents(DELTA_WIDTHS, sizes)
        for part, label in enumerate(("δ¹", "δ²", "δ³")):
            axes.loglog(DELTA_WIDTHS, sizes[:, part], "o-", label=f"{label} ~ n^{slopes[part]:.2f}")
        axes.set(title=name, xlabel="n")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        cases[name] = {
            "expected": expected,
            "exponents": slopes.round(3).tolist(),
            "sizes": sizes.tolist(),
        }
        print(f"{name}: {slopes.round(2)}, expected {expected}")
    return {"widths": DELTA_WIDTHS, "kappa": KAPPA, "update": 3, "cases": cases}, figure


def run_figure2() -> tuple[dict[str, Any], Figure]:
    """Take the median of Figure 2's test losses over the seeds and find the best cells.

    The paper has the mean of three seeds; the best rates lie next to where seeds diverge, and a
    mean with one that did is infinite.
    """
    rates_a, rates_b = FIGURE_RATES
    pairs = np.array(list(itertools.product(rates_b, rates_a)))
    runs = [
        figure_losses(pairs[:, 1], pairs[:, 0], FIGURE_UPDATES, seed=s) for s in range(FIGURE_SEEDS)
    ]
    shape = (FIGURE_SEEDS, len(FIGURE_UPDATES), len(rates_b), len(rates_a))
    losses = np.nan_to_num(np.array(runs), nan=np.inf).reshape(shape)
    equal = np.arange(len(rates_a))  # rates_b begins with all of rates_a
    figure = Figure(figsize=(11, 6), layout="constrained")
    result: dict[str, Any] = {
        "rates_a": rates_a,
        "rates_b": rates_b,
        "seeds": FIGURE_SEEDS,
        "updates": {},
    }
    for axes, updates, each in zip(
        figure.subplots(1, 2), FIGURE_UPDATES, losses.swapaxes(0, 1), strict=True
    ):
        known = np.median(each, axis=0)
        b, a = (int(i) for i in np.unravel_index(known.argmin(), known.shape))
        at = int(known[equal, equal].argmin())
        near = np.argwhere(known <= 1.01 * known.min())  # (cells, 2)
        marks = {"equal rates, the best": (at, at), "the best": (b, a)}
        heatmap = Heatmap(
            f"test loss after {updates} updates", "η_A", "η_B", rates_a, rates_b, known, marks
        )
        figure.colorbar(heatmap.draw(axes), ax=axes)
        axes.plot(*near.T[::-1], ".", color="red", markersize=4, label="within 1% of the least")
        axes.plot(equal, equal, "--", color="gray", lw=0.8)
        axes.legend(loc="lower left", fontsize=8, facecolor="gray")
        result["updates"][str(updates)] = found = {
            "best": {"eta_a": rates_a[a], "eta_b": rates_b[b], "loss": float(known[b, a])},
            "equal": {"eta": rates_a[at], "loss": float(known[at, at])},
            "ratios_within_1_percent": sorted(rates_b[b] / rates_a[a] for b, a in near),
            "equal_by_seed": [rates_a[int(seed[equal, equal].argmin())] for seed in each],
            "diverged_at_equal": np.sum(~np.isfinite(each[:, equal, equal]), axis=0).tolist(),
        }  # fmt: skip
        print(updates, found)
        found["losses"] = [[float(v) if np.isfinite(v) else None for v in row] for row in known]
    return result, figure


def run_width() -> tuple[dict[str, Any], Figure]:
    """Find the best equal rate, the best pair of rates, and the least ratio within twice its loss, at each width."""
    pairs = np.array(list(itertools.product(WIDTH_RATES_B, WIDTH_RATES_A)))
    equal = np.isclose(pairs[:, 0], pairs[:, 1])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    result: dict[str, Any] = {
        "widths": WIDTHS,
        "updates": WIDTH_UPDATES,
        "seeds": SEEDS,
        "inits": {},
    }
    inits: tuple[Init, ...] = ("init1", "init2")
    for init in inits:
        rows = []
        for n in WIDTHS:
            losses = np.array(
                [
                    adam_losses(n, init, pairs[:, 1], pairs[:, 0], steps=WIDTH_UPDATES, seed=s)
                    for s in range(SEEDS)
                ]
            )
            mean = np.exp(
                np.log(losses).mean(0)
            )  # of losses over many orders of size: the geometric one
            best, best_equal = int(mean.argmin()), int(np.where(equal, mean, np.inf).argmin())
            good = mean <= 2 * mean[best]
            ratio = float((pairs[good, 0] / pairs[good, 1]).min())
            rows.append(
                {
                    "n": n, "equal_rate": float(pairs[best_equal, 0]), "equal_loss": float(mean[best_equal]),
                    "eta_a": float(pairs[best, 1]), "eta_b": float(pairs[best, 0]), "loss": float(mean[best]),
                    "ratio": ratio,
                }
            )  # fmt: skip
            print(init, rows[-1], flush=True)
        slopes = {
            name: float(exponents(WIDTHS, np.array([[row[name]] for row in rows]))[0])
            for name in ("equal_rate", "ratio")
        }
        result["inits"][init] = {"rows": rows, "exponents": slopes}
        label = f"Init[{init[-1]}]"
        left.loglog(
            WIDTHS, [row["ratio"] for row in rows], "o-", label=f"{label}: n^{slopes['ratio']:.2f}"
        )
        (line,) = right.loglog(
            WIDTHS, [row["equal_loss"] for row in rows], "o-", label=f"{label}, equal rates"
        )
        right.loglog(
            WIDTHS,
            [row["loss"] for row in rows],
            "s--",
            color=line.get_color(),
            label=f"{label}, split",
        )
    left.set(title="least ratio η_B / η_A within twice the least loss", xlabel="n")
    right.set(title=f"loss after {WIDTH_UPDATES} updates / loss before", xlabel="n")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return result, figure


def write_tables() -> None:
    """Write the tables of what has been run into their pages in docs/."""
    tables = {
        "delta": ("research.md", delta_table),
        "width": ("research.md", width_table),
        "equivalence": ("research.md", equivalence_table),
        "scaling": ("distributed.md", scaling_table),
    }
    for name, (page, table) in tables.items():
        file = RESULTS / f"{name}.json"
        text = (DOCS / page).read_text(encoding="utf-8")
        start, end = f"<!-- study-{name}:start -->", f"<!-- study-{name}:end -->"
        if file.exists() and start in text:
            before, after = text.split(start)[0], text.split(end)[1]
            result = json.loads(file.read_text(encoding="utf-8"))
            text = f"{before}{start}\n\n{table(result)}\n\n{end}{after}"
            write_atomically(DOCS / page, text.encode())


DELTA_LEGEND = """\
A cell is the power of n with which the size of that part grows: 0 stays the same at any width, and below 0 it fades.
*Expected* is what §3 of the paper derives for δ¹, δ² and δ³."""
WIDTH_LEGEND = """\
*Loss*: after training, as a fraction of the loss before; lower is better. *Smallest η_B / η_A*: the smallest ratio with
at most twice the best loss; "below 1" means that B needs no higher rate than A. The last row is the power of n with
which the ratio grows."""


def delta_table(result: dict[str, Any]) -> str:
    """Return the exponents beside those expected."""
    lines = ["| start, rates of a and b | δ¹ | δ² | δ³ | expected |", "|---|--:|--:|--:|---|"]
    for name, case in result["cases"].items():
        found = " | ".join(f"{value:.2f}" for value in case["exponents"])
        lines.append(
            f"| {name} | {found} | {', '.join(f'{value:g}' for value in case['expected'])} |"
        )
    return "\n".join([*lines, "", DELTA_LEGEND])


def width_table(result: dict[str, Any]) -> str:
    """Return losses with equal and with split rates, and the best ratio, by width."""
    lines = [
        "| start | n | equal rates: best η | loss | separate rates: smallest η_B / η_A | loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for init, found in result["inits"].items():
        lines += [
            f"| Init[{init[-1]}] | {row['n']:,} | {row['equal_rate']:.1e} | {row['equal_loss']:.1e}"
            f" | {format(row['ratio'], ',.0f') if row['ratio'] >= 1 else 'below 1'} |"
            f" {row['loss']:.1e} |"
            for row in found["rows"]
        ]
        if found["rows"][0]["ratio"] >= 1:
            lines.append(f"| | | | | ~ n^{found['exponents']['ratio']:.2f} | |")
    return "\n".join([*lines, "", WIDTH_LEGEND])


if __name__ == "__main__":
    main()
