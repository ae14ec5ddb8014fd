"""The memory plan as a table in a terminal and as a picture in a notebook."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ..config import TrainConfig
from ..data.batches import round_up
from ..device import gb, simulate_mac, this_machine
from ..errors import counted
from ..migration import translate
from ..models.known_models import MODELS
from ..options import PlanOptions
from ..rich_display import RichDisplay
from ..settings import configure
from .estimate import Memory
from .plan import MemoryPlan, display_advice, memory_plan_of

# The models that are shown next to the requested model, if they fit.
FAMILY = (
    "gemma-3-270m",
    "gemma-3-1b",
    "gemma-3-4b",
    "gemma-3-12b",
    "gemma-3-27b",
    "gemma-4-e2b-it",
    "gemma-4-e4b-it",
    "gemma-4-26b-a4b-it",
    "gemma-4-31b-it",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-30b-a3b",
    "smollm3-3b",
    "phi-4-mini",
    "mistral-7b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-8b",
    "llama-3.3-70b",
    "llama-4-scout",
)
_SHORTEST = 64  # tokens
_BAR = 40  # characters


@dataclass(frozen=True, repr=False)
class Plan(RichDisplay):
    """The memory of a run by purpose, and what fits. Print it, or display it in a notebook.

    Attributes:
        fitting: The memory plan of the run.
        rows: Rows in a batch.
        length: Tokens in the longest row.
        family: The memory plans of other models to show, by name.
    """

    fitting: MemoryPlan
    rows: int
    length: int
    family: dict[str, MemoryPlan]

    @property
    def memory(self) -> Memory:
        """The memory of a batch, by purpose."""
        return self.fitting.memory(self.rows, self.length)

    @property
    def title(self) -> str:
        """The model, the batch, and whether it fits."""
        verdict = self.fitting.verdict(self.rows, self.length)
        batch = f"{counted(self.rows, 'row')} x {self.length:,} tokens"
        return f"{self.fitting.config.model}, {batch}: {verdict}"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the table of models, the bars of the memory, and advice."""
        fitting, memory = self.fitting, self.memory
        yield Text(str(fitting.machine))
        if self.family:
            yield self._table()

        # The memory by purpose.
        yield Text(f"\n{self.title}", "bold")
        for part, size in vars(memory).items():
            bar = "█" * round(_BAR * size / memory.total)
            yield Text(f"  {part:<12} {bar:<{_BAR}} {gb(size):>9}")
        total = f"{gb(memory.total):>9} of {gb(fitting.budget)}"
        yield Text(f"  {'in all':<12} {'':<{_BAR}} {total}")
        if cache := fitting.machine.cache(memory.total):
            yield Text(f"  MLX may also keep freed arrays, up to {gb(cache)}")

        # Disk space.
        optimizer = fitting.config.optimizer.optimizer
        saved = fitting.sizes.gradients() + fitting.sizes.moments(optimizer)
        saved *= fitting.config.keep_checkpoints + 2
        download = fitting.download
        if fitting.config.adapter.adapter == "full":  # these weights are counted as trained
            download += fitting.sizes.itemsize * fitting.sizes.trainable
        yield Text(
            f"  on disk: {gb(download)} of weights, up to {gb(saved)} of checkpoints;"
            f" fusing takes up to {gb(fitting.sizes.fuse())}"
        )

        if not fitting.fits(self.rows, self.length):
            for suggestion in fitting.suggestions(self.rows, self.length)[:3]:
                yield Text(f"  to make it fit: {suggestion}", "yellow")
        if advice := display_advice(fitting.sizes, self.rows, self.length):
            yield Text(f"  {advice}", "yellow")

    def _table(self) -> Table:
        """Return a table of the batches that fit for each model of the family."""
        batch = f"{self.rows} x {self.length:,} tokens"
        table = Table(box=None, padding=(0, 1, 0, 0))
        for heading in ("model", "download", batch, "peak", "longest row", "most rows"):
            justify = "left" if heading in ("model", batch) else "right"
            table.add_column(heading, no_wrap=True, justify=justify)

        for name, plan in self.family.items():
            longest, most_rows = plan.longest(self.rows), plan.most_rows(self.length)
            table.add_row(
                name,
                gb(plan.download),
                plan.verdict(self.rows, self.length),
                gb(plan.memory(self.rows, self.length).total),
                f"{longest:,}" if longest else "-",
                f"{most_rows:,}" if most_rows else "-",
            )
        return table

    def _repr_html_(self) -> None:
        """Return None, so that a notebook shows the PNG."""

    def _repr_png_(self) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.8), layout="constrained")
        axes = figure.subplots()

        # One bar, stacked by purpose, and a line for the budget.
        left = 0.0
        for part, size in vars(self.memory).items():
            axes.barh(0, size / 1e9, left=left, label=f"{part} {gb(size)}")
            left += size / 1e9
        budget = self.fitting.budget
        axes.axvline(budget / 1e9, color="black", label=f"may be used {gb(budget)}")

        axes.set(yticks=[], xlabel="GB", title=self.title)
        axes.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.55))
        picture = io.BytesIO()
        figure.savefig(picture, format="png", bbox_inches="tight")
        return picture.getvalue()


def plan_memory(
    model: str = "gemma-3", memory: str | None = None, **settings: Unpack[PlanOptions]
) -> Plan:
    """Plan a run's memory before anything is downloaded.

    Args:
        model: A name, hub id, folder or .gguf file. For a hub id, only the config is downloaded.
        memory: Memory of the Mac to plan for, e.g. "16GB"; by default that of this machine.
        settings: The settings of ``finetune``.

    Raises:
        ConfigError: A setting is not allowed.
        ModelError: The model does not exist.

    Example:
        >>> plan_memory("gemma-3-4b", memory="16GB", batch_size=4)
    """
    # The plan does not read the data
    used = translate(TrainConfig, dict(settings)) | {"model": model}
    used.pop("data", None)
    used.pop("data_weights", None)
    config = configure(TrainConfig, used)
    machine = simulate_mac(memory) if memory else this_machine()
    fitting = memory_plan_of(config, machine=machine)

    # Replace auto with the sizes that a run would choose.
    per_example = config.objective.rows_per_example
    rows, length = config.data.batch_size, config.data.max_seq_length
    if length == "auto":
        length = fitting.longest(per_example * (1 if rows == "auto" else rows)) or 64
    else:
        length = round_up(length)
    rows = fitting.batch_size(length) if rows == "auto" else per_example * rows

    # If the model has a short name, show the other models of which a short row fits, too. With
    # adapter full there are none, because most of them have 4 bits
    family: dict[str, MemoryPlan] = {}
    if model in MODELS and config.adapter.adapter != "full":
        for name in FAMILY:
            plan = memory_plan_of(replace(config, model=name), machine=machine)
            if plan.longest(1) >= _SHORTEST:
                family[name] = plan
    return Plan(fitting, rows, length, family)
