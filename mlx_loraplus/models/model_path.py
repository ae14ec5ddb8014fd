"""Check what is given as a model: a path that leads elsewhere, or to nothing."""

from pathlib import Path

from ..errors import ModelError, nearest
from ..files import describe_entry


def check_model_path(name: str) -> None:
    """Check that a name is not a file of another kind, or a path where nothing is.

    Raises:
        ModelError: It is.
    """
    if not name.strip():
        raise ModelError("the name of the model is empty: give a name, a folder or a .gguf file")
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
        raise ModelError(f"there is no folder or file {name!r}{similar_names(path)}")


def similar_names(path: Path) -> str:
    """Return a hint at the files and folders beside a missing path whose names are similar."""
    return nearest(path.name, [entry.name for entry in path.parent.glob("*")])
