"""What is meant by a first word that is not a command."""

import json
from pathlib import Path

import pytest

from mlx_loraplus.cli import COMMANDS
from mlx_loraplus.unknown_commands import command_hint


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--verbosity 1 train --data x", "train --verbosity 1 --data x"),
        ("--port 8000 serve runs", "serve --port 8000 runs"),
        ("--resume train -c a.yaml", "train --resume -c a.yaml"),
        ("--no-pack train --iters 3", "train --no-pack --iters 3"),
        ("-c run.yaml train", "train -c run.yaml"),
        ("--data train --model x", "train --data train --model x"),  # a folder of this name
        ("--prompt=hi", "generate --prompt=hi"),
        ("-p hi", "generate -p hi"),
        ("-m 5 generate run", "generate -m 5 run"),
    ],
)
def test_flags_before_their_command_are_put_after_it(given: str, meant: str):
    assert command_hint(given.split(), COMMANDS) == f" (did you mean {meant!r}?)"


@pytest.mark.parametrize(
    ("flag", "command"), [("--prompt hi", "generate"), ("--prompt=hi", "generate"), ("", "chat")]
)
def test_an_adapter_without_a_command_is_asked(tmp_path: Path, flag: str, command: str):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    words = [str(tmp_path), *flag.split()]
    assert f"'{command} {tmp_path}" in command_hint(words, COMMANDS)
