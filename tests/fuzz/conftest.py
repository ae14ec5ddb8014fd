"""The place for whole runs, here too."""

from tests.training.conftest import place

__all__ = ["place"]
