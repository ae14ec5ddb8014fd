"""Prepare the process for MLX, and explain why MLX can't start.

MLX postpones operations whose results are not needed yet, such as a layer's weight gradients, and
keeps their inputs in memory. With a small search width (``MLX_BFS_MAX_WIDTH``; the default is 20),
MLX finishes one branch of the graph before it starts the next. A CPU loses no speed with a width of
1. A GPU loses about 5%, so it gets a width of 10.

macOS ends a program whose work on the GPU holds up the display for long. With
``AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1`` it waits longer.

MLX's Linux CPU wheel links the reference BLAS (about 4 GFLOP/s in float32). Symbols that are loaded
globally before MLX take precedence, so loading OpenBLAS from the small ``ngsolve-openblas`` wheel
makes matrix products about 40 times faster without any other change.

On Linux, MLX itself comes without a backend. The extras ``cpu``, ``cuda12`` and ``cuda13`` of this
package install one. They exclude each other, because each installs a file of the same name.
"""

import ctypes
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution, files
from pathlib import Path

from .errors import BackendError
from .files import cache_folder, write_atomically

_LIBGFORTRAN = "libgfortran.so.5"
_CUDA_WHEELS = ("mlx-cuda-12", "mlx-cuda-13")
_WHEELS = ("mlx-cpu", *_CUDA_WHEELS)  # each installs mlx/lib/libmlx.so
_DRIVERS = {"cuda12": "550", "cuda13": "580"}  # extras → the NVIDIA driver that MLX needs

# glibc's mallopt options and the values for them: one arena, no mmap, no trimming.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_ARENA_MAX = -4, -1, -2, -8
_MALLOPT = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, 2**31 - 1),
    (_M_TOP_PAD, 2**28),
    (_M_ARENA_MAX, 1),
)


def prepare() -> None:
    """Set MLX's order of evaluation, macOS's time limit and, on a Linux CPU, BLAS and malloc.

    Variables that the user has set are not changed. Warns if MLX will be slow.
    """
    backends = installed_backends()
    is_cuda = has_cuda()
    is_mac = sys.platform == "darwin"
    if len(backends) > 1:
        message = f"several backends of MLX replace each other's files: {_reinstall(backends)}"
        warnings.warn(message, stacklevel=3)

    # MLX reads this at its first evaluation.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "10" if is_mac or is_cuda else "1")
    if is_mac:
        os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
    if sys.platform != "linux" or is_cuda:
        return

    if "mlx.core" in sys.modules:
        message = "import mlx_loraplus before mlx: MLX stays on its slow reference BLAS"
        warnings.warn(message, stacklevel=3)
        return

    if not backends:  # ``check_backend`` explains it
        return
    try:
        _load_openblas()
    except OSError as error:
        message = f"MLX stays on its slow reference BLAS (pip install ngsolve-openblas): {error}"
        warnings.warn(message, stacklevel=3)
    _keep_freed_memory()


def check_backend() -> None:
    """Import MLX.

    Raises:
        BackendError: MLX has no backend here, or its CUDA backend finds no driver or no GPU.
    """
    try:
        import mlx.core  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise BackendError(_explain(reason, installed_backends())) from None


def _explain(reason: str, backends: list[str]) -> str:
    """Return why MLX can't be imported, and what to do, as one line.

    Args:
        reason: The text of the ImportError.
        backends: The installed wheels that bring a backend.
    """
    if not backends:
        return f"MLX has no backend ({reason}): {_install()}"
    if "libcuda.so" in reason:
        return (
            "MLX's backend is CUDA, but this machine has no NVIDIA driver: install one, or pip"
            f" uninstall -y {' '.join(backends)}, then pip install 'mlx_loraplus[cpu]'"
        )
    return f"MLX can't start ({reason}): {_reinstall(backends)}"


def _install() -> str:
    """Return how to install a backend."""
    cuda = " or ".join(
        f"'mlx_loraplus[{extra}]' (driver {driver} or newer)" for extra, driver in _DRIVERS.items()
    )
    return f"pip install 'mlx_loraplus[cpu]'; with an NVIDIA GPU, pip install {cuda}"


def _reinstall(backends: list[str]) -> str:
    """Return how to replace the installed backends by one."""
    return f"pip uninstall -y {' '.join(backends)}, then {_install()}"


def installed_backends() -> list[str]:
    """Return the installed wheels that bring a backend of MLX for Linux; there should be one."""
    found: list[str] = []
    for wheel in _WHEELS:
        try:
            distribution(wheel)
        except PackageNotFoundError:
            continue
        found.append(wheel)
    return found


def has_cuda() -> bool:
    """Return whether MLX's CUDA backend is installed, without importing MLX."""
    return any(wheel in _CUDA_WHEELS for wheel in installed_backends())


def _installed(package: str, name: str) -> list[Path]:
    """Return the files of an installed package that match ``name``, without importing it."""
    try:
        found = files(package) or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in found if file.match(name)]


def _load_openblas() -> None:
    """Load OpenBLAS globally.

    Raises:
        OSError: OpenBLAS is missing, can't be loaded, or supports only one processor type.
    """
    libraries = _installed("ngsolve-openblas", "libopenblas*.so*")
    if not libraries:
        raise OSError("ngsolve-openblas is not installed")
    library = libraries[0]

    try:
        ctypes.CDLL(_LIBGFORTRAN)
    except OSError:
        _load_libgfortran()

    # Load it locally first. A build for one processor type would crash on another, so no symbol
    # may resolve to it before this check.
    openblas = ctypes.CDLL(str(library))
    openblas.openblas_get_config.restype = ctypes.c_char_p
    if b"DYNAMIC_ARCH" not in openblas.openblas_get_config():
        raise OSError(f"{library.name} is not built for run-time dispatch")

    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _load_libgfortran() -> None:
    """Load the libgfortran from MLX's own wheel under the name that OpenBLAS asks for.

    The wheel's copy has a mangled SONAME. The dynamic linker matches by SONAME, so a copy of the
    file with the original SONAME is loaded.
    """
    fortran = _installed("mlx-cpu", "libgfortran-*.so*")
    if not fortran:
        raise OSError("libgfortran.so.5 not found (on Debian: apt install libgfortran5)")
    library = fortran[0]

    # The two names must have the same length, so the shorter one is padded with zeros.
    copy = cache_folder() / library.name.split(".")[0] / _LIBGFORTRAN
    if not copy.exists():
        mangled = library.name.encode() + b"\0"
        original = _LIBGFORTRAN.encode().ljust(len(mangled), b"\0")
        write_atomically(copy, library.read_bytes().replace(mangled, original))

    for dependency in _installed("mlx-cpu", "libquadmath-*.so*"):
        ctypes.CDLL(str(dependency), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(copy))


def _keep_freed_memory() -> None:
    """Stop glibc from returning large blocks to the kernel.

    Otherwise, page faults would take a third of each step's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return

    for option, value in _MALLOPT:
        mallopt(option, value)
