"""LoRA at its own best rate against LoRA+ with several lambda, from both starts, at equal updates.

    scripts/study/evidence --data FOLDER --minutes 120    continue the study; Ctrl-C at any moment
    scripts/study/evidence --data FOLDER --plan           what is done, what is left, and what that costs
    scripts/study/evidence --table                        the tables in docs/research.md and the picture again, from the JSON

Every model meets every data set: FOLDER's, and the built-in demo set. First a search: each method
(a start, a lambda and an update rule: Adam, or one of scripts/study/optimizers.py) looks for its
own best eta on a grid of three rates a decade, from a guess to wherever the loss rises on both
sides, in short runs with one seed. Then the finals: LoRA, the best LoRA+ of each start, and the
other rules, at their best rates, in longer runs with several seeds, scored on the way. A seed's
batches are the same for all methods. Every trial is a line of scripts/study/results/evidence.jsonl;
a trial that is there is not made again. Pairs come one after another: a budget that ends early
leaves the later ones out.
"""

from mlx_loraplus.sweep.trial import Trial, TrialExamples, run_trial  # isort: skip  before mlx

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.eval_prompts import choose_eval_prompts
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.files import write_atomically
from mlx_loraplus.inference.generate import answer_questions, load
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.validation import score
from scripts.provenance import provenance
from scripts.study.evidence_page import LORA, RESULTS, Line, Method, write_findings
from scripts.study.optimizers import RULES

STEP = 10 ** (1 / 3)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "max_seq_length": 256,
    "rank": 8,
    "alpha": 16,
    "max_grad_norm": 1.0,
}
VALID_ROWS = QUESTIONS = 40
EDGE_RATE = -11  # STEP^-11 = 2.15e-4, the grid's nearest to the default


@dataclass(frozen=True)
class Pair:
    """A model and a data set, and how much of it is affordable.

    Attributes:
        model: Its name.
        data: "demo", or the folder's name.
        search: Updates of the search's runs.
        final: Updates of the finals.
        methods: What is searched.
        seeds: Of the finals.
        edge: Whether to look for the s lambda at which runs diverge.
    """

    model: str
    data: str
    search: int
    final: int
    methods: Sequence[Method]
    seeds: int = 3
    edge: bool = False

    @property
    def name(self) -> str:
        """How it is called in the JSON and the tables."""
        return f"{self.model}, {self.data}"


RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0)
ALL = (
    *((init, ratio, "adam") for ratio in RATIOS for init in ("init1", "init2")),
    *(("init1", 1.0, rule) for rule in RULES if rule != "adam"),
)
ADAM = tuple(method for method in ALL if method[2] == "adam")
FEW = (LORA, ("init1", 4.0, "adam"))


def pairs_of(folder: str) -> list[Pair]:
    """Return the pairs; all methods meet the demo set, whose updates are cheap, two of them the other."""
    return [
        Pair("smollm2-135m", "demo", 12, 30, ALL, edge=True),
        Pair("gemma-3-270m", folder, 12, 30, FEW),
        Pair("gemma-3-270m", "demo", 12, 30, ADAM),
        Pair("smollm2-135m", folder, 12, 30, FEW),
    ]


def guess(ratio: float, rule: str) -> int:
    """Return where to begin looking for eta, as a number of the grid: rates are STEP^number."""
    return round(math.log(3e-4 if rule == "rite" else 5e-3 / ratio**0.75, STEP))


