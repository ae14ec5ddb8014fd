"""The memory plan as text in a terminal, and as a page in a browser or a notebook."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Unpack

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ..adapters.stored_files import check_names_model, check_not_peft, is_adapter, model_for
from ..config import TrainConfig
from ..data.batches import round_up
from ..device import gb, simulate_mac, this_machine
from ..errors import ConfigError, counted, nearest
from ..files import describe_contents, write_atomically
from ..files.page_path import check_save_path
from ..keyword_types import PlanOptions, StrPath
from ..migration import translate
from ..models.known_models import sizes
from ..models.model_name_check import check_model_path
from ..models.trainable_families import check_trainable
from ..pages.pages import render_notebook, render_page
from ..python_messages import in_keywords, speak_keywords
from ..rich_display import RichDisplay
from ..settings import configure
from ..userpaths import shell_word
from .display_advice import display_advice
from .estimate import Memory
from .plan import MemoryPlan, memory_plan_of
from .plan_page import TO_FIT, plan_headline, plan_sections

_SHORTEST = 64  # tokens
_BAR = 40  # characters


@dataclass(frozen=True, repr=False)
class Plan(RichDisplay):
    """The memory of a run by purpose, and what fits. Print it, or display it in a notebook.

    Attributes:
        memory_plan: The memory plan of the run.
        rows: Rows in a batch.
        length: Tokens in the longest row.
        family: The memory plans of other models to show, by name.
        advice: What to change if the run does not fit or may be stopped, written with flags.
    """

    memory_plan: MemoryPlan
    rows: int
    length: int
    family: dict[str, MemoryPlan]
    advice: list[str]

    @property
    def memory(self) -> Memory:
        """The memory of a batch, by purpose."""
        return self.memory_plan.memory(self.rows, self.length)

    @property
    def verdict(self) -> str:
        """Whether the batch fits."""
        return self.memory_plan.verdict(self.rows, self.length)

    @property
    def title(self) -> str:
        """The model, the batch, and whether it fits."""
        batch = f"{counted(self.rows, 'row')} x {self.length:,} tokens"
        return f"{self.memory_plan.config.model}, {batch}: {self.verdict}"

    @property
    def parts(self) -> dict[str, float]:
        """The memory by purpose, in bytes."""
        parts: dict[str, float] = dict(vars(self.memory))
        if self.memory_plan.config.adapter.adapter != "full":
            return parts
        # All or some of the weights train, and there are no adapters.
        return {"trained": parts.pop("adapters"), "frozen": parts.pop("weights"), **parts}

    @property
    def download(self) -> int:
        """The approximate bytes of the model's files."""
        return self.memory_plan.download

    @property
    def checkpoints(self) -> int:
        """The largest number of bytes that checkpoints take on disk."""
        sizes, config = self.memory_plan.sizes, self.memory_plan.config
        each = sizes.gradients() + sizes.moments(config.optimizer.optimizer)
        return (config.keep_checkpoints + 2) * each

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the table of models, the bars of the memory, and advice."""
        memory_plan, memory = self.memory_plan, self.memory
        yield Text(str(memory_plan.machine))
        if self.family:
            yield self._table()

        # The memory by purpose.
        yield Text(f"\n{self.title}", "bold")
        for part, size in self.parts.items():
            if not size:  # such as the traces of a step that is not compiled
                continue
            bar = "█" * round(_BAR * size / memory.total)
            yield Text(f"  {part:<12} {bar:<{_BAR}} {gb(size):>9}")
        total = f"{gb(memory.total):>9} of {gb(memory_plan.budget)}"
        yield Text(f"  {'in all':<12} {'':<{_BAR}} {total}")
        cache = memory_plan.machine.cache(memory.total)
        if cache:
            yield Text(f"  MLX may also keep freed arrays, up to {gb(cache)}")

        # Disk space.
        weights, checkpoints = gb(self.download), gb(self.checkpoints)
        yield Text(f"  on disk: {weights} of weights, up to {checkpoints} of checkpoints")
        yield Text(f"  fusing takes up to {gb(memory_plan.sizes.fuse())} of memory")

        problem = memory_plan.problem(self.rows, self.length)
        if problem:
            yield Text(f"  it does not fit: {problem}", "yellow")
        for advice in self.advice:
            yield Text(f"  {advice}", "yellow")

    def _table(self) -> Table:
        """Return a table of the batches that fit for each model of the family."""
        head, rows = self.models()
        table = Table(box=None, padding=(0, 1, 0, 0))
        for column, heading in enumerate(head):
            justify = "left" if column in (0, 2) else "right"
            table.add_column(heading, no_wrap=True, justify=justify)
        for row in rows:
            table.add_row(*row)
        return table

    def models(self) -> tuple[list[str], list[list[str]]]:
        """Return a heading and a row for each model of the family: the batches that fit."""
        batch = f"{self.rows} x {self.length:,} tokens"
        head = ["model", "download", batch, "peak", "longest", "most rows"]
        rows: list[list[str]] = []
        for name, plan in self.family.items():
            longest, most_rows = plan.longest(self.rows), plan.most_rows(self.length)
            peak = plan.memory(self.rows, self.length).total
            rows.append(
                [
                    name,
                    gb(plan.download),
                    plan.verdict(self.rows, self.length),
                    gb(peak),
                    f"{longest:,}" if longest else "-",
                    f"{most_rows:,}" if most_rows else "-",
                ]
            )
        return head, rows

    @speak_keywords
    def save(self, save_path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan as a page.

        Args:
            save_path: The file, which ends in .html.
            overwrite: Replace an existing file.

        Raises:
            OutputError: The file exists, has another suffix, or can't be written.
        """
        path = check_save_path(save_path, overwrite=overwrite)
        page = render_page(self.title, plan_headline(self), plan_sections(self))
        write_atomically(path, page)

    def _repr_html_(self) -> str:
        return render_notebook(plan_sections(self), plan_headline(self))


