"""A step needs few launches, counted at a real size."""

import mlx.core as mx

from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.models.skeleton import config_of
from scripts.bench.launches import FOUR_BITS, launches, make_model, our_step, stock_step

CONFIG = config_of("gemma-3-270m") | FOUR_BITS


def test_a_gpus_step_has_at_most_1_6_times_the_launches_of_stock():
    ours = launches(our_step(make_model(CONFIG), 8, 512, default_choices(gpu=True))).total()
    stock = launches(stock_step(make_model(CONFIG), 8, 512)).total()
    assert 3000 < stock < ours <= 1.6 * stock


def test_smaller_slices_need_more_launches():
    choices = [StepChoices("native", size * 2**20, "native") for size in (4, 32)]
    small, large = (launches(our_step(make_model(CONFIG), 8, 512, one)).total() for one in choices)
    # 1,024 and 128 slices, of nine launches each
    assert small - large == 9 * (1024 - 128)


def test_counting_computes_nothing():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    launches(our_step(make_model(CONFIG), 8, 512, default_choices(gpu=True)))
    assert mx.get_peak_memory() - before < 50e6
