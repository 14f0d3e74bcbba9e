"""Warm-up: load the default models once the page has been opened, so that the first Run does not wait for them."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress

from ui.playground.example import compute_example

DELAY = 1.0  # seconds after the page has opened, in which its files are served
NICENESS = 3  # of the thread and of those that it starts; a first Run that comes early waits for it, so not more
_log = logging.getLogger(__name__)


class WarmUp:
    """Runs the example's comparison once in the background, at low priority: imports torch, loads and compiles."""

    def __init__(self, delay: float = DELAY) -> None:
        """Create a warm-up that starts `delay` seconds after `start`."""
        self._delay = delay
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the warm-up; later calls have no effect."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait for the end of the warm-up, if it was started."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        time.sleep(self._delay)
        if sys.platform == "linux":  # elsewhere this would slow down the whole process
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            compute_example()
        except Exception:
            _log.info("The models were not loaded in advance.", exc_info=True)
