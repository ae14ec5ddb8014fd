"""Feed hostile bytes to every loader of files from strangers.

GGUF, the safetensors and the config of adapters (ours and PEFT's) and models, run.yaml, and
checkpoints:

    scripts/stress/fuzz                    100,000 inputs, some minutes on one core
    scripts/stress/fuzz --seed 1 --keep    others; and keep those that reach new lines in tests/fuzz/corpus

Each loader has a process of its own, with 4 GB of memory above what it starts with. An input may
load, or be refused with one of the package's own errors in one short line. Anything else is reported
with the input's file: another exception, a crash, more than 5 seconds, a write outside the
process's folder, a connection, a process started.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "scripts" / "stress" / "results" / "fuzz.json"
BYTES = 4 << 30


def feed(name: str, count: int, seed: int, keep: bool) -> None:
    """Feed one target in this process; print what came of it as JSON."""
    from tests.fuzz.fuzzing import CORPUS, fuzz, watch_for_escapes

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "work"
        place.mkdir()
        escapes = watch_for_escapes(Path(folder))
        pages = (
            int(Path("/proc/self/statm").read_text().split()[0])
            if Path("/proc/self/statm").exists()
            else 0
        )
        if pages:
            most = pages * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        found = fuzz(name, count, seed, place, last=Path(f"last-input-{name}").absolute())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    outside = [escape for escape in escapes if "last-input-" not in escape]
    if keep:
        CORPUS.mkdir(exist_ok=True)
        with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number, content in enumerate(found):
                archive.writestr(
                    zipfile.ZipInfo(f"{number:03d}", (2026, 1, 1, 0, 0, 0)),
                    content,
                    zipfile.ZIP_DEFLATED,
                )
    Path(f"last-input-{name}").unlink()
    seconds = round(time.process_time() - started)
    print(
        json.dumps(
            {
                "inputs": count,
                "kept": len(found),
                "escapes": outside[:5],
                "kib": grown,
                "seconds": seconds,
            }
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Feed all targets, each in a process of its own, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=100_000, help="inputs in all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", action="store_true", help="keep the inputs that reach new lines as the corpus"
    )
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.target:
        return feed(options.target, options.count, options.seed, options.keep)
    from tests.fuzz.fuzzing import TARGETS

    results, failed = {}, []
    for name, target in TARGETS.items():
        words = [
            "--target",
            name,
            "--count",
            str(round(options.count * target.share)),
            "--seed",
            str(options.seed),
        ]
        command = [
            sys.executable,
            "-m",
            "scripts.stress.fuzz",
            *words,
            *(["--keep"] if options.keep else []),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or json.loads(done.stdout.splitlines()[-1])["escapes"]:
            failed.append(name)
            print(
                f"{name}: ended with {done.returncode}; see"
                f" last-input-{name}\n{done.stdout}{done.stderr[-2000:]}"
            )
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    total = sum(result["inputs"] for result in results.values())
    RESULT.write_text(
        json.dumps(
            {
                "inputs": total,
                "seed": options.seed,
                "failed": failed,
                **provenance(),
                "targets": results,
            },
            indent=1,
        )
    )
    print(f"{total:,} inputs; failed: {', '.join(failed) or 'none'}")
    if failed:
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
