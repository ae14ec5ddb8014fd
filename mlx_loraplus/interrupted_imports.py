"""End a command with one line if the user presses Ctrl-C while its modules are imported.

Otherwise, Python would print a traceback of the imports. ``__init__.py`` imports this module before
all others of the package. A program or notebook that imports the package keeps its own handling of
Ctrl-C.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the exit code after Ctrl-C, so that `train … && fuse …` stops
LAUNCHED = "MLX_LORAPLUS_LAUNCHED"  # set in the processes that --launch starts

_PACKAGE = "mlx_loraplus"


def report_interrupt() -> None:
    """Print one line, unless this process was started by another one that prints it."""
    if LAUNCHED not in os.environ:
        # The signal may have interrupted a write through sys.stderr, which must not be entered
        # again. A terminal has printed ^C, so start a new line there.
        os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")


def expect_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: the command handles it from here on."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: Any) -> None:
    """Handle Ctrl-C: report it, and end the process."""
    report_interrupt()
    raise SystemExit(INTERRUPTED)


def _is_command() -> bool:
    """Return whether this process runs a command of the package, by script or ``python -m``."""
    if sys.argv[:1] == ["-m"]:
        return any(word.startswith(_PACKAGE) for word in sys.orig_argv[1:])
    return bool(sys.argv) and Path(sys.argv[0]).name.startswith(_PACKAGE)


# A signal that is ignored, as in a background job, stays ignored.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
