"""Read numbers from the metadata of an untrusted GGUF file, and collect the problems with them."""

from dataclasses import dataclass, field
from typing import Any

from .architectures import REALS, Architecture
from .reader import GGUFFile

LARGEST = 1 << 24
"""The largest number that is accepted by default."""


@dataclass
class MetadataNumbers:
    """Reads numbers from a file's metadata, and collects the problems with them."""

    file: GGUFFile
    architecture: Architecture
    problems: list[str] = field(default_factory=list[str])

    def key(self, name: str) -> str:
        """Return the metadata key of a number with this name, the hub's or llama.cpp's."""
        return f"{self.architecture.name}.{self.architecture.numbers.get(name, name)}"

    def read(self, name: str, default: float | None = None, most: float = LARGEST) -> Any:
        """Return the number with this name, the hub's or llama.cpp's.

        If it is invalid, or missing without a default, add a problem and return 1.
        """
        key = self.key(name)
        found = self._same_in_all_blocks(self.file.metadata.get(key, default))
        kind = int | float if name in REALS else int
        is_number = isinstance(found, kind) and not isinstance(found, bool)
        may_be_zero = name in self.architecture.may_be_zero
        if is_number and (0 < found <= most or (found == 0 and may_be_zero)):
            return found

        number = "a number" if name in REALS else "a whole number"
        least = "of at least 0" if may_be_zero else "above 0"
        self.problems.append(
            f"{key} is {found!r:.40}, allowed is {number} {least} and up to {most:,}"
        )
        return 1

    def _same_in_all_blocks(self, found: Any) -> Any:
        """Return the number in a list that holds it once for each block; other values unchanged."""
        blocks = self.file.metadata.get(self.key("num_hidden_layers"))
        is_list = isinstance(found, list) and len(found) == blocks and found
        return found[0] if is_list and found.count(found[0]) == len(found) else found

    def read_per_layer(self, name: str, layers: int) -> list[int]:
        """Return a number that may differ from layer to layer, as a list with one for each layer.

        A file stores a list, or one number for all layers.
        """
        key = self.key(name)
        found = self.file.metadata.get(key)
        values: list[Any] = found if isinstance(found, list) else [found] * layers
        if len(values) == layers and all(_is_count(value) for value in values):
            return [int(value) for value in values]

        self.problems.append(
            f"{key} is {found!r:.40}, allowed is a number or a list of {layers} numbers"
        )
        return [1] * layers


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= LARGEST
