"""Watches the steps of the device: one that takes too long is reported with the stacks of all threads, the server says
that it is unhealthy, and the process ends, so that whoever supervises it starts it anew. A device that hangs or has
lost its context cannot be mended from inside.

Told of steps by the engine, on the loop; watches from a thread of its own, since the loop itself may hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_STATUS = 70
"""EX_SOFTWARE. Not 2, which means that a restart would not help."""
GRACE_S = 5.0
"""Between the report and the end: for probes to see /health at 503, and for clients to hear of it."""
BACKSTOP_S = 30.0
"""Beyond twice the timeout: then nothing above has come to its turn."""


def _exit() -> None:
    """Without cleaning up: the thread that hangs would be waited for."""
    logging.shutdown()
    os._exit(EXIT_STATUS)


class Watchdog:
    """`on_failure` is called on the watching thread, once, before the end. `backstop`: end the process, without a word
    to anybody, when no thread can run Python at all (a launch that hangs may hold the interpreter's lock)."""

    def __init__(
        self,
        timeout_s: float,
        *,
        grace_s: float = GRACE_S,
        exit_process: Callable[[], None] = _exit,
        backstop: bool = True,
    ) -> None:
        self.timeout_s = timeout_s
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None
        self._grace_s, self._exit, self._backstop = grace_s, exit_process, backstop
        self._began: float | None = None  # when the oldest step in flight began
        self._reason: str | None = None
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="lightvl-watchdog", daemon=True)
        self._thread.start()

    def step_began(self) -> None:
        """The device begins the oldest step in flight."""
        self._began = time.monotonic()

    def idle(self) -> None:
        self._began = None

    def is_overdue(self) -> bool:
        began = self._began
        return began is not None and time.monotonic() - began > self.timeout_s

    def condemn(self, reason: str) -> None:
        """The device is known to be lost: end now, not after the timeout."""
        self._reason = reason
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _watch(self) -> None:
        while not self._closed:
            if self._backstop:
                faulthandler.dump_traceback_later(2 * self.timeout_s + BACKSTOP_S, exit=True)
            self._wake.wait(min(self.timeout_s / 10, 5.0))
            if self._reason is None and self.is_overdue():
                self._reason = f"a step of the device has taken more than {self.timeout_s:g} s (--watchdog-timeout)"
            if self._reason is not None:
                self._end(self._reason)
                break
        if self._backstop:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, reason: str) -> None:
        self.failed = True
        logger.critical("%s; the process ends in %g s, for a restart. All threads:", reason, self._grace_s)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        with contextlib.suppress(Exception):  # whatever breaks here, the process must end
            self.on_failure()
        time.sleep(self._grace_s)
        self._exit()
