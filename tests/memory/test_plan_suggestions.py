"""What a plan suggests for a batch that does not fit, and the size of a download."""

from dataclasses import replace
from typing import Any

import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.device import Machine, simulate_mac
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.settings import configure


@pytest.mark.parametrize(
    ("objective", "size", "fewer", "per_example"), [("sft", 8, 4, 1), ("dpo", 9, 1, 2)]
)
def test_the_ways_to_make_it_fit(objective: str, size: int, fewer: int, per_example: int):
    """The batch size counts pairs, which have two rows, and fewer of them divide the batch."""
    settings = {"model": "llama-3.1-8b", "grad_checkpoint": "off", "objective": objective}
    fitting = memory_plan_of(configure(TrainConfig, settings), machine=simulate_mac("24GB"))
    suggestions = fitting.suggestions(per_example * size, 2048)
    steps = size // fewer
    same = f"--grad-checkpoint on --batch-size {fewer} --grad-accumulation-steps {steps} (learns the same)"
    assert suggestions[0] == same
    assert suggestions[-1] == "a smaller model, or one of 4 bits: the weights alone take 4.52 GB"
    assert len(suggestions) >= 3
    for way in suggestions[:-1]:
        words = way.partition(" (")[0].replace("--", "").replace("-", "_").split()
        eased = dict(zip(words[::2], words[1::2], strict=True))
        changed = memory_plan_of(
            configure(TrainConfig, settings | eased), machine=simulate_mac("24GB")
        )
        rows = per_example * int(eased.get("batch_size", size))
        assert changed.fits(rows, int(eased.get("max_seq_length", 2048)))


@pytest.mark.parametrize(
    ("name", "settings", "machine"),
    [
        ("qwen3-0.6b", {}, replace(simulate_mac("64GB"), backend="cpu")),
        ("llama-3.2-1b", {"train_modules": ["norms"]}, simulate_mac("64GB")),
        ("smollm2-135m", {"adapter": "full"}, simulate_mac("64GB")),
    ],
)
def test_a_download_depends_neither_on_the_machine_nor_on_what_trains(
    name: str, settings: dict[str, Any], machine: Machine
):
    alone = memory_plan_of(configure(TrainConfig, {"model": name}), machine=simulate_mac("8GB"))
    config = configure(TrainConfig, {"model": name, **settings})
    assert memory_plan_of(config, machine=machine).download == alone.download
