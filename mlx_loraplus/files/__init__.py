"""How this package writes and reads files.

Files and folders are replaced as a whole or not at all, and only one process at a time works in a
folder.
"""

from .atomic import replacing, sync, temporary_name, write_atomically
from .bounded_reading import LFS_ADVICE, is_lfs_pointer, open_ordinary, read_bounded
from .broken_links import check_links, describe_entry, is_not_ordinary_file
from .cache import cache_folder, write_error
from .folder_kinds import Contents, check_apart, check_contents, describe_contents
from .folders import (
    cached_folder,
    check_free,
    others_in,
    remove_folder,
    remove_leftovers,
    remove_unused,
    replacing_folder,
)
from .locks import check_unlocked, locked
from .writable import check_writable

__all__ = [
    "LFS_ADVICE",
    "Contents",
    "cache_folder",
    "cached_folder",
    "check_apart",
    "check_contents",
    "check_free",
    "check_links",
    "check_unlocked",
    "check_writable",
    "describe_contents",
    "describe_entry",
    "is_lfs_pointer",
    "is_not_ordinary_file",
    "locked",
    "open_ordinary",
    "others_in",
    "read_bounded",
    "remove_folder",
    "remove_leftovers",
    "remove_unused",
    "replacing",
    "replacing_folder",
    "sync",
    "temporary_name",
    "write_atomically",
    "write_error",
]
