"""A small real run, killed and damaged at random moments, resumed each time, and compared with an undisturbed one.

    scripts/stress/torture              about a quarter of an hour on one core; writes its JSON and the table in docs/resume.md
    scripts/stress/torture --kills 20   a tenth of it
    scripts/stress/torture --table      the table in docs/resume.md again, from the JSON

A session is a process of its own: ``mlx_loraplus.train`` on a tiny random Llama, with dropout,
accumulation and Adam, and a checkpoint at every fourth update. Something happens to it; the next
session continues with ``--resume``, and so on until the run has ended. Then adapter, optimizer state,
random key and history must be those of the undisturbed run, to the bit. What happens:

kill       kill -9: anywhere in training, or as soon as a save begins, or while the session starts
storm      1 to 20 SIGTERMs, some milliseconds apart
cut        kill -9, then a file of the newest checkpoint is cut short
flip       kill -9, then one bit of the newest checkpoint is flipped
full       the disk fills up in the middle of training (a small tmpfs), and has room again for the next session
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from mlx_loraplus.files import write_atomically
from mlx_loraplus.startup import INTERRUPTED
from scripts.provenance import commit
from scripts.tiny_model import write_sums, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULT = ROOT / "docs" / "resume.md", ROOT / "scripts" / "stress" / "results" / "torture.json"
START, END = "<!-- torture:start -->", "<!-- torture:end -->"
UPDATES = 300
TIMES = {
    "seconds", "minutes", "valid_seconds", "tokens_per_second", "mean_tokens_per_second", "memory",
    "peak_memory_gb", "active_memory_gb", "cache_memory_gb", "shapes",
}  # fmt: skip
SETTINGS = {
    "iters": UPDATES, "batch_size": 2, "grad_accumulation_steps": 2, "dropout": 0.2, "warmup": 10,
    "steps_per_report": 7, "steps_per_eval": 25, "steps_per_save": 4, "learning_rate": 1e-3,
}  # fmt: skip

Strike = Callable[["Session", random.Random], Counter[str]]


class Session:
    """One process of the train command, in a run's folder."""

    def __init__(self, home: Path, run: Path):
        self.run = run
        self.output = run.with_suffix(".log")
        words = ["-c", str(home / "settings.yaml"), "--adapter-path", str(run)]
        words += ["--resume"] if (run / "run.yaml").exists() else []
        with self.output.open("wb") as output:
            command = [sys.executable, "-m", "mlx_loraplus.train", *words]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        """Return all it printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.run / "checkpoints").glob(f".{self.process.pid}-*"))

    def until(self, sign: Callable[[], bool]) -> None:
        """Wait for a sign, or the process's end."""
        while self.process.poll() is None and not sign():
            time.sleep(0.0002)

    def until_training(self) -> None:
        """Wait until it has started."""
        self.until(lambda: "adapter:" in self.said)

    def end(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def ended(self) -> bool:
        """Wait, and return whether the run has finished; raise if it ended unexpectedly."""
        code = self.process.wait()
        full = code == 2 and "No space left" in self.said
        if not full and code not in (0, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM):
            raise SystemExit(f"error: a session ended with {code}:\n{self.said}")
        return code == 0


def kill(session: Session, chance: random.Random) -> Counter[str]:
    """Kill -9 at a random moment."""
    moment = chance.choices(["training", "save", "start"], [0.45, 0.45, 0.1])[0]
    if moment == "start":
        time.sleep(chance.uniform(0, 3))
    else:
        session.until_training()
        if moment == "save":
            time.sleep(chance.uniform(0, 0.2))
            session.until(lambda: session.saving)
            time.sleep(chance.uniform(0, 0.02))
        else:
            time.sleep(chance.uniform(0, 0.8))
    training = "adapter:" in session.said
    session.end(signal.SIGKILL)
    session.process.wait()
    if session.process.returncode == 0:
        return Counter()
    return Counter(
        {"kills": 1, "inside a save": int(session.saving), "while starting": int(not training)}
    )


def storm(session: Session, chance: random.Random) -> Counter[str]:
    """Send one to twenty SIGTERMs."""
    session.until_training()
    time.sleep(chance.uniform(0, 0.5))
    for _ in range(chance.randint(1, 20)):
        session.end(signal.SIGTERM)
        time.sleep(chance.uniform(0, 0.004))
    session.process.wait()
    return Counter(
        {"storms": 1, "left at once": int(session.process.returncode == -signal.SIGTERM)}
    )


def damage(
    session: Session, chance: random.Random, change: Callable[[bytearray], object]
) -> Counter[str]:
    """Kill, then change a file of the newest checkpoint, if there is an older one."""
    kill(session, chance)
    session.process.wait()
    folders = sorted(path for path in (session.run / "checkpoints").glob("[0-9]*"))
    if len(folders) < 2 or any((folder / "damaged").exists() for folder in folders[-2:]):
        return Counter()
    file = chance.choice(sorted(folders[-1].iterdir()))
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    (folders[-1] / "damaged").touch()
    return Counter({"damaged": 1})


def cut(session: Session, chance: random.Random) -> Counter[str]:
    """Cut a file short."""

    def shorten(content: bytearray) -> None:
        del content[chance.randrange(len(content)) :]

    return damage(session, chance, shorten)


def flip(session: Session, chance: random.Random) -> Counter[str]:
    """Flip one bit."""

    def change(content: bytearray) -> None:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)

    return damage(session, chance, change)


