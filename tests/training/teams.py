"""Starts processes on 127.0.0.1 that train together, and collects their results.

``python -m tests.training.teams JOBS RESULTS`` is one of these processes. It runs the jobs in the
file JOBS, each the settings of a run, and writes their results into the folder RESULTS.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx

import mlx.core as mx
import pytest

from mlx_loraplus.launching import free_ports

# What MLX raises if its work on a GPU fails.
OUT_OF_MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory (00000008)."

# Seconds that all processes may take: far more than they need, so that only hanging ones are stopped.
MOST = 900


@contextmanager
def world(count: int, words: Sequence[str], folder: Path) -> Iterator[list[subprocess.Popen]]:
    """Start ``python -m words`` in ``count`` processes that write to ``folder``/rank.log; kill them at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    processes = []
    try:
        for rank in range(count):
            with (folder / f"{rank}.log").open("w") as log:
                environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                command = [sys.executable, "-m", *words]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(log: Path, words: str, processes: Sequence[subprocess.Popen]) -> None:
    """Wait until ``words`` match the log, and fail if a process ends before."""
    until = time.monotonic() + MOST
    while not re.search(words, log.read_text()):
        assert all(process.poll() is None for process in processes), log.read_text()
        assert time.monotonic() < until
        time.sleep(0.1)


class Runs:
    """Runs of one or several processes on models and data in a folder, with ``plain`` as default settings."""

    def __init__(self, folder: Path, plain: dict[str, Any]):
        self.folder, self.plain = folder, plain

    def settings(self, name: str, model: str = "model", **settings: Any) -> dict[str, Any]:
        """The settings of a run in the folder ``name``."""
        places = {"model": model, "data": "data", "adapter_path": name}
        return (
            self.plain
            | {setting: str(self.folder / place) for setting, place in places.items()}
            | settings
        )

    def job(
        self,
        name: str,
        model: str = "model",
        by_rank: dict[str, dict] | None = None,
        **settings: Any,
    ) -> dict:
        """Return a run for ``do_jobs``; other ranks than the first get a folder that they must not create."""
        others: dict[str, dict] = {
            str(rank): {"adapter_path": str(self.folder / "never")} for rank in range(1, 4)
        }
        for rank, own in (by_rank or {}).items():
            others[rank] = others.get(rank, {}) | own
        return self.settings(name, model, **settings) | {"by_rank": others}

    def alone(self, name: str, model: str = "model", **settings: Any) -> ml.Run:
        """Train as one process, this one."""
        settings = self.settings(name, model, **settings)
        return ml.finetune(*ml.load(settings["model"]), **settings)

    def words(self, name: str, model: str = "model", **settings: Any) -> list[str]:
        """Return the words of a command, a module first."""
        pairs = self.settings(name, model, **settings).items()
        return [
            "mlx_loraplus.train",
            *(word for k, v in pairs for word in (f"--{k.replace('_', '-')}", str(v))),
        ]


def do_jobs(count: int, jobs: Sequence[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Run jobs one after another in ``count`` processes; return each job's results by rank."""
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with world(
        count, ["tests.training.teams", str(folder / "jobs.json"), str(folder)], folder
    ) as processes:
        for rank, process in enumerate(processes):
            assert process.wait(MOST) == 0, (folder / f"{rank}.log").read_text()
    ranks = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(count)]
    return [list(said) for said in zip(*ranks, strict=True)]


def do_job(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train with the settings of a job, some of which may differ by rank."""
    settings = job | job.get("by_rank", {}).get(str(rank), {})
    settings.pop("by_rank", None)
    if settings.pop("asked_to_stop", None):
        threading.Thread(target=ask_to_stop, daemon=True).start()
    failing = settings.pop("device_fails_in", None)
    told: list[str] = []
    group = (
        mx.distributed.init()
        if settings.pop("divided", settings.get("parallel") == "tensor")
        else None
    )
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        model, tokenizer = ml.load(settings["model"], group=group)
        loading = {"loaded": mx.get_active_memory() - before, "peak": mx.get_peak_memory() - before}
        with device_fails_in(failing) if failing else nullcontext():
            run = ml.finetune(model, tokenizer, log=told.append, **settings)
    except ml.LoRAPlusError as error:
        return {
            "kind": type(error).__name__,
            "error": str(error),
            "told": error.reported,
            "lines": told,
        }
    return {"history": run.history, "outcome": run.outcome, "lines": told, **loading}


@contextmanager
def device_fails_in(name: str) -> Iterator[None]:
    """Let a function of the training room, such as finetune.probe_model, fail as a GPU does."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(OUT_OF_MEMORY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"mlx_loraplus.training.{name}", fail)
        yield


def ask_to_stop() -> None:
    """Send this process SIGTERM as soon as it trains."""
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    mine = os.environ["MLX_RANK"]
    # No test cuts the power, and while one process waits for its disk, the others wait by spinning.
    os.fsync = lambda _: None
    done = [do_job(job, int(mine)) for job in json.loads(Path(sys.argv[1]).read_text())]
    (Path(sys.argv[2]) / f"results-{mine}.json").write_text(json.dumps(done))
