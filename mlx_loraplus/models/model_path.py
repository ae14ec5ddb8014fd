"""Check what is given as a model: a path that leads elsewhere, or a name instead of a model."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ModelError, nearest
from ..files import describe_entry


def check_model_path(name: str) -> None:
    """Check that a name is not a file of another kind, or a path where nothing is.

    Raises:
        ModelError: It is.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelError(
            f"{name!r} is a file, not a model: give a model's folder, a hub id or a .gguf file"
            " (rows go to --data)"
        )

    if path.is_symlink() and not path.exists():
        raise ModelError(f"{name!r} is {describe_entry(path)}: correct or remove the link")

    # Only a path begins like this.
    if name.startswith((".", "~", "/")) and not path.exists():
        beside = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ModelError(f"there is no folder or file {name!r}{nearest(path.name, beside)}")


def check_loaded(model: Any) -> None:
    """Check that the model given to a function is one, and not its name or its tokenizer.

    Raises:
        ModelError: It is not.
    """
    if isinstance(model, nn.Module):
        return
    given = f"the name {model!r:.80}" if isinstance(model, str) else f"a {type(model).__name__}"
    name = f"{model!r:.80}" if isinstance(model, str) else "name"
    raise ModelError(
        f"the first argument is {given}, not a model: model, tokenizer = mlx_loraplus.load({name})"
        " loads both, and functions take them in this order"
    )
