"""Bytes from strangers: what a loader is fed, how it is changed, and how an escape is noticed.

A target takes the bytes of one file and may end well or with one of the package's own errors.
Inputs are made by changing known ones; an input that reaches a new line of the package joins them,
which leads deeper than chance alone. The same seed gives the same inputs.
"""

import contextlib
import hashlib
import io
import os
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.storage import load_adapter, write_adapter
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.export.gguf_lora import load_gguf_lora, write_lora
from mlx_loraplus.export.peft import load_peft, write_peft
from mlx_loraplus.given_settings import _read_yaml
from mlx_loraplus.models.gguf.convert import write_folder
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.runs.state import Progress, StepStats
from mlx_loraplus.settings import configure, settings_of
from mlx_loraplus.training.checkpoint import (
    checkpoint_folder,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.run_fingerprint import RunFingerprint, compare_settings
from scripts.tiny_model import write_tiny_model
from tests.conftest import cpu_limit
from tests.fuzz.mutation import mutate
from tests.models.gguf_files import llama_cpp_weights, write_gguf

CORPUS = Path(__file__).parent / "corpus"
PACKAGE = str(Path(ml.__file__).parent)
SECONDS = 5.0  # of computing that one input may take


class EscapeError(Exception):
    """A loader touched what is not its business."""


@dataclass(frozen=True)
class Target:
    """What is fed.

    Attributes:
        seeds: Makes well-formed inputs.
        feed: Loads one, in a folder of its own.
        share: Of all inputs.
    """

    seeds: Callable[[Path], list[bytes]]
    feed: Callable[[bytes, Path], object]
    share: float


# The targets


def tiny_llama() -> nn.Module:
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2,
            num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=20, tie_word_embeddings=False,
        )
    )  # fmt: skip


def adapted(rank: int = 2) -> nn.Module:
    model = tiny_llama()
    attach_adapters(model, AdapterConfig(rank=rank))
    return model


def save_peft(model: nn.Module, folder: Path) -> None:
    write_peft(model, "base", folder)


def save_gguf(model: nn.Module, folder: Path) -> None:
    write_lora(model, folder / "lora.gguf")


def load_gguf(model: nn.Module, folder: Path) -> nn.Module:
    return load_gguf_lora(model, folder / "lora.gguf")


FORMATS = {
    "ours": (write_adapter, load_adapter),
    "peft": (save_peft, load_peft),
    "gguf": (save_gguf, load_gguf),
}


def adapter_seeds(folder: Path, name: str, kind: str) -> list[bytes]:
    made = []
    for rank in (1, 2):
        FORMATS[kind][0](adapted(rank), folder)
        made.append((folder / name).read_bytes())
    return made


