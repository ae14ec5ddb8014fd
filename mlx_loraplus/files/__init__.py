"""How this package writes and reads files.

Files and folders are replaced as a whole or not at all, and only one process at a time works in a
folder.
"""

from .atomic import replacing, sync, write_atomically
from .cache import cache_folder
from .folders import (
    cached_folder,
    check_free,
    others_in,
    remove_folder,
    remove_leftovers,
    replacing_folder,
)
from .locks import check_unlocked, locked
from .reading import open_ordinary, read_bounded

__all__ = [
    "cache_folder",
    "cached_folder",
    "check_free",
    "check_unlocked",
    "locked",
    "open_ordinary",
    "others_in",
    "read_bounded",
    "remove_folder",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "sync",
    "write_atomically",
]
