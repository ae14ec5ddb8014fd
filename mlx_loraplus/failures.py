"""Recognize the failures of a device by the text of MLX's errors.

MLX raises a ``RuntimeError`` if it gets no memory, and if a command buffer, which is a piece of the
GPU's work, fails. The texts are those of its ``allocator.cpp``, of its Metal backend's
``device.cpp`` and of its CUDA backend's ``utils.cpp``, with the words of the system in them::

    [metal::malloc] Attempting to allocate 9999 bytes which is greater than the maximum ...
    [metal::malloc] Resource limit (499000) exceeded.
    [malloc] Unable to allocate 9999 bytes.
    [METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer...
    [METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommand...
    [METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommand...
    cudaMallocAsync(&data, size, stream) failed: out of memory
    cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered

After a command buffer has failed, its results are lost. After a connection to another process has
failed, the next collective never ends. Code that tries something on the model and continues
if it fails must not continue after such an error; see ``is_lost``.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from .errors import DeviceError, LoRAPlusError

# The system stops long command buffers. MLX puts 40 operations or more into one.
_SHORTER_WORK = (
    "set MLX_MAX_OPS_PER_BUFFER=8 in the environment, so that MLX gives the GPU shorter work"
)

_LOST_PEER = "[ring] connection to a peer was lost"


@dataclass(frozen=True)
class Failure:
    """A way in which a device fails.

    Attributes:
        what: What happened, as a clause.
        words: If the text of an error contains one of these, this has happened.
        remedy: Advice that helps in any case.
    """

    what: str
    words: tuple[str, ...]
    remedy: str


MEMORY = Failure(
    "memory ran out",
    (
        "llocate",
        "Resource limit",
        "Insufficient Memory",
        "out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
    ),
    "close other programs, or use shorter inputs, smaller batches or a smaller model",
)
DISPLAY = Failure(
    "macOS stopped the GPU's work because it held up the display",
    ("Impacting Interactivity",),
    "let the display sleep (start the command with caffeinate -i, then run pmset displaysleepnow),"
    f" or {_SHORTER_WORK}",
)
TIMEOUT = Failure(
    "the system stopped the GPU's work because it took too long",
    ("GPU Timeout", "GPU Hang", "launch timed out"),
    f"close other programs that use the GPU, or {_SHORTER_WORK}",
)
GPU = Failure(
    "the GPU failed",
    (
        "Command buffer execution failed",
        "illegal memory access",
        "illegal instruction was encountered",
        "misaligned address",
        "unspecified launch failure",
        "uncorrectable ECC error",
        "device-side assert",
        "hardware stack error",
    ),
    "close other programs that use the GPU, and try again",
)


def failure_of(error: BaseException | None) -> Failure | None:
    """Return how the device failed, or None if the error is another one."""
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, LoRAPlusError) or not isinstance(error, RuntimeError):
        return None

    # The last one also matches all errors of Metal, so the order matters.
    text = str(error)
    for failure in (MEMORY, DISPLAY, TIMEOUT, GPU):
        if any(words in text for words in failure.words):
            return failure
    return None


def is_lost(error: BaseException | None) -> bool:
    """Return whether this process can compute nothing more on the model.

    This is so after the device's work has failed, but not if MLX got no memory for an array. It is
    also so after MLX's ring has lost another process that holds a part of the model.
    """
    if isinstance(error, RuntimeError) and _LOST_PEER in str(error):
        return True
    failure = failure_of(error)
    return failure is not None and (failure is not MEMORY or "Command buffer" in str(error))


@contextmanager
def described_failures(describe: Callable[[Failure, str], str]) -> Generator[None]:
    """Turn MLX's errors about memory and the GPU into one line.

    Args:
        describe: Returns the line, from the failure and MLX's own text.

    Raises:
        DeviceError: The device failed. Other errors are raised unchanged.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = failure_of(error)
        if failure is None:
            raise
        raise DeviceError(describe(failure, reason_text(error))) from error


def failures_in_one_line() -> AbstractContextManager[None]:
    """Turn MLX's errors about memory and the GPU into what happened and what helps.

    Raises:
        DeviceError: The device failed. Other errors are raised unchanged.
    """
    return described_failures(
        lambda failure, reason: f"{failure.what} ({reason}): {failure.remedy}"
    )


def reason_text(error: BaseException) -> str:
    """Return an error's text on one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
