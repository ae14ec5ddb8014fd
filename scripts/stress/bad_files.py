"""Settings that would do nothing, adapters of other programs, and files of the user's that a command could replace."""

from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file

from scripts.stress.bad_inputs import Case

ROWS = [
    {"prompt": f"What comes after {number}?", "completion": f"{number + 1}."} for number in range(4)
]
DATA = {"rows.jsonl": ROWS}
SHORT = "train --iters 1 --batch-size 2 --max-seq-length 64 --data rows.jsonl --valid-split 0 --model ../models/smollm2"
IMPORT = "export --from peft --model ../models/smollm2 --save-path imported --adapter-path"
MORE = f"{SHORT} --adapter-path run --resume-adapter-file ../models/run"
PYTHON = """
import mlx_loraplus
model, tokenizer = mlx_loraplus.load("../models/smollm2")
settings = {"data": "rows.jsonl", "iters": 1, "batch_size": 2, "valid_split": 0.0, "overwrite": True}
"""
TWICE = f"""{PYTHON}
mlx_loraplus.finetune(model, tokenizer, adapter_path="first", **settings)
try:
    mlx_loraplus.finetune(model, tokenizer, adapter_path="second", rank=4, **settings)
except mlx_loraplus.LoRAPlusError as error:
    print("refused:", error)
"""
OTHER_NAME = f"""{PYTHON}
try:
    mlx_loraplus.finetune(model, tokenizer, adapter_path="first", model="gemma-3", **settings)
except mlx_loraplus.LoRAPlusError as error:
    print("refused:", error)
"""
MINE = {"run.yaml": "mine: true\n", "report.html": "<p>mine</p>\n", "loss.png": "mine\n"}


def resumed(asked: str, *shows: str) -> Case:
    """Return a case that asks for something else than the adapter to start from has."""
    return Case(
        f"settings: {asked} beside an adapter to start from", f"{MORE} {asked}", DATA, shows=shows
    )


def unchanged(*names: str) -> Callable[[Path], str]:
    """Return a check that the user's files are as they were."""

    def wrong(folder: Path) -> str:
        changed = [name for name in names if "mine" not in (folder / name).read_text()]
        return f"changed: {', '.join(changed)}" if changed else ""

    return wrong


def scaled(ratio: float, modules: str) -> Callable[[Path], str]:
    """Return a check that an import changed B of some modules by a factor, and nothing else."""

    def wrong(folder: Path) -> str:
        one = load_file(folder / "imported" / "adapters.safetensors")
        other = load_file(folder.parent / "models" / "run" / "adapters.safetensors")
        differ = []
        for name in other:
            factor = ratio if f"{modules}.lora_b" in name else 1.0
            if abs(one[name] - factor * other[name]).max() > 1e-6:
                differ.append(name)
        return f"{len(differ)} arrays differ, {differ[0]} first" if differ else ""

    return wrong


def local_path_in(folder: Path) -> str:
    """Return where a fused folder shows a path of this machine."""
    texts = [(path.name, path.read_text()) for path in (folder / "fused").glob("*.json")]
    texts += [(path.name, path.read_text()) for path in (folder / "fused").glob("*.md")]
    found = [name for name, text in texts if str(folder.parent) in text]
    return f"a local path in {', '.join(found)}" if found else ""


def same_weights(one: str, other: str) -> Callable[[Path], str]:
    """Return a check that two folders have the same weights."""

    def wrong(folder: Path) -> str:
        first, second = (load_file(folder / name / "model.safetensors") for name in (one, other))
        differ = [name for name in first if abs(first[name] - second[name]).max() > 1e-5]
        return f"{len(differ)} arrays differ, {differ[0]} first" if differ else ""

    return wrong


def same_adapters(one: str, other: str) -> Callable[[Path], str]:
    """Return a check that two runs came to the same adapter."""

    def wrong(folder: Path) -> str:
        first, second = (load_file(folder / name / "adapters.safetensors") for name in (one, other))
        differ = [name for name in first if abs(first[name] - second[name]).max() > 1e-4]
        return f"{len(differ)} arrays differ, {differ[0]} first" if differ else ""

    return wrong


