"""The folders that the cases of bad_inputs.py use: the real models, and copies of them with one thing changed.

Each copy links to the weights of the real model unless it is the weights that are changed.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config

from mlx_loraplus.models.find_model import find_model, smollm2_file

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "tests" / "data" / "templates"
CHANGED_TAIL = 20 << 20  # bytes at the end of a GGUF file

Config = dict[str, Any]


def smollm2() -> Path:
    """Return the folder of SmolLM2 135M Instruct."""
    return find_model("smollm2-135m").path


def gemma() -> Path:
    """Return the folder of Gemma 3 270M."""
    return find_model("gemma-3-270m").path


def link(source: Path, folder: Path, *without: str) -> None:
    """Make a folder of links to another one's files, but for those named."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in without:
            (folder / file.name).symlink_to(file)


def change_json(source: Path, folder: Path, name: str, change: Callable[[Config], object]) -> None:
    """Replace a linked JSON file by a changed copy."""
    content = json.loads((source / name).read_text())
    change(content)
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(content, indent=1))


def configured(source: Callable[[], Path], **fields: Any) -> Callable[[Path], None]:
    """Return a maker of a model with other fields in its config; None removes a field."""

    def make(folder: Path) -> None:
        def change(config: Config) -> None:
            config.update(fields)
            for name in [name for name, value in fields.items() if value is None]:
                del config[name]

        link(source(), folder)
        change_json(source(), folder, "config.json", change)

    return make


def templated(template: str | None, source: Callable[[], Path] = smollm2) -> Callable[[Path], None]:
    """Return a maker of a model with another chat template: a file of the tests, the text, or none."""

    def make(folder: Path) -> None:
        link(source(), folder)
        stored = TEMPLATES / f"{template}.jinja"
        text = stored.read_text() if template and "{" not in template else template

        def change(config: Config) -> None:
            config["chat_template"] = text
            if text is None:
                del config["chat_template"]

        change_json(source(), folder, "tokenizer_config.json", change)

    return make


def with_tokens(*tokens: str, template: str | None = None) -> Callable[[Path], None]:
    """Return a maker of a SmolLM2 whose tokenizer has more tokens than its embedding has rows."""

    def make(folder: Path) -> None:
        templated(template or smollm2_template())(folder)

        def change(tokenizer: Config) -> None:
            ids = range(49152, 49152 + len(tokens))
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for number, token in zip(ids, tokens, strict=True):
                entry = {"id": number, "content": token, "special": True, **flags}
                tokenizer["added_tokens"].append(entry)

        change_json(smollm2(), folder, "tokenizer.json", change)

    return make


def smollm2_template() -> str:
    """Return SmolLM2's own chat template."""
    return json.loads((smollm2() / "tokenizer_config.json").read_text())["chat_template"]


def wrong_tokenizer(folder: Path) -> None:
    """Make a SmolLM2 that has Gemma's tokenizer."""
    link(smollm2(), folder, "tokenizer.json", "tokenizer_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(gemma() / name)


def with_weights(
    change: Callable[[dict[str, mx.array]], object], source: Callable[[], Path] = smollm2
) -> Callable[[Path], None]:
    """Return a maker of a model with changed weights."""

    def make(folder: Path) -> None:
        link(source(), folder, "model.safetensors")
        weights = mx.load(str(source() / "model.safetensors"))
        assert isinstance(weights, dict)
        change(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})

    return make


def set_number(name: str, value: float) -> Callable[[dict[str, mx.array]], None]:
    """Return a change of the first number of an array."""

    def change(weights: dict[str, mx.array]) -> None:
        flat = weights[name].flatten()
        flat[0] = value
        weights[name] = flat.reshape(weights[name].shape)

    return change


def cast(dtype: mx.Dtype) -> Callable[[dict[str, mx.array]], None]:
    """Return a change of all arrays to another type."""

    def change(weights: dict[str, mx.array]) -> None:
        weights.update({name: array.astype(dtype) for name, array in weights.items()})

    return change


