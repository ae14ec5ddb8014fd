"""GGUF files become mlx-lm folders: exact on tiny models, equal to the source on real ones, refused when broken."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlx_loraplus.errors import ModelError, OutputError
from mlx_loraplus.models.find_model import find_model
from mlx_loraplus.models.gguf.convert import cached, convert_gguf, write_folder
from mlx_loraplus.models.gguf.rope_scaling import llama3_divisors
from mlx_loraplus.models.loading import load_folder
from tests.models.gguf_files import HEAD, LAYERS, PIECES, hub_weights, write_gguf


@pytest.fixture(scope="session")
def gemma(gemma_folder: Path) -> tuple[Any, Any, dict]:
    return load_folder(gemma_folder)


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[Any, Any, dict]:
    return load_folder(smollm2_folder)


def convert(path: Path, weights: Any = "float32") -> Path:
    folder = path.parent / f"{path.stem}-{weights}"
    folder.mkdir()
    write_folder(path, folder, weights)
    return folder


# The real models. Greedy text is that of transformers 5.23 (torch, float32) reading the same files,
# whose logits scripts/judges/check_gguf compares; token ids are those of llama.cpp, and Gemma's
# also those of sentencepiece.


@pytest.mark.parametrize(
    ("name", "continued"),
    [
        ("gemma", " the capital of the country of France. It is the largest"),
        ("smollm2", " Paris.\n\nThe answer is:"),
    ],
)
def test_embedded_models_continue_as_their_source_does(
    name: str, continued: str, request: pytest.FixtureRequest
):
    model, tokenizer, _ = request.getfixturevalue(name)
    prompt, whole = (
        tokenizer.encode("The capital of France is" + more) for more in ("", continued)
    )
    assert whole[: len(prompt)] == prompt
    chosen = mx.argmax(model(mx.array([whole[:-1]])), axis=-1)  # greedy, all positions at once
    assert np.array(chosen)[0, len(prompt) - 1 :].tolist() == whole[len(prompt) :]


def test_find_model_says_what_is_embedded(gemma_folder: Path, smollm2_folder: Path):
    gemma, smollm2 = find_model("gemma-3"), find_model("smollm2-135m")
    assert (gemma.path, smollm2.path) == (gemma_folder, smollm2_folder)
    assert gemma.note
    assert smollm2.note
    assert "https://ai.google.dev/gemma/terms" in gemma.note
    assert "base" in gemma.note
    assert "Apache-2.0" in smollm2.note


GEMMA_IDS = {
    "": [2],
    "  ": [2, 138],
    "two  spaces   three    four": [2, 13498, 138, 35220, 139, 19891, 140, 19025],
    "trailing space ": [2, 136697, 2557, 236743],
    "line one\nline two\n\nline four\n\n\n": [2, 1257, 886, 107, 1257, 1156, 108, 1257, 2390, 109],
    "tab\there\t\tthere": [2, 4823, 255968, 8472, 255969, 13534],
    "\r\nwindows\r\n": [2, 251, 107, 33908, 251, 107],
    "007": [2, 236771, 236771, 236832],
    "naïve café — “quotes” …": None,
    "日本語のテキスト と 中文文本": [2, 94951, 236945, 95830, 8888, 17346, 237364, 57489],
    "مرحبا بالعالم": [2, 236873, 150345, 107602, 17193],
    "🎉🚀👩\u200d👩\u200d👧": [2, 242061, 242015, 243767, 237243, 243767, 237243, 244814],
    "<table><tr><td>1</td></tr></table>": [2, 168, 173, 175, 236770, 183, 181, 176],
    "<start_of_turn>user\nHi<end_of_turn>\n": [2, 105, 2364, 107, 10979, 106, 107],
    "𓀀": None,
}
SMOLLM2_IDS = {
    "": [],
    "  ": [256],
    "two  spaces   three    four": [11355, 216, 5600, 256, 1296, 333, 1876],
    "line one\nline two\n\nline four\n\n\n": [
        1311,
        582,
        198,
        1311,
        827,
        198,
        198,
        1311,
        1876,
        16506,
    ],
    "\r\nwindows\r\n": [201, 198, 37066, 2738],
    "007": [32, 32, 39],
    "½ ² Ⅷ ٣ 三": [16738, 216, 19133, 216, 173, 223, 117, 216, 164, 113, 216, 7906, 227],
    "Grüße aus München, straße": [
        27302,
        7170,
        34878,
        85,
        253,
        376,
        30919,
        94,
        7554,
        28,
        4040,
        34878,
        85,
    ],
    "🎉🚀": [10813, 232, 227, 10813, 244, 218],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "don't can't I'll": [12420, 982, 416, 982, 339, 3060],
    "𓀀": None,
}


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
def test_token_ids_are_those_of_the_source_and_decode_back(
    name: str, request: pytest.FixtureRequest
):
    _, tokenizer, _ = request.getfixturevalue(name)
    for text, expected in (GEMMA_IDS if name == "gemma" else SMOLLM2_IDS).items():
        ids = tokenizer.encode(text)
        assert expected is None or ids == expected, text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_and_template_come_along(
    gemma: tuple[Any, Any, dict], smollm2: tuple[Any, Any, dict]
):
    first, second = gemma[1], smollm2[1]
    assert (first.bos_token_id, first.eos_token_id, first.pad_token_id, first.chat_template) == (
        2,
        1,
        0,
        None,
    )
    assert (second.bos_token_id, second.eos_token_id, second.pad_token_id) == (1, 2, 2)
    chat = second.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (first.eos_token_ids, second.eos_token_ids) == ({1}, {2, 0})


# Tiny models: every number.


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_weight_comes_back_in_the_hubs_layout(architecture: str, tmp_path: Path):
    folder = convert(write_gguf(tmp_path / "tiny.gguf", architecture))
    weights: Any = mx.load(str(folder / "model.safetensors"))
    expected = hub_weights(architecture)
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        assert weights[name].dtype == mx.float32
        np.testing.assert_allclose(
            np.array(weights[name]), weight, atol=2e-7
        )  # 1 was added and subtracted
    model, tokenizer, config = load_folder(folder)
    assert model(mx.array([[1, 6, 7]])).shape == (1, 3, len(PIECES))
    assert config["head_dim"] == HEAD
    assert tokenizer.encode("a  ab") == [1, 6, 4, 9]
    assert tokenizer.decode([8, 9, 3]) == " aabA"


@pytest.mark.parametrize(("most", "files"), [(1, 56), (30_000, 7)])
def test_a_large_model_is_written_in_several_files(
    most: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole: Any = load_folder(convert(write_gguf(tmp_path / "whole.gguf")))[0]
    monkeypatch.setattr("mlx_loraplus.models.gguf.convert._SHARD_BYTES", most)
    folder = convert(write_gguf(tmp_path / "parts.gguf"))
    assert len(list(folder.glob("model*.safetensors"))) == files
    names = set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert names == {file.name for file in folder.glob("model*.safetensors")}
    parts: Any = load_folder(folder)[0]
    assert mx.array_equal(parts(mx.array([[1, 6, 7]])), whole(mx.array([[1, 6, 7]])))


def test_four_bits_for_metal_are_those_of_mlx(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    exact, _, _ = load_folder(convert(path))
    loaded: Any = load_folder(convert(path, "4bit"))
    quantized, _, config = loaded
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    layer = quantized.layers[0].mlp
    assert isinstance(layer.down_proj, nn.QuantizedLinear)
    assert (layer.down_proj.group_size, layer.gate_proj.group_size) == (
        64,
        32,
    )  # rows of 64 and of 32
    weight = mx.array(hub_weights("llama")["model.layers.0.mlp.down_proj.weight"]).astype(
        mx.bfloat16
    )
    assert mx.array_equal(layer.down_proj.weight, mx.quantize(weight, group_size=64, bits=4)[0])
    ids = mx.array([[1, 6, 7, 8]])
    assert mx.abs(exact(ids) - quantized(ids)).max() < 0.35 * mx.abs(exact(ids)).max()


def test_llama3_rope_divisors_become_the_hubs_rule(tmp_path: Path):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    divisors = llama3_divisors(HEAD, 500000.0, scaling)
    rope: Any = initialize_rope(HEAD, 500000.0, False, scaling | {"rope_type": "llama3"})
    plain = 500000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    np.testing.assert_allclose(np.array(rope._freqs), plain * divisors, rtol=1e-5)

    stored: dict[str, Any] = {"rope_freqs.weight": divisors.astype(np.float32)}
    path = write_gguf(
        tmp_path / "llama3.gguf", metadata={"llama.rope.freq_base": 500000.0}, tensors=stored
    )
    config = json.loads((convert(path) / "config.json").read_text())
    assert config["rope_scaling"] == scaling | {"rope_type": "llama3"}

    stored["rope_freqs.weight"] = np.array([1, 2, 3, 4], np.float32)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight\) follow no rule"):
        convert(write_gguf(tmp_path / "other.gguf", tensors=stored))


def test_linear_rope_scaling_is_kept_and_yarn_refused(tmp_path: Path):
    linear = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    folder = convert(write_gguf(tmp_path / "linear.gguf", "gemma3", linear))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 8.0,
    }
    # llama.cpp reads a factor without a type as linear, and knows an older key of it
    for number, key in enumerate(("rope.scaling.factor", "rope.scale_linear")):
        file = write_gguf(tmp_path / f"{number}.gguf", "gemma3", {f"gemma3.{key}": 8.0})
        config = json.loads((convert(file) / "config.json").read_text())
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}

    with pytest.raises(
        ModelError, match=r"RoPE scaling is 'yarn' by 8\.0, allowed are none and linear"
    ):
        convert(
            write_gguf(
                tmp_path / "yarn.gguf", "gemma3", linear | {"gemma3.rope.scaling.type": "yarn"}
            )
        )


def test_an_instruct_model_also_stops_at_the_end_of_its_turn(tmp_path: Path):
    pieces = [*PIECES[:-1], "<end_of_turn>"]
    instruct = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 4, 1, 1, 1, 1, 3],
    }
    config = json.loads(
        (convert(write_gguf(tmp_path / "a.gguf", "gemma3", instruct)) / "config.json").read_text()
    )
    assert config["eos_token_id"] == [2]
    instruct["tokenizer.chat_template"] = "{{ messages[0]['content'] }}<end_of_turn>"
    folder = convert(write_gguf(tmp_path / "b.gguf", "gemma3", instruct))
    assert load_folder(folder)[1].eos_token_ids == {2, 9}


# The cache.


def test_a_conversion_is_made_once_and_again_when_the_file_changes(tmp_path: Path, cache: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    first = convert_gguf(path)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    os.utime(path, (1, 1))
    assert convert_gguf(path) == first  # the same content
    size, changed = path.stat().st_size, bytearray(path.read_bytes())
    changed[-8] ^= 1  # the last tensor, with the size and the time as they were
    path.write_bytes(changed)
    os.utime(path, (1, 1))
    assert path.stat().st_size == size
    assert convert_gguf(path) != first
    assert len(list(cache.iterdir())) == 2


def test_a_crash_leaves_nothing_and_old_leftovers_go(cache: Path):
    def crash(folder: Path) -> None:
        (folder / "half").write_text("half a model")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", crash)
    assert not list(cache.iterdir())
    old, new = (f".1-{digit * 16}" for digit in "01")  # as a process names what it writes
    for name, age in ((old, 200_000), (new, 10)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age, time.time() - age))
    folder = cached("key", lambda folder: None)
    assert {entry.name for entry in cache.iterdir()} == {folder.name, new}


def test_a_cache_that_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        OutputError, match=r"can't write .*: .* is a file, not a folder; set MLX_LORAPLUS_CACHE"
    ):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("most", [500, 10_000])
def test_a_full_disk_is_told_and_leaves_nothing(most: int, tmp_path: Path, cache: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    code = f"""
import mlx_loraplus, resource
from mlx_loraplus.models.find_model import find_model
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))  # every file ends there
try:
    find_model({str(path)!r})
