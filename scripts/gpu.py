"""Measure what only a GPU can show, on Metal or CUDA, in at most eight minutes, into one JSON file.

    scripts/gpu                       on a Mac or with an NVIDIA GPU; writes gpu.json
    scripts/gpu --device any --tiny   tries the script itself on a CPU, with a tiny model
    scripts/gpu --device any --steps 4 --minutes 24   likewise, with the real model and fewer rows

Each part runs in a process of its own, with a time limit. A part that fails or takes too long is
recorded as such, and the next one runs. A part that no longer fits into the time is skipped. The
file is written again after each part, so an interrupted session loses nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.gpu_parts import (
    ROOT,
    STEPS,
    Options,
    Result,
    bench,
    demo,
    describe,
    doctor,
    fuse,
    packed,
    resume,
)
from scripts.provenance import provenance

LIMIT = 480.0  # seconds for all parts
FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class Part:
    """A part of the session.

    Attributes:
        run: The function that runs it.
        limit: Seconds that it may take if the session has eight minutes; more in proportion.
        least: Seconds that must be left to start it.
        real: Whether it needs the real model.
    """

    run: Callable[[Options], Result]
    limit: float
    least: float = 15.0
    real: bool = False


PARTS = {
    "machine": Part(describe, 90),
    "doctor": Part(doctor, 90),
    "demo": Part(demo, 150, 30),
    "fuse": Part(fuse, 60),
    "resume": Part(resume, 90, 30),
    "bench a stock": Part(bench("a", "stock", 20), 60, real=True),
    "bench a ours": Part(bench("a", "ours", 20), 60, real=True),
    "bench b stock": Part(bench("b", "stock", 20), 60, real=True),
    "bench b ours": Part(bench("b", "ours", 20), 60, real=True),
    "packed": Part(packed, 60, 20),
}
"""The parts by name, in their order. The demo's adapter is used by those after it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts that fit into the time and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["gpu", "any"], default="gpu", help="any: also a CPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of Gemma")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the demo (default: 38)")
    parser.add_argument("--minutes", type=float, default=LIMIT / 60, help="for all (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="default: gpu.json")
    parser.add_argument(
        "--only", help="names of parts, with commas; machine and demo come with them"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # this process runs one part
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part:
        import mlx_loraplus  # noqa: F401  before mlx

        options = Options(given.device, given.tiny, given.steps, given.folder)
        print("\n" + json.dumps(PARTS[given.part].run(options)))
        return

    # SIGTERM ends the session like Ctrl-C, so that no part continues alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(given.device, given.tiny, given.steps, folder)
        names = choose_parts(options, given.only)
        result = run_session(options, names, 60 * given.minutes, given.output)
    failed = [name for name, part in result["parts"].items() if part["status"] != "done"]
    say(f"{given.output}: {len(names) - len(failed)} of {len(names)} parts are done")
    if failed:
        raise SystemExit(1)


def choose_parts(options: Options, only: str | None) -> list[str]:
    """Return the names of the parts to run, in order."""
    names = [name for name, part in PARTS.items() if not (part.real and options.tiny)]
    if only is None:
        return names
    wanted = {"machine", "demo"} | {name.strip() for name in only.split(",")}
    unknown = wanted - set(names)
    if unknown:
        raise SystemExit(
            f"error: no part {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    return [name for name in names if name in wanted]


def run_session(options: Options, names: Sequence[str], limit: float, output: Path) -> Result:
    """Run the parts, and write the file after each."""
    started = time.monotonic()
    result: Result = {"format": FORMAT, **provenance(), "options": asdict(options), "parts": {}}
    del result["options"]["folder"]
    for name in names:
        left = limit - (time.monotonic() - started)
        say(f"{name} ({left:.0f} s left)")
        result["parts"][name] = run_part(name, options, left, PARTS[name].limit * limit / LIMIT)
        result["seconds"] = time.monotonic() - started
        write(output, result)
        record = result["parts"][name]
        say(f"  {record['status']}" + (f": {record['error']}" if "error" in record else ""))

        # Without a GPU or a model there is nothing to measure.
        if name == "machine" and record["status"] != "done":
            break
    return result


def run_part(name: str, options: Options, left: float, limit: float) -> Result:
    """Run one part in a process of its own, and return its record.

    Args:
        name: The part.
        options: For the part.
        left: Seconds that are left for the session.
        limit: Seconds that this part may take.
    """
    part = PARTS[name]
    if left < part.least:
        return {
            "status": "skipped",
            "error": f"{left:.0f} s are left and it needs {part.least:.0f}",
        }

    started = time.monotonic()
    command = [sys.executable, "-m", "scripts.gpu", "--part", name, "--folder", options.folder]
    command += ["--device", options.device, "--steps", str(options.steps)]
    command += ["--tiny"] if options.tiny else []
    # Without the hub, every machine has the same weights.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=min(limit, left))
                status = "failed" if process.returncode else "done"
            except subprocess.TimeoutExpired:
                status, printed = "timed out", ""
            finally:
                end(process)
        errors.seek(0)
        error = errors.read()

    record: Result = {"status": status, "seconds": time.monotonic() - started}
    if status == "done":
        record["result"] = json.loads(printed.splitlines()[-1])
    else:
        error = error.replace(options.folder, ".").replace(str(Path.home()), "~")
        record["error"] = error.strip()[-2000:]
    return record


def end(process: subprocess.Popen[str]) -> None:
    """End a part's process, and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write(path: Path, result: Result) -> None:
    """Write the file, and replace an older one atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def say(line: str) -> None:
    """Print a line immediately."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
