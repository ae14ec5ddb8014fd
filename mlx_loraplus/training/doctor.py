"""The ``doctor`` command: facts about this machine, the self-check and the tuning, as tables.

The tables are Markdown, so that they can be read in a terminal and pasted into a bug report.
``doctor_page.py`` makes them.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma3_text, llama

from ..adapters.attach import attach_adapters
from ..command_config import DoctorConfig
from ..config import TrainConfig
from ..data.batches import Batches
from ..data.tokenize import Example
from ..device import gb, on_gpu, this_machine
from ..files import write_atomically
from ..files.page_path import check_save_path
from ..inference.generate import load
from ..kernels.delta_rule import choices_for, has_delta_rule
from ..memory.plan import memory_plan_of
from ..models.find_model import is_stored
from ..settings import configure
from .doctor_page import ModelExamination, check_table, doctor_page, to_markdown, tuning_table
from .fastest_step import OpenChoices, largest_batch, tune_step, way_of
from .model_probes import probe_model
from .optimizer import LoRAPlus
from .run_checks import check_model_name
from .schedule import schedule_of
from .selfcheck import check_step, refuse_if_wrong
from .step_choices import machine_facts, ways_to_check
from .trainer import TrainState

PACKAGES = ("mlx_loraplus", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "safetensors")

_DEFAULT = "gemma-3"
# The rows and the length of the batch that is timed.
_GPU_BATCH, _CPU_BATCH = (4, 512), (2, 64)
_VOCABULARY = 8192

Log = Callable[[str], None]


def examine(config: DoctorConfig, log: Log) -> None:
    """Print tables about this machine and what it computes, and write them as a page if asked to.

    Args:
        config: The model to check with, and where to save the page.
        log: Called with each line.

    Raises:
        ModelError: The model can't be loaded.
        OutputError: The page can't be saved there.
        LoRAPlusError: This machine computes wrong results.
    """
    path = None
    if config.save_path is not None:
        path = check_save_path(config.save_path, overwrite=config.overwrite)
    if config.model is not None:
        check_model_name(config.model)
    machine = describe_machine()
    log(_shown(("machine", ""), machine))

    found: list[ModelExamination] = []
    for name, model in _models(config):
        log(f"\nchecking {name}; this takes a minute")
        found.append(_examine_model(name, model, log))

    log("\nFor a bug report, paste everything above.")
    if path is not None:
        write_atomically(path, doctor_page(machine, found))
        log(f"the page is {path}")
    for each in found:
        refuse_if_wrong(each.check)


def _shown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, which fits the terminal if there is one."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return to_markdown(head, rows, width)


def describe_machine() -> list[tuple[str, str]]:
    """Return the facts about this machine that a bug report needs."""
    machine, facts = this_machine(), machine_facts()
    rows = [
        ("system", facts["system"]),
        ("chip", facts["chip"]),
        ("device", facts["device"]),
        ("memory", f"{gb(machine.memory)}, {gb(machine.free)} free"),
        ("working set", gb(machine.working_set)),
        ("wired limit", _wired_limit()),
        ("BLAS", _blas()),
        ("python", platform.python_version()),
    ]

    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            rows.append((package, version(package)))
    for name, value in sorted(os.environ.items()):
        if name.startswith(("MLX_", "AGX_")) and name != "MLX_LORAPLUS_CACHE":
            rows.append((name, value))
    return rows


def _wired_limit() -> str:
    """Return macOS's limit on wired memory, which the user may have raised."""
    if sys.platform != "darwin":
        return "none"

    command = ("/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb")
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    megabytes = done.stdout.strip()
    return "the system's default" if megabytes == "0" else f"{megabytes} MB"


def _blas() -> str:
    """Return the library that computes matrix products on the CPU."""
    if sys.platform == "darwin":
        return "Accelerate"

    # The package loads OpenBLAS globally, so its symbols are those of the process.
    library: Any = ctypes.CDLL(None)
    try:
        describe = library.openblas_get_config
    except AttributeError:
        return "MLX's own (slow)"
    describe.restype = ctypes.c_char_p
    return describe().decode(errors="replace").strip()


def _models(config: DoctorConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the model of each check."""
    if config.model is not None:
        yield config.model, load(config.model)[0]
    elif is_stored(_DEFAULT):
        yield _DEFAULT, load(_DEFAULT)[0]
    else:
        yield "a small random 4-bit Llama", _small_llama()
        yield "a small random Gemma 3", _small_gemma()


def _small_llama() -> nn.Module:
    """Return a small Llama with random weights of 4 bits."""
    model = _small_model(
        llama,
        model_type="llama",
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    return _ready(model, bits=4)


def _small_gemma() -> nn.Module:
    """Return a small Gemma 3 with random weights and a tied head."""
    model = _small_model(
        gemma3_text,
        model_type="gemma3_text",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        query_pre_attn_scalar=128,
        sliding_window=256,
        sliding_window_pattern=2,
    )
    model.tie_word_embeddings = True
    model.pop("lm_head")
    return _ready(model)


def _small_model(family: Any, **settings: Any) -> Any:
    """Return a model of two small blocks, of one of mlx-lm's families, with random weights."""
    mx.random.seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
    return family.Model(family.ModelArgs(vocab_size=_VOCABULARY, **sizes, **settings))


def _ready(model: nn.Module, bits: int | None = None) -> nn.Module:
    """Set the type of the weights that is usual on this device, and quantize them if asked to."""
    model.set_dtype(mx.bfloat16 if on_gpu() else mx.float32)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model


def _examine_model(name: str, model: nn.Module, log: Log) -> ModelExamination:
    """Print and return the self-check and the tuning of a model."""
    rows, length = _GPU_BATCH if on_gpu() else _CPU_BATCH
    config = configure(TrainConfig, {"model": name, "batch_size": rows, "iters": 1})
    trainable = attach_adapters(model, config.adapter)
    probes = probe_model(model, pack=False)

    # Train on random tokens, half of which are supervised.
    batches = Batches(_random_examples(rows, length), rows, config.seed)
    schedule = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, schedule.steps)
    optimizer.init(model, trainable.groups)
    trunk_and_head = probes.trunk_and_head(model)
    choices = choices_for(model)
    state = TrainState(
        model, trunk_and_head, optimizer, batches, schedule, probes=probes, choices=choices
    )

    # Check the results of all ways to compute a step.
    check = check_step(model, probes, config.adapter, ways_to_check(state, config))
    if check.skipped:
        log(f"self-check: {check}")
    else:
        table, allowed = check_table(check)
        log(f"{_shown(table.head, table.rows)}\n\n{allowed}")

    # Time the ways to compute a step.
    compiled = (True, False) if on_gpu() else ()
    freedom = OpenChoices((True,), compiled, has_delta_rule(model))
    budget = memory_plan_of(config, model).budget
    start = way_of(state, config)
    tuned = tune_step(state, largest_batch(batches, slice(None)), start, freedom, budget)
    table, notes = tuning_table(tuned, probes)
    log("\n".join(["", _shown(table.head, table.rows), *(f"\n{note}" for note in notes)]))
    return ModelExamination(name, probes, check, tuned)


def _random_examples(count: int, length: int) -> list[Example]:
    """Return examples of random tokens; the second half of each is supervised."""
    random = np.random.default_rng(0)
    supervised = np.arange(length) >= length // 2
    return [
        Example(random.integers(1, 1000, length).astype(np.int32), supervised, str(number))
        for number in range(count)
    ]
