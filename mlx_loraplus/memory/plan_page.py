"""The memory plan as a page: what the run takes, what may be used, and which models fit."""

from typing import TYPE_CHECKING

from ..device import gb
from ..errors import counted
from ..pages.charts import bar_chart
from ..pages.pages import Headline, HTMLTable, Section, Tile
from ..userpaths import public_name

if TYPE_CHECKING:
    from .plan_view import Plan

TO_FIT = "to make it fit: "  # precedes each suggestion in a terminal
_MEANING = (
    "Activations are kept for the backward pass, and moments are the optimizer's. Working memory"
    " is temporary, and traces belong to compiled steps."
)


def plan_headline(plan: "Plan") -> Headline:
    """Return what a reader should know first: whether the run fits."""
    memory_plan, memory = plan.memory_plan, plan.memory
    batch = f"{counted(plan.rows, 'row')} x {plan.length:,} tokens"
    peak, budget = gb(memory.total), gb(memory_plan.budget)
    longest = memory_plan.longest(plan.rows)

    # Why it does not fit, or what it takes.
    problem = memory_plan.problem(plan.rows, plan.length)
    lead = f"The batch does not fit: {problem}."
    if not problem:
        lead = f"The run takes {peak} at the peak, and {budget} may be used."
        if memory_plan.checkpoint(plan.rows, plan.length):
            lead += " Gradient checkpointing saves memory and takes a third more time."
    notes = [line for line in plan.advice if not line.startswith(TO_FIT)]

    return Headline(
        title=f"{public_name(memory_plan.config.model)}: does training fit?",
        state=plan.verdict,
        text=f"batches of {batch}, on {str(memory_plan.machine).partition(':')[0]}",
        lead=lead,
        next_step=" ".join(f"{note[0].upper()}{note[1:]}." for note in notes),
        tiles=[
            Tile("Peak memory", peak, f"of {budget}"),
            Tile("Longest rows that fit", f"{longest:,} tokens", f"in batches of {plan.rows}"),
            Tile("Download", gb(plan.download), "of weights"),
            Tile("Checkpoints", f"up to {gb(plan.checkpoints)}", "on disk"),
            Tile("Fusing", f"up to {gb(memory_plan.sizes.fuse())}", "of memory"),
        ],
    )


def plan_sections(plan: "Plan") -> list[Section]:
    """Return the parts of the page: what to change, the memory by purpose, and the models."""
    memory_plan, memory = plan.memory_plan, plan.memory
    sections: list[Section] = []
    changes = [line.removeprefix(TO_FIT) for line in plan.advice if line.startswith(TO_FIT)]
    if changes:
        rows = [(str(number), change) for number, change in enumerate(changes, 1)]
        sections.append(Section("What makes it fit?", "Any one of these changes:", HTMLTable(rows)))

    # A part that takes nothing, such as the traces of a step that is not compiled, has no bar.
    bars = [(part, float(size), gb(size)) for part, size in plan.parts.items() if size]
    bars.append(("in all", float(memory.total), gb(memory.total)))
    caption = f"Memory at the peak; the dashed line is what may be used, {gb(memory_plan.budget)}"
    text = _MEANING
    cache = memory_plan.machine.cache(memory.total)
    if cache:
        text += f" MLX may also keep freed arrays, up to {gb(cache)}."
    chart = bar_chart(caption, bars, memory_plan.budget)
    sections.append(Section("What takes the memory?", text, charts=[chart]))

    if plan.family:
        head, rows = plan.models()
        marked = frozenset({memory_plan.config.model})
        sections.append(
            Section(
                "Which models fit?", table=HTMLTable(rows, head, marked=marked), is_question=True
            )
        )
    table = HTMLTable(_assumptions(plan))
    sections.append(Section("What was planned?", table=table, is_question=True))
    return sections


def _assumptions(plan: "Plan") -> list[tuple[str, str]]:
    """Return the settings that determine the memory."""
    memory_plan, config = plan.memory_plan, plan.memory_plan.config
    is_checkpointed = memory_plan.checkpoint(plan.rows, plan.length)
    adapter = config.adapter
    kind = adapter.adapter
    if kind != "full":
        kind += f", rank {adapter.rank}"
    return [
        ("model", config.model),
        ("machine", str(memory_plan.machine)),
        (
            "may be used",
            f"{gb(memory_plan.budget)}: nine tenths of what the machine has for a run, because the"
            " prediction may be off by a tenth",
        ),
        ("adapter", f"{kind}: {counted(memory_plan.sizes.trainable, 'trainable parameter')}"),
        ("optimizer", config.optimizer.optimizer),
        ("batch", f"{counted(plan.rows, 'row')} x {plan.length:,} tokens"),
        ("gradient checkpointing", "on" if is_checkpointed else "off"),
    ]
