"""The doctor's tables: as Markdown for a terminal or a bug report, and as a page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..device import gb
from ..errors import counted
from ..pages.pages import Headline, HTMLTable, Section, Tile, present_date, render_page
from ..userpaths import public_name
from .fastest_step import TuningResult
from .model_probes import ModelProbes
from .selfcheck import STOCK, CheckResult, remedy_for


@dataclass(frozen=True)
class ModelExamination:
    """What the doctor found about a model."""

    name: str
    probes: ModelProbes
    check: CheckResult
    tuned: TuningResult


def check_table(check: CheckResult) -> tuple[HTMLTable, str]:
    """Return the self-check's figures, and the deviations that are allowed."""
    problems = check.problems()
    rows: list[tuple[str, ...]] = []
    for name, deviation in check.deviations.items():
        wrong = any(problem.startswith(name) for problem in problems)
        part = max(deviation.parts, key=lambda part: deviation.parts[part])
        rows.append(
            (
                name,
                f"{deviation.loss:.1e}",
                f"{deviation.gradients:.1e}",
                f"{deviation.parts[part]:.1e} {part}",
                "WRONG" if wrong else "right",
            )
        )
    loss, gradients = check.tolerances
    head = ("against float32 on the CPU", "loss", "gradients", "largest part", "verdict")
    allowed = (
        f"allowed: {loss:g} for the loss and {gradients:g} for the gradients, or three times what"
        f" {STOCK} have"
    )
    return HTMLTable(rows, head), allowed


def tuning_table(tuned: TuningResult, probes: ModelProbes) -> tuple[HTMLTable, list[str]]:
    """Return the time and the memory of each way to compute a step, and notes."""
    rows: list[tuple[str, ...]] = []
    for timing in tuned.timings:
        mark = "chosen" if timing == tuned.best else ""
        if timing.seconds is None or timing.peak is None:
            rows.append((str(timing.way), "-", "-", timing.failure))
        else:
            rows.append((str(timing.way), f"{timing.seconds:.3g}", gb(timing.peak), mark))

    notes: list[str] = []
    if probes.head is None:
        notes.append(
            "could not locate this model's output head: computing full logits, which uses more"
            " memory"
        )
    if not tuned.is_complete:
        count = counted(len(tuned.timings), "way")
        notes.append(
            f"there was only time to measure {count} to compute a step; other ways may be faster,"
            " but nothing is wrong"
        )
    head = (f"a step of {tuned.rows} x {tuned.length} tokens", "seconds", "peak", "")
    return HTMLTable(rows, head, marked=frozenset({str(tuned.best.way)})), notes


def to_markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> str:
    """Return a Markdown table with aligned columns; a list if the table is wider than ``width``."""
    # The rule below the head needs three dashes in each column.
    widths = [max(3, *map(len, cells)) for cells in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]

    lines: list[str] = []
    for row in (head, rule, *rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    if width is not None and len(lines[0]) > width:
        lines = [f"{head[0]}:", *(_list_item(head, row, width) for row in rows)]
    return "\n".join(lines)


def _list_item(head: Sequence[str], row: Sequence[str], width: int) -> str:
    """Return a row of a table as an item of a Markdown list."""
    cells = [f"{name} {cell}".strip() for name, cell in zip(head[1:], row[1:], strict=True) if cell]
    return textwrap.fill(
        f"- {row[0]}: {', '.join(cells)}", width, subsequent_indent="  ", break_on_hyphens=False
    )


def doctor_page(machine: Sequence[tuple[str, str]], found: Sequence[ModelExamination]) -> bytes:
    """Return what the doctor found as a page, with the present date."""
    sections: list[Section] = []
    for each in found:
        name = public_name(each.name)
        if each.check.skipped:
            text = f"Not checked: {each.check.skipped}."
            sections.append(Section(f"{name}: does it compute correctly?", text))
        else:
            table, allowed = check_table(each.check)
            text = f"The largest deviations of each way to compute a step; {allowed}."
            sections.append(Section(f"{name}: does it compute correctly?", text, table))

        table, notes = tuning_table(each.tuned, each.probes)
        text = " ".join(f"{note[0].upper()}{note[1:]}." for note in notes)
        sections.append(Section(f"{name}: how fast is a step?", text, table))
    sections.append(Section("What is this machine?", table=HTMLTable(machine)))
    head = replace(_headline(dict(machine), found), date=f"checked {present_date()}")
    return render_page(f"doctor: {head.state}", head, sections)


def _headline(facts: dict[str, str], found: Sequence[ModelExamination]) -> Headline:
    """Return whether the machine computes correctly, how fast it is, and what to do."""
    problems = [problem for each in found for problem in each.check.problems()]
    is_checked = all(not each.check.skipped for each in found)
    next_step = ""
    if problems:
        state, lead = "wrong", "Losses or gradients are wrong on this machine with these versions."
        remedy = remedy_for(problems)
        next_step = f"{remedy[0].upper()}{remedy[1:]}. Please report what this page shows."
    elif is_checked:
        state, lead = "correct", "Losses and gradients are correct in every way to compute a step."
    else:
        state, lead = "not checked", "Not every model could be checked."

    tiles = [Tile("Memory", facts["memory"])]
    for each in found:
        best = each.tuned.best
        if best.seconds is not None:
            size = f"{each.tuned.rows} x {each.tuned.length} tokens, {public_name(each.name)}"
            tiles.append(Tile("A step takes", f"{best.seconds:.3g} s", size))
    return Headline(
        title=f"{facts['chip']}: is it ready to train?",
        state=state,
        text=f"{facts['device']}, mlx {facts['mlx']}, mlx_loraplus {facts['mlx_loraplus']}",
        lead=lead,
        next_step=next_step,
        tiles=tiles,
    )
