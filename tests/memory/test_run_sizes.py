"""A run that does not fit is refused with advice that helps, before anything is downloaded."""

from dataclasses import replace

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.nn as nn
import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.device import SIMULATED, simulate_mac
from mlx_loraplus.memory import run_sizes
from mlx_loraplus.memory.measured import MeasuredStep
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.memory.run_sizes import check_fit, resolve_grad_checkpoint
from mlx_loraplus.settings import configure


def test_a_model_that_cannot_fit_is_refused_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(SIMULATED, "16GB")
    with pytest.raises(
        ml.ConfigError, match=r"a smaller model, or one of 4 bits: the weights alone take 39\.69 GB"
    ):
        check_fit(configure(TrainConfig, {"model": "llama-3.3-70b"}))
    check_fit(configure(TrainConfig, {"model": "gemma-3-4b"}))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"grad_checkpoint": "off"}, "the same: --grad-checkpoint on (a third more time)"),
        ({"grad_checkpoint": "on"}, "the same: resume it on a machine with more memory"),
    ],
    ids=["off", "on"],
)
def test_a_resumed_run_that_trained_before_is_warned_and_others_get_advice_that_helps(
    settings: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
):
    config = configure(TrainConfig, {"model": "gemma-3-1b-it"} | settings)
    is_on = config.grad_checkpoint == "on"
    planned = memory_plan_of(config, machine=simulate_mac("16GB"))
    rows = planned.most_rows(512)
    measured = MeasuredStep(rows, 512, is_on, 1.0, planned.budget + 10**8)
    monkeypatch.setattr(run_sizes, "memory_plan_of", lambda *_: planned)
    said: list[str] = []

    def resolve(measured: MeasuredStep | None, rows: int = rows) -> bool:
        batch = (rows, 512)
        return resolve_grad_checkpoint(
            config, nn.Identity(), batch, said.append, measured, is_resumed=True
        )

    assert resolve(None) is is_on
    assert not any("warning" in line for line in said)
    assert resolve(measured) is is_on
    assert "may be used; the run continues, because it has trained this way before" in "".join(said)

    # It was not measured in this way, or not at all.
    with pytest.raises(ml.ConfigError, match="the resumed run does not fit") as error:
        resolve(None, rows + 1)
    assert advice in str(error.value)
    assert "--batch-size" not in str(error.value)
    other = replace(measured, grad_checkpoint=not is_on, peak=50 * measured.peak)
    with pytest.raises(ml.ConfigError, match="the resumed run does not fit"):
        resolve(other)
