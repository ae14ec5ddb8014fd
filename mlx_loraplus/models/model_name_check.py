"""Check the name of a model before the model is searched for: obvious mistakes get advice."""

from pathlib import Path

from ..errors import ModelError
from ..files import describe_entry
from ..hub_access import hub_id_in
from ..userpaths import similar_paths

MODEL_NAMES = (
    "a hub id (org/name), a folder, a .gguf file, or a name that mlx_loraplus.train --list-models"
    " prints"
)
"""What a model may be given as."""


def check_model_path(name: str) -> None:
    """Check that a name is not a file of another kind, a web address, or a missing path.

    Raises:
        ModelError: It is one of these, or empty.
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

    # The address of a page, copied from a browser.
    hub_id = hub_id_in(name)
    if hub_id or name.startswith(("https://", "http://")):
        hint = f": give its hub id, {hub_id}" if hub_id else ": give a hub id or a folder"
        raise ModelError(f"{name!r:.200} is an address, not a model{hint}")

    # Only paths begin or end like this.
    is_path = name.startswith((".", "~", "/")) or path.suffix.lower() == ".gguf"
    if is_path and not path.exists():
        hint = similar_paths(path, (".gguf",))
        kind = "file" if path.suffix.lower() == ".gguf" else "folder or file"
        raise ModelError(f"there is no {kind} {name!r}{hint}: give {MODEL_NAMES}")
