"""Make every number of the README and docs/ again, from one commit.

    scripts/numbers --plan                      what is current, what is not, and how long it takes
    scripts/numbers --minutes 120 --data wikisql=FOLDER --judge PYTHON --node FOLDER
    scripts/numbers --only bench,launches       these parts only

A part is a command that writes files in scripts/*/results. It is current if all of these name a commit
whose package and scripts are those of this checkout. Parts that are current are skipped, so the same
command continues after Ctrl-C. Parts that need something which is not given are left out:

    --data wikisql=FOLDER chat=FOLDER text=FOLDER   data sets: train.jsonl and valid.jsonl
    --data templates=FOLDER   chat templates of families: see scripts/judges/tool_calls
    --judge PYTHON   a Python with torch, transformers 5, peft and trl
    --vllm PYTHON    a Python with vllm and what scripts/judges/check_vllm names
    --node FOLDER    where ``npm i node-llama-cpp --ignore-scripts`` was done

Timings need a quiet machine. Commit the results at the end. The table in docs/benchmarks.md says which
commit each number is from; scripts/readme.py writes it.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.provenance import ROOT, same_code

PYTHON = ".venv/bin/python"


@dataclass(frozen=True)
class Part:
    """Numbers that one command makes.

    Attributes:
        name: Names the part in ``--only`` and in the tables.
        command: The command; ``{name}`` stands for what the user has to give.
        minutes: About how long it takes on two quiet cores.
        results: The files it writes, from scripts/.
    """

    name: str
    command: str
    minutes: int
    results: tuple[str, ...]


PARTS = (
    # Beside other programs: speed and memory
    Part(
        "bench",
        "scripts/bench/run --data {wikisql}",
        26,
        tuple(f"bench/results/{case}.json" for case in ("a", "b", "c", "d", "parity")),
    ),
    Part("rivals", "scripts/bench/rivals --data {wikisql}", 25, ("bench/results/rivals.json",)),
    Part("full", "scripts/bench/full --steps 24", 12, ("bench/results/full.json",)),
    Part("adapters", "scripts/bench/run adapters", 60, ("bench/results/adapters.json",)),
    Part("curve", "scripts/bench/run curve", 20, ("bench/results/curve.json",)),
    Part("preference steps", "scripts/bench/preferences", 5, ("bench/results/preferences.json",)),
    Part("launches", "scripts/bench/launches", 1, ("bench/results/launches.json",)),
    Part(
        "shapes",
        "scripts/bench/shapes chats={chat}@4 answers={wikisql}@8",
        2,
        ("bench/results/shapes.json",),
    ),
    Part("demo", "scripts/demo --publish", 6, ("study/results/demo.json",)),
    # Judged by other programs
    Part("families", "scripts/judges/families", 3, ("judges/results/families.json",)),
    Part(
        "rope",
        f"{PYTHON} scripts/judges/check_rope --judge {{judge}}",
        1,
        ("judges/results/rope.json",),
    ),
    Part(
        "peft",
        f"{PYTHON} scripts/judges/check_peft --judge {{judge}}",
        1,
        ("judges/results/peft.json",),
    ),
    Part(
        "vllm",
        f"{PYTHON} scripts/judges/check_vllm --judge {{vllm}}",
        3,
        ("judges/results/vllm.json",),
    ),
    Part(
        "preferences judge",
        f"{PYTHON} scripts/judges/check_preferences --judge {{judge}}",
        8,
        ("judges/results/preferences.json",),
    ),
    Part(
        "gguf families",
        f"{PYTHON} scripts/judges/check_gguf_families --node {{node}}",
        5,
        ("judges/results/gguf_families.json",),
    ),
    Part(
        "llama.cpp",
        f"{PYTHON} scripts/judges/check_llama_cpp --node {{node}}",
        15,
        ("judges/results/llama_cpp.json",),
    ),
    Part(
        "gguf types", f"{PYTHON} scripts/judges/gguf_types", 10, ("judges/results/gguf_types.json",)
    ),
    Part(
        "tool calls",
        f"{PYTHON} scripts/judges/tool_calls --templates {{templates}}",
        90,
        ("judges/results/tool_calls.json",),
    ),
    # Under stress
    Part("bad inputs", "scripts/stress/bad_inputs", 13, ("stress/results/bad_inputs.json",)),
    Part("fuzz", "scripts/stress/fuzz", 5, ("stress/results/fuzz.json",)),
    Part("torture", "scripts/stress/torture", 60, ("stress/results/torture.json",)),
    # Studies
    Part("memory grid", f"{PYTHON} scripts/study/memory_grid", 10, ("study/results/grid.json",)),
    Part("fuse rounding", "scripts/study/fuse_rounding", 15, ("study/results/rounding.json",)),
    Part("experts", f"{PYTHON} scripts/study/experts", 25, ("study/results/experts.json",)),
    Part("delta", "scripts/study/run delta", 2, ("study/results/delta.json",)),
    Part("figure 2", "scripts/study/run figure2", 10, ("study/results/figure2.json",)),
    Part("width", "scripts/study/run width", 10, ("study/results/width.json",)),
    Part("equivalence", "scripts/study/run equivalence", 2, ("study/results/equivalence.json",)),
    Part("scaling", "scripts/study/run scaling", 5, ("study/results/scaling.json",)),
    Part(
        "preferences",
        "scripts/study/preferences demo {scratch}",
        20,
        ("study/results/preferences.jsonl",),
    ),
    Part(
        "preferences search",
        "scripts/study/preferences search {scratch} --minutes 600",
        480,
        ("study/results/preference_search.jsonl",),
    ),
    Part(
        "rate",
        "scripts/study/rate --data wikisql={wikisql} chat={chat} text={text}",
        3200,
        ("study/results/rate.jsonl",),
    ),
    Part(
        "evidence",
        "scripts/study/evidence --data {wikisql}",
        600,
        ("study/results/evidence.jsonl",),
    ),
)


@dataclass(frozen=True)
class Origin:
    """Where the newest result of a file is from; empty texts for a file that is missing."""

    commit: str
    date: str
    is_current: bool


def origin(file: Path) -> Origin:
    """Return where a file of results is from. Of a JSONL file, the oldest line counts."""
    if not file.exists():
        return Origin("", "", is_current=False)

    text = file.read_text(encoding="utf-8")
    whole: list[Any] = (
        [json.loads(line) for line in text.splitlines()]
        if file.suffix == ".jsonl"
        else [json.loads(text)]
    )
    found = [pair for value in whole for pair in _origins_in(value)]
    if not found:
        return Origin("", "", is_current=False)
    commits = {commit for commit, _ in found}
    commit, date = min(found, key=lambda pair: pair[1])
    return Origin(commit, date, all(same_code(each) for each in commits))


def _origins_in(value: Any) -> list[tuple[str, str]]:
    """Return the pairs (commit, date) of a result, which may hold results of several runs."""
    if isinstance(value, list):
        return [pair for each in value for pair in _origins_in(each)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("commit"), str):
        return [(value["commit"], value.get("date", ""))]
    return [pair for each in value.values() for pair in _origins_in(each)]


def state_of(part: Part) -> tuple[bool, str]:
    """Return whether a part is current, and what to say of it."""
    origins = [origin(ROOT / "scripts" / file) for file in part.results]
    if all(each.is_current for each in origins):
        return True, "current"
    oldest = min(origins, key=lambda each: each.date)
    return False, f"{oldest.date} at {oldest.commit}" if oldest.commit else "no commit known"


def origins_table() -> str:
    """Return the table in docs/benchmarks.md: each part with its command, commit and date."""
    lines = ["| result | made by | commit | date |", "|---|---|---|---|"]
    for part in PARTS:
        for file in part.results:
            found = origin(ROOT / "scripts" / file)
            command = part.command.replace(f"{PYTHON} ", "").replace("{judge}", "PYTHON")
            command = re.sub(r"{\w+}", "FOLDER", command)
            name = Path(file).name
            if (ROOT / "scripts" / file).exists():
                name = f"[{name}](../scripts/{file})"
            commit, date = found.commit or "unknown", found.date or "unknown"
            lines.append(f"| {name} | `{command}` | {commit} | {date} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, or make the parts that are not current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="only print what there is to do")
    parser.add_argument("--only", help="names of parts, with commas (default: all)")
    parser.add_argument("--minutes", type=float, help="start nothing after so many")
    parser.add_argument(
        "--data", nargs="+", default=[], help="wikisql=FOLDER chat=FOLDER text=FOLDER"
    )
    parser.add_argument("--judge", help="a Python with torch, transformers, peft and trl")
    parser.add_argument("--vllm", help="a Python with vllm")
    parser.add_argument("--node", help="a folder with node-llama-cpp")
    parser.add_argument("--scratch", default="/tmp/numbers", help="for runs (default: %(default)s)")
    options = parser.parse_args(arguments)

    # What the user gives for the places in the commands.
    given = {name: getattr(options, name) for name in ("judge", "vllm", "node", "scratch")}
    given |= dict(each.split("=", 1) for each in options.data)
    given = {name: value for name, value in given.items() if value}

    # The parts.
    known = {part.name: part for part in PARTS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    started, failed = time.perf_counter(), []
    for part in (known[name] for name in names):
        is_current, state = state_of(part)
        missing = [name for name in places_of(part.command) if name not in given]
        if missing:
            state += f"; needs {', '.join(missing)}"
        print(f"{part.name:18} {part.minutes:5} minutes  {state}", flush=True)
        late = options.minutes and time.perf_counter() - started > 60 * options.minutes
        if options.plan or is_current or missing or late:
            continue

        command = [word.format(**given) for word in shlex.split(part.command)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(part.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def places_of(command: str) -> list[str]:
    """Return the names in braces in a command."""
    return [piece.partition("}")[0] for piece in command.split("{")[1:]]


if __name__ == "__main__":
    main()
