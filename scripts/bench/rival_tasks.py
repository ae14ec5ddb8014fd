"""The cases of scripts/bench/rivals, and the file that describes a case to a trainer."""

from scripts.bench.cases import SEED, TARGETS, Case, prepare, read_splits  # isort: skip  before mlx

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_tokenizer, save_config, save_model

from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.data.rows import Row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.device import on_gpu
from mlx_loraplus.files import write_atomically
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.models.loading import load_base
from scripts.bench.stock import ALPHA, RANK, RATE

MAX_LENGTH = 2048
HELD_OUT = 8  # rows or pairs
QUANTIZATION = {"group_size": 64, "bits": 4}  # of ``small_llama``


@dataclass(frozen=True)
class RivalCase:
    """One comparison.

    Attributes:
        title: The title in the tables.
        model: As for ``Case``.
        kind: As for ``Case``, or ``pairs`` for DPO.
        batch_size: Examples or pairs in a batch.
        updates: Timed updates, unless ``--updates`` gives another number.
        checkpoint: Whether every trainer recomputes its blocks.
    """

    title: str
    model: str
    kind: str
    batch_size: int
    updates: int
    checkpoint: bool = False

    @property
    def objective(self) -> str:
        """``sft`` or ``dpo``."""
        return "dpo" if self.kind == "pairs" else "sft"


CASES = {
    "gemma": RivalCase("Gemma 3 270M, completions", "gemma-3-270m", "completion", 8, 2),
    "gemma-checkpoint": RivalCase(
        "Gemma 3 270M, completions, checkpointed", "gemma-3-270m", "completion", 8, 1, True
    ),
    "text": RivalCase("SmolLM2 135M, text", "smollm2-135m", "text", 8, 2),
    "chats": RivalCase("SmolLM2 135M, chats", "smollm2-135m", "completion", 8, 2),
    "long": RivalCase("SmolLM2 135M, rows of 2,048 tokens", "smollm2-135m", "long", 1, 1),
    "4-bit": RivalCase("4-bit Llama of 1.3M parameters", "4-bit", "completion", 8, 4),
    "dpo": RivalCase("SmolLM2 135M, DPO", "smollm2-135m", "pairs", 4, 2),
}


def write_task(case: RivalCase, data: str | None, updates: int, folder: Path) -> dict[str, Any]:
    """Write ``task.json`` for the trainers, and the model if it has no folder yet; return the task."""
    if case.kind == "pairs":
        path = find_model(case.model).path
        model, _ = load_base(path)
        rows, held_out = write_pairs(path, data, updates * case.batch_size)
    else:
        sizes = Case(case.title, case.model, case.kind, case.batch_size, updates, ())
        task = prepare(sizes, data, updates)
        model = task.model
        rows = [as_row(each) for each in task.examples]
        held_out = [as_row(each) for each in task.held_out[:HELD_OUT]]
        if case.model == "4-bit":
            path = save_quantized(model, folder / "model")
        else:
            path = find_model(case.model).path

    content = {
        "model": str(path),
        "objective": case.objective,
        "batch_size": case.batch_size,
        "updates": updates,
        "passes": 3 if on_gpu() else 2,  # ours compiles a shape when it comes for the second time
        "targets": sorted(find_targets(model, TARGETS, -1)),
        "rank": RANK,
        "scale": ALPHA / RANK,
        "rate": RATE,
        "seed": SEED,
        "max_length": MAX_LENGTH,
        "checkpoint": case.checkpoint,
        "rows": rows,
        "held_out": held_out,
        "folder": str(folder),
    }
    write_atomically(folder / "task.json", json.dumps(content).encode())
    return content


def as_row(example: Example) -> dict[str, Any]:
    """Return an example as its tokens and where its supervised part begins."""
    first = int(np.flatnonzero(example.supervised)[0])
    if not example.supervised[first:].all():
        raise ValueError(f"{example.place} is not supervised to its end, which rivals can't do")
    return {"tokens": example.tokens.tolist(), "offset": first}


def write_pairs(
    path: Path, data: str | None, count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of pairs to train on, and those to score. The rejected answer is another row's."""
    tokenizer = load_tokenizer(path)
    splits = read_splits(data)
    if count > len(splits["train"]):
        raise SystemExit(f"error: the data has {len(splits['train'])} rows, and {count} are needed")
    return (
        pair_rows(splits["train"][:count], tokenizer),
        pair_rows(splits["valid"][:HELD_OUT], tokenizer),
    )


def pair_rows(rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
    """Return two rows for each pair: the chosen answer, then that of the row before as the rejected one."""
    found = []
    for index, row in enumerate(rows):
        prompt, chosen = row.fields["prompt"], row.fields["completion"]
        rejected = next(
            other.fields["completion"]
            for other in [*rows[:index][::-1], *rows[::-1]]
            if other.fields["completion"] != chosen
        )
        for answer in (chosen, rejected):
            tokens = tokenizer.encode(prompt + answer)
            offset = len(tokenizer.encode(prompt))
            if tokens[:offset] != tokenizer.encode(prompt):
                raise ValueError(f"row {row.line}: the answer's tokens merge with the prompt's")
            found.append(
                {
                    "tokens": tokens,
                    "offset": offset,
                    "text": prompt + answer,
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                }
            )
    return found


def save_quantized(model: nn.Module, folder: Path) -> Path:
    """Write the small model as a folder that mlx-lm loads, with SmolLM2's tokenizer, and return the folder."""
    sizes = {key: value for key, value in vars(model.args).items() if value is not None}
    sizes |= {"max_position_embeddings": MAX_LENGTH, "quantization": QUANTIZATION}
    save_model(folder, model)
    save_config(sizes, folder / "config.json")
    load_tokenizer(find_model("smollm2-135m").path).save_pretrained(folder)
    return folder