def imported(name: str, *shows: str) -> Case:
    """Return a case that is refused: a changed copy of an adapter in PEFT's format."""
    return Case(
        f"adapters: {name}", f"{IMPORT} ../models/{name}", shows=shows, absent=("imported",)
    )


def imported_as(name: str, ratio: float, modules: str = "q_proj") -> Case:
    """Return a case that imports such a copy, and looks at its scales."""
    wrong = scaled(ratio, modules)
    return Case(f"adapters: {name}", f"{IMPORT} ../models/{name}", code=0, wrong=wrong)


CASES = [
    resumed("--rank 4", "rank", "8"),
    resumed("--alpha 64", "alpha", "16"),
    resumed("--adapter dora", "dora"),
    resumed("--target-modules q_proj v_proj", "target_modules"),
    resumed("--num-layers 2", "num_layers"),
    resumed("--rslora", "rslora"),
    resumed("--init pissa", "init"),
    resumed("--train-modules embed_tokens", "train_modules"),
    Case("settings: dropout beside an adapter to start from takes effect", f"{MORE} --dropout 0.25", DATA, code=0,
         wrong=lambda folder: "" if '"dropout": 0.25' in (folder / "run/adapter_config.json").read_text() else "no dropout"),
    Case("settings: a model beside the adapter of another one", f"{SHORT.replace('smollm2', 'gemma')} --adapter-path run"
         " --resume-adapter-file ../models/run", DATA),
    Case("settings: Muon on vectors", f"{SHORT} --adapter dora --optimizer muon --iters 2 --adapter-path trained", DATA, code=0),
    Case("settings: Muon on VeRA, which has no matrices to train", f"{SHORT} --adapter vera --optimizer muon --adapter-path run", DATA,
         shows=("muon",)),
    Case("settings: another rank for a model that has adapters, in Python", "python twice.py",
         DATA | {"twice.py": TWICE}, code=0, shows=("refused: ", "adapters of an earlier run (first)"), absent=("second",)),
    Case("settings: a name beside a model, in Python", "python other.py", DATA | {"other.py": OTHER_NAME}, code=0,
         wrong=lambda folder: "gemma-3 is recorded" if "gemma-3" in "".join(
             file.read_text() for file in (folder / "first").glob("*.yaml")) else ""),
    Case("settings: gradient checkpointing", f"""
         {SHORT} --adapter-path on --grad-checkpoint on --seed 3
         {SHORT} --adapter-path off --grad-checkpoint off --seed 3
         """, DATA, code=0, wrong=same_adapters("on", "off")),
    # Adapters
    Case("adapters: mlx-lm's form of a file", f"{SHORT} --adapter-path trained --resume-adapter-file ../models/run/adapters.safetensors",
         DATA, code=0),
    Case("adapters: a file that is none", f"{SHORT} --adapter-path run --resume-adapter-file rows.jsonl", DATA, shows=("rows.jsonl",)),
    Case("adapters: of another model, fused", "fuse ../models/run --model ../models/gemma --save-path fused", absent=("fused",)),
    Case("adapters: the same folder twice", "fuse ../models/run:0.5 ../models/run:0.5 --save-path fused",
         shows=("give each folder once",), absent=("fused",)),
    Case("adapters: two equal ones at half the weight", """
         fuse --adapter ../models/run:0.5 --adapter ../models/same-run:0.5 --save-path twice
         fuse ../models/run --save-path once
         """, code=0, wrong=same_weights("once", "twice")),
    Case("adapters: two on the embedding that is also the head", f"""
         {SHORT} --target-modules embed_tokens q_proj --adapter-path one
         {SHORT} --target-modules embed_tokens v_proj --adapter-path two
         fuse one two --save-path fused
         python -m mlx_lm generate --model fused --max-tokens 4 --prompt Hello
         """, DATA, code=0),
    Case("adapters: paths in a fused folder", "fuse ../models/run --save-path fused", code=0, wrong=local_path_in),
    imported_as("peft", 1),
    imported_as("peft-anchored-pattern", 1),
    imported_as("peft-anchored-rank", 1),
    imported_as("peft-alpha-pattern", 2),
    imported("peft-token-indices", "trainable_token_indices"),
    imported("peft-vision-tower", "vision"),
    imported("peft-ia3", "IA3"),
    Case("adapters: of PEFT, used as it is", "generate --adapter-path ../models/peft --model ../models/smollm2", shows=("--from peft",)),
    # Files
    Case("files: ~ in --adapter-path=", f"{SHORT} --adapter-path=~/run", DATA, code=0, absent=("~",),
         wrong=lambda folder: "" if (folder / "home/run/run.yaml").exists() else "no home/run"),
    Case("files: ~ in a YAML file", "train -c settings.yaml", DATA | {"settings.yaml":
         "model: ../models/smollm2\ndata: ~/../rows.jsonl\nadapter_path: ~/deep/run\niters: 1\nbatch_size: 2\nvalid_split: 0\n"},
         code=0, absent=("~",), wrong=lambda folder: "" if (folder / "home/deep/run/run.yaml").exists() else "no home/deep/run"),
    Case("files: ~ in --save-path=", "export ../models/run --to peft --save-path=~/out", code=0, absent=("~",),
         wrong=lambda folder: "" if (folder / "home/out/adapter_config.json").exists() else "no home/out"),
    *(Case(f"files: a folder with a {name} of one's own", f"{SHORT} --adapter-path mine",
           DATA | {f"mine/{name}": text}, shows=("mine", "--overwrite"), wrong=unchanged(f"mine/{name}"))
      for name, text in MINE.items()),
    Case("files: a folder with notes, as a run", f"{SHORT} --adapter-path mine", DATA | {"mine/notes.txt": "mine"}, code=0,
         wrong=unchanged("mine/notes.txt")),
    Case("files: a folder of one's own to fuse into", "fuse ../models/run --save-path mine", {"mine/config.json": '{"mine": 1}'},
         shows=("mine",), wrong=unchanged("mine/config.json")),
    Case("files: data to fuse into, with --overwrite", "fuse ../models/run --save-path mine --overwrite",
         {"mine/train.jsonl": '{"text": "mine"}\n'}, shows=("mine",), wrong=unchanged("mine/train.jsonl")),
    Case("files: a run to export into", "export ../models/run --to peft --save-path mine --overwrite",
         {"mine/run.yaml": "mine: 1\n", "mine/history.jsonl": "{}\n", "mine/adapters.safetensors": "mine"}, shows=("mine",), wrong=unchanged("mine/run.yaml")),
    Case("files: a file as a folder", f"{SHORT} --adapter-path rows.jsonl", DATA, shows=("is a file",)),
    Case("files: a lock that leads to another file", f"{SHORT} --adapter-path mine", DATA | {"victim": "mine", "mine/.lock": "-> ../victim"},
         shows=(".lock",), wrong=unchanged("victim")),
    Case("files: weights that lead to another file", f"{SHORT} --adapter-path mine",
         DATA | {"victim": "mine", "mine/adapters.safetensors": "-> ../victim"}, wrong=unchanged("victim")),
    Case("files: a comparison over a picture of one's own", "compare ../models/run ../models/run --save-path mine.png",
         {"mine.png": "mine"}, shows=("--overwrite",), wrong=unchanged("mine.png")),
    Case("files: a sweep into a run", "sweep --data rows.jsonl --iters 3 --model ../models/smollm2 --adapter-path mine",
         DATA | {"mine/run.yaml": "mine: 1\n", "mine/history.jsonl": "{}\n"}, shows=("mine",), wrong=unchanged("mine/run.yaml")),
    Case("files: a folder whose name begins with a dash", f"""
         {SHORT} --adapter-path=-mine
         fuse ./-mine --save-path fused
         """, DATA, code=0, shows=("fused",)),
    Case("adapters: the same folder twice, under two spellings", "fuse ../models/run:0.5 ../models/../models/run:0.5 --save-path fused",
         shows=("give each folder once",), absent=("fused",)),
    Case("files: a GGUF file named as the folder to write", "export ../models/run --to gguf --save-path adapter.gguf"),
]  # fmt: skip
