"""Publish a run on the model hub: its adapter in every format that supports it, and a model card.

Only huggingface-hub reads the hub's token (``hf auth login``, ``HF_TOKEN``). An error message never
repeats a server's answer about the token.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from huggingface_hub import HfApi, ModelCard, ModelCardData
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import write_adapter
from ..errors import AdapterError, ModelError, OutputError
from ..hub_access import hub_reachable, reason_of
from ..models.find_model import ModelSource
from ..models.prompt_format import format_of
from ..runs.history import PLOT, SETTINGS, Run
from ..runs.report import plain, summary
from ..settings import settings_of
from ..userpaths import public_name
from .gguf_lora import write_lora
from .ollama import modelfile
from .peft import write_peft

CARD_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_LICENCES = {
    "gemma": "gemma", "smollm": "apache-2.0", "llama-3.1": "llama3.1", "llama-3.2": "llama3.2",
    "llama-3.3": "llama3.3", "llama-4": "llama4",
}  # fmt: skip
_SHOWN = (
    "adapter", "init", "rank", "alpha", "rslora", "dropout", "target_modules", "num_layers",
    "optimizer", "learning_rate", "lr_ratio", "embedding_learning_rate", "weight_decay", "schedule",
    "warmup", "max_grad_norm", "batch_size", "grad_accumulation_steps", "max_seq_length",
    "train_on", "pack", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class CardRun:
    """The parts of a run that a model card shows, as Markdown.

    Attributes:
        data: The names of the data.
        results: Rows of (name, text).
        settings: Rows of (name, text).
        plot: The file with the loss curves; empty if the run has no such file.
    """

    data: str
    results: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    plot: str


def write_repository(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    source: ModelSource,
    repo_id: str,
    adapter: Path,
    folder: Path,
) -> list[str]:
    """Write a folder for the hub: the adapter for mlx-lm, PEFT and llama.cpp, and a model card.

    PEFT expects its files at the top level. The files for mlx-lm are in ``mlx``, because both
    formats have a file named adapter_config.json.

    Args:
        model: The base with the adapter.
        tokenizer: The base's tokenizer.
        source: Where the base was found.
        repo_id: The repository's id, owner/name.
        adapter: The folder that the adapter was loaded from. If it is a run's folder, the model
            card describes the run.
        folder: The folder to fill.

    Returns:
        The reason for each format that was left out.
    """
    base = public_name(source.base)
    left_out: list[str] = []

    # mlx-lm's format can express every adapter.
    write_adapter(model, folder / "mlx")
    formats = ["mlx"]

    try:
        write_peft(model, base, folder)
        formats.append("peft")
    except AdapterError as problem:
        left_out.append(str(problem))

    try:
        write_lora(model, folder / "adapter.gguf")
        text = modelfile(tokenizer, "./base.gguf", "./adapter.gguf", format_of(model))
        (folder / "Modelfile").write_bytes(text.encode())
        formats.append("gguf")
    except (AdapterError, ModelError) as problem:
        left_out.append(str(problem))

    # Write the model card, with all known facts about the training.
    run = Run.load(adapter) if (adapter / SETTINGS).is_file() else None
    if (adapter / PLOT).is_file():
        shutil.copy(adapter / PLOT, folder)
    model_card(base, licence_of(base), repo_id, run, formats).save(folder / "README.md")
    return left_out


def model_card(
    base: str, licence: str, repo_id: str, run: Run | None, formats: Sequence[str]
) -> ModelCard:
    """Return the model card of an adapter or a model: base, training if known, and how to use it.

    Args:
        base: A hub id or a name.
        licence: The hub's name of the base's licence.
        repo_id: The repository's id, owner/name.
        run: The run that trained the adapter.
        formats: The formats of the adapter in the repository (mlx, peft, gguf), or only "model".
    """
    data = ModelCardData(
        library_name="peft" if "peft" in formats else "mlx",
        pipeline_tag="text-generation",
        tags=["mlx"] if "model" in formats else ["lora", "loraplus", "mlx"],
        license=licence,
    )
    if "/" in base:
        data.base_model = base
        data["base_model_relation"] = "finetune" if "model" in formats else "adapter"

    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        name=repo_id.partition("/")[2],
        base=base,
        licence=licence,
        repo_id=repo_id,
        run=_describe_run(run) if run else None,
        formats=formats,
    )


def licence_of(base: str) -> str:
    """Return a base's licence: from its model card, else from its family, else "other"."""
    licence: Any = None
    # The base may have no repository or no card, and network errors have no common base class.
    with suppress(Exception):
        if "/" in base and hub_reachable():
            card = HfApi().model_info(base, timeout=10).card_data
            licence = getattr(card, "license", None)
    if licence:
        return licence

    name = base.rpartition("/")[2].lower().removeprefix("meta-")
    for family, family_licence in _LICENCES.items():
        if name.startswith(family):
            return family_licence
    return "other"


def upload(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository in one commit, and return the repository's address.

    If the repository does not exist, it is created as a private repository.

    Raises:
        OutputError: The hub refuses the upload, or can't be reached. The message never contains
            the token.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, commit_message="Upload with mlx_loraplus"
        )
    # The errors of a network or a server have no common base class.
    except Exception as problem:  # noqa: BLE001
        raise OutputError(f"{repo_id} can't be uploaded: {reason_of(problem)}") from None
    return str(url)


def _describe_run(run: Run) -> CardRun:
    """Return a run's data, results and settings, without any local path."""
    names = [f"`{public_name(name)}`" for name in run.config.data.data]

    # The trained model may be a quantized version of the base, so its name is shown too.
    results = [("model", public_name(run.config.model))]
    results += [row for row in summary(run) if row[0] != "model"]

    values = settings_of(run.config)
    settings = [(key, plain(values[key])) for key in _SHOWN if values[key] not in (None, [])]

    return CardRun(
        data=", ".join(names) or "the built-in demo set",
        results=results,
        settings=settings,
        plot=PLOT if (run.folder / PLOT).is_file() else "",
    )