def full(session: Session, chance: random.Random) -> Counter[str]:
    """Fill the disk that the run is on, and free it when the session has ended."""
    session.until_training()
    time.sleep(chance.uniform(0, 0.5))
    filler = session.run.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(max(0, file.tell() - chance.randrange(100_000)))
    said = "is not saved" if chance.random() < 0.5 else "error:"
    session.until(lambda: said in session.said)
    session.end(signal.SIGTERM)
    session.process.wait()
    filler.unlink()
    return Counter({"full disks": 1, "saves that failed": session.said.count("can't write")})


STRIKES: dict[str, Strike] = {"kill": kill, "storm": storm, "cut": cut, "flip": flip, "full": full}


def torture(home: Path, where: Path, name: str, wanted: int, seed: int) -> dict[str, Any]:
    """Let something happen to runs, one after the other, until it has happened ``wanted`` times; compare each run."""
    chance, counts, started = random.Random(seed), Counter[str](), time.perf_counter()
    first = {"kill": "kills", "storm": "storms", "full": "full disks"}.get(name, "damaged")
    while counts[first] < wanted:
        run = where / f"{name}-{counts['runs']}"
        finished = False
        while not finished:
            session = Session(home, run)
            if counts[first] < wanted:
                counts += STRIKES[name](session, chance)
            finished = session.ended()
            counts["sessions"] += 1
            if counts["sessions"] > 20 * (wanted + 5):
                raise SystemExit(f"error: {name}: a run does not come to its end:\n{session.said}")
        counts["runs"] += 1
        counts["equal"] += int(equal(home / "undisturbed", run))
        say(f"{name}: {dict(counts)}, {time.perf_counter() - started:.0f} s")
        subprocess.run(["rm", "-r", str(run)], check=True)
    return {**counts, "seconds": round(time.perf_counter() - started)}


def equal(one: Path, other: Path) -> bool:
    """Compare two runs' ends to the bit: adapter, optimizer state, random key, history."""
    last = f"checkpoints/{UPDATES:06d}"
    for file in (
        "adapters.safetensors",
        f"{last}/adapters.safetensors",
        f"{last}/state.safetensors",
    ):
        a, b = load_file(one / file), load_file(other / file)
        if {n: (x.shape, x.tobytes()) for n, x in a.items()} != {
            n: (x.shape, x.tobytes()) for n, x in b.items()
        }:
            return False
    return history(one) == history(other)


