"""The benchmark's harness, on a tiny model: both trainers run on the same tokens, and learn the same from them."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_loraplus.data.batches import Batches, one_per_row
from mlx_loraplus.data.packing import PackedBatches
from mlx_loraplus.data.tokenize import Example
from scripts.bench import adapters as bench_adapters
from scripts.bench import bench
from scripts.bench.cases import Task, sizes_of
from scripts.bench.curve import exponent
from scripts.bench.shapes import count_shapes
from scripts.bench.trainers import _FirstTwice, measure, measure_parity, stock_batch
from tests.conftest import TinyModel

BATCH = 4


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Stock compiles its step, which on a CPU builds kernels with g++ for half a minute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def completions(count: int) -> list[Example]:
    """Rows of 5 to 60 tokens, supervised from somewhere to their end."""
    generator = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        length = int(generator.integers(5, 60))
        supervised = np.arange(length) >= generator.integers(1, length)
        rows.append(
            Example(
                generator.integers(1, 128, length).astype(np.int32), supervised, "train.jsonl:1"
            )
        )
    return rows


def task(tiny: TinyModel, batches: int, kind: str = "llama") -> Task:
    rows = completions(BATCH * (batches + 1))
    return Task(tiny(kind), rows[:-BATCH], rows[-BATCH:], BATCH)


def test_shapes_traces_and_padding_are_counted():
    batches = Batches(completions(40), BATCH, 0)
    counted = count_shapes(batches, 50)
    made = [batches[number] for number in range(50)]
    tokens = sum(batch.tokens.size for batch in made)
    assert counted["padded_share"] == pytest.approx(1 - sum(b.token_count for b in made) / tokens)
    assert counted["shapes"] == len({(b.tokens.shape, b.targets.shape) for b in made})
    assert 0 < counted["traces"] <= counted["shapes"]


def test_all_trainers_are_measured_on_the_same_tokens(tiny: TinyModel):
    trainers = ("stock", "ours", "ours+checkpoint", "ours+pack")
    runs = [{"repeat": 0, **vars(measure(trainer, task(tiny, 3), 3))} for trainer in trainers]
    rows = task(tiny, 3).examples
    for run in runs:
        assert run["useful_tokens"] == sum(len(row.tokens) - 1 for row in rows)
        assert run["supervised_tokens"] == sum(int(row.supervised.sum()) for row in rows)
        assert run["peak_bytes"] > run["base_bytes"] > 0
        assert run["held_out_loss"] < 6
        assert len(run["losses"]) == len(run["seconds"]) + 1
    stock, ours = runs[:2]
    assert 0 < stock["supervised_pads"] <= len(rows)
    assert ours["supervised_pads"] == 0
    assert ours["padded_tokens"] < stock["padded_tokens"]
    assert ours["flops"] < stock["flops"]
    assert runs[2]["held_out_loss"] == pytest.approx(
        ours["held_out_loss"], rel=1e-4
    )  # the same training
    assert set(ours["phases"]) == {"trunk_forward", "head_loss", "backward", "optimizer"}

    case = bench.Case("tiny", "tiny", "completion", BATCH, 3, trainers)
    result = bench.assemble("a", case, runs, None, 3)
    assert result["data"] == "demo"
    assert result["medians"]["stock"]["speed_to_stock"] == 1
    text = bench.markdown([result])
    assert all(f"| {trainer} |" in text for trainer in trainers)


@pytest.mark.parametrize("kind", [Batches, PackedBatches])
def test_the_batch_that_is_not_timed_is_the_first_of_the_same_batches(kind: type[Batches]):
    batches = kind(completions(30), BATCH, 0, *([64] if kind is PackedBatches else []))
    twice = _FirstTwice(batches)
    for n in range(batches.per_epoch):
        batch = twice.collate(twice.rows_of(n))  # as the loop reads them
        np.testing.assert_array_equal(batch.tokens, batches[max(n - 1, 0)].tokens)


def test_fewer_supervised_tokens_than_stock_are_refused():
    stock = {"trainer": "stock", "useful_tokens": 100, "supervised_tokens": 40}
    bench.check_tokens([stock, stock | {"trainer": "ours", "supervised_tokens": 41}])
    with pytest.raises(RuntimeError, match="ours learned 39 tokens, stock 40"):
        bench.check_tokens([stock, stock | {"trainer": "ours", "supervised_tokens": 39}])
    with pytest.raises(RuntimeError, match="99 inputs"):
        bench.check_tokens([stock, stock | {"trainer": "ours", "useful_tokens": 99}])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_losses_equal_those_of_stock_on_our_batches(tiny: TinyModel, kind: str):
    curves = measure_parity(task(tiny, 4, kind), 10)
    assert len(curves["stock"]) == len(curves["ours"]) == 10
    assert abs(curves["stock"][0] - curves["stock"][-1]) > 0.02  # something was learned
    np.testing.assert_allclose(curves["ours"], curves["stock"], rtol=1e-5)


def test_a_batch_of_ours_in_the_form_of_stock_holds_the_same_targets():
    batch = one_per_row(completions(BATCH))
    tokens, spans = (np.array(array) for array in stock_batch(batch))
    steps = np.arange(1, tokens.shape[1])
    mask = (steps >= spans[:, :1]) & (steps <= spans[:, 1:])  # as default_loss has it
    inputs = (
        batch.tokens > 0
    )  # the last target stands behind them, where nothing supervised sees it
    np.testing.assert_array_equal(tokens[:, :-1][inputs], batch.tokens[inputs])
    np.testing.assert_array_equal(tokens[:, 1:][mask], batch.targets[: batch.target_count])


def test_flops_of_a_step_are_those_of_its_matrices(tiny: TinyModel):
    sizes = sizes_of(tiny("llama"))
    assert len(sizes.linears) == 3 * 7
    assert sizes.head == 128 * 64
    assert sizes.queries == 3 * 64
    linear = 2 * sum(o * i for o, i in sizes.linears)
    adapter = 2 * 4 * sum(o + i for o, i in sizes.linears)
    attention = 4 * 5**2 * sizes.queries
    expected = 3 * 5 * (2 * linear + 3 * adapter) + 3 * 3 * attention + 4 * 7 * sizes.head
    assert sizes.step_flops(4, rows=3, length=5, positions=7, grad_checkpoint=False) == expected
    again = 3 * 5 * (linear + adapter) + 3 * attention
    assert (
        sizes.step_flops(4, rows=3, length=5, positions=7, grad_checkpoint=True) == expected + again
    )


def test_the_table_goes_between_the_markers(tmp_path, monkeypatch, capsys):
    numbers = {
        "useful_tokens": 90,
        "supervised_tokens": 40,
        "padded_tokens": 120,
        "shapes": [[1, 2]],
        "seconds": [2.0],
    }
    numbers |= {
        "supervised_pads": 0,
        "base_bytes": 10,
        "held_out_loss": 1.0,
        "phases": {},
        "flops": 1e9,
    }
    numbers |= {"matmul_flops_per_second": 1e10, "repeat": 0}
    runs = [numbers | {"trainer": "stock", "peak_bytes": 110}]
    runs += [numbers | {"trainer": "ours", "peak_bytes": 60, "seconds": [1.0]}]
    case = bench.Case("Tiny", "tiny", "completion", 8, 1, ("stock", "ours"))
    page, stored = tmp_path / "benchmarks.md", tmp_path / "results"
    monkeypatch.setattr(bench, "PAGES", {"bench": page})
    monkeypatch.setattr(bench, "RESULTS", stored)
    bench.write_json("a", bench.assemble("a", case, runs, "/somewhere/wikisql/", 1))
    assert "somewhere" not in (stored / "a.json").read_text()

    start, end = "<!-- bench:start -->", "<!-- bench:end -->"
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    bench.main(["--table"])
    text = page.read_text()
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "2.00x" in text
    assert "0.500" in text
    assert "wikisql rows" in text

    page.write_text("no markers\n")
    bench.main(["--table"])
    assert page.read_text() == "no markers\n"
    assert "2.00x" in capsys.readouterr().out


def test_exponent_is_that_of_a_power_law():
    assert exponent([1, 2, 4, 8], [3 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_every_adapter_is_measured_and_put_into_the_table(
    tiny: TinyModel, tmp_path, monkeypatch, capsys
):
    rows = completions(BATCH * 3)
    methods = {}
    for name, settings in bench_adapters.METHODS.items():
        small = {"rank": 4, "batch_size": BATCH}
        if "quantize" in settings or settings.get("init") == "loftq":
            small["quantize_group_size"] = 32
        monkeypatch.setattr(bench_adapters, "BITS", {"group_size": 32, "bits": 4})
        methods[name] = bench_adapters.train(
            tiny("llama"),
            rows[:-BATCH],
            rows[-BATCH:],
            settings | small,
            2,
            quantized=name == bench_adapters.OVER_BITS,
        )
    over = {name for name in methods if "4 bits" in name}
    for name, row in methods.items():
        assert row["loss_after"] != row["loss_before"]
        assert (row["seconds"] is None) == (row["peak_above_weights"] is None) == (name in over)
    assert methods["LoftQ+ over 4 bits"]["residual"] < methods["PiSSA+ over 4 bits"]["residual"]
    assert (
        methods["VeRA+"]["trainable"]
        < methods["LoRA+"]["trainable"]
        < methods["DoRA+"]["trainable"]
    )

    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "PAGES", {"adapters": tmp_path / "adapters.md"})
    result = {
        "case": "adapters",
        "model": "tiny",
        "data": "demo",
        "batch_size": BATCH,
        "updates": 2,
    }
    bench.write_json("adapters", {**result, **bench.provenance(), "methods": methods})
    bench.main(["--table"])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in methods)
    assert "1.00x" in printed
