"""Our trainer and mlx_lm's own train() side by side, in one run: the same model, rows, rank, targets, batch and rates.

    scripts/bench/run --data FOLDER          all cases (a, b, c, d) and the parity of the losses, with their JSON
    scripts/bench/run curve                  what a step costs against length, batch, rank and vocabulary
    scripts/bench/run adapters               every adapter on one model, after the same number of updates
    scripts/bench/run times                  only its seconds again, over fewer updates, on a quiet machine
    scripts/bench/run --table                only writes the tables in docs/, from the JSON

Each repetition is a fresh process, and the trainers take turns. Both get OpenBLAS and our allocator
settings; stock has MLX's own order of evaluation, and ours has the one that it sets. There is no
validation while training, lambda is 1, and Adam has bias correction and one constant rate. The rows
are batches of neighbours from seeded places in the file: stock trains on these batches (it does not
sort, and pads to multiples of 32), ours puts the same rows into batches by length. Useful tokens
are inputs that are not padding and have something to predict. They are the same on both sides, and
so are the supervised ones, except for one pad token per row that only stock supervises. The first
update is made twice, and the first time is not measured. Memory is MLX's peak while training, minus
what is in use when model, adapters and optimizer are ready.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_loraplus.files import write_atomically
from scripts.bench.bench_table import HEADINGS, cells, markdown, phases_line
from scripts.bench.cases import CASES, Case
from scripts.provenance import provenance, source_line

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PAGES = {"bench": ROOT / "docs" / "benchmarks.md", "adapters": ROOT / "docs" / "adapters.md"}
"""Part → the page that holds its table, between the markers ``<!-- part:start -->`` and ``<!-- part:end -->``."""
PARITY_UPDATES = 10
TRAINERS = "scripts.bench.trainers"

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="cases",
        choices=["cases", "curve", "adapters", "times"],
        help="default: cases",
    )
    parser.add_argument(
        "--data", help="folder with train.jsonl and valid.jsonl; without it, the built-in demo set"
    )
    parser.add_argument(
        "--cases", default="a,b,c,d,parity", help="which, with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--updates", type=int, help="timed updates (default: " + _default_updates() + ")"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="processes for each trainer (default: %(default)s)"
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the tables in docs/, from the JSON"
    )
    options = parser.parse_args(arguments)
    if options.table:
        write_tables()
    elif options.what == "curve":
        from scripts.bench.curve import write_curve

        write_curve(RESULTS, provenance())
    elif options.what == "adapters":
        run_adapters(options.data, options.updates)
        write_tables()
    elif options.what == "times":
        time_adapters(options.data, options.updates or 6)
        write_tables()
    else:
        names = options.cases.split(",")
        unknown = set(names) - {*CASES, "parity"}
        if unknown:
            parser.error(
                f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}, parity"
            )
        for name in names:
            if name == "parity":
                run_parity(options.data)
            else:
                run_case(
                    name, options.data, options.updates or CASES[name].updates, options.repeats
                )
        write_tables()


def _default_updates() -> str:
    return ", ".join(f"{name} {case.updates}" for name, case in CASES.items())


def run_case(name: str, data: str | None, updates: int, repeats: int) -> Result:
    """Measure one case, print it and write its JSON."""
    case = CASES[name]
    files = [data] if data else []
    runs: list[Result] = []
    for repeat in range(repeats):
        for trainer in case.trainers if repeat % 2 == 0 else reversed(case.trainers):
            started = time.perf_counter()
            runs.append({"repeat": repeat, **child(TRAINERS, name, trainer, str(updates), *files)})
            say(
                f"case {name}, repeat {repeat + 1}: {trainer},"
                f" {time.perf_counter() - started:.0f} s"
            )
    result = assemble(name, case, runs, data, updates)
    show(result)
    write_json(name, result)
    return result


def run_parity(data: str | None) -> None:
    """Compare the loss curves that both trainers have on our batches of case b, and write them."""
    curves = child(TRAINERS, "b", "parity", str(PARITY_UPDATES), *([data] if data else []))
    differences = [
        abs(a - b) / abs(b) for a, b in zip(curves["ours"], curves["stock"], strict=True)
    ]
    title = f"{CASES['b'].title}: {PARITY_UPDATES} steps on our batches, lambda = 1"
    result = {"case": "parity", "title": title, "data": _data_name(data), **provenance(), **curves}
    write_json("parity", {**result, "max_relative_difference": max(differences)})
    say(
        f"parity: the loss curves of stock and ours differ by at most {max(differences):.1e} of the"
        " loss"
    )


def run_adapters(data: str | None, updates: int | None) -> None:
    """Measure every adapter and write their JSON."""
    from scripts.bench import adapters as bench

    updates = updates or bench.UPDATES
    methods: Result = {}
    for name in bench.METHODS:
        started = time.perf_counter()
        methods[name] = child(bench.__name__, name, str(updates), *([data] if data else []))
        say(
            f"{name}: held-out loss {methods[name]['loss_after']:.3f},"
            f" {time.perf_counter() - started:.0f} s"
        )
    result = {
        "case": "adapters",
        "model": bench.MODEL,
        "data": _data_name(data),
        "batch_size": bench.BATCH,
    }
    write_json("adapters", {**result, "updates": updates, **provenance(), "methods": methods})


def time_adapters(data: str | None, updates: int) -> None:
    """Measure the seconds of every adapter's updates again, and put them into their JSON."""
    from scripts.bench import adapters as bench

    result = json.loads((RESULTS / "adapters.json").read_text())
    for name, method in result["methods"].items():
        if method["seconds"] is not None:
            method["seconds"] = child(
                bench.__name__, name, str(updates), *([data] if data else [])
            )["seconds"]
            say(f"{name}: {method['seconds']:.2f} s an update")
    write_json("adapters", {**result, "times": {"updates": updates, **provenance()}})