def history(run: Path) -> list[dict[str, Any]]:
    """Return a run's events without what its clock and memory said."""
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in event.items() if name not in TIMES} for event in events]


def torture_all(kills: int, seed: int) -> dict[str, Any]:
    """Torture runs in every way and return what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_tiny_model(home / "model")
        write_sums(home / "data")
        settings = SETTINGS | {"model": str(home / "model"), "data": str(home / "data")}
        (home / "settings.yaml").write_text(yaml.safe_dump(settings))
        for name in ("undisturbed", "again"):
            if not Session(home, home / name).ended():
                raise SystemExit("error: the undisturbed run did not end")
        if not equal(home / "undisturbed", home / "again"):
            raise SystemExit("error: two undisturbed runs differ, so nothing can be compared")
        few = max(1, kills // 8)
        cases = {
            name: torture(home, home, name, kills if name == "kill" else few, seed)
            for name in list(STRIKES)[:-1]
        }
        return cases | {"full": full_disk(home, few, seed)}


def full_disk(home: Path, wanted: int, seed: int) -> dict[str, Any]:
    """Torture runs on a small disk of their own, in a process that may mount one; nothing if it may not."""
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-m",
        "scripts.stress.torture",
        "--inside",
        str(home),
        str(wanted),
        str(seed),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    except OSError:
        return {}
    say(done.stdout.rstrip().rpartition("\n")[0])
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def inside(home: Path, wanted: int, seed: int) -> None:
    """Mount the small disk, torture on it and print the result as JSON."""
    disk = home / "disk"
    disk.mkdir()
    size = 2 * sum(
        -(-path.stat().st_size // 4096) * 4096 for path in (home / "undisturbed").rglob("*")
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    print(json.dumps(torture(home, disk, "full", wanted, seed)))


def table(result: dict[str, Any]) -> str:
    """Return the table in docs/resume.md."""
    cases = result["cases"]
    rows = [
        (
            "kill -9",
            "kill",
            "{kills} ({inside a save} inside a save, {while starting} while starting)",
        ),
        ("a storm of SIGTERMs", "storm", "{storms} ({left at once} left at once)"),
        ("newest checkpoint cut short", "cut", "{damaged}"),
        ("one bit of it flipped", "flip", "{damaged}"),
        ("disk full", "full", "{full disks} ({saves that failed} saves failed)"),
    ]
    lines = ["| what happened | how often | runs | equal to the bit |", "|---|---|---|---|"]
    for label, name, counts in rows:
        case = Counter(cases[name])
        often = counts.format_map(case) if cases[name] else "not tried here"
        lines.append(f"| {label} | {often} | {case['runs']} | {case['equal']} |")
    return (
        "\n".join(lines)
        + f"\n\n{result['minutes']} minutes on {result['machine']}, MLX {result['mlx']}.\n"
    )


def write_table() -> None:
    """Put the table between its markers."""
    head, rest = PAGE.read_text(encoding="utf-8").split(START)
    text = f"{head}{START}\n{table(json.loads(RESULT.read_text()))}{END}{rest.split(END)[1]}"
    write_atomically(PAGE, text.encode())


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Torture, write the JSON and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="and an eighth of it of all else (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table", action="store_true", help="only write the table in docs/resume.md, from the JSON"
    )
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return inside(Path(options.inside[0]), int(options.inside[1]), int(options.inside[2]))
    if not options.table:
        started = time.perf_counter()
        cases = torture_all(options.kills, options.seed)
        result = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "mlx": version("mlx"),
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "commit": commit(),
            "settings": SETTINGS,
            "cases": cases,
        }
        write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())
        if unequal := [
            name for name, case in cases.items() if case and case["equal"] != case["runs"]
        ]:
            raise SystemExit(f"error: runs differ from the undisturbed one: {', '.join(unequal)}")
    return write_table()


if __name__ == "__main__":
    main()
