"""A tiny Llama with random weights and a tokenizer of one token a character, and rows to train it on."""

import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in range(32, 127)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_tiny_model(
    folder: Path, *, hidden: int = 32, layers: int = 2, vocabulary: int = 128, seed: int = 0
) -> Path:
    """Write a model's folder that ``--model`` takes.

    Args:
        folder: The folder; it is made if needed.
        hidden: The size of the hidden states.
        layers: The number of blocks.
        vocabulary: The number of tokens that the model has room for.
        seed: Of the weights.
    """
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    model: nn.Module = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    numbers = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.BPE(numbers, [], unk_token="<unk>"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_sums(folder: Path, *, rows: int = 40, seed: int = 0) -> Path:
    """Write train.jsonl and valid.jsonl of little sums, of different lengths."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("valid", 6)):
        numbers = [
            (chance.randrange(10**4), chance.randrange(10 ** chance.randint(1, 6)))
            for _ in range(count)
        ]
        lines = [
            json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b}"}) + "\n"
            for a, b in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def write_preferred_sums(folder: Path, *, rows: int = 40, seed: int = 0) -> Path:
    """Write train.jsonl and valid.jsonl of pairs: the right sum is preferred to a wrong one."""
    write_sums(folder, rows=rows, seed=seed)
    for file in folder.glob("*.jsonl"):
        sums = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": f"{row['completion']}7",
            }
            for row in sums
        ]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder
