"""A run on the model hub: its adapter in every format that can hold it, and a model card written from the run.

The token for the hub is huggingface-hub's own affair (``hf auth login``, ``HF_TOKEN``): it is read
by that library alone, and what a server says of it is not repeated.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.nn as nn
import yaml
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import save_adapter
from ..errors import AdapterError, ModelError, OutputError
from ..hub_access import hub_reachable, reason_of
from ..models.registry import ModelSource
from ..runs.history import PLOT, SETTINGS, Run
from ..runs.report import plain, summary
from ..settings import settings_of
from ..userpaths import public_name
from .gguf_lora import write_lora
from .ollama import modelfile
from .peft import write_peft

_LICENCES = {
    "gemma": "gemma", "smollm": "apache-2.0", "llama-3.1": "llama3.1", "llama-3.2": "llama3.2", "llama-3.3": "llama3.3",
    "llama-4": "llama4",
}  # fmt: skip
_SHOWN = (
    "adapter", "init", "rank", "alpha", "rslora", "dropout", "target_modules", "num_layers", "optimizer",
    "learning_rate", "lr_ratio", "embedding_learning_rate", "weight_decay", "schedule", "warmup", "max_grad_norm",
    "batch_size", "grad_accumulation_steps", "max_seq_length", "train_on", "pack", "seed",
)  # fmt: skip
_USE = {
    "mlx": (
        """With mlx-lm, on a Mac:

```bash
hf download {repo_id} --include 'mlx/*' --local-dir .
mlx_lm.generate --model {base} --adapter-path mlx --prompt '…'
```"""
    ),
    "peft": (
        """With transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```"""
    ),
    "gguf": (
        """With Ollama (llama.cpp takes it by `--lora adapter.gguf`): put the base as `base.gguf` beside the files
`adapter.gguf` and `Modelfile`, then

```bash
ollama create {name} -f Modelfile
ollama run {name}
```"""
    ),
}


def write_repository(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    source: ModelSource,
    repo_id: str,
    adapter: Path,
    folder: Path,
) -> list[str]:
    """Fill a folder with what goes to the hub: the adapter for mlx-lm, PEFT and llama.cpp, and its card.

    PEFT's is on top, where it is looked for; mlx-lm's is in ``mlx``, since both call a file
    adapter_config.json. If ``adapter``, where the adapter came from, is a run's folder, the card
    tells of that.

    Returns: What could not be written, and why.
    """
    missing, base = [], public_name(source.base)
    save_adapter(model, folder / "mlx")
    formats = ["mlx"]
    try:
        write_peft(model, base, folder)
        formats.append("peft")
    except AdapterError as problem:
        missing.append(str(problem))
    try:
        write_lora(model, folder / "adapter.gguf")
        (folder / "Modelfile").write_bytes(
            modelfile(tokenizer, "./base.gguf", "./adapter.gguf").encode()
        )
        formats.append("gguf")
    except (AdapterError, ModelError) as problem:
        missing.append(str(problem))
    run = Run.load(adapter) if (adapter / SETTINGS).is_file() else None
    if (adapter / PLOT).is_file():
        shutil.copy(adapter / PLOT, folder)
    (folder / "README.md").write_bytes(
        model_card(base, licence_of(base), repo_id, run, formats).encode()
    )
    return missing


def model_card(
    base: str, licence: str, repo_id: str, run: Run | None, formats: Sequence[str]
) -> str:
    """Return the model card of an adapter: its base, how it was trained if that is known, and how to use it.

    ``base`` is a hub id or a name, ``licence`` as the hub has it, ``formats`` those of _USE that
    are there.
    """
    head: dict[str, Any] = {
        "library_name": "peft" if "peft" in formats else "mlx", "pipeline_tag": "text-generation",
        "tags": ["lora", "loraplus", "mlx"], "license": licence,
    }  # fmt: skip
    if "/" in base:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    name = repo_id.partition("/")[2]
    unknown = (
        " It could not be found out: look at the base's own card." if licence == "other" else ""
    )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        (
            f"A LoRA+ adapter for {base}, trained with mlx_loraplus: the B matrices learn faster"
            " than the A matrices ([arXiv 2402.12354](https://arxiv.org/abs/2402.12354))."
        ),
        *(_training(run) if run else []),
        *([f"![Loss against steps]({PLOT})"] if run and (run.folder / PLOT).is_file() else []),
        "## Use",
        *(_USE[kind].format(base=base, repo_id=repo_id, name=name.lower()) for kind in formats),
        (
            f"## Licence\n\nThe adapter is nothing without its base, {base}, whose licence applies:"
            f" `{licence}`.{unknown}"
        ),
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(base: str) -> str:
    """Return the licence of a base as its card on the hub has it, or its family's, or "other"."""
    from huggingface_hub import HfApi

    said: Any = None
    with suppress(Exception):  # no such model, no card, or anything that a network can do
        if "/" in base and hub_reachable():
            said = getattr(HfApi().model_info(base, timeout=10).card_data, "license", None)
    stem = base.rpartition("/")[2].lower().removeprefix("meta-")
    return said or next(
        (licence for family, licence in _LICENCES.items() if stem.startswith(family)), "other"
    )


def upload(folder: Path, repo_id: str) -> str:
    """Upload a folder as a model's repository, made private if it is not there, in one commit; return its address.

    Raises: OutputError where the hub does not take it; the message holds no token.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, commit_message="Upload with mlx_loraplus"
        )
    # The hub's client has no common root for what a network or a server can do.
    except Exception as problem:  # noqa: BLE001
        raise OutputError(f"{repo_id} can't be uploaded: {reason_of(problem)}") from None
    return str(url)


def _training(run: Run) -> list[str]:
    """Return the data, the numbers and the settings of a run as Markdown."""
    names = (
        ", ".join(f"`{public_name(name)}`" for name in run.config.data.data)
        or "the built-in demo set"
    )
    model = (
        "model",
        public_name(run.config.model),
    )  # which may be a quantized one, unlike the base
    settings = settings_of(run.config)
    shown = [
        (f"`{key}`", plain(settings[key])) for key in _SHOWN if settings[key] not in (None, [])
    ]
    return [
        f"## Training\n\nOn {names}:",
        _table(("", ""), [model, *(row for row in summary(run) if row[0] != "model")]),
        _table(("setting", "value"), shown),
    ]


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in (head, ("---", "---"), *rows))
