"""Keep a run's history and report current while it trains."""

import os
import time

from ..errors import OutputError
from ..files.atomic import SAFE_FLAGS
from ..runs.history import HISTORY, REPORT, Run, encode_event
from ..runs.progress import Log
from ..runs.report import write_report
from ..runs.state import Event
from .checkpoint import write_history

REPORT_FRACTION = 0.01  # of the session's time, for rewriting the page


class LiveFiles:
    """A callback that appends each event to ``history.jsonl`` and rewrites ``report.html``.

    If the run is killed, at most the last line of the history is lost. A checkpoint rewrites the
    whole history. Rewriting the page takes at most about 1% of the session's time. The first page
    is not counted: it takes longer, because it loads what every page needs, also that of the end.
    """

    def __init__(self, log: Log):
        self._log = log
        self._started = time.perf_counter()
        self._spent = 0.0  # seconds, for rewriting the page
        self._is_complete = True  # whether the file has all events but the newest

    def __call__(self, run: Run, event: Event) -> None:
        """Write an event. ``start_folder`` has written the start; ``RunWriter`` writes the end."""
        if "outcome" in event or not run.folder.is_dir():
            return

        is_start = "schema" in event
        try:
            if not is_start:
                self._write_event(run, event)
            if is_start:
                write_report(run, live=True)
            elif self._spent < REPORT_FRACTION * (time.perf_counter() - self._started):
                self._rewrite_page(run)
        except (OSError, OutputError) as error:
            self._is_complete = False
            self._log(
                f"warning: {run.folder / HISTORY} and {REPORT} can't be written now, and will be"
                f" written later: {getattr(error, 'strerror', None) or error}"
            )

    def _write_event(self, run: Run, event: Event) -> None:
        # After an error the file may end within a line.
        if not self._is_complete:
            write_history(run.folder, run.history)
            self._is_complete = True
            return

        line = f"{encode_event(event)}\n".encode()
        flags = os.O_WRONLY | os.O_APPEND | SAFE_FLAGS
        descriptor = os.open(run.folder / HISTORY, flags)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line)

    def _rewrite_page(self, run: Run) -> None:
        started = time.perf_counter()
        write_report(run, live=True)
        self._spent += time.perf_counter() - started
