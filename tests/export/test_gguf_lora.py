"""GGUF files: a LoRA comes back bit-exactly, its rows are in llama.cpp's order; whole models and their tokenizers."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from mlx_lm.models import stablelm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import pre_tokenizers

from mlx_loraplus import AdapterError, ModelError
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export.gguf_lora import load_gguf_lora, write_lora
from mlx_loraplus.export.gguf_model import write_model
from mlx_loraplus.export.ollama import modelfile
from mlx_loraplus.models.gguf.convert import write_folder
from mlx_loraplus.models.gguf.pre_tokenizers import BYTE_LEVEL
from mlx_loraplus.models.gguf.reader import read_gguf
from mlx_loraplus.models.gguf.tokenizer import write_tokenizer
from mlx_loraplus.models.gguf.tokenizer_to_gguf import add_tokenizer
from mlx_loraplus.models.loading import load_folder, load_folder_tokenizer
from mlx_loraplus.setting_types import Merged
from tests.conftest import TinyModel, make_model, randomize_adapters, same
from tests.models.gguf_files import HEAD, HEADS, write_gguf

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 8, 0, 4, 3]])


def converted(file: Path, folder: Path) -> tuple[nn.Module, TokenizerWrapper]:
    folder.mkdir()
    write_folder(file, folder, "float32")
    model, tokenizer, _ = load_folder(folder)
    return model, tokenizer


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    attach_adapters(model, AdapterConfig(**{"rank": 4, "alpha": 6.0} | settings))
    randomize_adapters(model)
    model.eval()
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("settings", [{}, {"rslora": True, "num_layers": 1}])
def test_a_lora_comes_back_bit_exactly(tiny: TinyModel, tmp_path: Path, kind: str, settings: dict):
    targets = ("all-linear", "embed_tokens", "lm_head") if kind == "llama" else ("all-linear",)
    model = adapted(tiny(kind), target_modules=targets, **settings)
    write_lora(model, tmp_path / "adapter.gguf")
    back = load_gguf_lora(tiny(kind), tmp_path / "adapter.gguf")
    assert same(model.trainable_parameters(), back.trainable_parameters())
    scale = next(iter(find_adapters(model).values())).scale
    assert all(
        abs(a.scale - scale) < 1e-7 * scale for a in find_adapters(back).values()
    )  # stored as float32


@pytest.mark.parametrize(
    "settings", [{"adapter": "vera", "rank": 16, "alpha": 16.0}, {"init": "pissa"}]
)
def test_vera_and_pissa_become_the_lora_they_are(tiny: TinyModel, tmp_path: Path, settings: dict):
    model = adapted(tiny("llama"), **settings)
    write_lora(model, tmp_path / "adapter.gguf")
    back = load_gguf_lora(tiny("llama"), tmp_path / "adapter.gguf")
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 2e-5 * mx.abs(model(TOKENS)).max()


def test_a_scale_of_nothing_comes_back(tiny: TinyModel, tmp_path: Path):
    model = adapted(tiny("llama"))
    for adapter in find_adapters(model).values():
        adapter.scale = 0.0
    write_lora(model, tmp_path / "adapter.gguf")
    back = load_gguf_lora(tiny("llama"), tmp_path / "adapter.gguf")
    assert mx.array_equal(back(TOKENS), tiny("llama")(TOKENS))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_lora_fits_the_rows_of_llama_cpps_base(tmp_path: Path, architecture: str):
    source = write_gguf(tmp_path / "tiny.gguf", architecture)
    model = adapted(converted(source, tmp_path / "model")[0])
    write_lora(model, tmp_path / "adapter.gguf")
    file = GGUFReader(tmp_path / "adapter.gguf")  # the gguf package's own
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == (
        "adapter",
        "lora",
        6.0,
    )
    tensors = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    base = read_gguf(source)
    for name, path in (
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("ffn_down", "mlp.down_proj"),
    ):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{each}"] for each in "ab")
        adapter = find_adapters(model)[f"model.layers.1.{path}"]
        wanted = np.array(adapter.merged(full_weight(adapter.base, mx.float32)))
        if architecture == "llama" and name != "ffn_down":  # two halves of a head → pairs
            heads = len(wanted) // HEAD
            wanted = wanted.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(wanted.shape)
            assert name == "attn_k" or heads == HEADS
        np.testing.assert_allclose(
            base.read(f"blk.1.{name}.weight") + 6.0 / 4 * b @ a, wanted, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("llama", {"adapter": "dora"}, "dora on model.layers"),
        ("llama", {"train_modules": ("norms",)}, "layernorm trained in full"),
        ("llama", {"init": "loftq", "quantize_group_size": 32}, "a quantized base of its own"),
        ("gemma3", {"target_modules": ("embed_tokens",)}, "is also the head"),
    ],
)
def test_what_a_lora_can_not_express_is_told(
    tiny: TinyModel, tmp_path: Path, kind: str, settings: dict, told: str
):
    with pytest.raises(AdapterError, match=f"can't express.*{told}.*--merged"):
        write_lora(adapted(tiny(kind), **settings), tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_told(tmp_path: Path):
    args = stablelm.ModelArgs(
        "stablelm", vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=2, intermediate_size=32, rope_theta=1e4, use_qkv_bias=False,
        partial_rotary_factor=0.5, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = adapted(stablelm.Model(args))
    with pytest.raises(ModelError, match="stablelm can't be written as GGUF here, allowed are "):
        write_lora(model, tmp_path / "adapter.gguf")


def test_a_lora_of_another_model_is_told(tiny: TinyModel, tmp_path: Path):
    write_lora(adapted(tiny("llama")), tmp_path / "adapter.gguf")
    with pytest.raises(AdapterError, match="is for 'llama', the model is gemma3"):
        load_gguf_lora(tiny("gemma3"), tmp_path / "adapter.gguf")
    with pytest.raises(AdapterError, match="is not a LoRA"):
        load_gguf_lora(tiny("llama"), write_gguf(tmp_path / "base.gguf"))
    for name, shape, told in (
        (
            "blk.0.attn_q.weight.lora_b",
            (64, 4),
            "adapter.type or adapter.lora.alpha is missing or invalid",
        ),
        ("blk.0.attn_q.weight.lora_b", (30, 4), r"is incomplete: .*lora_a is missing"),
        ("blk.9.attn_q.weight.lora_b", (64, 4), "has no place"),
        ("x", (2, 2), "has no place"),
        ("blk.0.attn_q.weight.lora_b", (64, 4), "acts only after certain tokens"),
    ):
        writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
        if "only" in told:
            writer.add_array("adapter.alora.invocation_tokens", [1, 2])
        if "invalid" in told:
            writer.add_array("adapter.type", [1, 2])
        else:
            writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        writer.add_tensor(name, np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(AdapterError, match=told):
            load_gguf_lora(tiny("llama"), tmp_path / "odd.gguf")


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("q8_0", 3e-2)])
def test_a_whole_model_comes_back_with_its_adapter(
    tmp_path: Path, architecture: str, kind: Merged, tolerance: float
):
    metadata = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    source = write_gguf(tmp_path / "tiny.gguf", architecture, metadata)
    model, tokenizer = converted(source, tmp_path / "model")
    adapted(model, adapter="dora", train_modules=("norms",))
    write_model(model, tokenizer, "tiny", tmp_path / "whole.gguf", kind)
    back, again = converted(tmp_path / "whole.gguf", tmp_path / "back")
    assert not find_adapters(back)
    expected = model(TOKENS)
    assert mx.abs(back(TOKENS) - expected).max() < tolerance * mx.abs(expected).max()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "model" / name).read_text()
    assert again.chat_template == tokenizer.chat_template
    stored = read_gguf(tmp_path / "whole.gguf").tensors
    assert {stored["blk.0.ffn_up.weight"].type.name, stored["output_norm.weight"].type.name} == {
        kind.upper(),
        "F32",
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_rope_scaling_comes_back(tmp_path: Path, kind: str):
    _, tokenizer = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tokens")
    model: Any = make_model(kind)
    model.args.sliding_window_pattern = 6
    if kind == "gemma3":  # llama.cpp's Gemma 3 has this pattern, so all kinds of layers need six
        model.args.num_hidden_layers = 6
        model.model.layers += make_model(kind).model.layers[: 6 - len(model.model.layers)]
    scaling = (
        SCALED | {"original_max_position_embeddings": 8192}
        if kind == "llama"
        else {"rope_type": "linear", "factor": 8.0}
    )
    model.args.rope_scaling, model.args.max_position_embeddings = scaling, 64
    write_model(model, tokenizer, "tiny", tmp_path / "whole.gguf", "f32")
    back, _ = converted(tmp_path / "whole.gguf", tmp_path / "back")
    assert back.args.rope_scaling == scaling  # pyright: ignore[reportAttributeAccessIssue]


def test_what_llama_cpp_does_not_have_is_told(tmp_path: Path):
    _, tokenizer = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tokens")
    for change, told in (
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
    ):
        model: Any = make_model("llama")
        for name, value in change.items():
            setattr(model.args, name, value)
        with pytest.raises(ModelError, match=told):
            write_model(model, tokenizer, "tiny", tmp_path / "whole.gguf", "f16")
    assert not (tmp_path / "whole.gguf").exists()


def test_a_real_byte_level_tokenizer_comes_back(tmp_path: Path, smollm2_folder: Path):
    """Gemma's is compared by scripts/judges/check_llama_cpp: its 513,511 merges take long."""
    tokenizer = load_folder_tokenizer(smollm2_folder)
    writer = GGUFWriter(tmp_path / "tokens.gguf", "llama")
    add_tokenizer(writer, tokenizer, 49152)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_tokenizer(read_gguf(tmp_path / "tokens.gguf").metadata, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    back = load_folder_tokenizer(tmp_path)
    text = (
        "The  quick (brown) fox's 1234 über   \n\n\t ß 🎉 <start_of_turn>user\nHi<|im_end|> def"
        " f(x):\n    return x"
    )
    assert back.encode(text) == tokenizer.encode(text)
    assert back.chat_template == tokenizer.chat_template
    assert (back.bos_token_id, back.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_a_pre_tokenizer_comes_back_by_its_name_and_none_that_is_like_it(tmp_path: Path, name: str):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.pre": name,
    }
    model, tokenizer = converted(
        write_gguf(tmp_path / "tiny.gguf", metadata=metadata), tmp_path / "model"
    )
    write_model(model, tokenizer, "tiny", tmp_path / "whole.gguf", "f32")
    assert read_gguf(tmp_path / "whole.gguf").metadata["tokenizer.ggml.pre"] == name
    split: Any = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = split  # of digits that are not taken one by one
    with pytest.raises(ModelError, match="its tokenizer splits by Digits, ByteLevel, which"):
        write_model(model, tokenizer, "tiny", tmp_path / "whole.gguf", "f32")


LLAMA32 = """{{- bos_token }}
{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<|system|>Today: ' + day + '\\n\\n' + system + '<|eot|>' }}
{%- for message in messages if message.role != 'system' %}
    {{- '<|' + message.role + '|>' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
TURNS = """{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ if le $i 1 }}%s{{ else }}%s{{ end }}{{ else if \
eq .Role "assistant" }}{{.Content}}{{ if gt (len (slice $.Messages $i)) 1 }}%s{{ end }}{{ end }}{{ end }}"""


def test_a_modelfile_says_what_the_chat_template_does(tmp_path: Path, smollm2_folder: Path):
    """That Ollama reads it so is seen with Go's text/template, by hand."""
    said = modelfile(load_folder_tokenizer(smollm2_folder), "./model.gguf")
    turn, end = (
        "<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    )
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    first = (
        f"<|im_start|>system\n{{{{ $.System }}}}<|im_end|>\n{turn}{{{{ else"
        f" }}}}<|im_start|>system\n{own}<|im_end|>\n"
    )
    template = TURNS % (f"{{{{ if $.System }}}}{first}{turn}{{{{ end }}}}", turn, end)
    assert said == f'FROM ./model.gguf\nTEMPLATE """{template}"""\nPARAMETER stop <|im_end|>\n'
    _, tokenizer = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tokens")
    plain = modelfile(tokenizer, "./base.gguf", "./adapter.gguf")
    assert plain == 'FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
    for template, told in (
        ("{{ raise_exception('no') }}", "fails with"),
        ("{{ messages[0].content }}", "leaves out"),
    ):
        (tmp_path / "tokens" / "chat_template.jinja").write_text(template)
        with pytest.raises(ModelError, match=told):
            modelfile(load_folder_tokenizer(tmp_path / "tokens"), "./base.gguf")


def test_a_modelfile_has_the_day_it_is_used_and_what_stands_before_every_chat(tmp_path: Path):
    converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tokens")
    (tmp_path / "tokens" / "chat_template.jinja").write_text(LLAMA32)
    head, turn = (
        "<|system|>Today: {{ currentDate }}\n\n",
        "<|user|>{{ .Content }}<|eot|><|assistant|>",
    )
    first = (
        f"{{{{ if $.System }}}}{head}{{{{ $.System }}}}<|eot|>{turn}{{{{ else"
        f" }}}}{head}<|eot|>{turn}{{{{ end }}}}"
    )
    said = modelfile(load_folder_tokenizer(tmp_path / "tokens"), "./base.gguf")
    assert (
        said
        == f'FROM ./base.gguf\nTEMPLATE """{TURNS % (first, turn, "<|eot|>")}"""\nPARAMETER stop'
        " <|eot|>\n"
    )
