"""Does preference training work on a real model, and with which rates?

    scripts/study/preferences data FOLDER      write the rows, to train on them by hand
    scripts/study/preferences demo FOLDER      SFT, then DPO from its adapter; ORPO alone; --seed is 0
    scripts/study/preferences search FOLDER    eta, lambda and beta of each objective, with three seeds
    scripts/study/preferences table            write the tables in docs/preferences.md again

The rows are those of the demo set: a request, and a command as JSON. The chosen answer has the JSON
on one line. The rejected answer is the same JSON over several lines, with more tokens. First,
SmolLM2 135M learns the commands, half of the actions in each style, so that it prefers the chosen
answer for half of the requests. Preferences must then change the style of the others, but not the
content. No combination of arguments is in two of the splits, and SFT and preferences have different
rows.

Every model is scored on test rows: the share of pairs whose chosen answer is more likely per token
and the loss of the chosen answers (both from ``evaluate``), and of the greedy answers the share
whose content is right (equal as JSON, in whatever style) and the share on one line. A result is a
line of results/preferences.jsonl, or of preference_search.jsonl. A stored result is not measured
again, so the same command continues after Ctrl-C.
"""

import mlx_loraplus as ml  # isort: skip  before mlx

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_loraplus.data.demo import demo_rows
from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.files import write_atomically
from mlx_loraplus.inference.generate import answer_all
from mlx_loraplus.runs.verdict import verdict_of
from scripts.provenance import provenance
from scripts.study.preferences_page import WEIGHTS, Line, write_tables

FOLDER = Path(__file__).parent / "results"
RESULTS = {"demo": FOLDER / "preferences.jsonl", "search": FOLDER / "preference_search.jsonl"}
MODEL = "smollm2-135m"
SYSTEM = "Answer with JSON."  # shorter than the model's own system prompt
ONE_LINE = ("light", "timer", "play")
"""The actions whose commands are on one line in the SFT rows; those of the others have several lines.
With a random style for each row, the style that the model prefers would depend on the last batches."""
SFT_ROWS, PAIR_ROWS = 600, 120  # of the 1,200 train rows
VALID_ROWS = 24  # of the SFT rows, and of the pairs
TEST_ROWS = 150  # all of them
MAX_TOKENS = 48  # of an answer; the longest rejected one has 41

Row = dict[str, str]

TRAIN = f"mlx_loraplus.train --model {MODEL}"
DPO = (
    f"{TRAIN} --data {{data}}/pairs --objective dpo --resume-adapter-file {{runs}}/first"
    " --reference start --batch-size 4 --iters 80"
)
COMMANDS = {  # name of a trained model → how the demo trains it
    "first": TRAIN + " --data {data}/sft --lr-ratio 16 --learning-rate 5e-4 --iters 120"
    " --adapter-path {runs}/first",
    "dpo": DPO + " --beta 0.5 --adapter-path {runs}/dpo",
    "weak": DPO + " --adapter-path {runs}/weak",
    "orpo": TRAIN + " --data {data}/pairs --objective orpo --batch-size 4 --iters 45"
    " --adapter-path {runs}/orpo",
}

STEPS, BATCH, SEARCH_PAIRS, SEEDS = 20, 2, 24, 3
"""Of the search: steps of a run, pairs of a step, test pairs, and seeds of the best cells."""
RATES = {  # objective → c; eta is c / sqrt(lambda)
    "dpo": (2e-4, 5e-5, 8e-4),
    "orpo": (2e-3, 5e-4, 1.25e-4, 8e-3),
    "ipo": (2e-4, 5e-5, 8e-4),
    "simpo": (2e-4, 5e-5, 8e-4),
    "kto": (2e-4, 5e-5, 8e-4),
}
RATIOS = (1.0, 16.0)
STRENGTHS = {  # objective → values of the setting in WEIGHTS that differ from the default
    "dpo": (0.5, 0.02),
    "orpo": (0.5, 0.02),
    "ipo": (0.5, 0.02),
    "simpo": (10.0, 0.5),
    "kto": (0.5, 0.02),
}


@dataclass(frozen=True)
class Cell:
    """One run of the search.

    Attributes:
        objective: The objective. ORPO starts from the base, the others from the adapter of SFT.
        lr_ratio: lambda.
        learning_rate: eta.
        weight: The objective's beta, or ORPO's lambda; None for the default.
        seed: Of the run.
    """

    objective: str
    lr_ratio: float
    learning_rate: float
    weight: float | None
    seed: int


