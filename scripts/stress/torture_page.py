"""The table of ``torture.py`` in docs/resume.md."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_loraplus.files import write_atomically
from scripts.provenance import source_line

PAGE = Path(__file__).resolve().parents[2] / "docs" / "resume.md"
START, END = "<!-- torture:start -->", "<!-- torture:end -->"
LEGEND = """\
Each run is disturbed as often as the second column says, and resumed each time. *Bit-identical*: the runs whose final
adapter has exactly the bytes of an undisturbed run; it should be all of them."""


def table(result: dict[str, Any], kinds: Sequence[str]) -> str:
    """Return the table, with a row for each of these kinds of runs besides the plain ones."""
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
        *((f"kill -9, {kind}", kind, "{kills} ({inside a save} inside a save)") for kind in kinds),
    ]
    lines = ["| what happened | how often | runs | bit-identical |", "|---|---|---|---|"]
    for label, name, counts in rows:
        case = Counter(cases[name])
        often = counts.format_map(case) if cases[name] else "not tried here"
        lines.append(f"| {label} | {often} | {case['runs']} | {case['equal']} |")
    return "\n".join(
        [*lines, "", LEGEND, "", f"{result['minutes']} minutes; {source_line(result)}", ""]
    )


def write_table(result: dict[str, Any], kinds: Sequence[str]) -> None:
    """Put the table between its markers in docs/resume.md."""
    head, rest = PAGE.read_text(encoding="utf-8").split(START)
    text = f"{head}{START}\n{table(result, kinds)}{END}{rest.split(END)[1]}"
    write_atomically(PAGE, text.encode())
