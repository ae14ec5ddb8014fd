"""Load the libraries that make MLX fast on a Linux CPU; to be imported before MLX."""

import ctypes
import os

LIBRARIES = "RIVALS_LIBRARIES"
"""The environment variable that names them, as PATH names folders."""

for _library in filter(None, os.environ.get(LIBRARIES, "").split(os.pathsep)):
    ctypes.CDLL(_library, mode=ctypes.RTLD_GLOBAL)