def child(module: str, *arguments: str) -> Result:
    """Run one repetition in a process of its own and return the JSON that it prints."""
    # Our package sets this variable; stock gets MLX's default.
    environment = dict(os.environ)
    if "stock" in arguments:
        environment["MLX_BFS_MAX_WIDTH"] = "20"
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(
            f"error: {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr.strip()}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def assemble(
    name: str, case: Case, runs: Sequence[Result], data: str | None, updates: int
) -> Result:
    """Put a case's repetitions together, with medians and ratios to stock."""
    check_tokens(runs)
    trainers = {}
    for trainer in case.trainers:
        mine = [summary(run) for run in runs if run["trainer"] == trainer]
        trainers[trainer] = {key: median(run[key] for run in mine) for key in mine[0]}
        if phases := [run["phases"] for run in runs if run["trainer"] == trainer and run["phases"]]:
            trainers[trainer]["phases"] = {
                part: median(run[part] for run in phases) for part in phases[0]
            }
    stock = trainers["stock"]
    for trainer in trainers.values():
        trainer["speed_to_stock"] = trainer["useful_per_second"] / stock["useful_per_second"]
        trainer["memory_to_stock"] = trainer["peak_above_weights"] / stock["peak_above_weights"]
    return {
        "case": name,
        "title": case.title,
        "data": _data_name(data),
        "batch_size": case.batch_size,
        "updates": updates,
        **provenance(),
        "medians": trainers,
        "runs": list(runs),
    }


def check_tokens(runs: Sequence[Result]) -> None:
    """Check that all runs trained on the same inputs, and ours on as many supervised tokens as stock.

    Stock's supervised pad tokens are counted separately, so ours need not reach them.
    """
    stock = [run for run in runs if run["trainer"] == "stock"]
    for run in runs:
        if run["useful_tokens"] != stock[0]["useful_tokens"]:
            raise RuntimeError(
                f"{run['trainer']} had {run['useful_tokens']} inputs, stock"
                f" {stock[0]['useful_tokens']}"
            )
        if run["supervised_tokens"] < stock[0]["supervised_tokens"]:
            raise RuntimeError(
                f"{run['trainer']} learned {run['supervised_tokens']} tokens, stock"
                f" {stock[0]['supervised_tokens']}"
            )


def summary(run: Result) -> Result:
    """Return the numbers of one repetition that the table shows; seconds are per update."""
    spent = sum(run["seconds"])
    return {
        "useful_per_second": run["useful_tokens"] / spent,
        "supervised_per_second": run["supervised_tokens"] / spent,
        "supervised_pads": run["supervised_pads"],
        "peak_above_weights": run["peak_bytes"] - run["base_bytes"],
        "padding": 1 - run["useful_tokens"] / run["padded_tokens"],
        "shapes": len({tuple(shape) for shape in run["shapes"]}),
        "held_out_loss": run["held_out_loss"],
        "seconds": spent / len(run["seconds"]),
        "matmul_share": run["flops"] / spent / run["matmul_flops_per_second"],
        "matmul_flops_per_second": run["matmul_flops_per_second"],
    }


def show(result: Result) -> None:
    """Print a case's table."""
    table = Table(*HEADINGS, title=f"({result['case']}) {result['title']}, {result['data']}")
    for trainer, row in result["medians"].items():
        table.add_row(*cells(trainer, row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if line := phases_line(result):
        console.print(line, highlight=False)


def write_tables() -> None:
    """Put the tables of all stored results into their pages."""
    stored = [
        json.loads(file.read_text())
        for name in CASES
        if (file := RESULTS / f"{name}.json").exists()
    ]
    adapters, parity = RESULTS / "adapters.json", RESULTS / "parity.json"
    if not stored and not adapters.exists():
        raise SystemExit(f"error: no results in {RESULTS}: run scripts/bench/run first")
    if stored:
        text = markdown(stored)
        if parity.exists():
            value = json.loads(parity.read_text())
            text += (
                f"\n{CASES['b'].title}: {len(value['ours'])} steps on our batches with λ = 1: the loss curves of stock's `train()` and ours differ by at"
                " most "
            )
            text += f"{value['max_relative_difference']:.0e} of the loss.\n"
        put("bench", text)
    if adapters.exists():
        from scripts.bench.adapters import markdown as adapters_markdown

        result = json.loads(adapters.read_text())
        lines = (
            f"{adapters_markdown(result)}\n`scripts/bench/run adapters`: {source_line(result)}\n"
        )
        if again := result.get("times"):
            lines += (
                f"Seconds by `scripts/bench/run times`, {again['updates']} steps:"
                f" {source_line(again)}\n"
            )
        put("adapters", lines)


def put(part: str, text: str) -> None:
    """Put ``text`` between the markers of this part in its page, or print it if they are missing."""
    page, start, end = PAGES[part], f"<!-- {part}:start -->", f"<!-- {part}:end -->"
    written = page.read_text() if page.exists() else ""
    if start in written and end in written:
        head, tail = written.split(start)[0], written.split(end)[1]
        write_atomically(page, f"{head}{start}\n\n{text}\n{end}{tail}".encode())
        say(f"{part}: written to {page.name}")
    else:
        print(text)


def _data_name(data: str | None) -> str:
    return Path(data).resolve().name if data else "demo"


def write_json(name: str, result: Result) -> None:
    """Write a result beside the others."""
    write_atomically(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
