"""Compare what ``generate`` asks a trained model with the prompts that it was trained on, id for id.

    python -m scripts.stress.same_prompts RUN DATA

Prints how many rows have a prompt, as ``generate`` writes it, that is what comes before the last
supervised turn in training. Exit code 1 unless all have.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import json
import sys
from pathlib import Path
from typing import Any

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.eval_prompts import _divide_last_turn
from mlx_loraplus.data.encode_prompt import encode_prompt
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.inference.generate import load, system_message
from mlx_loraplus.models.prompt_format import format_of
from mlx_loraplus.settings import configure

QUESTIONS = ("prompt", "instruction", "question")


def asked(row: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    """Return the messages before a row's last question, and the question."""
    if "messages" in row:
        last = max(n for n, message in enumerate(row["messages"]) if message["role"] == "user")
        return row["messages"][:last], row["messages"][last]["content"]
    return [], next(row[name] for name in QUESTIONS if name in row)


def main() -> int:
    """Compare every row."""
    run, data = sys.argv[1:]
    model, tokenizer = load(run)
    config = configure(TrainConfig, {"data": data, "valid_split": 0.0})
    examples = load_data(config, tokenizer, "train").examples["train"]
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]

    same = 0
    for row, example in zip(rows, examples, strict=True):
        earlier, question = asked(row)
        ids = encode_prompt(
            question,
            tokenizer,
            earlier=[*system_message(model, None), *earlier],
            form=format_of(model),
            tools=row.get("tools", ()),
        )
        same += ids == _divide_last_turn(example)[0]
    print(f"{same} of {len(rows)} prompts are those of training")
    return int(same != len(rows))


if __name__ == "__main__":
    sys.exit(main())