class Evidence:
    """One pair at work.

    Args:
        pair: What.
        folder: Where its data is; none for the demo set.
        lines: Every trial that has been made, of all pairs; new ones are added.
        file: Where they are kept.
        deadline: When to start no more, as ``time.perf_counter`` has it.
    """

    def __init__(
        self, pair: Pair, folder: str | None, lines: list[Line], file: Path, deadline: float
    ):
        self.pair, self.lines, self.file, self.deadline = pair, lines, file, deadline
        self.data = () if pair.data == "demo" else (str(folder),)
        self.model, self.tokenizer = load(pair.model)
        config = configure(TrainConfig, {**SETTINGS, "model": pair.model, "data": self.data})
        examples = load_data(config, self.tokenizer, "train", "valid", "test").examples
        chosen = np.random.default_rng(0).permutation(len(examples["valid"]))[:VALID_ROWS]
        self.train, self.valid = examples["train"], examples["valid"].take(np.sort(chosen))
        self.questions = choose_eval_prompts(examples["test"], config, self.tokenizer, QUESTIONS)
        self.untrained = score(
            self.model, find_trunk_and_head(self.model), self.valid, SETTINGS["batch_size"]
        ).loss

    def run(self) -> None:
        """Search, then the finals."""
        best = {method: self.search(method) for method in self.pair.methods}
        for seed in range(self.pair.seeds):
            for method in finalists(best):
                self.trial("final", method, best[method][0], seed)
        if self.pair.edge:
            self.find_edge()

    def search(self, method: Method) -> tuple[int, float]:
        """Return a method's best rate, as a number of the grid, and its loss there."""
        losses: dict[int, float] = {}

        def loss_at(number: int) -> float:
            if number not in losses:
                losses[number] = self.trial("search", method, number, 0)["loss"] or math.inf
            return losses[number]

        best = guess(*method[1:])
        while math.isinf(loss_at(best)):
            best -= 1
        for step in (1, -1):
            while loss_at(best + step) < losses[best]:
                best += step
        return best, losses[best]

    def find_edge(self) -> None:
        """Make alpha, so s lambda, four times larger at the default eta until a run ends no better than it began."""
        alpha, loss = SETTINGS["alpha"], 0.0
        while loss < self.untrained:
            loss = (
                self.trial("edge", ("init1", 16.0, "adam"), EDGE_RATE, 0, alpha)["loss"] or math.inf
            )
            alpha *= 4

    def trial(
        self, stage: str, method: Method, number: int, seed: int, alpha: float = SETTINGS["alpha"]
    ) -> Line:
        """Return a trial's line, made now if it is not there."""
        updates = self.pair.final if stage == "final" else self.pair.search
        init, ratio, rule = method
        key = {
            "pair": self.pair.name, "stage": stage, "init": init, "lr_ratio": ratio, "rule": rule,
            "learning_rate": float(f"{STEP**number:.3g}"), "updates": updates, "seed": seed,
        } | ({"alpha": alpha} if stage == "edge" else {})  # fmt: skip
        for line in self.lines:
            if key.items() <= line.items():
                return line
        if time.perf_counter() > self.deadline:
            raise OutOfTimeError
        settings = {name: key[name] for name in ("init", "lr_ratio", "learning_rate", "seed")} | {
            "alpha": alpha
        }
        final, judged = stage == "final", {}
        config = configure(
            TrainConfig,
            {**SETTINGS, **settings, "model": self.pair.model, "data": self.data, "iters": updates,
             "warmup": updates // 10, "steps_per_report": 5, "steps_per_eval": max(1, updates // 3)},
        )  # fmt: skip

        def judge() -> None:
            given = answer_questions(self.model, self.tokenizer, self.questions)
            wanted = [question.expected or "" for question in self.questions]
            judged["exact"] = fmean(
                w.strip() == g.strip() for w, g in zip(wanted, given, strict=True)
            )

        trial, outcome = run_trial(
            self.model, config, TrialExamples(self.train, self.valid), untrained=self.untrained, rule=RULES[rule],
            validate_during=final, finish=judge if final else lambda: None,
        )  # fmt: skip
        if outcome != "finished":
            raise KeyboardInterrupt
        line = {**key, **judged, **summary(trial), **provenance()}
        self.lines.append(line)
        write_atomically(
            self.file, "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        )
        print(
            " ".join(f"{value}" for value in key.values()),
            line["loss"],
            f"{line['seconds']} s",
            flush=True,
        )
        return line


class OutOfTimeError(Exception):
    """The budget is spent."""


def summary(trial: Trial) -> Line:
    """Return what is kept of a trial."""
    curve = [
        (event["step"], event["valid_loss"]) for event in trial.history if "valid_loss" in event
    ]
    loss = trial.loss if math.isfinite(trial.loss) else None
    return {
        "loss": loss,
        "accuracy": trial.accuracy,
        "seconds": round(trial.seconds, 1),
        "curve": curve,
    }


def finalists(best: dict[Method, tuple[int, float]]) -> Iterator[Method]:
    """Yield LoRA, of each start the LoRA+ that the search found best, and the other rules."""
    yield LORA
    for init in ("init1", "init2"):
        found: dict[Method, float] = {}
        for method, (_, loss) in best.items():
            start, ratio, _ = method
            if start == init and ratio > 1:
                found[method] = loss
        if found:
            yield min(found, key=lambda method: found[method])
    yield from (method for method in best if method[2] != "adam")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="folder with train, valid and test files, the second data set"
    )
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="start no trial after this many (default: 120)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3],
        help="which of the pairs (default: all)",
    )
    parser.add_argument("--plan", action="store_true", help="print what is done and what is left")
    parser.add_argument(
        "--table", action="store_true", help="only write the tables and the picture"
    )
    options = parser.parse_args(arguments)
    file = RESULTS / "evidence.jsonl"
    lines = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.exists()
        else []
    )
    if not options.table and not options.data:
        parser.error("give --data FOLDER")
    if options.plan:
        print_plan(pairs_of(Path(options.data).name), lines)
        return
    if not options.table:
        deadline = time.perf_counter() + 60 * options.minutes
        try:
            for pair in (pairs_of(Path(options.data).name)[number] for number in options.pairs):
                Evidence(pair, options.data, lines, file, deadline).run()
        except OutOfTimeError:
            print("the time is up; the same command continues")
        except KeyboardInterrupt:
            print("stopped; the same command continues")
    if lines:
        write_findings(lines)


def print_plan(pairs: Sequence[Pair], lines: Sequence[Line]) -> None:
    """Print how much of each pair is done, and the minutes that the rest takes at the pace so far."""
    for pair in pairs:
        mine = [line for line in lines if line["pair"] == pair.name]
        done, seconds = sum(line["updates"] for line in mine), sum(line["seconds"] for line in mine)
        total = round(3.5 * len(pair.methods)) * pair.search + 9 * pair.final
        left = (
            f"about {seconds / done * max(0, total - done) / 60:.0f} minutes left"
            if done
            else "not begun"
        )
        print(
            f"{pair.name}: {len(mine)} trials, {done} of about {total} updates, {seconds / 60:.0f}"
            f" minutes; {left}"
        )


if __name__ == "__main__":
    main()
