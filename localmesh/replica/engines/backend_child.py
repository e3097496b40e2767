"""The process of a foreign backend: started, found, watched, stopped."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

_GUARDIAN = Path(__file__).with_name("guardian.py")
_TAIL_LINES = 20
_LINE_BYTES = 2000
_READ_BYTES = 1 << 16
_READS = 16
"""At once, so that a chatterbox does not keep the loop busy."""


class BackendChild:
    """A program in a process group of its own, whose output goes to our stderr and whose last lines are remembered."""

    def __init__(self, process: Process, output: int) -> None:
        self._process = process
        self._output = output
        self._last: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._unfinished = b""
        os.set_blocking(output, False)
        asyncio.get_running_loop().add_reader(output, self._read)

    @classmethod
    async def start(cls, command: Iterable[str], *, folder: Path, environment: Mapping[str, str]) -> "BackendChild":
        """Start a program in a folder.

        Call it from the main thread: the program dies with the thread that started it.
        """
        # A pipe of our own: with one of asyncio's, waiting for the process would wait for all who hold the pipe, too.
        output, its_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARDIAN), str(os.getpid())),
                *command,
                cwd=folder,
                env=dict(environment),
                stdin=DEVNULL,
                stdout=its_end,
                stderr=STDOUT,
                process_group=0,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(its_end)
        return cls(process, output)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def wait(self) -> str:
        """Wait until it has ended, and return how, with its last words."""
        code = await self._process.wait()
        self._read()
        return f"{_how(code)}{self.last_words()}"

    def last_words(self) -> str:
        """Return the end of what it wrote, for an error message; empty if it wrote nothing."""
        lines = [*self._last, self._unfinished] if self._unfinished else [*self._last]
        text = "\n".join(line.decode("utf-8", "replace") for line in lines).strip()
        return f"; its last words:\n{text}" if text else ""

    def listening_ports(self) -> list[int]:
        """Return the TCP ports that the program or one of its children listens on."""
        ports: set[int] = set()
        with suppress(psutil.Error):
            guardian = psutil.Process(self._process.pid)
            for process in (guardian, *guardian.children(recursive=True)):
                with suppress(psutil.Error):
                    ports |= {
                        connection.laddr.port
                        for connection in process.net_connections("tcp")
                        if connection.status == psutil.CONN_LISTEN
                    }
        return sorted(ports)

    async def stop(self, grace_seconds: float) -> None:
        """End it: SIGTERM to the group, time to go, SIGKILL to whoever is left of the group."""
        group = self._process.pid
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        await self._process.wait()
        self._close()

    def _read(self) -> None:
        """Take what it wrote. Called by the loop when there is something."""
        for _ in range(_READS):
            if self._output < 0:
                return
            try:
                data = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._close()
                return
            with suppress(OSError):
                os.write(2, data)
            self._remember(data)

    def _remember(self, data: bytes) -> None:
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[-_LINE_BYTES:]
        self._last.extend(line[:_LINE_BYTES] for line in lines if line.strip())

    def _close(self) -> None:
        if self._output >= 0:
            asyncio.get_running_loop().remove_reader(self._output)
            os.close(self._output)
            self._output = -1


def _how(code: int) -> str:
    if code == 0:
        return "it ended by itself"
    number = code - 128 if code > 128 else -code
    if number <= 0:
        return f"it ended with exit code {code}"
    names = {s.value: s.name for s in signal.Signals}
    return f"it was killed by {names.get(number, f'signal {number}')}"