except mlx_loraplus.OutputError as problem:
    print(problem)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    ).stdout
    assert re.fullmatch(
        r"can't write .*: File too large; free some space, or set MLX_LORAPLUS_CACHE to another folder\n",
        told,
    )
    assert not list(cache.iterdir())


def test_two_processes_at_once_end_with_one_whole_folder(tmp_path: Path, cache: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    code = (
        "from mlx_loraplus.models.find_model import find_model;"
        f" print(find_model({str(path)!r}).path)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=300)[0].strip() for process in started}
    assert folders == {str(folder) for folder in cache.iterdir()}
    model: Any = load_folder(Path(folders.pop()))[0]
    assert len(model.layers) == LAYERS


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", mx.float16), ("BF16", mx.bfloat16), ("F32", mx.float32)]
)
def test_full_precision_stays_so_on_metal(tmp_path: Path, kind: str, dtype: mx.Dtype):
    """Metal's branch: what a file stores in full precision is never quantized."""
    from gguf import GGMLQuantizationType

    from mlx_loraplus.models.gguf import convert as gguf

    path = write_gguf(tmp_path / "tiny.gguf")
    file = gguf.read_gguf(path)
    for name, tensor in list(file.tensors.items()):
        if len(tensor.shape) == 2:
            file.tensors[name] = dataclasses.replace(tensor, type=GGMLQuantizationType[kind])
    config = gguf.config_from_gguf(file)
    assert gguf._stored_quantization(file, config) is None
    assert gguf._stored_dtype(file) == dtype


def test_each_matrix_keeps_its_bits_on_metal(tmp_path: Path):
    from gguf import GGMLQuantizationType

    from mlx_loraplus.models.gguf import convert as gguf

    file = gguf.read_gguf(write_gguf(tmp_path / "tiny.gguf"))
    kinds = {"attn_q": "Q8_0", "attn_k": "Q6_K", "attn_v": "F16"}
    for name, tensor in list(file.tensors.items()):
        if len(tensor.shape) == 2:
            kind = next((kinds[part] for part in kinds if part in name), "Q4_K")
            file.tensors[name] = dataclasses.replace(tensor, type=GGMLQuantizationType[kind])
    settings: Any = gguf._stored_quantization(file, gguf.config_from_gguf(file))
    layer = "model.layers.0.self_attn."
    assert settings["bits"] == 4
    assert (settings[f"{layer}q_proj"]["bits"], settings[f"{layer}k_proj"]["bits"]) == (8, 6)
    assert settings[f"{layer}v_proj"] is False
