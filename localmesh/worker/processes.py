"""Linux processes: which belong to a replica, when one ends, and ending them without ever hitting another's.

A process belongs to a replica if it is in the replica's process group or inherited its marker in the environment: so a
descendant that made itself a group or session of its own is found, too.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MARKER = "LOCALMESH_REPLICA_DIR"
"""In the environment of a replica and of all that it starts: the replica's folder."""
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStat:
    """What /proc/PID/stat says."""

    pid: int
    state: str
    """"Z" is a process that ended and was not waited for yet."""
    group: int
    start_ticks: int
    """When it was started, since boot: with the pid it names one process for ever (until the next boot)."""


def read_stat(pid: int) -> ProcessStat | None:
    """Return what the system knows of a process; None when there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # the name is in parentheses and may hold anything
    fields = text.rpartition(")")[2].split()
    return ProcessStat(pid=pid, state=fields[0], group=int(fields[2]), start_ticks=int(fields[19]))


def command_line(pid: int) -> tuple[str, ...]:
    """Return the arguments that a process was started with; nothing when there is none."""
    try:
        text = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode("utf-8", "replace") for part in text.split(b"\0")[:-1])


def belonging(folder: Path, *, group: int = 0) -> list[ProcessStat]:
    """Return the processes that are alive and belong to a replica.

    Args:
        folder: The replica's folder, as in its marker.
        group: Its process group; 0 when that is not known for sure.
    """
    marker = f"{MARKER}={folder}".encode()
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        stat = read_stat(int(entry.name))
        if stat is None or stat.state in "ZX":
            continue
        if (group and stat.group == group) or marker in _environment(stat.pid):
            found.append(stat)
    return found


def send_signal(stat: ProcessStat, number: signal.Signals) -> None:
    """Send a signal to exactly this process: never to another one that was given its number since."""
    try:
        fd = os.pidfd_open(stat.pid)
    except OSError:
        return
    try:
        # the descriptor is of whoever has the pid now; only after it is open can nobody else get it
        now = read_stat(stat.pid)
        if now is not None and now.start_ticks == stat.start_ticks:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


class ExitWatch:
    """Tells when a process ends; it need not be a child. A child is not reaped: its number stays its own.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, pid: int, *, on_exit: Callable[[], None] | None = None) -> None:
        self._fd = os.pidfd_open(pid)
        self._told = on_exit
        self._loop = asyncio.get_running_loop()
        self.exited = asyncio.Event()
        self._loop.add_reader(self._fd, self._on_exit)

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._fd)
        self.exited.set()
        if self._told is not None:
            self._told()

    def __enter__(self) -> Self:
        """Return the watch."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()


async def kill_belonging(folder: Path, *, group: int = 0, timeout_seconds: float = 5.0) -> bool:
    """Kill whatever belongs to a replica and wait until it is gone.

    Returns:
        Whether nothing is left.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            while found := await asyncio.to_thread(belonging, folder, group=group):
                for stat in found:
                    send_signal(stat, signal.SIGKILL)
                await _all_gone(found)
    except TimeoutError:
        return False
    return True


async def _all_gone(stats: Iterable[ProcessStat]) -> None:
    for stat in stats:
        try:
            with ExitWatch(stat.pid) as watch:
                now = read_stat(stat.pid)
                if now is not None and now.start_ticks == stat.start_ticks:
                    await watch.exited.wait()
        except ProcessLookupError:
            continue


def _environment(pid: int) -> frozenset[bytes]:
    try:
        return frozenset((_PROC / str(pid) / "environ").read_bytes().split(b"\0"))
    except OSError:  # another user's, or gone
        return frozenset()
