"""Check the name of a model before the model is searched for: obvious mistakes get advice."""

from pathlib import Path

from ..errors import ModelError
from ..files import describe_entry
from ..hub_access import hub_id_in
from ..userpaths import similar_paths


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

    # Only paths begin like this.
    if name.startswith((".", "~", "/")) and not path.exists():
        raise ModelError(f"there is no folder or file {name!r}{similar_paths(path, ('.gguf',))}")
