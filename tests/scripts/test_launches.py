"""A step needs few launches, counted at a real size."""

import mlx.core as mx

from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.models.skeleton import config_of
from scripts.bench.launches import FOUR_BITS, launches, make_model, our_step, stock_step

CONFIG = config_of("gemma-3-270m") | FOUR_BITS
GPU = default_choices(gpu=True)


def test_a_gpus_step_has_at_most_1_6_times_the_launches_of_stock():
    ours = launches(our_step(make_model(CONFIG), 8, 512, GPU)).total()
    stock = launches(stock_step(make_model(CONFIG), 8, 512)).total()
    assert 3000 < stock < ours <= 1.6 * stock


def test_smaller_slices_need_more_launches():
    choices = [StepChoices("native", size * 2**20, "native") for size in (4, 64)]
    small, large = (launches(our_step(make_model(CONFIG), 8, 512, one)).total() for one in choices)
    # 1,024 and 64 slices, of eight launches each
    assert small - large == 8 * (1024 - 64)


def test_longer_rows_than_the_window_need_no_more_launches():
    """A step of 4,096 tokens has the same head, whether in one row or in eight."""
    short, long, longer = (
        launches(our_step(make_model(CONFIG), rows, 4096 // rows, GPU)).total()
        for rows in (8, 4, 1)
    )
    stock = launches(stock_step(make_model(CONFIG), 1, 4096)).total()
    assert long == longer <= 1.5 * stock
    assert short < long


def test_counting_computes_nothing():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    launches(our_step(make_model(CONFIG), 8, 512, GPU))
    assert mx.get_peak_memory() - before < 50e6
