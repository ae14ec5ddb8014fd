"""A small real run, killed and damaged at random moments, resumed each time, and compared with an undisturbed one.

    scripts/stress/torture              about three quarters of an hour on one core; writes its JSON and the table in docs/resume.md
    scripts/stress/torture --kills 20   a tenth of it
    scripts/stress/torture --table      the table in docs/resume.md again, from the JSON

A session is a process of its own: ``mlx_loraplus.train`` on a tiny random Llama, with dropout,
accumulation and Adam, and a checkpoint at every fourth step. Something happens to it. The next
session continues with ``--resume``, and so on until the run has ended. Then adapter, optimizer state,
random key and history must be those of the undisturbed run, bit for bit. What happens:

kill       kill -9: anywhere in training, or as soon as a save begins, or while the session starts
storm      1 to 20 SIGTERMs, some milliseconds apart
cut        kill -9, then a file of the newest checkpoint is cut short
flip       kill -9, then one bit of the newest checkpoint is flipped
full       the disk fills up in the middle of training (a small tmpfs), and has room again for the next session

Runs of other kinds (``KINDS``: compiled, packed, DPO, all weights, two processes) are killed, too, and
each is compared with an undisturbed run of its own kind.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from mlx_loraplus.files import write_atomically
from mlx_loraplus.interrupted_imports import INTERRUPTED
from scripts.provenance import provenance
from scripts.stress.torture_page import write_table
from scripts.tiny_model import write_preferred_sums, write_sums, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "torture.json"
UPDATES = 300
TIMES = {
    "seconds", "minutes", "valid_seconds", "tokens_per_second", "mean_tokens_per_second", "memory",
    "peak_memory_gb", "active_memory_gb", "cache_memory_gb", "shapes", "started",
    "answer_seconds",
}  # fmt: skip
SETTINGS = {
    "iters": UPDATES, "batch_size": 2, "grad_accumulation_steps": 2, "dropout": 0.2, "warmup": 10,
    "steps_per_report": 7, "steps_per_eval": 25, "steps_per_save": 4, "learning_rate": 1e-3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": "on"},
    "packed": {"pack": True, "max_seq_length": 64},
    "dpo": {"objective": "dpo", "data": "pairs"},
    "all weights": {"adapter": "full", "dropout": 0.0},
    "two processes": {},
}
"""Kind of run → what it has in place of ``SETTINGS`` (data: a folder in the home of the runs)."""
FLAGS = {"two processes": ["--launch", "2"]}

Strike = Callable[["Session", random.Random], Counter[str]]


class Session:
    """One start of the train command, in a run's folder, with the settings of a kind of run."""

    def __init__(self, home: Path, run: Path, kind: str = ""):
        self.run = run
        self.output = run.with_suffix(".log")
        words = ["-c", str(file_of(home, "settings", kind)), "--adapter-path", str(run)]
        words += FLAGS.get(kind, [])
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
        return any((self.run / "checkpoints").glob(".*-*"))

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


def torture(
    home: Path, where: Path, name: str, wanted: int, seed: int, kind: str = ""
) -> dict[str, Any]:
    """Let something happen to runs, one after the other, until it has happened ``wanted`` times; compare each run.

    Args:
        home: The folder with the models, the data and the undisturbed runs.
        where: The folder for the runs.
        name: What happens, of ``STRIKES``.
        wanted: How often.
        seed: Of the moments.
        kind: The kind of run, of ``KINDS``; empty for the usual one.
    """
    chance, counts, started = random.Random(seed), Counter[str](), time.perf_counter()
    first = {"kill": "kills", "storm": "storms", "full": "full disks"}.get(name, "damaged")
    while counts[first] < wanted:
        run = file_of(where, f"{name}-{counts['runs']}", kind)
        finished = False
        while not finished:
            session = Session(home, run, kind)
            if counts[first] < wanted:
                counts += STRIKES[name](session, chance)
            finished = session.ended()
            counts["sessions"] += 1
            if counts["sessions"] > 20 * (wanted + 5):
                raise SystemExit(f"error: {name}: a run does not come to its end:\n{session.said}")
        counts["runs"] += 1
        counts["equal"] += int(equal(file_of(home, "undisturbed", kind), run))
        say(f"{kind} {name}: {dict(counts)}, {time.perf_counter() - started:.0f} s")
        subprocess.run(["rm", "-r", str(run)], check=True)
    return {**counts, "seconds": round(time.perf_counter() - started)}


def file_of(home: Path, what: str, kind: str) -> Path:
    """Return the path of what each kind of run has of its own."""
    return home / "-".join([what, *kind.split()])


def equal(one: Path, other: Path) -> bool:
    """Compare the ends of two runs bit for bit: weights, optimizer state, random key, history."""
    files, others = weight_files(one), weight_files(other)
    if len(files) < 3 or files.keys() != others.keys():
        return False
    same = all(tensors(files[name]) == tensors(others[name]) for name in files)
    return same and history(one) == history(other)


def weight_files(run: Path) -> dict[str, Path]:
    """Return the safetensors files of a finished run and of its last checkpoint."""
    folders = {"run": run, "checkpoint": run / f"checkpoints/{UPDATES:06d}"}
    return {
        f"{name}/{file.name}": file
        for name, folder in folders.items()
        for file in folder.glob("*.safetensors")
    }


def tensors(file: Path) -> dict[str, tuple[Any, bytes]]:
    """Return the shape and the bytes of each tensor of a file."""
    return {name: (array.shape, array.tobytes()) for name, array in load_file(file).items()}


def history(run: Path) -> list[dict[str, Any]]:
    """Return a run's events without what its clock and memory said."""
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in event.items() if name not in TIMES} for event in events]


def torture_all(kills: int, seed: int) -> dict[str, Any]:
    """Torture runs in every way and return what came of it."""
    few = max(1, kills // 8)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_tiny_model(home / "model")
        write_sums(home / "data")
        write_preferred_sums(home / "pairs")

        # The usual run.
        make_undisturbed(home, "")
        cases = {
            name: torture(home, home, name, kills if name == "kill" else few, seed)
            for name in list(STRIKES)[:-1]
        }
        cases["full"] = full_disk(home, few, seed)

        # The other kinds of runs.
        for kind in KINDS:
            make_undisturbed(home, kind)
            cases[kind] = torture(home, home, "kill", few, seed, kind)
        return cases


def make_undisturbed(home: Path, kind: str) -> None:
    """Write a kind's settings, and make its undisturbed run, twice."""
    changed = KINDS.get(kind, {})
    settings = SETTINGS | {"model": str(home / "model")} | changed
    settings["data"] = str(home / changed.get("data", "data"))
    file_of(home, "settings", kind).write_text(yaml.safe_dump(settings))
    runs = [file_of(home, name, kind) for name in ("undisturbed", "again")]
    for run in runs:
        session = Session(home, run, kind)
        if not session.ended():
            raise SystemExit(f"error: the undisturbed run did not end:\n{session.said}")
    if not equal(runs[0], runs[1]):
        raise SystemExit(f"error: two undisturbed runs differ, so nothing can be compared: {kind}")


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
            **provenance(),
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "settings": SETTINGS,
            "cases": cases,
        }
        write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())
        if unequal := [
            name for name, case in cases.items() if case and case["equal"] != case["runs"]
        ]:
            raise SystemExit(f"error: runs differ from the undisturbed one: {', '.join(unequal)}")
    return write_table(json.loads(RESULT.read_text()), list(KINDS))


if __name__ == "__main__":
    main()
