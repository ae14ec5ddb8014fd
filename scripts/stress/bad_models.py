"""Bases whose config, weights or file would load as something else, and settings that a base does not allow."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

from scripts.stress.bad_inputs import Case

ASK = "generate --max-tokens 8 --prompt 'Question: What is the capital of France? Answer:' --model"
TRAIN = "train --iters 1 --batch-size 2 --max-seq-length 64 --adapter-path trained --data rows.jsonl --valid-split 0"
ROWS = {
    "rows.jsonl": [
        {"prompt": f"What comes after {number}?", "completion": f"{number + 1}."}
        for number in range(4)
    ]
}
PARIS = "The capital of France is Paris."
GEMMA_PARIS = "Paris"


def stored_types(folder: Path) -> set[str]:
    """Return the types of the arrays in a folder's safetensors files."""
    types: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        types |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return types


def stores_other_than(expected: str) -> Callable[[Path], str]:
    """Return a check that a fused model has arrays of one type."""

    def wrong(folder: Path) -> str:
        found = stored_types(folder / "fused")
        return "" if found == {expected} else f"fused stores {sorted(found)}, not {expected}"

    return wrong


def fused(model: str, dtype: str, options: str = "") -> Case:
    """Return a case that trains, fuses and looks at what is stored; stock mlx_lm reads it."""
    commands = f"""
        {TRAIN} --model ../models/{model}
        fuse trained --save-path fused {options}
        python -m mlx_lm generate --model fused --max-tokens 8 --prompt 'The capital of France is'
    """
    return Case(f"bases: {model} fused {options}".strip(), commands, ROWS, code=0,
                wrong=stores_other_than(dtype))  # fmt: skip


CASES = [
    # rope_parameters of transformers 5
    Case("bases: SmolLM2 as it is", f"{ASK} ../models/smollm2", code=0, shows=(PARIS,)),
    Case("bases: Gemma as it is", f"{ASK} ../models/gemma", code=0, shows=(GEMMA_PARIS,)),
    Case("bases: SmolLM2 with rope_parameters alone", f"{ASK} ../models/new-rope", code=0, shows=(PARIS,)),
    Case("bases: Gemma with rope_parameters alone", f"{ASK} ../models/new-rope-gemma", code=0, shows=(GEMMA_PARIS,)),
    Case("bases: rope_parameters that contradict rope_theta", f"{ASK} ../models/contradicting-rope",
         shows=("rope_theta", "100000.0", "500000.0")),
    Case("bases: YaRN in Gemma's local layers", f"{ASK} ../models/local-yarn-gemma", shows=("yarn",)),
    Case("bases: dynamic scaling in rope_parameters", f"{ASK} ../models/dynamic-rope", code=0, shows=(PARIS,)),
    Case("bases: an unknown kind of scaling", f"{ASK} ../models/unknown-rope", shows=("spiral",)),
    # arrays that nothing reads
    Case("bases: nvfp4 with a global scale", f"{ASK} ../models/nvfp4-scaled", shows=("global_scale",)),
    Case("bases: 4 bits with an input scale", f"{TRAIN} --model ../models/4-bit-scaled", ROWS, shows=("input_scale",)),
    # types and files
    fused("bfloat16", "BF16"),
    fused("float16", "F16"),
    fused("4-bit", "F32", "--dequantize"),
    Case("bases: two GGUF files of one size, date and beginning",
         f"""
         {ASK} ../models/gguf/same.gguf
         {ASK} ../models/gguf-changed/same.gguf
         """, hides=(PARIS,), shows=("holds only zeros",)),
    Case("bases: a GGUF file in full precision, fused", f"""
         {TRAIN} --model ../models/smollm2
         export trained --to gguf --merged f16 --save-path whole
         train --iters 1 --batch-size 2 --max-seq-length 64 --adapter-path again --data rows.jsonl --valid-split 0 --model whole/model.gguf
         fuse again --save-path fused
         """, ROWS, code=0, shows=("its matrices are float32",), wrong=stores_other_than("F32")),
    # sizes that no model has
    Case("bases: no layers", f"{ASK} ../models/no-layers", shows=("num_hidden_layers", "0")),
    Case("bases: no heads", f"{ASK} ../models/no-heads", shows=("num_attention_heads", "0")),
    Case("bases: a negative vocabulary", f"{TRAIN} --model ../models/negative-vocabulary", ROWS, shows=("vocab_size", "-1")),
]  # fmt: skip
