"""The simulation's formula, and what it counts."""

import pytest

from scripts.study.scaling import LINKS, ROWS, Link, Work, work


def test_a_ring_sends_each_part_around_twice():
    link = Link(bandwidth=1e9, latency=1e-3)
    assert link.all_reduce(1, 8e9) == 0
    assert link.all_reduce(2, 1e9) == pytest.approx(
        1 + 2e-3
    )  # half of it there, half of it back, one after the other
    assert link.all_reduce(4, 1e9) == pytest.approx(1.5 + 6e-3)


def test_an_update_computes_a_share_and_sends():
    link, alone = Link(1e9, 0.0), Work(seconds=8.0, gradients=1e9)
    assert alone.update(1, link) == 8
    assert alone.update(2, link) == pytest.approx(4 + 1)
    assert alone.speed(4, link) == pytest.approx(8 / (2 + 1.5))
    divided = Work(seconds=8.0, gradients=0.0, messages=10, activations=1e8)
    assert divided.update(2, link) == pytest.approx(4 + 10 * 0.1)


def test_the_end_is_where_half_of_each_mac_waits():
    one = Work(seconds=10.0, gradients=1e9)
    link = Link(1e9, 0.0)  # 10 / N of computing and 2 (N - 1) / N of sending: as long at N = 6
    assert one.end(link) == 6
    assert Work(seconds=10.0, gradients=1e6).end(link) == ROWS
    assert Work(seconds=10.0, gradients=1e12).end(link) == 1


def test_what_is_sent_is_counted_from_the_model():
    lora, full = work("llama-3.1-8b", 8), work("llama-3.1-8b", None)
    linear = (
        4096 * 2 + 2 * (4096 + 1024) + 3 * (4096 + 14_336) + 4096 * 2
    )  # of a block: q, k and v, MLP, o: in + out
    assert lora.gradients == 4 * 8 * 32 * linear
    assert full.gradients == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert full.seconds == pytest.approx(1.5 * lora.seconds)
    divided = work("llama-3.1-8b", 8, tensor=True)
    assert (divided.messages, divided.activations, divided.most) == (
        4 * 32 * 4,
        4 * 512 * 4096 * 2,
        8,
    )
    assert divided.gradients == lora.gradients


def test_rdma_is_what_tensor_parallel_asks_for():
    divided = work("llama-3.3-70b", 8, tensor=True)
    speeds = [divided.speed(2, link) for link in LINKS.values()]
    assert speeds == sorted(speeds)
    assert speeds[0] < 1 < speeds[-1]