def plan_memory(
    model: StrPath | None = None,
    memory: str | None = None,
    *,
    families: str | Sequence[str] = (),
    **settings: Unpack[PlanOptions],
) -> Plan:
    """Plan a run's memory before anything is downloaded.

    Args:
        model: A name, hub id, folder or .gguf file. For a hub id, only the config is downloaded.
            By default gemma-3, or the largest of ``families`` that fits.
        memory: Memory of the Mac to plan for, e.g. "16GB"; by default that of this machine.
        families: Words such as "qwen" or "llama-3". The plan shows every model with a short name
            that contains one of them, whether it fits or not; by default all that fit, or only
            ``model`` if it is given.
        settings: The settings of ``finetune``.

    Raises:
        ConfigError: A setting is not allowed, or no short name contains a word of ``families``.
        ModelError: The model does not exist, or can't be trained.

    Example:
        >>> plan_memory("gemma-3-4b", memory="16GB", batch_size=4)
        >>> plan_memory(memory="32GB", families="qwen")
    """
    # The plan does not read the data.
    used = translate(TrainConfig, dict(settings))
    used.pop("data", None)
    used.pop("data_weights", None)
    if used.get("resume_adapter_file") is not None:
        raise ConfigError(
            "plan_memory does not read the adapter in resume_adapter_file: give its own settings"
            " instead (rank, target_modules, …), or use the command mlx_loraplus.plan"
        )
    config = configure(TrainConfig, used | {"model": model or "gemma-3"})
    plan = plan_run(config, memory, families, is_named=model is not None)
    plan.advice[:] = map(in_keywords, plan.advice)
    return plan


def _check_family(word: str) -> None:
    """Check that short names contain a word.

    Raises:
        ConfigError: None does, or the word is an adapter, or a path or a hub id, which goes to
            ``--model``.
        ModelError: The word is a file that is not a model.
    """
    path = Path(word)
    is_model = path.is_file() or (path / "config.json").is_file()
    if path.exists() and not sizes(word):
        check_model_path(word)
        _check_no_run(path)
    if is_model or (not sizes(word) and ("/" in word or word.endswith(".gguf"))):
        raise ConfigError(f"{word!r:.80} is not part of a short name: write --model {word:.80}")
    if word.upper() in ("GB", "G", "MB"):
        raise ConfigError("the size and its unit are one word, as in --memory 16GB")
    if not sizes(word):
        raise ConfigError(
            f"no short name contains {word!r:.40}{nearest(word, sizes())}: a hub id or a folder"
            " goes to --model, and mlx_loraplus.train --list-models prints the names"
        )


