"""``--launch``: the variables that each process gets, and a GPU for each with CUDA."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_loraplus as ml
from mlx_loraplus import launching
from mlx_loraplus.launching import (
    free_ports,
    launch,
    nccl_environments,
    pick_gpus,
    ring_environments,
    visible_gpus,
)


def test_nccl_gives_every_process_a_gpu_of_its_own():
    environments = nccl_environments(["2", "GPU-5ebc"], 12345)
    shared = {"MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "12345"}
    assert environments == [
        {"MLX_RANK": "0", "CUDA_VISIBLE_DEVICES": "2"} | shared,
        {"MLX_RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-5ebc"} | shared,
    ]


def test_mlx_launch_sets_the_same_variables_for_nccl():
    """Its own source is the judge, so that another name there is noticed."""
    import mlx._distributed_utils.launch as stock

    source = Path(stock.__file__).read_text()
    (ours,) = nccl_environments(["0"], 1)
    assert [name for name in ours if name not in source] == []


def test_the_ring_gives_every_process_its_rank_and_the_hosts():
    assert ring_environments(2, "hosts.json") == [
        {"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"},
        {"MLX_RANK": "1", "MLX_HOSTFILE": "hosts.json"},
    ]


def test_more_processes_than_gpus_are_refused():
    assert pick_gpus(2, ["4", "5", "6"]) == ["4", "5"]
    with pytest.raises(ml.ConfigError) as error:
        pick_gpus(4, ["0", "1"])
    assert str(error.value) == (
        "--launch 4 needs 4 GPUs, one for each process, but MLX finds 2: give --launch 2"
    )
    with pytest.raises(ml.ConfigError, match="but MLX finds 1: leave --launch out"):
        pick_gpus(2, ["0"])


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [
        (2, None, ["0", "1"]),
        (2, "", ["0", "1"]),
        (2, "3,5", ["3", "5"]),
        (1, "3,99", ["3"]),  # CUDA ignores what follows an unknown GPU
    ],
)
def test_the_gpus_are_those_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, count: int, named: str | None, expected: list[str]
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    answer = subprocess.CompletedProcess([], 0, stdout=f"{count}\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert visible_gpus() == expected


def test_mlx_counts_the_gpus_in_a_process_of_its_own():
    """Without a GPU there is none; on a Mac there is one."""
    assert visible_gpus() == (["0"] if sys.platform == "darwin" else [])


@pytest.fixture
def same_signals() -> Iterator[None]:
    """``launch`` passes signals on; afterwards they are this process's own again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("same_signals")
def test_with_cuda_the_processes_are_started_for_nccl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The command is replaced by one that writes its environment; all else is as with two GPUs."""
    code = (
        "import json, os, pathlib; "
        f"pathlib.Path({str(tmp_path)!r}, os.environ['MLX_RANK']).write_text(json.dumps(dict(os.environ)))"
    )
    monkeypatch.setattr(launching, "has_cuda", lambda: True)
    monkeypatch.setattr(launching, "visible_gpus", lambda: ["0", "1"])
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: start([command[0], "-c", code], **options)
    )
    assert launch(2, []) == 0
    seen = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in seen] == ["0", "1"]
    assert [each["MLX_WORLD_SIZE"] for each in seen] == ["2", "2"]
    assert seen[0]["NCCL_PORT"] == seen[1]["NCCL_PORT"]

    with pytest.raises(ml.ConfigError, match="MLX finds 2"):
        launch(3, [])


def test_free_ports_are_different():
    assert len(set(free_ports(5))) == 5
