"""The demo trains and asks the model that it names, on every machine."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.models.known_models import CHOSEN_BY_MEMORY, KNOWN
from scripts import demo


def test_the_demo_names_its_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """``gemma-3`` would be a larger model on a Mac, and its answers would be no comparison."""
    assert demo.MODEL not in CHOSEN_BY_MEMORY
    assert KNOWN[demo.MODEL].package is not None, "it needs no hub"

    # What the demo would load and run.
    asked: list[tuple[str, Path | None]] = []
    commands: list[list[str]] = []

    def load(model: str, adapter: Path | None) -> tuple[None, None]:
        asked.append((model, adapter))
        return None, None

    def run(command: str | list[str]) -> None:
        commands.append(shlex.split(command) if isinstance(command, str) else command)

    def answer_all(*arguments: Any, **_: Any) -> list[str]:
        return ["an answer"] * len(arguments[2])

    for name, replacement in (("load", load), ("run", run), ("answer_all", answer_all)):
        monkeypatch.setattr(demo, name, replacement)
    monkeypatch.setattr(demo, "encode_prompt", lambda *_: [1])
    demo.main([])
    assert asked == [(demo.MODEL, None), (demo.MODEL, demo.RUN)]

    train, fuse, generate = commands
    config, _ = parse(TrainConfig, Switches, train[1:], train[0])
    assert (config.model, config.adapter_path) == (demo.MODEL, str(demo.RUN))
    assert fuse[:2] == ["mlx_loraplus.fuse", str(demo.RUN)]
    assert generate[:3] == ["mlx_loraplus.generate", "--model", str(demo.FUSED)]
    said = capsys.readouterr().out
    assert "== the model: " in said
    assert f"before: {demo.MODEL} answers" in said
