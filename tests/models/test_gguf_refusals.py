"""GGUF files that can not be used are refused in one line, and leave nothing behind."""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.find_model import find_model, smollm2_file
from mlx_loraplus.models.gguf.convert import convert_gguf, write_folder
from mlx_loraplus.models.gguf.read_config import config_from_gguf
from mlx_loraplus.models.gguf.reader import read_gguf
from tests.conftest import cpu_limit
from tests.models.gguf_files import HIDDEN, LAYERS, PIECES, write_gguf

# What can't be used is one line, and leaves nothing behind.

GPT2: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("rwkv7", {}, {}, "architecture is 'rwkv7'; allowed are llama, llama4, gemma, gemma2, gemma3"),
    ("llama", {"llama.expert_count": 8}, {}, "llama.expert_used_count is None"),
    ("gemma3", {"gemma3.expert_count": 8}, {}, "mixture of experts"),
    (
        "llama",
        {"llama.block_count": 2_000_000_000},
        {},
        r"llama\.block_count is 2000000000, allowed",
    ),
    ("llama", {"llama.attention.head_count": None}, {}, r"llama\.attention\.head_count is None"),
    ("llama", {"llama.attention.head_count_kv": 3}, {}, "4 heads can't share 3 key heads"),
    ("llama", {"llama.rope.dimension_count": 4}, {}, r"rope\.dimension_count': 4"),
    ("llama", {"llama.embedding_length": "wide"}, {}, r"embedding_length is 'wide'"),
    ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, {}, "caps its logits"),
    ("gemma3", {"gemma3.attention.sliding_window": None}, {}, r"attention\.sliding_window is None"),
    ("llama", {}, {"output_norm.weight": None}, r"tensor 'output_norm\.weight' is missing"),
    ("llama", {}, {"token_embd.weight": None}, r"tensor 'token_embd\.weight' is missing"),
    (
        "llama",
        {},
        {"blk.0.attn_q.bias": np.zeros(32, np.float32)},
        "has no place in mlx-lm's model",
    ),
    ("llama", {}, {"output_norm.weight": np.zeros(9, np.float32)}, r"is \(9,\), not \(32,\)"),
    (
        "llama",
        {},
        {"output_norm.weight": np.zeros(HIDDEN, np.int8)},
        "has the type I8, allowed are F32, F16",
    ),
    ("llama", {"tokenizer.ggml.tokens": None}, {}, "it holds no tokenizer"),
    ("llama", {"tokenizer.ggml.tokens": [*PIECES, "more"]}, {}, "11 tokens for 10 embeddings"),
    ("llama", {"tokenizer.ggml.tokens": ["a"] * 10}, {}, "a token appears twice"),
    ("llama", {"tokenizer.ggml.scores": [1.0]}, {}, "10 tokens and 1 score"),
    ("llama", {"tokenizer.ggml.bos_token_id": 10}, {}, "bos token id is 10; allowed are 0 to 9"),
    (
        "llama",
        {"tokenizer.ggml.model": "bert"},
        {},
        "tokenizer is of type 'bert'; allowed are 'llama', 'gpt2' and 'gemma4'",
    ),
    ("llama", {"tokenizer.ggml.model": "gpt2"}, {}, r"tokenizer\.ggml\.merges is missing"),
    (
        "llama",
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.pre": "viking",
        },
        {},
        "pre-tokenizer is 'viking'; allowed are smollm, gpt-2, llama-bpe",
    ),
    ("llama", GPT2 | {"tokenizer.ggml.merges": ["a c"]}, {}, "is broken .*`c` out of vocabulary"),
    ("llama", GPT2 | {"tokenizer.ggml.merges": ["a b", "a"]}, {}, "its metadata is broken"),
    ("llama", {"tokenizer.ggml.token_type": "thousand.."}, {}, "its metadata is broken"),
    ("llama", {"tokenizer.ggml.tokens": 3}, {}, "its metadata is broken"),
    ("llama", {"llama.expert_count": [1, 2]}, {}, r"llama.expert_count is \[1, 2\], allowed"),
    (
        "llama",
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.attn_factor": 2.0,
        },
        {},
        "attn_factor is 2.0, but mlx-lm always uses 1",
    ),
    ("gemma3", {"gemma3.rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor is 0.5"),
    ("llama", {"llama.attention.causal": False}, {}, "reads texts in both directions"),
    (
        "llama",
        {"tokenizer.ggml.scores": [float("nan")] * 10},
        {},
        "a score of a token is not a finite",
    ),
    ("llama", {"tokenizer.ggml.eos_token_id": True}, {}, "eos token id is True"),
    ("llama", {"tokenizer.chat_template": 3}, {}, "chat_template is 3; allowed is the text"),
    ("llama", {"llama.rope.scaling.type": [1, 2]}, {}, r"RoPE scaling is \[1, 2\] by 1"),
]