def feed_adapter(content: bytes, folder: Path, name: str, kind: str) -> None:
    save, load = FORMATS[kind]
    if not all(
        (folder / each).exists()
        for each in (name, *(["adapter_config.json"] if kind != "gguf" else []))
    ):
        save(adapted(), folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        model = load(tiny_llama(), folder)
        mx.eval(model(mx.array([[1, 2, 3]])))
    finally:
        (folder / name).write_bytes(whole)


def adapter_target(name: str, share: float, kind: str = "ours") -> Target:
    return Target(of(adapter_seeds, name, kind), of(feed_adapter, name, kind), share)


def yaml_seeds(_: Path) -> list[bytes]:
    import yaml

    settings = settings_of(
        configure(TrainConfig, {"iters": 3, "target_modules": ["q_proj", "v_proj"], "patience": 2})
    )
    whole = yaml.safe_dump(settings).encode()
    return [
        whole,
        *(line + b"\n" for line in whole.splitlines()[:12]),
        b"rank: &a [1, *a]\n",
        b"? [1]\n: 2\n",
    ]


def feed_yaml(content: bytes, folder: Path) -> None:
    (folder / "run.yaml").write_bytes(content)
    configure(TrainConfig, _read_yaml(folder / "run.yaml", ()))


def gguf_seeds(folder: Path) -> list[bytes]:
    byte_level = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    made = []
    for architecture, more in (("llama", {}), ("gemma3", {}), ("llama", byte_level)):
        path = folder / "seed.gguf"
        weights = llama_cpp_weights(architecture)
        one_block = {
            name: None if re.match(r"blk\.[1-9]", name) else 0 * weight
            for name, weight in weights.items()
        }
        write_gguf(path, architecture, {f"{architecture}.block_count": 1, **more}, one_block)
        made.append(path.read_bytes())
    return made


def feed_gguf(content: bytes, folder: Path) -> None:
    (folder / "input.gguf").write_bytes(content)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    write_folder(folder / "input.gguf", out, "float32")


def model_seeds(folder: Path, name: str) -> list[bytes]:
    return [(write_tiny_model(folder / "model", hidden=16, layers=1) / name).read_bytes()]


def feed_model(content: bytes, folder: Path, name: str) -> None:
    model = folder / "model"
    if not model.exists():
        write_tiny_model(model, hidden=16, layers=1)
    whole = (model / name).read_bytes()
    (model / name).write_bytes(content)
    try:
        load_folder(model)
    finally:
        (model / name).write_bytes(whole)


@cache
def made_checkpoint(folder: Path) -> tuple[Path, nn.Module, LoRAPlus]:
    model = adapted()
    optimizer = LoRAPlus(OptimizerConfig(), total_steps=10)
    optimizer.init(model, trainable_summary(model).groups)
    identity = RunFingerprint(
        settings_of(configure(TrainConfig, {})), "model", "rows", {"mlx": "0"}
    )
    progress = Progress(
        step=3, best_step=2, best_loss=1.5, window=[StepStats(1.0, 0.5, 7, 20, 24, 0.1)]
    )
    report = {"step": 3, "loss": 1.25, "useful_tokens": 20, "seconds": 0.1, "peak_memory_gb": 0.5}
    events = [{"step": 0, "schema": 1}, {"step": 2, "valid_loss": 1.5}, report]
    save_checkpoint(folder, model, optimizer, progress, identity, events, keep=1)
    return checkpoint_folder(folder, 3), model, optimizer


def checkpoint_seeds(folder: Path, name: str) -> list[bytes]:
    return [(made_checkpoint(folder)[0] / name).read_bytes()]


def feed_checkpoint(content: bytes, folder: Path, name: str) -> None:
    """Feed a checkpoint whose sums are right: a stranger's, not a broken one."""
    made, model, optimizer = made_checkpoint(folder)
    whole, sums = (made / name).read_bytes(), (made / "SHA256SUMS").read_bytes()
    (made / name).write_bytes(content)
    if name != "SHA256SUMS":
        right = sums.replace(
            *(hashlib.sha256(file).hexdigest().encode() for file in (whole, content))
        )
        (made / "SHA256SUMS").write_bytes(right)
    try:
        checkpoint = read_checkpoint(made)
        compare_settings(checkpoint.identity, configure(TrainConfig, {}))
        restore(checkpoint, model, optimizer)
    finally:
        (made / name).write_bytes(whole)
        (made / "SHA256SUMS").write_bytes(sums)


def of(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, *names)


TARGETS = {
    "gguf": Target(gguf_seeds, feed_gguf, 0.25),
    "adapters.safetensors": adapter_target("adapters.safetensors", 0.15),
    "adapter_config.json": adapter_target("adapter_config.json", 0.1),
    "adapter_model.safetensors": adapter_target("adapter_model.safetensors", 0.1, "peft"),
    "peft.json": adapter_target("adapter_config.json", 0.1, "peft"),
    "lora.gguf": adapter_target("lora.gguf", 0.05, "gguf"),
    "run.yaml": Target(yaml_seeds, feed_yaml, 0.08),
    "model.safetensors": Target(
        of(model_seeds, "model.safetensors"), of(feed_model, "model.safetensors"), 0.07
    ),
    "config.json": Target(of(model_seeds, "config.json"), of(feed_model, "config.json"), 0.04),
    "state.json": Target(
        of(checkpoint_seeds, "state.json"), of(feed_checkpoint, "state.json"), 0.02
    ),
    "state.safetensors": Target(
        of(checkpoint_seeds, "state.safetensors"), of(feed_checkpoint, "state.safetensors"), 0.02
    ),
    "SHA256SUMS": Target(
        of(checkpoint_seeds, "SHA256SUMS"), of(feed_checkpoint, "SHA256SUMS"), 0.02
    ),
}


# Feeding


def feed(
    target: Target, content: bytes, folder: Path, *, watch: bool = True
) -> frozenset[tuple[str, int]]:
    """Feed one input and return the lines of the package that it reached; anything but an own error is raised."""
    said = io.StringIO()
    reached: set[tuple[str, int]] = set()
    lines = lines_to(reached) if watch else contextlib.nullcontext()
    try:
        with (
            cpu_limit(SECONDS),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
            lines,
        ):
            target.feed(content, folder)
    except ml.LoRAPlusError as error:
        message = str(error)
        if "\n" in message or len(message) > 3000:
            raise EscapeError(
                f"a message of {len(message)} characters: {message[:300]!r}"
            ) from error
    return frozenset(reached)


@contextmanager
def lines_to(reached: set[tuple[str, int]]) -> Iterator[None]:
    """Note every line of the package that is run."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()  # coverage's
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def watch_for_escapes(folder: Path) -> list[str]:
    """Return a list that will hold what this process does outside ``folder`` from now on, and should not."""
    escapes: list[str] = []
    forbidden = (
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "pickle.find_class",
    )

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            path = Path(os.fsdecode(arguments[0])).absolute()
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.is_relative_to(folder):
                escapes.append(f"writes {path}")
            if path.name == "passwd":
                escapes.append(f"reads {path}")
        elif event.startswith(forbidden):
            escapes.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return escapes


def kept(name: str) -> list[bytes]:
    """Return a target's kept corpus."""
    path = CORPUS / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(member) for member in sorted(archive.namelist())]


def fuzz(name: str, count: int, seed: int, folder: Path, last: Path | None = None) -> list[bytes]:
    """Feed ``count`` inputs to a target and return those that reached new lines of the package.

    Args:
        name: The target.
        count: How many.
        seed: Of the inputs.
        folder: A place to work in.
        last: Where to leave the input at work, for a process that dies of it.
    """
    target, chance = TARGETS[name], random.Random(f"{name} {seed}")
    inputs = [*target.seeds(folder), *kept(name)]
    known, reached, found = len(inputs), set(), []
    for number in range(count):
        content = (
            inputs[number] if number < known else mutate(chance.choice(inputs), chance, inputs)
        )
        if last is not None:
            last.write_bytes(content)
        lines = feed(
            target, content, folder, watch=number < known or chance.random() < 0.25
        )  # watching is slow
        if not lines <= reached:
            reached |= lines
            found.append(content)
            inputs.append(content)
    return found
