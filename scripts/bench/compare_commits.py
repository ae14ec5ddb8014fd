"""Measure the speed and memory of two commits, turn by turn, on cases a and b of scripts/bench/run.

    scripts/bench/compare_commits OLD          OLD against this checkout
    scripts/bench/compare_commits OLD NEW      two commits
    scripts/bench/compare_commits OLD --compile on      with compiled steps

Each commit is checked out into a temporary folder and measured by its own scripts, each repetition
in a process of its own: old, new, old, new. Both use the packages that are installed here. Results
go to scripts/bench/results/before_after.json, and those of compiled steps to
before_after_compiled.json: medians of the seconds of an update and of the peak of memory above the
weights, and their ratios, new to old.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from mlx_loraplus.files import write_atomically
from scripts.bench.cases import CASES
from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
TRAINERS = ("scripts/bench/trainers.py", "scripts/bench_trainers.py")  # now, and before 0.2
SIDES = ("old", "new")
COMPILED = '"compile": "on"'  # in their settings, because stock always compiles its step

Result = dict[str, Any]


@contextmanager
def checked_out(commit: str) -> Generator[Path]:
    """Yield a temporary folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*words: str) -> str:
    """Run git in this checkout, and return what it prints."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def set_compile(folder: Path, value: str) -> None:
    """Change the setting in a checkout's own scripts."""
    file = folder / trainers_of(folder)
    text = file.read_text()
    if COMPILED not in text:
        raise SystemExit(f"error: {file} has no setting {COMPILED}")
    file.write_text(text.replace(COMPILED, f'"compile": "{value}"'))


def trainers_of(folder: Path) -> str:
    """Return the path of a checkout's trainers in it."""
    return next(file for file in TRAINERS if (folder / file).exists())


def measure(folder: Path, case: str, updates: int) -> Result:
    """Measure one repetition with a checkout's own scripts and package."""
    module = trainers_of(folder).removesuffix(".py").replace("/", ".")
    done = subprocess.run(
        [sys.executable, "-m", module, case, "ours", str(updates)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {folder.name}, case {case}: {done.stderr.strip()[-2000:]}")
    run = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": sum(run["seconds"]) / len(run["seconds"]),
        "peak_above_weights": run["peak_bytes"] - run["base_bytes"],
        "useful_tokens": run["useful_tokens"],
        "matmul_flops_per_second": run["matmul_flops_per_second"],
    }


def compare(folders: dict[str, Path], case: str, updates: int, repeats: int) -> Result:
    """Measure both sides of a case in turn, and return their medians and ratios."""
    runs: dict[str, list[Result]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES:
            runs[side].append(measure(folders[side], case, updates))
            print(f"case {case}, repeat {repeat + 1}, {side}: {runs[side][-1]}", flush=True)

    tokens = {side: {run["useful_tokens"] for run in runs[side]} for side in SIDES}
    if tokens["old"] != tokens["new"]:
        raise SystemExit(f"error: case {case}: the sides trained on different tokens: {tokens}")

    medians = {
        side: {name: median(run[name] for run in runs[side]) for name in runs[side][0]}
        for side in SIDES
    }
    ratios = {
        name: medians["new"][name] / medians["old"][name]
        for name in ("seconds", "peak_above_weights")
    }
    return {
        "title": CASES[case].title,
        "updates": updates,
        "ratios": ratios,
        **medians,
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare two commits, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", help="default: the commit that is checked out here")
    parser.add_argument("--cases", default="a,b", help="with commas (default: %(default)s)")
    parser.add_argument("--updates", type=int, help="timed updates (default: those of the case)")
    parser.add_argument("--repeats", type=int, default=3, help="for each side (default: 3)")
    parser.add_argument(
        "--compile",
        choices=("auto", "on"),
        default="auto",
        help="the runs' setting; auto compiles on a GPU only (default: %(default)s)",
    )
    parser.add_argument("--no-json", action="store_true", help="print the ratios alone")
    options = parser.parse_args(arguments)

    commits = {"old": git("rev-parse", options.old), "new": git("rev-parse", options.new or "HEAD")}
    with checked_out(commits["old"]) as old, checked_out(commits["new"]) as new:
        folders = {"old": old, "new": new}
        for folder in folders.values():
            set_compile(folder, options.compile)
        cases = {}
        for name in options.cases.split(","):
            updates = options.updates or CASES[name].updates
            cases[name] = compare(folders, name, updates, options.repeats)
            print(f"case {name}: new to old: {cases[name]['ratios']}", flush=True)

    if not options.no_json:
        result = {**provenance(), "commits": commits, "repeats": options.repeats}
        name = "before_after.json" if options.compile == "auto" else "before_after_compiled.json"
        file = RESULTS / name
        result |= {"compile": options.compile, "cases": cases}
        write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
