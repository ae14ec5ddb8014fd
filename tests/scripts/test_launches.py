"""A step needs few launches, counted at a real size."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.models.skeleton import config_of
from scripts.bench import launches as script
from scripts.bench.launches import (
    CASES,
    FOUR_BITS,
    LIMIT,
    launches,
    make_model,
    our_step,
    stock_step,
)

CONFIG = config_of("gemma-3-270m") | FOUR_BITS
GPU = default_choices(gpu=True)


@pytest.mark.parametrize(("name", "rows", "length"), CASES)
def test_a_gpus_step_has_at_most_1_5_times_the_launches_of_stock(name: str, rows: int, length: int):
    config = config_of(name) | FOUR_BITS
    ours = launches(our_step(make_model(config), rows, length, GPU)).total()
    stock = launches(stock_step(make_model(config), rows, length)).total()
    assert 3000 < stock < ours <= LIMIT * stock
    assert LIMIT == 1.5


@pytest.mark.parametrize(("limit", "found"), [(1.5, "met"), (1.1, "missed")])
def test_the_script_fails_if_a_step_has_more_launches_than_it_may(
    limit: float,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    result = tmp_path / "launches.json"
    for name, value in (("CASES", CASES[-1:]), ("LIMIT", limit), ("RESULT", result)):
        monkeypatch.setattr(script, name, value)
    if found == "met":
        script.main([])
    else:
        with pytest.raises(SystemExit) as stop:
            script.main([])
        assert stop.value.code == 1
    assert capsys.readouterr().out.endswith(f" (at most {limit}: {found})\n")
    assert len(json.loads(result.read_text())["counts"]) == 1


def test_smaller_slices_need_more_launches():
    choices = [StepChoices("native", size * 2**20, "native") for size in (4, 64)]
    small, large = (launches(our_step(make_model(CONFIG), 8, 512, one)).total() for one in choices)
    # 1,024 and 64 slices, of eight launches each
    assert small - large == 8 * (1024 - 64)


def test_the_number_of_launches_does_not_depend_on_the_length():
    """A step of 8,192 tokens has the same head, whether in one row or in eight."""
    long, longer = (
        launches(our_step(make_model(CONFIG), rows, 8192 // rows, GPU)).total() for rows in (8, 1)
    )
    assert long == longer


def test_counting_computes_nothing():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    launches(our_step(make_model(CONFIG), 8, 512, GPU))
    assert mx.get_peak_memory() - before < 50e6
