"""What ties a component's process to the process that started it: a status pipe and a common end."""

import ctypes
import json
import os
import signal
from dataclasses import asdict, dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The component serves."""

    endpoint: str
    """Advertised address, host:port."""
    port: int
    """Port that it listens on."""
    detail: str = ""
    """What else an operator should know, in a few words."""
    join_token: str = ""
    """With which new machines may enrol, where they may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The component gives up; its exit follows."""

    message: str
    exit_code: int


Status = Ready | Failed


def to_line(status: Status) -> str:
    """Return the status as one line of JSON, with its end."""
    return json.dumps({"event": type(status).__name__.lower()} | asdict(status)) + "\n"


def parse_line(line: bytes) -> Status:
    """Read what `to_line` wrote.

    Raises:
        ValueError: It is something else.
    """
    try:
        body: dict[str, Any] = dict(json.loads(line))
        kind: type[Ready | Failed] = {"ready": Ready, "failed": Failed}[body.pop("event")]
        return kind(**body)
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"not a status line: {line!r}") from problem


class StatusPipe:
    """The writing end. A parent that is gone or does not read is no reason to fail."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            # A component starts processes of its own: they must not hold this pipe open.
            os.set_inheritable(fd, False)

    def send(self, status: Status) -> None:
        """Write one status line."""
        if self._fd is not None:
            try:
                os.write(self._fd, to_line(status).encode())
            except OSError:
                self._fd = None


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process (SIGTERM) when the process that started it ends, however it ends.

    Raises:
        ProcessLookupError: It has ended already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise ProcessLookupError(f"process {parent_pid}, which started this one, has ended")
