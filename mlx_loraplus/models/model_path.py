"""Check the name of a model that is a path, before it is taken for the name of a hub model."""

from pathlib import Path

from ..errors import ModelError, nearest


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

    # Only a path begins like this.
    if name.startswith((".", "~", "/")) and not path.exists():
        beside = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ModelError(f"there is no folder or file {name!r}{nearest(path.name, beside)}")