def write_rows(folder: Path) -> None:
    """Write the folders ``sft``, ``pairs`` and ``ratings`` with the rows of their splits."""
    rows = demo_rows()
    parts = {
        "sft/train": [one_style(row) for row in rows["train"][:SFT_ROWS]],
        "sft/valid": [one_style(row) for row in rows["valid"][:VALID_ROWS]],
        "pairs/train": [pair(row) for row in rows["train"][-PAIR_ROWS:]],
        "pairs/valid": [pair(row) for row in rows["valid"][-VALID_ROWS:]],
        "pairs/test": [pair(row) for row in rows["test"][:TEST_ROWS]],
    }
    parts["ratings/train"] = [rating for row in parts["pairs/train"] for rating in ratings(row)]
    for name, content in parts.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in content).encode())


def pair(row: Row) -> Row:
    """Return a pair: the command on one line is chosen, the command on several lines rejected."""
    command = json.loads(row["completion"])
    return {
        "system": SYSTEM,
        "prompt": row["prompt"].removeprefix("Request: ").removesuffix("\nCommand:"),
        "chosen": json.dumps(command),
        "rejected": json.dumps(command, indent=2),
    }


def ratings(pair: Row) -> list[Row]:
    """Return the two labeled answers of a pair, as KTO learns them."""
    asked = {"system": pair["system"], "prompt": pair["prompt"]}
    return [
        asked | {"completion": pair["chosen"], "label": "true"},
        asked | {"completion": pair["rejected"], "label": "false"},
    ]


def one_style(row: Row) -> Row:
    """Return a row for SFT, with the answer of its pair that has the style of its action."""
    both = pair(row)
    action = json.loads(both["chosen"])["action"]
    style = "chosen" if action in ONE_LINE else "rejected"
    return {"system": SYSTEM, "prompt": both["prompt"], "completion": both[style]}


class Results:
    """The lines of a file of results. Lines that were stored without a seed are of seed 0.

    Args:
        file: One of ``RESULTS``.
    """

    def __init__(self, file: Path):
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self.lines: list[Line] = [{"seed": 0} | json.loads(line) for line in text.splitlines()]

    def find(self, key: Line) -> Line | None:
        """Return the line with these values, or None."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def add(self, line: Line) -> None:
        """Add a line with its provenance, write the file, and print the line."""
        print(json.dumps(line), flush=True)
        self.lines.append(line | provenance())
        text = "".join(json.dumps(each) + "\n" for each in self.lines)
        write_atomically(self.file, text.encode())


def score(model: nn.Module, tokenizer: TokenizerWrapper, pairs: Sequence[Row]) -> Line:
    """Return what a model does on test pairs; the shares are in [0, 1]."""
    found = ml.evaluate(
        model, tokenizer, data={"test": list(pairs)}, split="test", objective="dpo", answers=0
    )
    system = {"role": "system", "content": SYSTEM}
    prompts = [encode_prompt(row["prompt"], tokenizer, earlier=[system]) for row in pairs]
    answers = answer_all(model, tokenizer, prompts, max_tokens=MAX_TOKENS)

    contents = [read_json(answer) for answer in answers]
    right = [
        content == json.loads(row["chosen"]) for content, row in zip(contents, pairs, strict=True)
    ]
    return {
        "preferred": found.preferred,
        "chosen_loss": found.loss,
        "right": fmean(right),
        "one_line": fmean("\n" not in answer.strip() for answer in answers),
        "pairs": len(pairs),
    }


def read_json(text: str) -> Any:
    """Return the value of a text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def run_demo(folder: Path, results: Results, seed: int = 0) -> None:
    """Train with the commands that the docs show, and score each model on all test pairs."""
    pairs = read_rows(folder / "pairs/test.jsonl")
    for name in ("base", *COMMANDS):
        seconds = train_by_command(folder, name, seed)
        key = {"part": "demo", "model": name, "seed": 0 if name == "base" else seed}
        score_stored(key, folder, pairs, results, train_seconds=seconds)


def score_stored(
    key: Line, folder: Path, pairs: Sequence[Row], results: Results, **known: Any
) -> None:
    """Score the base, or a model that the demo has trained, unless the results hold it.

    Args:
        key: The part of the study, the model's name, and the seed of its run.
        folder: Where rows and runs are.
        pairs: The test pairs.
        results: Where the scores go.
        known: What else the line shows.
    """
    if results.find(key):
        return
    name = key["model"]
    adapter = None if name == "base" else runs_of(folder, key["seed"]) / name
    model, tokenizer = ml.load(MODEL, adapter)
    results.add(key | known | score(model, tokenizer, pairs))


def runs_of(folder: Path, seed: int) -> Path:
    """Return the folder of the runs with a seed."""
    return folder / f"seed-{seed}" if seed else folder


