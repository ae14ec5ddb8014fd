"""How much faster several Macs make an update, on paper: the time to compute against the time to send.

    data parallel     T(N) = rows' compute / N + R(N, bytes of the gradients)
    tensor parallel   T(N) = compute / N + messages R(N, bytes of the activations) + R(N, bytes of the gradients)
    ring all-reduce   R(N, b) = 2 (N - 1) / N b / bandwidth + 2 (N - 1) latency

Sending never overlaps with computing: gradients are summed once, when all gradients of an update
are there, and each layer waits for the sum of the one before. An update has the same rows on any
number of Macs, which divide them. The bytes to send follow from the models' shapes. The time to
compute follows from one number, which is given below. The figures of the links are measurements by
others, with their sources. Only the ring's formula is tried here, by real processes on one machine.
"""

from mlx_loraplus.launching import free_ports  # isort: skip  before mlx

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.attach import required_layer_class
from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.models.skeleton import config_of, make_skeleton
from mlx_loraplus.settings import configure

TOKENS_PER_SECOND, OF_PARAMETERS = 475.0, 6.74e9
"""Of one Mac: Llama 7B with LoRA on an M2 Ultra (mlx-examples, lora/README.md, Results); other sizes in proportion."""
# Full fine-tuning also has the gradients of the weights: 6 instead of 4 operations for each, about
FULL = 1.5
ROWS, LENGTH = 16, 512  # of an update
ROWS_AT_ONCE = 4  # tensor parallel: rows in a batch, four of which make the update
MACS = (1, 2, 4, 8, 16)
# Of a block's activations, two forwards and two backwards; as many again come with gradient
# checkpointing
SUMS = 4


@dataclass(frozen=True)
class Link:
    """A link between Macs: bytes a second in one direction, and the seconds that a small message takes."""

    bandwidth: float
    latency: float

    def all_reduce(self, macs: int, size: float) -> float:
        """Return the seconds in which a ring of Macs sums arrays of ``size`` bytes."""
        return 2 * (macs - 1) / macs * size / self.bandwidth + 2 * (macs - 1) * self.latency


LINKS = {
    # 941 of 1,000 Mb/s are left of Ethernet, IP and TCP with frames of 1,500 bytes (1,448 of 1,538,
    # RFC 894 and 9293). The latency is an assumption: sizes decide here.
    "1 GbE": Link(0.1177e9, 100e-6),
    # The same share of ten times as much; Hurwitz and Feng measured 20 µs between applications (Hot
    # Interconnects 11, 2003), and a switch and macOS's stack are assumed to take as long again.
    "10 GbE": Link(1.177e9, 40e-6),
    # Half of the 80 Gb/s of the cable, an assumption: over Thunderbolt 4 TCP was measured at 16.4
    # Gb/s of 20 (Brejcha, jiribrejcha.net). 300 µs is Geerling's for four Mac Studios
    # (jeffgeerling.com, 2025-12-18); round trips of 0.38 to 0.95 ms were seen on others (exo issue
    # 2295).
    "Thunderbolt 5, TCP": Link(5e9, 300e-6),
    # 7.6 GB/s a rank over RDMA on Thunderbolt 5 (pytorch pull request 189856). Developers who build
    # on it (exo) report single-digit µs, and Geerling below 50.
    "Thunderbolt 5, JACCL": Link(7.6e9, 10e-6),
}


@dataclass(frozen=True)
class Work:
    """What an update computes and sends.

    Attributes:
        seconds: The time of one Mac that computes all of it.
        gradients: Bytes of the gradients.
        messages: With tensor parallel, the number of sums of activations in an update.
        activations: Bytes of each of these sums.
        most: The largest number of Macs that can divide the work.
    """

    seconds: float
    gradients: float
    messages: int = 0
    activations: float = 0.0
    most: int = ROWS

    def update(self, macs: int, link: Link) -> float:
        """Return an update's seconds."""
        if macs == 1:
            return self.seconds
        sums = self.messages * link.all_reduce(macs, self.activations) if self.messages else 0.0
        return self.seconds / macs + sums + link.all_reduce(macs, self.gradients)

    def speed(self, macs: int, link: Link) -> float:
        """Return how many times as fast as one Mac."""
        return self.seconds / self.update(macs, link)

    def end(self, link: Link, share: float = 0.5) -> int:
        """Return the largest number of Macs at which each still does this share of what it does alone."""
        return max(n for n in range(1, self.most + 1) if self.speed(n, link) >= share * n)


def work(name: str, rank: int | None, *, tensor: bool = False) -> Work:
    """Return the work of an update of adapters of a rank, or of all weights in bfloat16 for None."""
    config = config_of(name) | {"quantization": None}
    model: Any = make_skeleton(config)
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parameters = sum(array.size for array in arrays.values())
    settings = configure(TrainConfig, {"model": name, "rank": rank or 8}).adapter
    targets = find_targets(model, settings.target_modules, settings.num_layers)
    shapes = [
        required_layer_class("lora", module, path).shapes(module, settings.rank)
        for path, module in targets.items()
    ]
    adapters = sum(int(np.prod(shape)) for named in shapes for shape in named.values())
    seconds = (
        ROWS * LENGTH / (TOKENS_PER_SECOND * OF_PARAMETERS / parameters) * (1 if rank else FULL)
    )
    gradients = 4 * adapters if rank else 2 * parameters
    if not tensor:
        return Work(seconds, gradients)
    args = model.args
    batches = ROWS // ROWS_AT_ONCE
    activations = ROWS_AT_ONCE * LENGTH * args.hidden_size * 2
    return Work(
        seconds,
        gradients,
        SUMS * len(model.layers) * batches,
        activations,
        args.num_key_value_heads,
    )


