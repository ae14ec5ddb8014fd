"""Find the batches that fit a machine, before weights are downloaded and when a run starts."""

import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache

import mlx.nn as nn
from mlx.core.distributed import Group

from ..adapters.tensor_parallel import divide
from ..config import AdapterConfig, TrainConfig
from ..data.batches import round_up
from ..device import MOST_ELEMENTS, Machine, gb, this_machine
from ..errors import ModelError, counted
from ..kernels.choices import default_choices
from ..models.find_model import find_config, is_embedded, original_of
from ..models.known_models import CHOSEN_BY_MEMORY, KNOWN, gemma_for, without_gpu
from ..models.skeleton import VISION_BYTES, config_of, make_skeleton, read_config
from ..models.weight_files import stored_weights
from .estimate import Memory, Sizes, batch_shape, estimate
from .measured import MeasuredStep
from .model_shapes import measure, stored_itemsize, weight_bytes
from .trace_memory import all_traces

# Fraction of the budget that a plan uses. The prediction may be off by 10%, and MLX keeps freed
# memory.
ROOM = 0.9
# A measured step lowers the prediction at most to this fraction.
_LEAST_CORRECTION = 0.5
_MOST_ROWS = 1024


@dataclass(frozen=True)
class MemoryPlan:
    """The batches of a run that fit, from the sizes of a model and the budget of a machine.

    ``correction`` is the measured size of a step's temporary arrays, relative to the prediction.
    ``stored`` is the bytes of the weights in the model's files; 0 for a model that is loaded.
    """

    sizes: Sizes
    config: TrainConfig
    machine: Machine
    correction: float = 1.0
    stored: int = 0

    @property
    def budget(self) -> int:
        """The bytes that a run may use."""
        return int(ROOM * self.machine.budget)

    @property
    def holds_traces(self) -> bool:
        """Whether the planned memory also holds the traces of a compiled step.

        With CUDA, the plan is about the GPU's memory, but traces are in the computer's memory.
        """
        compiled, backend = self.config.compile, self.machine.backend
        return backend != "cuda" and compiled != "off" and (compiled == "on" or backend == "metal")

    @property
    def download(self) -> int:
        """The approximate bytes of the model's files: the weights, and the vision tower if any."""
        name = self.config.model
        has_vision = name.startswith(("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"))
        has_vision = has_vision and name in KNOWN  # the files of any other model are counted
        return self.stored + (VISION_BYTES if has_vision else 0)

    def memory(self, rows: int, length: int, *, checkpoint: bool | None = None) -> Memory:
        """Return the memory of a batch.

        ``checkpoint`` defaults to the choice that the run would make for this batch.
        """
        if checkpoint is None:
            checkpoint = self.checkpoint(rows, length)
        memory = estimate(self.sizes, self.config, rows, length, checkpoint=checkpoint)
        memory = replace(
            memory,
            activations=int(self.correction * memory.activations),
            working=int(self.correction * memory.working),
        )
        if not self.holds_traces:
            return memory

        traces = all_traces(self.sizes, rows * length, checkpoint=checkpoint)
        return replace(memory, traces=traces)

    def corrected(self, measured: MeasuredStep | None) -> "MemoryPlan":
        """Return the plan with the correction that a measured step shows."""
        if measured is None:
            return self
        shape, checkpoint = (measured.rows, measured.length), measured.grad_checkpoint
        memory = estimate(self.sizes, self.config, *shape, checkpoint=checkpoint)
        predicted = memory.activations + memory.working
        found = predicted + measured.peak - memory.arrays
        return replace(self, correction=max(_LEAST_CORRECTION, found / predicted))

    def fits(self, rows: int, length: int, *, checkpoint: bool | None = None) -> bool:
        """Return whether a batch fits; ``checkpoint`` as for ``memory``."""
        if self.largest_array(rows, length) > MOST_ELEMENTS:
            return False
        return self.memory(rows, length, checkpoint=checkpoint).total <= self.budget

    def largest_array(self, rows: int, length: int) -> int:
        """Return the elements of a batch's largest array; 0 on a CPU, which has no limit for it."""
        if not self.machine.has_gpu:
            return 0
        batch = batch_shape(self.sizes, self.config, rows, length)
        return max(block.largest_array(batch) for block in set(self.sizes.blocks))

    def checkpoint(self, rows: int, length: int) -> bool:
        """Return whether to checkpoint: as set or, with auto, if memory is too small otherwise."""
        if self.config.grad_checkpoint != "auto":
            return self.config.grad_checkpoint == "on"
        return self.memory(rows, length, checkpoint=False).total > self.budget

    def problem(self, rows: int, length: int) -> str:
        """Return why a batch does not fit; "" if it fits."""
        batch = f"{counted(rows, 'row')} x {length:,} tokens"
        elements = self.largest_array(rows, length)
        if elements > MOST_ELEMENTS:
            return (
                f"{batch} need an array of {elements:,} elements, but on a GPU an array has at"
                f" most {MOST_ELEMENTS:,}"
            )

        needed = self.memory(rows, length).total
        if needed <= self.budget:
            return ""
        checkpoint = " with gradient checkpointing" if self.checkpoint(rows, length) else ""
        return f"{batch} take {gb(needed)}{checkpoint}, but only {gb(self.budget)} may be used"

    def verdict(self, rows: int, length: int) -> str:
        """Return a phrase that says whether a batch fits."""
        if self.fits(rows, length, checkpoint=False):
            return "fits comfortably"
        if self.fits(rows, length, checkpoint=True):
            is_off = self.config.grad_checkpoint == "off"
            return "does not fit without checkpointing" if is_off else "fits with checkpointing"
        return "does not fit"

    def longest(self, rows: int) -> int:
        """Return the largest length, within the context, at which ``rows`` rows fit; or 0."""
        context = self.sizes.context or 1 << 20

        # Lengths start at 1, so the index of the first that does not fit is the largest that fits.
        length = bisect_left(
            range(1, context + 1), True, key=lambda length: not self.fits(rows, round_up(length))
        )
        return min(round_up(length), context) if length else 0

    def most_rows(self, length: int) -> int:
        """Return the largest number of rows of this length that fit, at most 1,024; or 0."""
        return bisect_left(
            range(1, _MOST_ROWS + 1), True, key=lambda rows: not self.fits(rows, length)
        )

    def batch_size(self, length: int) -> int:
        """Return the largest batch size that fits: up to 16 rows, or 4 with checkpointing."""
        fitting = [rows for rows in (4, 2, 1) if self.fits(rows, length)]
        if self.config.grad_checkpoint != "on":
            fitting += [rows for rows in (16, 8, 4) if self.fits(rows, length, checkpoint=False)]
        return max([1, *fitting]) // self.config.objective.rows_per_example or 1

    def suggestions(self, rows: int, length: int) -> list[str]:
        """Return changes of the settings that make a batch fit, the cheapest first."""
        per_example = self.config.objective.rows_per_example
        examples = max(1, rows // per_example)
        found: list[str] = []
        eased, flag = self, ""

        # Checkpointing takes a third more time. All suggestions below assume it.
        if self.config.grad_checkpoint == "off":
            eased = replace(self, config=replace(self.config, grad_checkpoint="on"))
            flag = "--grad-checkpoint on "
            if eased.fits(rows, length):
                found.append(f"{flag.strip()} (a third more time)")

        # Fewer examples at a time. The result is the same if their number divides the batch.
        most = min(examples, eased.most_rows(length) // per_example)
        fewer = max((size for size in range(1, most + 1) if examples % size == 0), default=0)
        if 0 < fewer < examples:
            accumulation_steps = examples // fewer * self.config.grad_accumulation_steps
            accumulate = f"--grad-accumulation-steps {accumulation_steps}"
            found.append(f"{flag}--batch-size {fewer} {accumulate} (learns the same)")

        # Shorter rows.
        shorter = eased.longest(rows)
        if 0 < shorter < length:
            found.append(f"{flag}--max-seq-length {shorter}")

        # Other adapters and weights with fewer bits do not make the arrays of a batch smaller.
        if self.largest_array(rows, length) > MOST_ELEMENTS:
            return [*found, "a smaller model"]

        if self.config.adapter.adapter == "full":
            return [*found, "--adapter lora (trains far fewer parameters)", "a smaller model"]

        # Adapters on fewer blocks.
        by_blocks = eased.with_fewer_blocks(examples, length, more_than=most)
        if by_blocks:
            found.append(flag + by_blocks)

        # Fewer and shorter rows.
        shorter = eased.longest(per_example)
        if examples > 1 and 0 < shorter < length:
            found.append(f"{flag}--batch-size 1 --max-seq-length {shorter}")

        weights = gb(self.sizes.weights)
        return [*found, f"a smaller model, or one of 4 bits: the weights alone take {weights}"]

    def with_fewer_blocks(self, examples: int, length: int, *, more_than: int) -> str:
        """Return flags to adapt a half or a quarter of the blocks, or "" if that does not help.

        It helps if more than ``more_than`` examples then fit.
        """
        per_example = self.config.objective.rows_per_example
        for blocks in (self.sizes.learning // 2, self.sizes.learning // 4):
            if blocks == 0:
                continue
            smaller = replace(self, sizes=replace(self.sizes, learning=blocks))
            possible = min(examples, smaller.most_rows(length) // per_example)
            if possible > more_than:
                batch = f"--batch-size {possible} " if possible < examples else ""
                return f"{batch}--num-layers {blocks} (adapts the last {counted(blocks, 'block')})"
        return ""


def memory_plan_of(
    config: TrainConfig,
    model: nn.Module | None = None,
    machine: Machine | None = None,
    group: Group | None = None,
) -> MemoryPlan:
    """Return the memory plan of a run.

    Args:
        config: The run's settings.
        model: The loaded model; if None, a skeleton is made from the model's config.
        machine: The machine to plan for; by default this one.
        group: The processes that divide the skeleton's weights.

    Raises:
        ModelError: The model does not exist, or can't be used.
        ConfigError: A target matches no module.
    """
    machine = machine or this_machine()
    choices = default_choices(gpu=machine.has_gpu)
    if model is not None:
        sizes = measure(model, config.adapter)
        sizes = replace(sizes, choices=choices, backend=machine.backend)
        return MemoryPlan(sizes, config, machine)

    # The embedded model is quantized, but it is dequantized on a CPU.
    name = _resolve_name(config.model, machine)
    folder = None if name in KNOWN else find_config(name).parent
    facts = config_of(name) if folder is None else read_config(folder / "config.json")
    if is_embedded(name) and not machine.has_gpu:
        facts = facts | {"quantization": None, "dtype": "float32"}

    # The weight files, if they are here, say more than the config. A GPU keeps their type.
    files = None if folder is None else stored_weights(folder)
    stored_size = stored_itemsize(facts) if files is None else files.itemsize
    itemsize = stored_size if machine.has_gpu else 4
    try:
        sizes, stored = _skeleton_sizes(
            json.dumps(facts), config.adapter, (itemsize, stored_size), group, original_of(name)
        )
    except ModelError as problem:
        raise ModelError(f"{name} can't be used: {problem}") from problem
    stored = stored if files is None else files.size
    sizes = replace(sizes, choices=choices, backend=machine.backend)
    return MemoryPlan(sizes, replace(config, model=name), machine, stored=stored)


@cache
def _skeleton_sizes(
    facts: str,
    adapter: AdapterConfig,
    itemsizes: tuple[int, int],
    group: Group | None,
    original: str,
) -> tuple[Sizes, int]:
    """Return the sizes of the skeleton of a config, and the bytes of the weights in its files.

    Args:
        facts: The config, as JSON.
        adapter: The adapters.
        itemsizes: The bytes of a floating-point number on the machine of the plan, and in the
            files.
        group: The processes that divide the weights.
        original: The model's name on the hub.
    """
    config = json.loads(facts)
    model = make_skeleton(config)
    itemsize, stored_size = itemsizes
    stored = weight_bytes(model, stored_size)
    return measure(divide(model, group), adapter, itemsize, original), stored


def _resolve_name(name: str, machine: Machine) -> str:
    """Resolve a family's name to a model for this machine, and return any other name unchanged."""
    if name not in CHOSEN_BY_MEMORY:
        return name
    if machine.has_gpu:
        return gemma_for(machine.budget, name)
    return "gemma-3-270m" if is_embedded(name) else without_gpu(name)
