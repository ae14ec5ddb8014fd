"""Give the commands inputs that must be refused or reported, with the real SmolLM2 135M and Gemma 3 270M.

    scripts/stress/bad_inputs               all cases, about ten minutes on two cores; writes its JSON
    scripts/stress/bad_inputs --only WORD   cases whose names contain a word; nothing is written

Each case runs commands of the package in a folder of its own. All but the last must end with exit
code 0, the last one with the case's. A refusal must be one line that begins with ``error:`` and must
leave no folder ``run`` behind. The cases are in bad_tokens.py, bad_rows.py, bad_models.py and
bad_files.py; models.py makes their models.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_loraplus.files import write_atomically
from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "scripts" / "stress" / "results" / "bad_inputs.json"

LINK = "-> "  # begins the content of a file that is a link
Content = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """Commands, and what must come of them.

    Attributes:
        name: The kind of the fault, and the input.
        commands: One command a line, without the program's name: ``train --model …``. Other
            modules of the checkout are run as ``python -m module …``.
        files: Name → text, or rows of a JSON lines file, or ``-> target`` of a link.
        code: Exit code of the last command.
        shows: What its output must contain.
        hides: What its output must not contain.
        absent: Files and folders that must not exist afterwards; a refusal adds ``run``.
        stdin: What is typed.
        wrong: Looks at the case's folder, and returns what is wrong there, or nothing.
    """

    name: str
    commands: str
    files: Mapping[str, Content] = field(default_factory=dict)
    code: int = 2
    shows: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    stdin: str = ""
    wrong: Callable[[Path], str] = lambda _: ""


def write_files(folder: Path, files: Mapping[str, Content]) -> None:
    """Write a case's files and links; rows become JSON lines."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith(LINK):
            path.symlink_to(content.removeprefix(LINK))
            continue
        rows = content if not isinstance(content, str) else ()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text or str(content), encoding="utf-8")


def run_command(line: str, folder: Path, stdin: str) -> subprocess.CompletedProcess[str]:
    """Run one command in a folder, with its cache and home below it."""
    words = shlex.split(line)
    command = ["-m", "mlx_loraplus", *words] if words[0] != "python" else words[1:]
    cache = os.environ["MLX_LORAPLUS_CACHE"]
    environment = os.environ | {"HOME": str(folder / "home"), "MLX_LORAPLUS_CACHE": cache}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case in its folder, and return its output with what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    write_files(folder, case.files)

    started = time.perf_counter()
    *first, last = [line.strip() for line in case.commands.strip().splitlines()]
    for line in first:
        done = run_command(line, folder, case.stdin)
        if done.returncode != 0:
            problem = f"`{line}` ended with {done.returncode}"
            return {"wrong": [problem], "code": done.returncode, "output": lines_of(done.stdout)}
    done = run_command(last, folder, case.stdin)

    wrong = problems_of(case, done.returncode, done.stdout, folder)
    return {
        "wrong": wrong,
        "commands": [*first, last],
        "code": done.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "output": [line.replace(str(folder.parent), "…") for line in lines_of(done.stdout)],
    }


def folder_name(case: Case) -> str:
    """Return the name of a case's folder."""
    return case.name.replace(" ", "-").replace("/", "-")


def lines_of(output: str) -> list[str]:
    """Return the lines of an output that are not empty."""
    return [line.rstrip() for line in output.splitlines() if line.strip()]


def problems_of(case: Case, code: int, output: str, folder: Path) -> list[str]:
    """Return how a case's end differs from what it must be."""
    found: list[str] = []
    if code != case.code:
        found.append(f"exit code {code} instead of {case.code}")
    if "Traceback" in output:
        found.append("a traceback")
    refusal = "training would stop: " if "--dry-run" in case.commands else "error: "
    errors = sum(line.startswith(refusal) for line in lines_of(output))
    if errors != (case.code == 2):
        found.append(f"{errors} lines begin with {refusal}")
    if case.code == 2 and not (lines_of(output) or [""])[-1].startswith(refusal):
        found.append("the error is not the last line")

    found += [f"the output does not contain {text!r}" for text in case.shows if text not in output]
    found += [f"the output contains {text!r}" for text in case.hides if text in output]
    absent = (*case.absent, "run") if case.code == 2 and "run" not in case.files else case.absent
    found += [f"{name} exists" for name in absent if (folder / name).exists()]
    problem = case.wrong(folder)
    return [*found, problem] if problem else found


def all_cases() -> list[Case]:
    """Return all cases."""
    from scripts.stress import bad_files, bad_models, bad_rows, bad_tokens

    return [*bad_tokens.CASES, *bad_rows.CASES, *bad_models.CASES, *bad_files.CASES]


def main() -> int:
    """Run the cases, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose names contain one of these words"
    )
    parser.add_argument(
        "--work", type=Path, help="a folder to work in, whose models are used again the next time"
    )
    options = parser.parse_args()
    cases = [case for case in all_cases() if any(word in case.name for word in options.only)]
    is_part = options.only != [""]

    results: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        os.environ["MLX_LORAPLUS_CACHE"] = str(work / "cache")
        from scripts.stress.models import make_models

        make_models(work, " ".join(case.commands for case in cases))
        for case in cases:
            result = run_case(case, work / folder_name(case))
            results[case.name] = result
            if not options.work:
                shutil.rmtree(work / folder_name(case))
            print("WRONG" if result["wrong"] else "right", f"{case.name}:", flush=True)
            shown = result["output"] if result["wrong"] or is_part else result["output"][-1:]
            print(*(f"    {line}" for line in [*result["wrong"], *shown]), sep="\n", flush=True)

    right = sum(not result["wrong"] for result in results.values())
    minutes = round((time.perf_counter() - started) / 60, 1)
    print(f"{right} of {len(results)} cases are right, in {minutes} minutes")
    if not is_part:
        content = {**provenance(), "minutes": minutes, "right": right, "cases": results}
        write_atomically(RESULT, (json.dumps(content, indent=1) + "\n").encode())
    return 0 if right == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
