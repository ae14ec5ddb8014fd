"""Will it fit? What a run takes on this machine, the sizes that fit, and what to change where they don't."""

import io
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.nn as nn
from mlx.core.distributed import Group
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ..adapters.tensor_parallel import divide
from ..config import AdapterConfig, RunConfig
from ..data.batches import round_up
from ..device import Machine, gb, simulate_mac, this_machine
from ..errors import ConfigError, ModelError
from ..models.known_models import MODELS
from ..models.registry import gemma_for, is_embedded
from ..models.skeleton import VISION_BYTES, config_of, make_skeleton
from ..rich_display import RichDisplay
from ..settings import configure
from .estimate import Memory, Sizes, estimate
from .model_shapes import measure

# Of the budget may be planned: the plan may be off by a tenth, and MLX keeps some freed memory
ROOM = 0.9
FAMILY = (
    "gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b", "llama-3.2-1b", "llama-3.2-3b",
    "llama-3.1-8b", "llama-3.3-70b", "llama-4-scout",
)  # fmt: skip
_LONG_LAYER = 5e12  # floating-point operations; a small GPU needs seconds for so many
_BAR = 40


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of a model and its adapters beside a machine's budget: which batches of a run fit."""

    sizes: Sizes
    config: RunConfig
    machine: Machine

    @property
    def budget(self) -> int:
        """Bytes that may be planned."""
        return int(ROOM * self.machine.budget)

    @property
    def download(self) -> int:
        """Bytes of the model's files, about: its weights, and the vision tower that mlx-lm leaves out."""
        sees = self.config.model.startswith(("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"))
        return self.sizes.weights + (VISION_BYTES if sees else 0)

    def memory(self, rows: int, length: int, *, checkpoint: bool | None = None) -> Memory:
        """Return what a batch takes, by default with the checkpointing that it would be given."""
        checkpoint = self.checkpoint(rows, length) if checkpoint is None else checkpoint
        return estimate(self.sizes, self.config, rows, length, checkpoint=checkpoint)

    def fits(self, rows: int, length: int, *, checkpoint: bool | None = None) -> bool:
        """Tell whether a batch fits, by default with the checkpointing that it would be given."""
        return self.memory(rows, length, checkpoint=checkpoint).total <= self.budget

    def checkpoint(self, rows: int, length: int) -> bool:
        """Return whether to checkpoint: as the setting says; auto: where the batch does not fit without."""
        if self.config.grad_checkpoint != "auto":
            return self.config.grad_checkpoint == "on"
        return not self.fits(rows, length, checkpoint=False)

    def verdict(self, rows: int, length: int) -> str:
        """Say whether a batch fits comfortably, with checkpointing, or not."""
        if self.fits(rows, length, checkpoint=False):
            return "fits comfortably"
        return (
            "fits with checkpointing"
            if self.fits(rows, length, checkpoint=True)
            else "does not fit"
        )

    def longest(self, rows: int) -> int:
        """Return the longest row of the ladder, at most the model's context, so many of which fit; or 0."""
        most = self.sizes.context or 1 << 20
        length = bisect_left(
            range(1, most + 1), True, key=lambda length: not self.fits(rows, round_up(length))
        )
        return min(round_up(length), most) if length else 0

    def most_rows(self, length: int) -> int:
        """Return the largest batch of rows of a length that fits, at most 1,024; or 0."""
        return bisect_left(range(1, 1025), True, key=lambda rows: not self.fits(rows, length))

    def batch_size(self, length: int) -> int:
        """Choose a batch size: 4 to 16 without checkpointing where that fits, else up to 4 with it, else what fits."""
        if self.config.grad_checkpoint != "on":
            for rows in (16, 8, 4):
                if self.fits(rows, length, checkpoint=False):
                    return rows
        return next((rows for rows in (4, 2, 1) if self.fits(rows, length)), 1)

    def suggestions(self, rows: int, length: int) -> list[str]:
        """Return what makes a batch fit that does not, the cheapest first."""
        found, eased, flag = [], self, ""
        if self.config.grad_checkpoint == "off":
            eased, flag = (
                replace(self, config=replace(self.config, grad_checkpoint="on")),
                "--grad-checkpoint on ",
            )
            if eased.fits(rows, length):
                found.append(flag.strip() + " (a third more time)")
        fewer = min(rows, eased.most_rows(length))
        if 0 < fewer < rows:
            again = -(-rows // fewer) * self.config.grad_accumulation_steps
            found.append(
                f"{flag}--batch-size {fewer} --grad-accumulation-steps {again} (learns the same)"
            )
        if 0 < (shorter := eased.longest(rows)) < length:
            found.append(f"{flag}--max-seq-length {shorter}")
        for blocks in (eased.sizes.learning // 2, eased.sizes.learning // 4):
            some = replace(eased, sizes=replace(eased.sizes, learning=blocks))
            if blocks and (more := min(rows, some.most_rows(length))) > fewer:
                batch = f"--batch-size {more} " if more < rows else ""
                found.append(
                    f"{flag}{batch}--num-layers {blocks} (adapts the last {blocks} blocks only)"
                )
                break
        if rows > 1 and 0 < (shorter := eased.longest(1)) < length:
            found.append(f"{flag}--batch-size 1 --max-seq-length {shorter}")
        return [
            *found,
            "a smaller model, or one of 4 bits: the weights alone take " + gb(self.sizes.weights),
        ]


def memory_plan_of(
    config: RunConfig, model: nn.Module | None = None, machine: Machine | None = None, group: Group | None = None
) -> MemoryPlan:  # fmt: skip
    """Return the fitting of a run's model: of a loaded one as it is, else of its skeleton, divided in a ``group``.

    Raises:
        ModelError: There is no such model.
        ConfigError: A target that matches nothing.
    """
    machine = machine or this_machine()
    if model is not None:
        return MemoryPlan(measure(model, config.adapter), config, machine)
    name = _named(config.model, machine)
    facts = config_of(name) | (
        {"quantization": None} if is_embedded(name) and not machine.metal else {}
    )
    sizes = _skeleton_sizes(json.dumps(facts), config.adapter, 2 if machine.metal else 4, group)
    return MemoryPlan(sizes, replace(config, model=name), machine)


@cache
def _skeleton_sizes(
    facts: str, adapter: AdapterConfig, itemsize: int, group: Group | None
) -> Sizes:
    return measure(divide(make_skeleton(json.loads(facts)), group), adapter, itemsize)


def _named(name: str, machine: Machine) -> str:
    """Return what gemma-3 is on a machine, and any other name as it is."""
    if name != "gemma-3":
        return name
    if machine.metal:
        return gemma_for(machine.working_set)
    return "gemma-3-270m" if is_embedded(name) else "gemma-3-1b-it"


def resolve_length(
    config: RunConfig, model: nn.Module | None, log: Callable[[str], None] = lambda _: None
) -> RunConfig:
    """Return the config with a number for ``max_seq_length`` auto: the longest row of which a batch fits."""
    if config.data.max_seq_length != "auto":
        return config
    rows = 1 if config.data.batch_size == "auto" else config.data.batch_size
    fitting = memory_plan_of(config, model)
    length = fitting.longest(rows)
    if length < 2:
        raise ConfigError(_refusal(fitting, rows, 64))
    log(
        f"max_seq_length is {length:,}: the longest of which {rows} rows fit in"
        f" {gb(fitting.budget)}"
    )
    return replace(config, data=replace(config.data, max_seq_length=length))


def resolve_batch(
    config: RunConfig,
    model: nn.Module | None,
    longest: int,
    log: Callable[[str], None] = lambda _: None,
) -> RunConfig:
    """Return the config with a number for ``batch_size`` auto, for rows of ``longest`` tokens or packed ones."""
    if config.data.batch_size != "auto":
        return config
    length = round_up(config.data.max_seq_length if config.data.pack else longest)
    fitting = memory_plan_of(config, model)
    rows = fitting.batch_size(length)
    needed = gb(fitting.memory(rows, length).total)
    log(
        f"batch_size is {rows}: with rows of up to {length:,} tokens it takes {needed} of"
        f" {gb(fitting.budget)}"
    )
    return replace(config, data=replace(config.data, batch_size=rows))


def resolve_grad_checkpoint(
    config: RunConfig, model: nn.Module, batch: tuple[int, int], log: Callable[[str], None]
) -> bool:
    """Return whether to checkpoint, for a run's largest batch (rows, length).

    Raises:
        ConfigError: The batch does not fit either way; told with the three cheapest ways to make it
            fit.
    """
    try:
        fitting = memory_plan_of(config, model)
    except ModelError as problem:
        log(f"warning: {problem}")
        return config.grad_checkpoint == "on"
    checkpoint = fitting.checkpoint(*batch)
    if not fitting.fits(*batch):
        raise ConfigError(_refusal(fitting, *batch))
    log(
        f"plan: {gb(fitting.memory(*batch).total)} at the peak, for {batch[0]} rows x {batch[1]:,}"
        f" tokens, of {gb(fitting.budget)}; gradient checkpointing is"
        f" {'on' if checkpoint else 'off'}"
    )
    if advice := _watchdog(fitting.sizes, *batch):
        log(advice)
    return checkpoint


def compare_with_plan(
    config: RunConfig,
    model: nn.Module,
    shapes: Iterable[tuple[int, int, int]],
    peaks: Sequence[float],
    log: Callable[[str], None],
    *,
    checkpoint: bool,
) -> None:
    """Report a peak that differs from the plan for the batches so far by more than 15%.

    Args:
        config: The run's settings.
        model: With its adapters.
        shapes: The (rows, length, targets) of the batches so far.
        peaks: In bytes; the last is that of the steps, those before it are of validations.
        log: Called with the line.
        checkpoint: Whether blocks are checkpointed.
    """
    try:
        fitting = memory_plan_of(config, model)
    except ModelError:
        return
    sizes = {(rows, length) for rows, length, _ in shapes}
    predicted = max(fitting.memory(*size, checkpoint=checkpoint).total for size in sizes)
    if peaks[-1] > max(peaks[:-1], default=0) and not 1 / 1.15 <= predicted / peaks[-1] <= 1.15:
        log(
            f"plan: the first steps took {gb(peaks[-1])} where {gb(predicted)} was foretold, so"
            " the plan for the largest batch is off as much; scripts/study/calibrate fits it to"
            " this machine"
        )


def check_fit(config: RunConfig, group: Group | None = None) -> None:
    """Refuse a model of which, or of whose part in a ``group``, not even the smallest batch fits, before it is loaded.

    Raises:
        ConfigError: See there.
    """
    try:
        fitting = memory_plan_of(config, group=group)
    except ModelError:  # told better where it is loaded
        return
    if not fitting.fits(1, 64):
        raise ConfigError(_refusal(fitting, 1, 64))


def _refusal(fitting: MemoryPlan, rows: int, length: int) -> str:
    checkpoint = " with gradient checkpointing" if fitting.checkpoint(rows, length) else ""
    needed = gb(fitting.memory(rows, length).total)
    return (
        f"{fitting.config.model} does not fit: {rows} rows x {length:,} tokens take"
        f" {needed}{checkpoint}, and {gb(fitting.budget)} may be used; the cheapest ways to make it"
        " fit: " + "; ".join(fitting.suggestions(rows, length)[:3])
    )


def _watchdog(sizes: Sizes, rows: int, length: int) -> str | None:
    """Advise where one layer keeps a small GPU busy for seconds: macOS stops what holds up its display."""
    block = sizes.blocks[-1]
    layer = 2 * rows * length * block.hidden * max(block.mlp, block.experts, block.queries)
    attention = 4 * rows * min(length, 512) * length * block.queries
    if max(layer, attention) < _LONG_LAYER:
        return None
    return (
        "layers are long: where macOS stops the run for 'Impacting Interactivity', smaller batches"
        " or shorter rows help (--batch-size, with --grad-accumulation-steps), or a Mac without a"
        " display"
    )


@dataclass(frozen=True, repr=False)
class Plan(RichDisplay):
    """Where a run's memory goes, and what fits. ``print`` it, or show it in a notebook."""

    fitting: MemoryPlan
    rows: int  # in a batch
    length: int  # of the longest
    family: dict[str, MemoryPlan]  # other models beside it, by name

    @property
    def memory(self) -> Memory:
        """Where the bytes go."""
        return self.fitting.memory(self.rows, self.length)

    @property
    def title(self) -> str:
        """The model, the batch, and whether it fits."""
        batch = self.rows, self.length
        return (
            f"{self.fitting.config.model}, {self.rows} rows x {self.length:,} tokens:"
            f" {self.fitting.verdict(*batch)}"
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield it line by line."""
        fitting, memory, batch = self.fitting, self.memory, (self.rows, self.length)
        yield Text(str(fitting.machine))
        if self.family:
            yield self._table()
        yield Text(f"\n{self.title}", "bold")
        for part, size in vars(memory).items():
            yield Text(
                f"  {part:<12} {'█' * round(_BAR * size / memory.total):<{_BAR}} {gb(size):>9}"
            )
        yield Text(f"  {'in all':<12} {'':<{_BAR}} {gb(memory.total):>9} of {gb(fitting.budget)}")
        if cache := fitting.machine.cache(memory.total):
            yield Text(
                f"  freed arrays that MLX keeps besides, while there is room: up to {gb(cache)}"
            )
        saved = fitting.sizes.gradients() + fitting.sizes.moments(
            fitting.config.optimizer.optimizer
        )
        saved *= fitting.config.keep_checkpoints + 2
        yield Text(
            f"  on the disk: {gb(fitting.download)} of weights, up to {gb(saved)} of checkpoints;"
            f" fusing takes up to {gb(fitting.sizes.fuse())}"
        )
        if not fitting.fits(*batch):
            for way in fitting.suggestions(*batch)[:3]:
                yield Text(f"  to make it fit: {way}", "yellow")
        if advice := _watchdog(fitting.sizes, *batch):
            yield Text(f"  {advice}", "yellow")

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        batch = f"{self.rows} x {self.length:,} tokens"
        for heading in ("model", "download", batch, "peak", "longest row", "most rows"):
            table.add_column(
                heading, no_wrap=True, justify="left" if heading in ("model", batch) else "right"
            )
        for name, one in self.family.items():
            sizes = (
                f"{n:,}" if n else "-" for n in (one.longest(self.rows), one.most_rows(self.length))
            )
            fits, peak = (
                one.verdict(self.rows, self.length),
                one.memory(self.rows, self.length).total,
            )
            table.add_row(name, gb(one.download), fits, gb(peak), *sizes)
        return table

    def _repr_html_(self) -> None:
        """Leave a notebook the picture."""

    def _repr_png_(self) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.8), layout="constrained")
        axes, left = figure.subplots(), 0.0
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


def plan_memory(model: str = "gemma-3", memory: str | None = None, **settings: Any) -> Plan:
    """Plan a run's memory before anything is downloaded.

    Args:
        model: A name, hub id, folder or .gguf file; of a hub id, only the config is downloaded.
        memory: Of the Mac to plan for, e.g. "16GB"; by default this machine.
        settings: The settings of ``finetune``.

    Raises:
        ConfigError: A setting that is not allowed.
        ModelError: There is no such model.

    Example:
        >>> plan_memory("gemma-3-4b", memory="16GB", batch_size=4)
    """
    config = configure(RunConfig, settings | {"model": model})
    machine = simulate_mac(memory) if memory else this_machine()
    family = {
        name: memory_plan_of(replace(config, model=name), machine=machine)
        for name in FAMILY
        if model in MODELS
    }
    fitting = memory_plan_of(config, machine=machine)
    rows, length = config.data.batch_size, config.data.max_seq_length
    length = (
        fitting.longest(1 if rows == "auto" else rows) or 64
        if length == "auto"
        else round_up(length)
    )
    rows = fitting.batch_size(length) if rows == "auto" else rows
    return Plan(fitting, rows, length, family)