def train_by_command(folder: Path, name: str, seed: int = 0) -> float | None:
    """Train one of the demo's models unless it is there; return its seconds, None for the base."""
    if name == "base":
        return None
    runs = runs_of(folder, seed)
    history = runs / name / "history.jsonl"
    if not history.exists():
        words = COMMANDS[name].format(data=folder, runs=runs).split()
        if seed:
            words += ["--seed", str(seed)]
        print("$", *words, flush=True)
        program = Path(sys.executable).with_name(words[0])
        subprocess.run([program, *words[1:]], check=True)
    return round(60 * verdict_of(ml.Run.load(runs / name)).minutes, 1)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_search(folder: Path, results: Results, deadline: float) -> None:
    """Make the search's runs, the most useful ones first, until ``deadline``."""
    pairs = read_rows(folder / "pairs/test.jsonl")[:SEARCH_PAIRS]
    train_by_command(folder, "first")
    for name in ("base", "first"):
        score_stored({"part": "start", "model": name, "seed": 0}, folder, pairs, results)
    for cell in cells(results):
        if time.perf_counter() > deadline:
            print("the time is up; the same command continues")
            return
        if results.find({"part": "search", **asdict(cell)}):
            continue
        started = time.perf_counter()
        model, tokenizer = ml.load(MODEL)
        run = ml.finetune(model, tokenizer, **settings_of_cell(cell, folder))
        line = {"part": "search", **asdict(cell), "steps": STEPS, "batch_size": BATCH}
        line |= {"loss": run.losses()[-1][1], **score(model, tokenizer, pairs)}
        results.add(line | {"seconds": round(time.perf_counter() - started, 1)})


def settings_of_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the settings of a run; it has no validation, because ``score`` follows it."""
    is_labeled = cell.objective == "kto"  # a pair is two labeled answers
    settings: dict[str, Any] = {
        "objective": cell.objective,
        "data": str(folder / ("ratings" if is_labeled else "pairs") / "train.jsonl"),
        "valid_split": 0,
        "lr_ratio": cell.lr_ratio,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "iters": STEPS,
        "batch_size": 2 * BATCH if is_labeled else BATCH,
        "adapter_path": str(folder / "search"),
        "overwrite": True,
    }
    if cell.objective != "orpo":
        settings["resume_adapter_file"] = str(folder / "first")
    if cell.objective in ("dpo", "ipo", "kto"):
        settings["reference"] = "start"
    if cell.weight is not None:
        settings[WEIGHTS[cell.objective]] = cell.weight
    return settings


def cells(results: Results) -> Iterator[Cell]:
    """Yield the runs of the search; what the first ones have found decides the later ones."""
    for objective in RATES:
        # Every rate with one seed, then the best rate of each lambda with the others.
        yield from grid(objective)
        best = {ratio: best_cell(objective, ratio, results) for ratio in RATIOS}
        for cell in best.values():
            for seed in range(1, SEEDS):
                yield replace(cell, seed=seed)

        # The strength of the objective, at the best rate of lambda 16.
        for weight in STRENGTHS[objective]:
            yield replace(best[RATIOS[-1]], weight=weight)


def grid(objective: str) -> list[Cell]:
    """Return the runs of an objective with its default strength and seed 0."""
    return [
        Cell(objective, ratio, float(f"{rate / ratio**0.5:.3g}"), None, 0)
        for ratio in RATIOS
        for rate in RATES[objective]
    ]


def best_cell(objective: str, ratio: float, results: Results) -> Cell:
    """Return the run of seed 0 that learned the preference and kept the content best.

    The measure is preferred + right; of equals, the one with the lower loss of the chosen answers.
    """
    scores: dict[Cell, tuple[float, float]] = {}
    for cell in grid(objective):
        line = results.find({"part": "search", **asdict(cell)})
        if cell.lr_ratio == ratio and line is not None:
            scores[cell] = (line["preferred"] + line["right"], -line["chosen_loss"])
    return max(scores, key=lambda cell: scores[cell])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("data", "demo", "search", "table"))
    parser.add_argument("folder", type=Path, nargs="?", help="where rows and runs are written")
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="start no run of the search after this many"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the demo's runs (default: 0)")
    options = parser.parse_args(arguments)
    if options.part == "table":
        write_tables([line for file in RESULTS.values() for line in Results(file).lines])
        return
    if options.folder is None:
        parser.error(f"{options.part} needs a FOLDER")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} is not a whole number of at least 0")

    write_rows(options.folder)
    if options.part == "demo":
        run_demo(options.folder, Results(RESULTS["demo"]), options.seed)
    elif options.part == "search":
        deadline = time.perf_counter() + 60 * options.minutes
        run_search(options.folder, Results(RESULTS["search"]), deadline)


if __name__ == "__main__":
    main()