@pytest.mark.parametrize(("architecture", "metadata", "tensors", "told"), REFUSED)
def test_what_can_not_be_converted_is_refused_in_one_line(
    architecture: str, metadata: dict, tensors: dict, told: str, tmp_path: Path, cache: Path
):
    path = write_gguf(tmp_path / "tiny.gguf", architecture, metadata, tensors)
    with pytest.raises(ModelError, match=told) as raised:
        find_model(str(path))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_gguf_cut_anywhere_is_refused(architecture: str, tmp_path: Path, cache: Path):
    whole = write_gguf(tmp_path / "whole.gguf", architecture).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1500, 23), *range(1500, len(whole) - 128, 1999), len(whole) - 128]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf (is not a whole GGUF file|can't be read)"):
            convert_gguf(cut)
    assert not list(cache.iterdir())


def test_the_real_file_cut_short_is_refused_at_once(tmp_path: Path, cache: Path):
    size = smollm2_file().stat().st_size
    cut = tmp_path / "cut.gguf"
    for length in (1_000_000, size // 2, size - 1):
        with smollm2_file().open("rb") as whole:
            cut.write_bytes(whole.read(length))
        with pytest.raises(ModelError, match="is not a whole GGUF file"), cpu_limit():
            convert_gguf(cut)
    assert not list(cache.iterdir())


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 6))
def test_a_gguf_with_any_bytes_changed_converts_or_is_refused(
    seed: int, changes: int, tmp_path: Path
):
    path = tmp_path / "tiny.gguf"
    whole = path.read_bytes() if path.exists() else write_gguf(path).read_bytes()
    chance = random.Random(seed)
    header = whole.index(b"blk.1.ffn_up") + 64
    bad = bytearray(whole)
    for _ in range(changes):
        width = chance.choice((1, 4, 8))
        value = chance.choice((0, 1, 2 ** (8 * width) - 1, chance.getrandbits(8 * width)))
        at = chance.randrange(header)
        bad[at : at + width] = value.to_bytes(width, "little")
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(bad)
    folder = tmp_path / f"out-{seed}-{changes}-{time.monotonic_ns()}"
    folder.mkdir()
    with contextlib.suppress(ModelError):
        write_folder(changed, folder, "float32")


def test_a_list_with_one_equal_number_for_each_block_is_that_number(tmp_path: Path):
    """llama.cpp reads both forms."""
    lists = {
        "llama.attention.head_count_kv": [2] * LAYERS,
        "llama.feed_forward_length": [64] * LAYERS,
    }
    as_lists = config_from_gguf(read_gguf(write_gguf(tmp_path / "lists.gguf", metadata=lists)))
    assert as_lists == config_from_gguf(read_gguf(write_gguf(tmp_path / "numbers.gguf")))
    for wrong in ([2, 2], [2] * (LAYERS - 1) + [1]):
        changed = lists | {"llama.attention.head_count_kv": wrong}
        with pytest.raises(ModelError, match=r"head_count_kv is \["):
            config_from_gguf(read_gguf(write_gguf(tmp_path / "wrong.gguf", metadata=changed)))
