"""Whole runs on a tiny model and small sums, for several tests."""

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.stored_files import read_weights
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batch, arrays_of
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.runs.state import Event
from mlx_loraplus.settings import configure
from mlx_loraplus.training import trainer
from mlx_loraplus.training.compiled import CompiledByShape
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus

TIMES = {
    "seconds",
    "minutes",
    "mean_tokens_per_second",
    "valid_seconds",
    "answer_seconds",
    "started",
    "tokens_per_second",
    "memory",
    "peak_memory_gb",
    "active_memory_gb",
    "cache_memory_gb",
    "shapes",
    "resumed",
}


def examples(count: int, seed: int = 0, longest: int = 30) -> list[Example]:
    """Make examples of random tokens, half of them supervised, with their numbers as sources."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(generator.integers(3, longest))
        supervised = generator.random(length) < 0.5
        supervised[0], supervised[-1] = False, True
        made.append(
            Example(generator.integers(1, 128, length).astype(np.int32), supervised, str(number))
        )
    return made


def write_pairs(folder: Path, count: int = 24) -> None:
    """Write sums with a right and a wrong answer, some of them longer."""
    folder.mkdir()
    for name, seed, size in (("train", 0, count), ("valid", 1, 5)):
        generator = np.random.default_rng(seed)
        rows = []
        for _ in range(size):
            one, other, error = generator.integers(1, 50, 3).tolist()
            wrong = f" {one + other + error}" + " maybe" * (error % 3)
            rows.append(
                {
                    "prompt": f"{one} + {other} =",
                    "chosen": f" {one + other}",
                    "rejected": wrong,
                }
            )
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_labeled(folder: Path, count: int = 24) -> None:
    """Write sums with an answer, which is labeled true if it is right."""
    folder.mkdir()
    for name, seed, size in (("train", 0, count), ("valid", 1, 6)):
        generator = np.random.default_rng(seed)
        rows = []
        for number in range(size):
            one, other, error = generator.integers(1, 50, 3).tolist()
            wrong = f" {one + other + error}" + " maybe" * (error % 3)
            is_right = number % 2 == 0
            rows.append(
                {
                    "prompt": f"{one} + {other} =",
                    "completion": f" {one + other}" if is_right else wrong,
                    "label": is_right,
                }
            )
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def without_times(history: list[Event]) -> list[Event]:
    return [
        {name: value for name, value in event.items() if name not in TIMES} for event in history
    ]


@dataclass
class Place:
    """A tiny model and data on disk, and the settings of a run there."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def run(
        self,
        name: str = "run",
        *,
        stop_at: int = -1,
        at: dict[int, Callable[[], object]] | None = None,
        **settings: Any,
    ) -> ml.Run:
        """Train or resume in a folder; interrupt it, or call a function, when a step is reported."""
        model, tokenizer = ml.load(settings.get("model", str(self.folder / "model")))
        self.told = []
        happenings = (at or {}) | {stop_at: lambda: os.kill(os.getpid(), signal.SIGINT)}

        def log(line: str) -> None:
            self.told.append(line)
            reported = re.match(r"step +(\d+)/.*rates", line)
            happenings.get(int(reported[1]) if reported else 0, lambda: None)()

        plain = {
            "iters": 6, "batch_size": 4, "warmup": 1, "learning_rate": 1e-3, "dropout": 0.1, "steps_per_report": 1,
            "steps_per_eval": 2, "steps_per_save": 2, "sample_rows": 0, "data": str(self.folder / "data"),
            "model": str(self.folder / "model"),
        }  # fmt: skip
        return ml.finetune(
            model, tokenizer, log=log, adapter_path=str(self.folder / name), **plain | settings
        )

    def told_with(self, words: str) -> str:
        (line,) = [line for line in self.told if words in line]
        return line


def poison(place: Place, *numbers: int) -> None:
    """Make some training rows' loss not finite: they hold a character whose embedding is no number."""
    lines = (place.folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    for number in numbers:
        lines[number] = json.dumps({"prompt": "~ =", "completion": " 1"}) + "\n"
    (place.folder / "data" / "train.jsonl").write_text("".join(lines))
    weights: Any = mx.load(str(place.folder / "model" / "model.safetensors"))
    vocabulary = json.loads((place.folder / "model" / "tokenizer.json").read_text())["model"][
        "vocab"
    ]
    embedding = np.array(weights["model.embed_tokens.weight"])
    embedding[vocabulary["~"]] = np.nan
    mx.save_safetensors(
        str(place.folder / "model" / "model.safetensors"),
        weights | {"model.embed_tokens.weight": mx.array(embedding)},
    )


def validate_on_what_is_unlearned(place: Place) -> None:
    """Make the validation data unlike the training data, so that the validation loss rises."""
    row = json.dumps({"prompt": "1 + 1 =", "completion": "~~~~~"}) + "\n"
    (place.folder / "data" / "valid.jsonl").write_text(row * 4)


def adapter_of(run: ml.Run) -> dict[str, mx.array]:
    return read_weights(run.folder / "adapters.safetensors")


def keep_loops(monkeypatch: pytest.MonkeyPatch) -> list[trainer.TrainLoop]:
    """Return a list that the training loops of this test are added to."""
    loops: list[trainer.TrainLoop] = []

    class KeptLoop(trainer.TrainLoop):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            loops.append(self)

    monkeypatch.setattr(trainer, "TrainLoop", KeptLoop)
    return loops


def compiled_choices(loop: trainer.TrainLoop) -> list[Any]:
    """Return what a loop's compiled functions have seen, and which shapes are compiled."""
    kept = [loop.traces]
    if isinstance(loop._update, CompiledByShape):
        kept.append(loop._update.traces)
    return [(traces._seen, list(traces._kept)) for traces in kept]


def assert_same_step(model: Any, ways: Sequence[Sequence[Batch]]) -> None:
    """Make a step of plain SGD from each way's batches, summed; all must end at the same weights."""
    before = dict(tree_flatten(model.trainable_parameters()))
    results = []
    for batches in ways:
        model.load_weights(list(before.items()), strict=False)
        optimizer = LoRAPlus(configure(TrainConfig, {"optimizer": "sgd"}).optimizer, 10)
        optimizer.init(model, trainable_summary(model).groups)
        loss = make_loss(find_trunk_and_head(model))
        accumulate, update = make_step(model, loss, optimizer, compiled=False)
        carried, tokens = None, mx.array(float(sum(batch.target_count for batch in batches)))
        for batch in batches[:-1]:
            carried = accumulate(arrays_of(batch), carried)
        update(*accumulate(arrays_of(batches[-1]), carried), tokens)
        results.append(dict(tree_flatten(model.trainable_parameters())))

    for name, value in results[0].items():
        assert mx.abs(value - results[1][name]).max() < 1e-7, name
        assert not mx.array_equal(value, before[name])