def quantized(mode: str, extra: str, **settings: int) -> Callable[[Path], None]:
    """Return a maker of a quantized SmolLM2; each of its layers gets one more array, named ``extra``."""

    def make(folder: Path) -> None:
        link(smollm2(), folder, "model.safetensors", "config.json")
        model, config = load_model(smollm2())
        model, config = quantize_model(model, config, mode=mode, **settings)
        weights = dict(tree_flatten(model.parameters()))
        for name, module in model.named_modules():
            if extra and isinstance(module, nn.QuantizedLinear):
                weights[f"{name}.{extra}"] = mx.array([1e4])
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        save_config(config, folder / "config.json")

    return make


def gguf(folder: Path, *, changed: bool = False) -> None:
    """Make a folder with SmolLM2's GGUF file, with zeros at the end of its weights if ``changed``."""
    folder.mkdir(parents=True)
    file = folder / "same.gguf"
    shutil.copy(smollm2_file(), file)
    if changed:
        with file.open("r+b") as stream:
            stream.seek(-CHANGED_TAIL, os.SEEK_END)
            stream.write(bytes(CHANGED_TAIL))
    os.utime(file, (1_700_000_000, 1_700_000_000))


def tiny_gpt2(folder: Path) -> None:
    """Make a GPT-2 with random weights, 32 learned positions and SmolLM2's tokenizer."""
    from mlx_lm.models import gpt2

    config = {"model_type": "gpt2", "n_ctx": 32, "n_embd": 32, "n_head": 2, "n_layer": 2,
              "n_positions": 32, "layer_norm_epsilon": 1e-5, "vocab_size": 49152}  # fmt: skip
    link(smollm2(), folder, "model.safetensors", "config.json")
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def run(command: str, folder: Path) -> None:
    """Run a command of the package in a folder."""
    words = [sys.executable, "-m", "mlx_loraplus", *shlex.split(command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def trained_run(folder: Path) -> None:
    """Train SmolLM2 for two steps."""
    rows = folder.with_suffix(".jsonl")
    rows.write_text('{"prompt": "What comes after 1?", "completion": "2."}\n' * 4)
    settings = "--iters 2 --batch-size 2 --valid-split 0"
    run(
        f"train --model ../models/smollm2 --data {rows} {settings} --adapter-path {folder}",
        folder.parent,
    )


def exported(folder: Path) -> None:
    """Export that run for PEFT."""
    run(f"export run --to peft --save-path {folder}", folder.parent)


def peft(renamed: tuple[str, str] = ("", ""), **fields: Any) -> Callable[[Path], None]:
    """Return a maker of a changed copy of the exported adapter: other fields, or renamed arrays."""

    def make(folder: Path) -> None:
        source = folder.parent / "peft"
        link(source, folder, "adapter_model.safetensors")
        change_json(source, folder, "adapter_config.json", lambda config: config.update(fields))
        weights = mx.load(str(source / "adapter_model.safetensors"))
        assert isinstance(weights, dict)
        weights = {name.replace(*renamed): array for name, array in weights.items()}
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights, {"format": "pt"})

    return make


PLAIN = {"rope_type": "default", "rope_theta": 100000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GLOBAL = {"rope_type": "default", "rope_theta": 1000000.0}
OLD_ROPE: Config = {"rope_theta": None, "rope_scaling": None}
OLD_GEMMA: Config = {**OLD_ROPE, "rope_local_base_freq": None}
TURN_TOKENS = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"

MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2": lambda folder: folder.symlink_to(smollm2()),
    "gemma": lambda folder: folder.symlink_to(gemma()),
    # tokens
    "added-token": with_tokens("<call>"),
    "added-in-template": with_tokens("<|turn|>", template=TURN_TOKENS),
    "wrong-tokenizer": wrong_tokenizer,
    "infinite-norm": with_weights(set_number("model.norm.weight", float("inf"))),
    "nan-embedding": with_weights(set_number("model.embed_tokens.weight", float("nan"))),
    "short-context": configured(smollm2, max_position_embeddings=32),
    "short-gemma": configured(gemma, max_position_embeddings=32),
    "gpt2": tiny_gpt2,
    # templates
    **{name: templated(name) for name in (
        "qwen3", "thinking_switch", "opens_thoughts", "cuts_thoughts", "hermes_tools", "empty_call",
        "empty_blocks", "closes_thoughts", "own_tags", "inlined_results",
    )},
    "gemma-chat": templated("gemma3", gemma),
    "system_last": templated("system_last"),
    "next_role_ends": templated(
        (TEMPLATES / "next_role_ends.jinja").read_text().replace("<|user|>", "<|im_end|>")
    ),
    "names-in-headers": templated(TURN_TOKENS.replace("m.role", "(m.name or m.role)")),
    "mistaken-template": templated("{% for m in messages %}\n{{ m.content }\n{% endfor %}"),
    "calling-template": templated("{{ say(messages) }}"),
    "empty-template": templated(""),
    "silent-template": templated("{{ bos_token }}"),
    "no-template": templated(None),
    # bases
    "new-rope": configured(smollm2, rope_parameters=PLAIN, **OLD_ROPE),
    "new-rope-gemma": configured(
        gemma, rope_parameters={"full_attention": GLOBAL, "sliding_attention": LOCAL}, **OLD_GEMMA
    ),
    "contradicting-rope": configured(smollm2, rope_parameters=PLAIN | {"rope_theta": 5e5}),
    "local-yarn-gemma": configured(
        gemma,
        rope_parameters={"full_attention": GLOBAL, "sliding_attention": LOCAL | {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        **OLD_GEMMA,
    ),
    "dynamic-rope": configured(smollm2, rope_parameters=PLAIN | {"rope_type": "dynamic", "factor": 4.0}, **OLD_ROPE),
    "unknown-rope": configured(smollm2, rope_scaling={"rope_type": "spiral", "factor": 2.0}),
    "bfloat16": with_weights(cast(mx.bfloat16)),
    "float16": with_weights(cast(mx.float16)),
    "nvfp4-scaled": quantized("nvfp4", "global_scale", group_size=16, bits=4),
    "4-bit-scaled": quantized("affine", "input_scale", group_size=64, bits=4),
    "4-bit": quantized("affine", "", group_size=64, bits=4),
    "gguf": gguf,
    "gguf-changed": lambda folder: gguf(folder, changed=True),
    # an adapter, and changed copies of it in PEFT's format
    "run": trained_run,
    "same-run": lambda folder: link(folder.parent / "run", folder),
    "peft": exported,
    "peft-anchored-pattern": peft(alpha_pattern={"^q_proj": 640, "layers.0.self_attn.q": 320}),
    "peft-anchored-rank": peft(rank_pattern={"^q_proj": 4}),
    "peft-alpha-pattern": peft(alpha_pattern={"q_proj": 32}),
    "peft-token-indices": peft(trainable_token_indices=[5, 6]),
    "peft-vision-tower": peft(renamed=("model.layers", "vision_tower.layers")),
    "peft-ia3": peft(peft_type="IA3"),
    # nonsensical sizes
    "no-layers": configured(smollm2, num_hidden_layers=0),
    "no-heads": configured(smollm2, num_attention_heads=0),
    "negative-vocabulary": configured(smollm2, vocab_size=-1),
}  # fmt: skip


def make_models(work: Path, commands: str) -> None:
    """Make the models that the commands name as ``../models/NAME``, unless they are there."""
    (work / "models").mkdir(parents=True, exist_ok=True)
    wanted = set(re.findall(r"models/([\w-]+)", commands))
    wanted |= {"smollm2", "run"} if wanted & {"run", "same-run"} else set()
    wanted |= (
        {"smollm2", "run", "peft"} if any(name.startswith("peft") for name in wanted) else set()
    )
    for name, make in MODELS.items():
        if name in wanted and not (work / "models" / name).exists():
            make(work / "models" / name)
