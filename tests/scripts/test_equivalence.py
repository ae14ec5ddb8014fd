"""LoRA+ with (eta, lambda eta, s) and LoRA with (eta, eta, lambda s): one and the same, or not."""

from scripts.study.equivalence import CASES, learn  # isort: skip  before mlx

from pathlib import Path

import numpy as np
import pytest

from scripts.tiny_model import write_tiny_model

SAME = {
    "Adam",
    "Adam, weight decay 0.1, the same for A and B (ours)",
    "Adam, Init[2], LoRA's B starting λ times smaller",
    "Adam, DoRA",
    "Lion",
    "Adafactor",
    "SGD, LoRA's scale √λ s",
}


@pytest.mark.parametrize("name", [*sorted(SAME), "Adam, Init[2]", "Adam, PiSSA", "SGD"])
def test_where_they_are_one_and_where_they_part(name: str, tmp_path: Path):
    model = write_tiny_model(tmp_path / "model")
    (plus, plus_change), (_, lora_change) = (
        learn(model, CASES[name], 12, plus=plus) for plus in (True, False)
    )
    apart = np.linalg.norm(plus_change - lora_change) / np.linalg.norm(plus_change)
    assert plus[-1] < plus[0]
    assert apart < 5e-3 if name in SAME else apart > 0.1
