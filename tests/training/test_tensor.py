"""Processes that hold a part of the model each train as one that holds it all: real ones, on 127.0.0.1."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_loraplus as ml
from mlx_loraplus.adapters.dropout import Dropout, drawing_from
from mlx_loraplus.adapters.stored_files import read_weights
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.settings import configure
from mlx_loraplus.training.distributed import World
from mlx_loraplus.training.run_checks import check_world
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import CONFIGS, make_model
from tests.training.teams import MOST, Runs, do_jobs, wait_for, world

PLAIN = {
    "iters": 8, "batch_size": 4, "lr_ratio": 16, "learning_rate": 5e-4, "warmup": 2, "steps_per_report": 1,
    "steps_per_eval": 8, "steps_per_save": 8, "schedule": "constant", "rank": 4, "sample_rows": 0,
}  # fmt: skip
# Of each model: its config's changes, how it is quantized, and settings that go another way through
# the code.
SMALL = {"num_hidden_layers": 2}
GEMMA = {**SMALL, "sliding_window_pattern": 2, "num_key_value_heads": 2}
EQUAL: dict[str, tuple[str, dict[str, Any], int | None, dict[str, Any]]] = {
    "llama": ("llama", SMALL, None, {"pack": True, "grad_accumulation_steps": 2, "dropout": 0.2, "max_seq_length": 64}),
    "gemma 3": ("gemma3", GEMMA, None, {"grad_checkpoint": "on", "dropout": 0.1}),
    "gemma 2": ("gemma2", {}, None, {"iters": 3}),
    "qwen 3": ("qwen3", {}, None, {"iters": 3, "init": "init2", "sample_rows": 1}),
    "llama, 4 bits": ("llama", {**SMALL, "intermediate_size": 128}, 4, {
        "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "gemma 3, 8 bits": ("gemma3", {**GEMMA, "intermediate_size": 128}, 8, {
        "iters": 3, "optimizer": "muon", "target_modules": ["all-linear", "embed_tokens"]}),
}  # fmt: skip


def write_model(folder: Path, kind: str, changes: dict[str, Any], bits: int | None) -> Path:
    """Write a tiny model's folder, with the tokenizer of the tiny Llama."""
    write_tiny_model(folder)
    config, before = CONFIGS[kind] | changes, CONFIGS[kind]
    CONFIGS[kind] = config
    try:
        model = make_model(kind, bits=bits)
    finally:
        CONFIGS[kind] = before
    quantized = {"quantization": {"group_size": 32, "bits": bits}} if bits else {}
    (folder / "config.json").write_text(json.dumps(config | quantized))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("tensor")
    write_sums(folder / "data")
    for name, (kind, changes, bits, _) in EQUAL.items():
        write_model(folder / name, kind, changes, bits)
    write_model(folder / "one key head", "gemma3", {}, None)
    write_model(folder / "cohere", "cohere", {}, None)
    write_model(folder / "experts", "qwen3_moe", {}, None)
    write_model(folder / "few groups", "llama", {"intermediate_size": 96}, 4)  # 3 groups of 32
    write_tiny_model(folder / "wide", hidden=512, layers=4)
    return Runs(folder, PLAIN)


