"""Run every stage for a tiny model of each family, and write the outcomes as JSON and as a page of the docs."""

import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.provenance import provenance  # noqa: E402

CONFIGS = ROOT / "tests" / "families" / "configs.json"
RESULTS = ROOT / "scripts" / "judges" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
BATCH = 12  # families that share a process, until one of them ends it

INTRODUCTION = """# Model families

At the end of this page you know whether the family of your model is tested here, and what to expect of it.

This page lists every model type of mlx-lm {version}, and how a tiny model of each behaves here (float32, on a CPU).
Each one is loaded, planned, adapted with `all-linear` at rank 8, trained, saved, loaded with its adapter by stock
mlx-lm, fused (plain, at 4 bits, and dequantized from 4 bits), and loaded again by stock mlx-lm. Gradients are
compared with those of mlx-lm's own layers and full logits, with checkpointing, and for packed rows.
`scripts/judges/families` makes the page.

On a Mac, `rwkv7` is refused before training, because mlx-lm computes it with a Metal kernel that has no gradient.

- **correct**: every stage gives the right results;
- **refused**: a stage is refused, and the program says why in one line; if that stage is a fuse, the model trains;
- **faulty**: a stage named here gives a wrong result or an error.

{counts}

| model type | outcome | what is said |
|---|---|---|
"""


def outcome(stages: dict[str, str]) -> tuple[str, str]:
    """Return the outcome of a family, and the messages of its stages."""
    refusals = [
        message.removeprefix("refused: ")
        for message in stages.values()
        if message.startswith("refused")
    ]
    faults = [
        f"{stage}: {message.removeprefix('failed: ')}"
        for stage, message in stages.items()
        if message.startswith("failed")
    ]
    if faults:
        return "faulty", "; ".join(faults + refusals)
    return ("refused", "; ".join(refusals)) if refusals else ("correct", "")


def page(results: dict[str, dict[str, str]], measured_with: str) -> str:
    """Return the page."""
    outcomes = {
        name: outcome(stages)
        for name, stages in sorted(results.items(), key=lambda item: item[0].lower())
    }
    counts = Counter(kind for kind, _ in outcomes.values())
    summary = (
        f"{len(outcomes)} model types: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
        + "."
    )
    rows = [
        f"| `{name}` | {kind} | {said.replace('|', '/')} |"
        for name, (kind, said) in outcomes.items()
    ]
    return INTRODUCTION.format(version=measured_with, counts=summary) + "\n".join(rows) + "\n"


def walk_all(names: list[str]) -> dict[str, dict[str, str]]:
    """Return family → stage → what became of it; a family that ends the process is recorded and the next one begun."""
    found: dict[str, dict[str, str]] = {}
    rest = list(names)
    while rest:
        batch = rest[:BATCH]
        command = [sys.executable, "-m", "tests.families.walk", *batch]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        results = [json.loads(line) for line in done.stdout.splitlines()]
        for result in results:
            found |= result
            print(
                *(f"{name}: {': '.join(outcome(stages))}" for name, stages in result.items()),
                flush=True,
            )
        if len(results) < len(batch):
            crashed = batch[len(results)]
            found[crashed] = {"load": f"failed: the process ended with {done.returncode}"}
            results.append(found[crashed])
        rest = rest[len(results) :]
    return found


def main() -> None:
    """Walk the families that are named, or all, and write the results and the page; or check the page."""
    words = sys.argv[1:]
    stored = (
        json.loads(RESULTS.read_text())
        if RESULTS.exists()
        else {"mlx_lm": version("mlx-lm"), "families": {}}
    )
    if words != ["--check"]:
        known = list(json.loads(CONFIGS.read_text()))
        if unknown := set(words) - set(known):
            sys.exit(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        families = {name: stages for name, stages in stored["families"].items() if name in known}
        families |= walk_all(words or known)
        stored = provenance() | {
            "mlx_lm": version("mlx-lm"),
            "families": dict(sorted(families.items())),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(stored["families"], stored["mlx_lm"]))
    elif PAGE.read_text() != page(stored["families"], stored["mlx_lm"]):
        sys.exit(
            "docs/families.md does not fit scripts/judges/results/families.json: run"
            " scripts/judges/families"
        )


if __name__ == "__main__":
    main()