CASES: dict[str, tuple[str, int | None, bool]] = {
    "Gemma 3 4B, LoRA rank 8": ("gemma-3-4b", 8, False),
    "Gemma 3 4B, LoRA rank 64": ("gemma-3-4b", 64, False),
    "Gemma 3 4B, all weights": ("gemma-3-4b", None, False),
    "Llama 3.1 8B, LoRA rank 8": ("llama-3.1-8b", 8, False),
    "Llama 3.1 8B, LoRA rank 64": ("llama-3.1-8b", 64, False),
    "Llama 3.1 8B, all weights": ("llama-3.1-8b", None, False),
    "Llama 3.1 8B, LoRA rank 8, tensor": ("llama-3.1-8b", 8, True),
    "Llama 3.3 70B, LoRA rank 8, tensor": ("llama-3.3-70b", 8, True),
}
PICTURED = list(CASES)[3:6] + list(CASES)[7:]
SIZES = (1 << 12, 1 << 20, 1 << 22, 1 << 24)  # bytes, on this machine


def run_scaling() -> tuple[dict[str, Any], Figure]:
    """Compute every case over every link, and try the ring's formula on this machine."""
    result: dict[str, Any] = {
        "tokens_per_second": TOKENS_PER_SECOND, "of_parameters": OF_PARAMETERS, "rows": ROWS, "length": LENGTH,
        "links": {name: vars(link) for name, link in LINKS.items()}, "cases": {},
    }  # fmt: skip
    figure = Figure(figsize=(3.3 * len(PICTURED), 3.4), layout="constrained")
    panels = dict(zip(PICTURED, figure.subplots(1, len(PICTURED), sharey=True), strict=True))
    for name, (model, rank, tensor) in CASES.items():
        one = work(model, rank, tensor=tensor)
        result["cases"][name] = vars(one) | {
            "speed": {
                way: [one.speed(n, link) for n in MACS if n <= one.most]
                for way, link in LINKS.items()
            },
            "end": {way: one.end(link) for way, link in LINKS.items()},
        }
        if name in panels:
            macs = np.arange(1, one.most + 1)
            for way, link in LINKS.items():
                panels[name].plot(macs, [one.speed(int(n), link) for n in macs], label=way)
            panels[name].plot(macs, macs, "k:", linewidth=1)
            panels[name].set(
                title=name.replace(", ", "\n", 1), xlabel="Macs", xscale="log", yscale="log"
            )
            panels[name].set(
                xticks=MACS, xticklabels=MACS, yticks=MACS, yticklabels=MACS, ylim=(0.1, 18)
            )
            panels[name].minorticks_off()
            panels[name].grid(alpha=0.3)
    panels[PICTURED[0]].set(ylabel="times as fast as one")
    panels[PICTURED[0]].legend(fontsize=7)
    result["loopback"] = try_formula()
    return result, figure


def try_formula() -> dict[str, Any]:
    """Measure all-reduces here, fit latency and bandwidth to 2 processes, and predict those of 4.

    Processes that share a core also share what it sends. With n processes for each core, they take
    n times as long.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    crowd = {processes: max(1.0, processes / cores) for processes in (2, 4)}
    measured = {processes: measure(processes) for processes in crowd}
    two = np.array(measured[2]) / crowd[2]
    terms = np.array([[size, 2.0] for size in SIZES])  # of two: 2 (N - 1) / N = 1, and 2 latencies
    (slowness, latency), *_ = np.linalg.lstsq(
        terms / two[:, None], np.ones(len(SIZES)), rcond=None
    )  # by shares
    link = Link(float(1 / slowness), float(latency))
    return {
        "sizes": SIZES, "cores": cores, "bandwidth": link.bandwidth, "latency": link.latency,
        "measured": {str(n): seconds for n, seconds in measured.items()},
        "foretold": {str(n): [crowd[n] * link.all_reduce(n, size) for size in SIZES] for n in measured},
    }  # fmt: skip


def measure(processes: int) -> list[float]:
    """Return the shortest time of an all-reduce of each size among ``processes`` on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(processes)]))
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "scripts.study.all_reduces", *map(str, SIZES)],
                stdout=subprocess.PIPE, text=True,
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        try:
            return json.loads(started[0].communicate(timeout=300)[0])
        finally:
            for process in started:
                process.kill()
                process.wait()


def scaling_table(result: dict[str, Any]) -> str:
    """Return the speeds of 2, 4, 8 and 16 Macs, and the number at which each still does half its work."""
    ways = list(result["links"])
    lines = [
        f"| what trains | sent per step | {' | '.join(ways)} |",
        "|---|--:|" + "--:|" * len(ways),
    ]
    for name, case in result["cases"].items():
        sent = case["gradients"] + case["messages"] * case["activations"]
        cells = []
        for way in ways:
            speeds = " / ".join(f"{speed:.1f}" for speed in case["speed"][way][1:])
            cells.append(f"{speeds} ({case['end'][way]})")
        size = f"{sent / 1e9:.1f} GB" if sent >= 1e9 else f"{sent / 1e6:.0f} MB"
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)
