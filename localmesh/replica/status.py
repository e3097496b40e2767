"""Tells the worker how the replica is doing, over the file descriptor that it left open."""

import contextlib
import os
from dataclasses import replace

from localmesh.core.replica_process import FailedEvent, StatusEvent, status_to_json

_LINE_LIMIT = 4000  # a write of less than PIPE_BUF (4096) is never torn


class StatusWriter:
    """Writes status events, one line each. A worker that is gone or does not read is never waited for."""

    def __init__(self, descriptor: int) -> None:
        """Begin.

        Args:
            descriptor: The file descriptor; kept from children, whose holding it open would hide our own exit. Negative
                for none.

        Raises:
            OSError: It is not open.
        """
        self._descriptor = descriptor
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
            os.set_blocking(descriptor, False)

    def send(self, event: StatusEvent) -> None:
        """Write one event. Lost if nobody reads; a long message is cut."""
        if self._descriptor < 0:
            return
        line = status_to_json(event)
        while len(line) > _LINE_LIMIT and isinstance(event, FailedEvent):
            event = replace(event, message=event.message[: len(event.message) // 2] + "...")
            line = status_to_json(event)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionError):
            os.write(self._descriptor, (line + "\n").encode())
