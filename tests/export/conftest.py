"""A tiny model with an adapter that is exported."""

import json
from pathlib import Path

import pytest

from mlx_loraplus import save_adapter
from tests.export import test_peft
from tests.export.test_gguf_lora import adapted, converted
from tests.models.gguf_files import write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in PEFT's format."""
    test_peft.written(test_peft.adapted("llama"), tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, and an adapter with a run's files."""
    model, _ = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    save_adapter(adapted(model), tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_text(
        "model: gemma-3\ndata: [/home/me/secret/rows, org/set]\nlearning_rate: 0.0002\nlr_ratio:"
        " 16.0\nrank: 4\n"
    )
    events = [
        {
            "step": 0,
            "schema": 1,
            "steps": 20,
            "model": "/home/me/gemma-3",
            "adapter": "4 of 9",
            "modules": [],
        }
        | {"memory": {"weights_gb": 0.5, "planned_gb": None, "available_gb": None}}
        | {split: {"examples": 1200, "tokens": 5, "supervised": 3} for split in ("train", "valid")},
        {"step": 0, "valid_loss": 3.0, "valid_seconds": 1},
        {"step": 10, "loss": 2.5, "useful_tokens": 1200, "seconds": 50.0, "peak_memory_gb": 1.5},
        {"step": 20, "loss": 1.5, "useful_tokens": 1300, "seconds": 70.0, "peak_memory_gb": 1.5},
    ]
    (tmp_path / "run" / "history.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events)
    )
    (tmp_path / "run" / "loss.png").write_bytes(b"\x89PNG")
    return tmp_path