def _check_no_run(path: Path) -> None:
    """Check that a folder, which is no family of models, does not hold a run, adapter or sweep.

    Raises:
        ConfigError: It does; the message says how to plan such a run.
        AdapterError: It holds an adapter that must be converted or that names no model.
    """
    check_not_peft(path)
    for file, kind in (("run.yaml", "a run"), ("best.yaml", "a sweep")):
        if (path / file).is_file():
            raise ConfigError(
                f"{path} is {kind}, not a family of models: mlx_loraplus.plan -c {path / file}"
                " plans with its settings"
            )
    if describe_contents(path).startswith("data"):
        raise ConfigError(
            f"{path} holds data, not a family of models: rows go to --data, as in mlx_loraplus.plan"
            f" --data {shell_word(path)}"
        )
    if is_adapter(path):
        raise ConfigError(
            f"{path} is an adapter, not a family of models: --model {model_for(None, path)} is its"
            " model"
        )


def plan_run(
    config: TrainConfig,
    memory: str | None = None,
    families: str | Sequence[str] = (),
    *,
    is_named: bool = True,
) -> Plan:
    """Plan the memory of a run with these settings; see ``plan_memory``.

    Args:
        config: The settings of the run.
        memory: Memory of the Mac to plan for.
        families: Words of the short names to show.
        is_named: Whether the user named the model, or an adapter that names it.

    With families, and if the user named no model, the plan is for the largest of them that fits.
    """
    machine = simulate_mac(memory) if memory else this_machine()

    # Words may also be separated by commas.
    given = [families] if isinstance(families, str) else list(map(str, families))
    words = [word for word in ",".join(given).split(",") if word]
    for word in words:
        _check_family(word)

    # The models to show: those of the families, or the one that is named, or else all models that
    # fit with a short row. Most have 4 bits, so adapter full can't train them, and shows none.
    family: dict[str, MemoryPlan] = {}
    if words or not (is_named or config.adapter.adapter == "full"):
        for name in sizes(*words):
            plan = memory_plan_of(replace(config, model=name), machine=machine)
            if words or plan.longest(1) >= _SHORTEST:
                family[name] = plan
    if words and not is_named:
        config = replace(config, model=_largest_that_fits(family))

    # The plan of the run.
    check_model_path(config.model)
    check_names_model(config.model)
    check_trainable(config.model)
    memory_plan = memory_plan_of(config, machine=machine)
    rows, length = _batch(memory_plan)
    advice: list[str] = []
    if not memory_plan.fits(rows, length):
        suggestions = memory_plan.suggestions(rows, length)[:3]
        advice += [f"{TO_FIT}{suggestion}" for suggestion in suggestions]
    line = display_advice(memory_plan.sizes, memory_plan.machine, rows, length)
    if line:
        advice.append(line)
    return Plan(memory_plan, rows, length, family, advice)


def _batch(memory_plan: MemoryPlan) -> tuple[int, int]:
    """Return the rows and the length of a run's largest batch, as the run would choose them."""
    config = memory_plan.config
    per_example = config.objective.rows_per_example
    rows, length = config.data.batch_size, config.data.max_seq_length
    if length == "auto":
        length = memory_plan.longest(per_example * (1 if rows == "auto" else rows)) or 64
    else:
        length = round_up(length)
    size = memory_plan.batch_size(length) if rows == "auto" else rows
    return per_example * size, length


def _largest_that_fits(family: dict[str, MemoryPlan]) -> str:
    """Return the name of the largest model whose batch fits, or else of the smallest model."""
    by_size = sorted(family, key=lambda name: family[name].sizes.weights)
    fits = [name for name in by_size if family[name].fits(*_batch(family[name]))]
    return fits[-1] if fits else by_size[0]