@pytest.fixture(scope="module")
def two(tensor: Runs) -> dict[str, list[dict]]:
    """What two processes say of all that is asked of two, in one go."""
    tensor.alone("alone first", "llama", iters=3, dropout=0.2)
    jobs = {
        **{
            name: tensor.job(f"2 {name}", name, **settings)
            for name, (_, _, _, settings) in EQUAL.items()
        },
        "first leg": tensor.job("two first", "llama", iters=3, dropout=0.2),
        "second leg": tensor.job("alone first", "llama", iters=6, dropout=0.2, resume=True),
        "load": tensor.job("2 wide", "wide", iters=1),
        "one key head": tensor.job("no", "one key head"),
        "cohere": tensor.job("no", "cohere"),
        "experts": tensor.job("no", "experts"),
        "few groups": tensor.job("no", "few groups"),
        "dora": tensor.job("no", "llama", adapter="dora"),
        "vera": tensor.job("no", "llama", adapter="vera", alpha=16.0),
        "pissa": tensor.job("no", "llama", init="pissa"),
        "norms": tensor.job("no", "llama", train_modules=["norms"]),
    }
    jobs = {name: job | {"parallel": "tensor"} for name, job in jobs.items()}
    jobs["not for tensor"] = tensor.job("no", "llama") | {"parallel": "data", "divided": True}
    done = do_jobs(2, list(jobs.values()), tensor.folder / "two")
    return dict(zip(jobs, done, strict=True))


@pytest.mark.parametrize("name", EQUAL)
def test_two_are_as_one(name: str, tensor: Runs, two: dict[str, list[dict]]):
    alone = tensor.alone(f"1 {name}", name, **EQUAL[name][3])
    for field in ("loss", "valid_loss", "grad_norm"):
        one = [event[field] for event in alone.history if field in event]
        for said in two[name]:
            assert [event[field] for event in said["history"] if field in event] == pytest.approx(
                one, rel=1e-4
            )
    learned, ours = (
        read_weights(tensor.folder / f"{n} {name}" / "adapters.safetensors") for n in (1, 2)
    )
    assert learned.keys() == ours.keys()
    for path, array in learned.items():
        np.testing.assert_allclose(np.array(ours[path]), np.array(array), atol=1e-4)
    configs = [
        json.loads((tensor.folder / f"{n} {name}" / "adapter_config.json").read_text())
        for n in (1, 2)
    ]
    assert configs[0] == configs[1]  # whose fingerprint is that of the whole base
    assert not (tensor.folder / "never").exists()


@pytest.mark.parametrize("name", ["llama", "gemma 3", "llama, 4 bits"])
def test_stock_mlx_lm_loads_what_two_have_learned(
    name: str, tensor: Runs, two: dict[str, list[dict]]
):
    assert two[name][0]["outcome"] == "finished"
    place = tensor.folder / name
    ours, _ = ml.load(str(place), tensor.folder / f"2 {name}")
    model: nn.Module
    model, *_ = mlx_lm.load(str(place), adapter_path=str(tensor.folder / f"2 {name}"))
    tokens = mx.array([[3, 9, 4, 7, 5, 8]])
    plain, _ = ml.load(str(place))
    assert (mx.abs(ours(tokens) - plain(tokens)).max() > 1e-2).item()
    np.testing.assert_allclose(np.array(model(tokens)), np.array(ours(tokens)), atol=1e-4)


def test_another_number_of_processes_goes_on(tensor: Runs, two: dict[str, list[dict]]):
    whole = tensor.alone("whole", "llama", iters=6, dropout=0.2)
    resumed = tensor.alone("two first", "llama", iters=6, dropout=0.2, resume=True)
    losses = [event["loss"] for event in whole.history if "loss" in event]
    for history in (resumed.history, two["second leg"][0]["history"]):
        assert [event["loss"] for event in history if "loss" in event] == pytest.approx(
            losses, rel=1e-4
        )


