"""Count the distinct shapes that a run's batches have, and the padding, without training.

    scripts/bench/shapes chats=FOLDER@4 answers=FOLDER@8

Each argument is a name, the data as ``--data`` takes it, and the rows in a batch. A compiled step
is traced for shapes that come back, so there should be few: at most 48 in 1,000 updates of chats
with 4 rows in a batch and at most 2,048 tokens in a row, and at most 24 for short answers with 8
rows. At most 8% of the tokens should be padding. Results go to scripts/bench/results/shapes.json.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_tokenizer

import mlx_loraplus  # noqa: F401  before mlx: it gives MLX a fast BLAS
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.data.load_data import load_examples
from mlx_loraplus.files import write_atomically
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import CompiledByShape, Traces
from scripts.provenance import provenance

RESULT = Path(__file__).parent / "results" / "shapes.json"
UPDATES = 1000
MAX_TOKENS = 2048
_CASE = re.compile(r"(\w+)=(.+)@(\d+)")

Result = dict[str, Any]


class CountingTraces(CompiledByShape):
    """Compiled functions that count how many were made, those that were dropped included."""

    made = 0

    def _compile(self) -> Any:
        self.made += 1
        return super()._compile()


def count_shapes(batches: Batches, updates: int) -> Result:
    """Count the shapes and the padding of a run's first batches, one in each update."""
    shapes: set[tuple[int, int, int]] = set()
    compiled = CountingTraces(lambda *_: None, [], Traces())
    used, tokens, supervised, targets = 0, 0, 0, 0
    for number in range(updates):
        rows = batches.rows_of(number)
        shape = batches.shape_of(rows)
        shapes.add(shape)
        compiled.count_call(mx.zeros(shape))  # never computed
        tokens += shape[0] * shape[1]
        targets += shape[2]
        used += sum(int(batches.lengths[row].sum()) for row in rows)
        supervised += sum(int(batches.target_counts[row].sum()) for row in rows)
    return {
        "examples": len(batches.examples),
        "mean_tokens": float(batches.lengths.mean()),
        "longest": int(batches.lengths.max()),
        "shapes": len(shapes),
        "traces": compiled.made,
        "padded_share": 1 - used / tokens,
        "padded_targets_share": 1 - supervised / targets,
    }


def measure(model: str, data: str, batch_size: int, updates: int) -> Result:
    """Read and tokenize the data as a run does, and count the shapes of its batches."""
    settings = {
        "model": model,
        "data": data,
        "batch_size": batch_size,
        "max_seq_length": MAX_TOKENS,
        "on_long": "truncate",
    }
    config = configure(TrainConfig, settings)
    tokenizer = load_tokenizer(find_model(model).path)
    examples = load_examples(config, tokenizer, print)["train"]
    batches = Batches(examples, batch_size, config.seed)
    return {"model": model, "batch_size": batch_size} | count_shapes(batches, updates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every case, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", metavar="NAME=DATA@ROWS")
    parser.add_argument("--models", default="smollm2-135m", help="with commas")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--no-json", action="store_true", help="print the counts alone")
    options = parser.parse_args(arguments)

    cases = {}
    for case in options.cases:
        found = _CASE.fullmatch(case)
        if found is None:
            parser.error(f"{case}: a case is NAME=DATA@ROWS, as in chats=my_folder@4")
        name, data, rows = found.groups()
        for model in options.models.split(","):
            cases[f"{name}, {model}"] = measure(model, data, int(rows), options.updates)
            print(f"{name}, {model}: {cases[f'{name}, {model}']}", flush=True)

    if not options.no_json:
        result = {**provenance(), "updates": options.updates, "cases": cases}
        write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
