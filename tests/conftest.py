"""Tiny random models of real architectures, and the two real ones."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import fcntl
import gc
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from scripts.tiny_model import write_sums, write_tiny_model
from tests.mistakes_workshop import make_workshop

settings.register_profile("unhurried", deadline=None)  # a first call may compile kernels
settings.load_profile("unhurried")

VOCABULARY = 128

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
        "query_pre_attn_scalar": 16,
    },
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": {
            "attention_bias": False, "attention_chunk_size": 8, "head_dim": 16, "hidden_size": 64,
            "interleave_moe_layer_step": 1, "intermediate_size": 96, "intermediate_size_mlp": 96,
            "max_position_embeddings": 128, "model_type": "llama4_text", "num_attention_heads": 4,
            "num_experts_per_tok": 1, "num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 4,
            "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "use_qk_norm": True,
            "vocab_size": VOCABULARY, "attn_temperature_tuning": 4, "floor_scale": 8192, "attn_scale": 0.1,
        },
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False, "num_experts": 8,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "cohere": {
        "model_type": "cohere", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "logit_scale": 0.25,
    },
}  # fmt: skip

TinyModel = Callable[..., nn.Module]


def make_model(
    kind: str, *, bits: int | None = None, mode: str = "affine", seed: int = 0
) -> nn.Module:
    """Make a tiny model with random weights, its norms and biases random too."""
    mx.random.seed(seed)
    model_class, args_class = _get_classes(CONFIGS[kind])
    model = model_class(args_class.from_dict(CONFIGS[kind]))
    if kind == "gemma3":
        model.tie_word_embeddings = True
        model.pop("lm_head")
    if bits is not None:
        group = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}[mode]
        nn.quantize(model, group_size=group, bits=bits, mode=mode)
    mx.eval(model.parameters())
    model.eval()
    return model


LONGEST = (
    "tests/runs/test_browser.py",
    "tests/scripts/test_launches.py",
    "tests/test_readme.py",
    "tests/test_settings_act.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_distributed.py",
    "tests/training/test_find_rate.py",
    "tests/training/test_finetune.py",
    "tests/training/test_full.py",
    "tests/training/test_kto.py",
    "tests/training/test_tensor.py",
)
"""The files that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that none is left for one process alone at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """Let Python's garbage collector skip thousands of tests, and look more rarely for new garbage.

    It would take a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Let writes return before they are on the disk: a run waits for it 140 times, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(fcntl, "F_FULLFSYNC", raising=False)  # a Mac's
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_tokens() -> Iterator[None]:
    """Let no test read tokens from the cache that other code has encoded."""
    from mlx_loraplus.data import dataset

    code = hashlib.blake2b()
    for file in sorted(Path(dataset.__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_VERSION", code.hexdigest())
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> None:
    """Draw pictures with few pixels: each run draws one, and no test looks at it closely."""
    import matplotlib as mpl

    mpl.rcParams["savefig.dpi"] = 20


@pytest.fixture
def tiny() -> TinyModel:
    """Make a tiny model: ``tiny("llama", bits=4)``."""
    return make_model


@pytest.fixture(scope="session")
def gemma_folder() -> Path:
    """The real Gemma 3 270M, as an mlx-lm folder."""
    from mlx_loraplus.models.find_model import find_model

    return find_model("gemma-3-270m").path


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The real SmolLM2 135M Instruct, as an mlx-lm folder."""
    from mlx_loraplus.models.find_model import find_model

    return find_model("smollm2-135m").path


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """Write a tiny model and little sums; return the place where whole runs are made on them."""
    from tests.training.tiny_runs import Place

    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    return Place(tmp_path)


class HangError(BaseException):
    """Something did not end; nothing may catch it."""


@contextmanager
def cpu_limit(seconds: float = 10.0) -> Iterator[None]:
    """Raise HangError where this process computes for longer, whatever else the machine does meanwhile."""

    def end(*_: object) -> None:
        raise HangError(f"more than {seconds} s of computing")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def same(first: Any, second: Any) -> bool:
    """Tell whether two trees of arrays are equal to the bit."""
    a, b = dict(tree_flatten(first)), dict(tree_flatten(second))
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


def randomize_adapters(model: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Give every adapter a B that does something."""
    mx.random.seed(seed)
    trained = [
        (name, size * mx.random.normal(p.shape))
        for name, p in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(trained, strict=False)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what people have."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def in_workshop(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make that folder the current one, without the model hub."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return workshop
