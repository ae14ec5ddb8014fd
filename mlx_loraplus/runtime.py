"""The process MLX runs in: the order of its work, and a fast BLAS and a calm allocator where it has no GPU.

MLX puts off what nothing waits for, such as a layer's weight gradients, and all that they need stays in memory. A
narrow search (``MLX_BFS_MAX_WIDTH=1``, 20 by default) makes it finish one branch before it starts the next.

MLX's Linux CPU wheel links the reference BLAS (about 4 GFLOP/s in float32). Symbols loaded globally before MLX win, so
OpenBLAS from the small ``ngsolve-openblas`` wheel makes matrix products some 40 times faster with no other change.
"""

import ctypes
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from .places import cache_folder, write_atomically


def prepare() -> None:
    """Set MLX's order of work and, on a Linux CPU, its BLAS and malloc; say in one line when MLX has to stay slow."""
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")  # read at MLX's first evaluation
    if sys.platform != "linux" or _installed("mlx-cuda-12", "libmlx.so") or _installed("mlx-cuda-13", "libmlx.so"):
        return
    if "mlx.core" in sys.modules:
        warnings.warn("import mlx_loraplus before mlx: MLX stays on its slow reference BLAS", stacklevel=3)
        return
    try:
        _load_openblas()
    except OSError as error:
        warnings.warn(f"MLX stays on its slow reference BLAS (pip install ngsolve-openblas): {error}", stacklevel=3)
    _keep_freed_memory()


def _installed(package: str, name: str) -> list[Path]:
    """Return the installed files of ``package`` whose names match ``name``, without importing it."""
    try:
        found = files(package) or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in found if file.match(name)]


def _load_openblas() -> None:
    libraries = _installed("ngsolve-openblas", "libopenblas*.so*")
    if not libraries:
        raise OSError("ngsolve-openblas is not installed")
    try:
        ctypes.CDLL("libgfortran.so.5")
    except OSError:
        _load_libgfortran()
    # Local first: a build for one processor only would die on another, so nothing is bound to it before this check.
    openblas = ctypes.CDLL(str(libraries[0]))
    openblas.openblas_get_config.restype = ctypes.c_char_p
    if b"DYNAMIC_ARCH" not in openblas.openblas_get_config():
        raise OSError(f"{libraries[0].name} is not built for run-time dispatch")
    ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)


def _load_libgfortran() -> None:
    """Lend OpenBLAS the libgfortran inside MLX's own wheel, under the name that OpenBLAS asks for.

    The wheel's copy carries a mangled SONAME; the dynamic linker matches by SONAME, so a copy gets the plain one back.
    """
    fortran, quadmath = _installed("mlx-cpu", "libgfortran-*.so*"), _installed("mlx-cpu", "libquadmath-*.so*")
    if not fortran:
        raise OSError("libgfortran.so.5 not found (on Debian: apt install libgfortran5)")
    mangled, plain = fortran[0].name.encode() + b"\0", b"libgfortran.so.5"
    copy = cache_folder() / fortran[0].name.split(".")[0] / plain.decode()
    if not copy.exists():
        library = fortran[0].read_bytes()
        write_atomically(copy, library.replace(mangled, plain.ljust(len(mangled), b"\0")))
    for dependency in quadmath:
        ctypes.CDLL(str(dependency), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(copy))


def _keep_freed_memory() -> None:
    """Stop glibc from handing every big block back to the kernel: page faults cost a third of a step."""
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_arena_max, 1)):
        mallopt(option, value)