def test_no_process_holds_the_whole_model(tensor: Runs, two: dict[str, list[dict]]):
    model, _ = ml.load(str(tensor.folder / "wide"))
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    sizes = {name: array.nbytes for name, array in arrays.items()}
    whole = sum(size for name, size in sizes.items() if "layers" not in name)
    divided, block = (
        sum(sizes.values()) - whole,
        sum(size for name, size in sizes.items() if "layers.0." in name),
    )
    for said in two["load"]:
        assert said["loaded"] == pytest.approx(
            whole + divided / 2, rel=0.01
        )  # norms are not divided
        assert said["peak"] < whole + divided / 2 + 1.1 * block


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one key head", "can't be sharded over 2 processes: it has 1 key head"),
        ("cohere", "models of type cohere can't be sharded"),
        ("experts", "models with experts"),
        ("few groups", "down_proj has 3 groups of 32 inputs"),
        ("dora", 'adapter="dora" does not work with parallel="tensor"'),
        ("vera", 'adapter="vera" does not work with parallel="tensor"'),
        ("pissa", 'init="pissa" needs whole weights'),
        ("norms", 'train_modules does not work with parallel="tensor"'),
        ("not for tensor", 'such a model needs parallel="tensor"'),
    ],
)
def test_what_cant_be_divided_is_refused(name: str, words: str, two: dict[str, list[dict]]):
    for said in two[name]:
        assert words in said["error"]
        assert "\n" not in said["error"]


def test_the_command_refuses_with_one_line(tensor: Runs, tmp_path: Path):
    words = tensor.words(str(tmp_path / "run"), "one key head", parallel="tensor")
    with world(2, words, tmp_path / "team") as processes:
        assert [process.wait(MOST) for process in processes] == [2, 2]
    first, second = ((tmp_path / "team" / f"{rank}.log").read_text() for rank in (0, 1))
    assert [line for line in first.splitlines() if "error" in line] == [
        "error: this model can't be sharded over 2 processes: it has 1 key head; use another"
        " number of processes, or --parallel data"
    ]
    assert "error" not in second


def test_one_that_dies_stops_the_other_with_a_checkpoint(tensor: Runs, tmp_path: Path):
    words = tensor.words(str(tmp_path / "run"), "llama", parallel="tensor", iters=100_000)
    with world(2, words, tmp_path / "team") as (first, second):
        log = tmp_path / "team" / "0.log"
        wait_for(log, " 3/100000", [first])
        second.kill()
        assert first.wait(MOST) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "another process has ended" in line
    last = max((tmp_path / "run" / "checkpoints").glob("0*"))
    words[words.index("100000")] = str(int(last.name))  # nothing is left to train
    subprocess.run([sys.executable, "-m", *words, "--resume"], check=True, capture_output=True)


class Half:
    """The first of two processes, for what computes nothing."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def test_a_part_is_planned_as_what_it_holds():
    config = configure(TrainConfig, {"model": "llama-3.1-8b", "rank": 8})
    two: Any = Half()
    whole, half = (memory_plan_of(config, group=group).sizes for group in (None, two))
    head = (
        2 * 128_256 * 4096 * (1 / 2 + 2 * half.itemsize / 64)
    )  # embedding, head: 4 bits, of 64 a scale and a bias
    assert half.weights == pytest.approx(head + (whole.weights - head) / 2, rel=0.01)
    assert half.trained == whole.trained
    for ours, theirs in zip(half.blocks, whole.blocks, strict=True):
        assert (ours.queries, ours.keys, ours.mlp) == (
            theirs.queries // 2,
            theirs.keys // 2,
            theirs.mlp // 2,
        )
        assert ours.hidden == theirs.hidden


def test_a_mask_of_dropout_is_the_same_in_parts():
    dropout, x = Dropout(0.5), mx.ones((3, 4, 10))
    key = mx.random.key(7)
    masks = []
    for part in (None, 0, 1):
        with drawing_from(key):
            masks.append(dropout(x) if part is None else dropout(x[..., :5], (part, 2)))
    assert mx.array_equal(masks[0], mx.concatenate(masks[1:], axis=-1))
    assert 0 < (masks[0] == 0).sum().item() < x.size


def test_one_process_is_told_that_nothing_is_divided():
    notes: list[str] = []
    config = configure(TrainConfig, {"model": "llama-3.1-8b", "parallel": "tensor"})
    check_world(config, nn.Module(), World(parallel="tensor"), notes.append)
    assert notes == ["note: --parallel tensor has no effect in one process: --launch 2 starts two"]
