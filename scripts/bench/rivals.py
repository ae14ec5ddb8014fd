"""This package's trainer beside other trainers for MLX: the same model, rows, rank, targets, batch and rate, in one run.

    scripts/bench/rivals --data FOLDER                 all cases and trainers
    scripts/bench/rivals --data FOLDER --cases gemma   one case
    scripts/bench/rivals --list                        the cases and trainers

Each rival is installed with uv into an environment of its own in the cache, never into .venv. Only
its public trainer is called, by the file of its name in ``rival_trainers/``. Each repetition is a
process of its own. All get OpenBLAS, the settings of malloc, and the rows as tokens; DPO's rows are
text to those that tokenize it themselves. Batches, their padding, and whether a step is compiled
are each trainer's own, by default. Every trainer makes two passes over the rows, three on a GPU.
In all but the last pass it allocates and compiles; the last one is timed. So all have the same
number of useful tokens, which are inputs that are not padding. Memory is MLX's peak in all passes,
minus what is in use when model, adapters and optimizer are ready.

What was measured at this commit with the same arguments is not measured again, so the same command
continues an interrupted run. The results go to ``results/rivals.json``; ``scripts/readme.py`` makes
the table of docs/benchmarks.md from it.
"""

from scripts.bench.rival_tasks import CASES, write_task  # isort: skip  before mlx

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_loraplus._runtime import installed_backends
from mlx_loraplus.files import cache_folder, write_atomically
from scripts.bench.rival_trainers.fast_blas import LIBRARIES
from scripts.bench.rivals_table import OURS, markdown
from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "rivals.json"
TIMEOUT = 1200  # seconds for one repetition
ATTEMPTS = 3
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""The settings of malloc that mlx_loraplus uses; here, every trainer gets them."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """A trainer.

    Attributes:
        package: Its name on PyPI.
        version: Its version.
        module: Its file in ``rival_trainers``.
        licence: The licence of the package.
        needs: Its dependencies, if those that it declares can't be installed here. The package is
            then installed without its own.
        mlx: The version of MLX that it requires, by default that of .venv.
        objectives: The objectives that it can train.
    """

    package: str
    version: str
    module: str
    licence: str
    needs: tuple[str, ...] = ()
    mlx: str = ""
    objectives: tuple[str, ...] = ("sft", "dpo")


RIVALS = {
    "mlx-lm": Rival("mlx-lm", "", "mlx_lm", "MIT", objectives=("sft",)),
    "mlx-lm-lora": Rival("mlx-lm-lora", "5.10.2", "mlx_lm_lora", "Apache-2.0"),
    "mlx-tune": Rival("mlx-tune", "0.6.0", "mlx_tune", "Apache-2.0"),
    "unsloth": Rival(
        "unsloth-zoo",
        "2026.10.9",
        "unsloth",
        "LGPL-3.0, its MLX part AGPL-3.0",
        needs=(
            "mlx-vlm<=0.7.9", "transformers<=5.17", "datasets>=3.4.1,<4.4", "sentencepiece", "psutil", "msgspec",
            "pillow", "regex",
        ),  # without torch, which it requires where there is no Metal
    ),
    "mlx-train-perf": Rival(
        "mlx-train-perf[mlx-lm]", "0.9.1", "mlx_train_perf", "MIT", mlx="0.32.0", objectives=("sft",)
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with train.jsonl and valid.jsonl; default: the demo")
    parser.add_argument("--cases", type=_names(CASES), default=list(CASES), help="with commas")
    everyone = [OURS, *RIVALS]
    parser.add_argument(
        "--trainers", type=_names(everyone), default=everyone, help="with commas; default: all"
    )
    parser.add_argument("--updates", type=_positive, help="timed updates; default: the case's")
    parser.add_argument("--repeats", type=_positive, default=1, help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--no-json", action="store_true", help="print the tables alone")
    parser.add_argument("--list", action="store_true", help="print the cases and the trainers")
    options = parser.parse_args(arguments)
    if options.list:
        print("cases:", *(f"  {name}: {each.title}" for name, each in CASES.items()), sep="\n")
        print("trainers:", *(f"  {name}" for name in everyone), sep="\n")
        return

    if options.data and not Path(options.data).is_dir():
        parser.error(f"--data {options.data}: there is no such folder; give one with train.jsonl")

    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {"trainers": {}, "cases": {}}
    for name in options.cases:
        measure_case(name, stored, options)
    print(markdown({**stored, "cases": {name: stored["cases"][name] for name in options.cases}}))


def _names(known: Sequence[str] | dict[str, Any]) -> Any:
    """Return a type of argument: names with commas, of those that are known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))} is not one of {', '.join(known)}"
            )
        return names

    return parse


