"""Sliding-window attention in blocks computes what MLX's own does, with its gradients."""

import io

import mlx.core as mx
import pytest

import mlx_loraplus.kernels.window_attention as window_module
from mlx_loraplus.kernels.attention import CausalMask
from mlx_loraplus.kernels.patch import replaced_attention
from mlx_loraplus.kernels.window_attention import Blocks, window_attention

NATIVE = mx.fast.scaled_dot_product_attention
Arrays = tuple[mx.array, mx.array, mx.array]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "BLOCK", 8)


def relative(one: mx.array, other: mx.array) -> float:
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return (mx.linalg.norm((one - other).flatten()) / mx.linalg.norm(other.flatten())).item()  # pyright: ignore[reportReturnType]


def inputs(heads: tuple[int, int], length: int, dtype: mx.Dtype = mx.float32) -> Arrays:
    keys = mx.random.split(mx.random.key(length), 3)
    q = mx.random.normal((2, heads[0], length, 16), key=keys[0])
    k = mx.random.normal((2, heads[1], length, 16), key=keys[1])
    v = mx.random.normal((2, heads[1], length, 12), key=keys[2])
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def learn(
    arrays: Arrays, mask: CausalMask, *, ours: bool = True, compiled: bool = False
) -> tuple[mx.array, Arrays]:
    """The output, and the gradients of q, k and v."""
    length, whole = arrays[0].shape[2], slice(0, arrays[0].shape[2])
    weights = mx.random.normal((2, arrays[0].shape[1], length, 12), key=mx.random.key(9))

    def loss(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        if ours:
            out = window_attention(q, k, v, 0.3, mask)
        else:
            out = NATIVE(q, k, v, scale=0.3, mask=mask.part(whole, whole))
        return (out.astype(mx.float32) * weights).sum(), out

    function = mx.value_and_grad(loss, argnums=(0, 1, 2))
    (_, out), gradients = (mx.compile(function) if compiled else function)(*arrays)
    return out, gradients


def segments_of(length: int) -> mx.array:
    """Two rows of examples; the first one ends with padding."""
    first = [1] * (length // 3) + [2] * (length // 2)
    return mx.array([first + [0] * (length - len(first)), [1] * length])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("length", [18, 24, 37])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_and_its_gradients_are_mlxs_own(
    heads: tuple[int, int], window: int, length: int, packed: bool
):
    mask = CausalMask(window, segments_of(length) if packed else None)
    out, gradients = learn(inputs(heads, length), mask)
    expected, others = learn(inputs(heads, length), mask, ours=False)
    assert relative(out, expected) < 1e-6
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.shape == other.shape
        assert mx.abs(gradient - other).max() <= 1e-5 * max(1, mx.abs(other).max().item())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("window", "length"), [(21, 21), (40, 21), (3, 5), (1, 1)])
def test_windows_of_the_whole_row_and_rows_shorter_than_a_block(window: int, length: int):
    out, gradients = learn(inputs((4, 2), length), CausalMask(window))
    expected, others = learn(inputs((4, 2), length), CausalMask(window), ours=False)
    assert relative(out, expected) < 1e-6
    for gradient, other in zip(gradients, others, strict=True):
        assert mx.abs(gradient - other).max() <= 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_groups_of_blocks_give_what_one_group_gives(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
):
    mask = CausalMask(11, segments_of(53))
    expected, others = learn(inputs((4, 2), 53), mask)
    blocks = Blocks(2, 4, 2, 53, 11)
    assert list(blocks.groups(4)) == [slice(0, 7)]

    # Three blocks fit into a group: 8 queries and 24 keys each, for 2 rows of 4 heads.
    monkeypatch.setattr(window_module, "GROUP_BYTES", 3 * 4 * 2 * 4 * 8 * 24)
    assert list(blocks.groups(4)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    out, gradients = learn(inputs((4, 2), 53), mask, compiled=compiled)
    assert relative(out, expected) < 1e-6
    for gradient, other in zip(gradients, others, strict=True):
        assert relative(gradient, other) < 1e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_is_as_close_to_float32_as_mlxs_own(dtype: mx.Dtype, compiled: bool):
    mask, arrays = CausalMask(11), inputs((4, 2), 53, dtype)
    out, gradients = learn(arrays, mask, compiled=compiled)
    stock_out, stock = learn(arrays, mask, ours=False)
    right_out, right = learn((arrays[0].astype(mx.float32), *arrays[1:]), mask, ours=False)
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3
    assert relative(out, right_out) < 1.5 * relative(stock_out, right_out)
    for gradient, other, expected in zip(gradients, stock, right, strict=True):
        assert relative(gradient, expected) < 1.5 * relative(other, expected)


def test_the_number_of_operations_does_not_depend_on_the_length():
    def count(length: int) -> int:
        out, gradients = learn(inputs((4, 2), length), CausalMask(11), compiled=True)
        text = io.StringIO()
        mx.export_to_dot(text, out, *gradients)
        return text.getvalue().count("shape=rectangle")

    assert count(32) == count(128)


def test_rows_longer_than_the_window_take_it_with_native_attention(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[int | None] = []

    def counted(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: CausalMask) -> mx.array:
        calls.append(mask.window)
        return window_attention(q, k, v, scale, mask)

    monkeypatch.setattr("mlx_loraplus.kernels.patch.window_attention", counted)
    arrays = inputs((4, 2), 21)
    for kind, expected in (("native", [11]), ("chunked", [])):
        calls.clear()
        with replaced_attention(kind):
            for mask in (CausalMask(11), CausalMask(21), CausalMask(), "causal"):
                mx.fast.scaled_dot_product_attention(*arrays, scale=0.3, mask=mask)  # pyright: ignore[reportArgumentType]
        assert calls == expected