def _positive(text: str) -> int:
    """Return a whole number of at least 1, as a type of argument."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def measure_case(name: str, stored: Result, options: argparse.Namespace) -> None:
    """Measure a case's trainers in turn, and store each result at once."""
    case = CASES[name]
    updates = options.updates or case.updates
    with tempfile.TemporaryDirectory() as temporary:
        task = write_task(case, options.data, updates, Path(temporary))
        start = {
            "title": case.title,
            "batch_size": case.batch_size,
            "data": Path(options.data).resolve().name if options.data else "demo",
            "updates": updates,
            "useful_tokens": sum(len(row["tokens"]) - 1 for row in task["rows"]),
            **{key: provenance()[key] for key in ("machine", "commit", "date")},
        }
        before = stored["cases"].get(name, {})
        same = [key for key in start if key != "date" and before.get(key) == start[key]]
        if options.again or len(same) < len(start) - 1:
            before = {**start, "runs": {}, "errors": {}}
        stored["cases"][name] = before

        for repeat in range(options.repeats):
            for trainer in options.trainers:
                if len(before["runs"].get(trainer, [])) > repeat:
                    continue
                measure_one(name, trainer, Path(temporary) / "task.json", stored)
                if not options.no_json:
                    write_atomically(RESULT, (json.dumps(stored, indent=1) + "\n").encode())


def measure_one(name: str, trainer: str, task: Path, stored: Result) -> None:
    """Run one repetition of a trainer, and put its result or its error into the case."""
    case = stored["cases"][name]
    case["errors"].pop(trainer, None)
    started = time.perf_counter()
    if trainer in RIVALS and CASES[name].objective not in RIVALS[trainer].objectives:
        case["errors"][trainer] = f"it has no {CASES[name].objective}"
        return

    # A trainer that compiled a kernel in its timed pass runs again, and finds it on disk.
    for _ in range(ATTEMPTS):
        done = run_trainer(trainer, task)
        if done.returncode or not json.loads(done.stdout.splitlines()[-1])["kernels_built"]:
            break
        print(f"{name}: {trainer} compiled kernels in its timed pass; it runs again", flush=True)
    if done.returncode != 0:
        reason = last_line(done.stderr).replace(str(task.parent), "FOLDER")
        case["errors"][trainer] = reason or f"it ended with {done.returncode}"
        print(f"{name}: {trainer}: {case['errors'][trainer]}", flush=True)
        return
    run = json.loads(done.stdout.splitlines()[-1])
    versions = run.pop("versions")
    case["runs"].setdefault(trainer, []).append(run)
    stored["trainers"][trainer] = describe(trainer, versions)
    print(
        f"{name}: {trainer}: {run['seconds']:.1f} s for {case['updates']} updates,"
        f" {time.perf_counter() - started:.0f} s in all,"
        f" {run['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s",
        flush=True,
    )


def describe(trainer: str, versions: dict[str, str]) -> dict[str, str]:
    """Return a trainer's licence and its versions."""
    package = RIVALS[trainer].package.split("[")[0] if trainer in RIVALS else trainer
    licence = RIVALS[trainer].licence if trainer in RIVALS else "Apache-2.0"
    return {
        "version": versions[package],
        "licence": licence,
        "mlx": versions["mlx"],
        "mlx-lm": versions["mlx-lm"],
    }


def last_line(text: str) -> str:
    """Return the last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run_trainer(trainer: str, task: Path) -> "subprocess.CompletedProcess[str]":
    """Run a trainer on a task in a process of its own."""
    rival = RIVALS.get(trainer)
    module = rival.module if rival else "ours"
    python = environment_of(trainer, rival) if rival else sys.executable
    # This package sets MLX_BFS_MAX_WIDTH, and the other trainers get MLX's default.
    variables = {key: value for key, value in os.environ.items() if key != "MLX_BFS_MAX_WIDTH"}
    variables |= MALLOC | {LIBRARIES: os.pathsep.join(fast_libraries()), "PYTHONPATH": str(ROOT)}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        return subprocess.run(
            [str(python), "-m", f"scripts.bench.rival_trainers.{module}", str(task)],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"stopped after {TIMEOUT} seconds")


def fast_libraries() -> list[str]:
    """Return the libraries that make MLX fast in this process, in the order to load them; none on macOS."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    loaded = dict.fromkeys(re.findall(r"\S+/\S+\.so\S*", maps.read_text()))
    wanted = ("libquadmath", "libgfortran.so.5", "libopenblas")
    return [file for name in wanted for file in loaded if Path(file).name.startswith(name)]


def environment_of(name: str, rival: Rival) -> Path:
    """Install a rival into its environment in the cache if it is not there, and return its Python.

    mlx-lm is in .venv, because this package needs it.
    """
    if not rival.version:
        return Path(sys.executable)
    folder = cache_folder() / "rivals" / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    mlx = rival.mlx or version("mlx")
    wanted = [f"{rival.package}=={rival.version}", f"mlx=={mlx}", *rival.needs]
    wanted += [f"{wheel}=={mlx}" for wheel in installed_backends()]
    if not rival.mlx:
        wanted.append(f"mlx-lm=={version('mlx-lm')}")
    content = "\n".join(wanted) + "\n"
    if stamp.exists() and stamp.read_text() == content:
        return python

    print(f"{name}: installing {wanted[0]} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    call(find_uv(), "venv", "--quiet", "--python", sys.executable, str(folder))
    install = [find_uv(), "pip", "install", "--quiet", "--python", str(python)]
    if rival.needs:
        call(*install, *wanted[1:])
        call(*install, "--no-deps", wanted[0])
    else:
        call(*install, *wanted)
    write_atomically(stamp, content.encode())
    return python


def find_uv() -> str:
    """Return the path of uv."""
    found = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("error: uv is not installed: pip install uv, then run this again")
    return found


def call(*words: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(words)}: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    main()
