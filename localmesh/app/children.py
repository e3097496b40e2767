"""A component as a child process: started, watched, started again when it crashes, and stopped.

Each child leads a process group of its own, so that a Ctrl-C in the terminal reaches the parent only, which then stops
its children in order.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from localmesh.app import config_reader
from localmesh.app.config import Config
from localmesh.app.lifeline import Failed, Ready, parse_line
from localmesh.app.restart import Crashes, RestartPolicy, after_crash
from localmesh.core.clock import Clock

_LOG = logging.getLogger(__name__)
_TAIL_BYTES = 2000


class StartFailed(Exception):
    """A component did not become ready. The message is for the operator."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run."""

    name: str
    """Unique among the children; names its log and its configuration file."""
    role: str
    """Component: registry, router or worker."""
    config: Config
    run_dir: Path
    """Folder for its configuration file."""
    log_dir: Path

    @property
    def log_path(self) -> Path:
        """File with its output."""
        return self.log_dir / f"{self.name}.log"


class Child:
    """Runs one component until told to stop."""

    def __init__(self, spec: ChildSpec, clock: Clock, policy: RestartPolicy | None = None) -> None:
        self.spec = spec
        self.ready: asyncio.Event = asyncio.Event()
        """Set while it serves."""
        self.address: Ready | None = None
        """Where it serves, once it was ready."""
        self.starts = 0
        """How often it was started."""
        self._clock = clock
        self._policy = policy or RestartPolicy()
        self._crashes = Crashes()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int:
        """Its process, 0 between two lives."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def run(self, *, on_ready: Callable[[Ready], None], on_crash: Callable[[str], None]) -> None:
        """Start it, and again whenever it ends, until `stop`.

        Args:
            on_ready: Called each time it serves.
            on_crash: Called with a sentence after each crash.

        Raises:
            StartFailed: It ended before it was ever ready.
        """
        while not self._stopping.is_set():
            began = self._clock.monotonic()
            failure = await self._live(on_ready)
            if self._stopping.is_set():
                return
            if self.address is None:
                raise StartFailed(f"{self.spec.name} did not start: {failure[0]}", failure[1])
            ran = self._clock.monotonic() - began
            self._crashes, delay = after_crash(self._policy, self._crashes, ran_seconds=ran)
            on_crash(f"{self.spec.name} ended ({failure[0]}); it starts again in {delay:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to stop, and kill its process group if it has not in time. Idempotent."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_seconds)
        except TimeoutError:
            _LOG.warning("%s did not stop within %.0f s and is killed", self.spec.name, grace_seconds)
            self._kill_group(process.pid)
            await process.wait()

    async def _live(self, on_ready: Callable[[Ready], None]) -> tuple[str, int]:
        """Run one process to its end; return why it ended and its exit code."""
        reading, writing = os.pipe()
        try:
            process = await self._spawn(writing)
        except BaseException as problem:
            os.close(reading)
            if isinstance(problem, OSError):
                return f"it cannot be started: {problem}", 1
            raise
        finally:
            os.close(writing)
        self._process = process
        self.starts += 1
        if self._stopping.is_set():  # stop() came while the process was being made
            process.terminate()
        try:
            said = await self._follow(reading, on_ready)
            code = await process.wait()
        except asyncio.CancelledError:
            self._kill_group(process.pid)
            raise
        finally:
            self.ready.clear()
        # What it started and did not stop must not outlive it: ports would stay taken.
        self._kill_group(process.pid)
        if said is not None:
            return said.message, said.exit_code
        return f"{_describe_exit(code)}; its last words: {self._tail()}", 1

    async def _spawn(self, status_fd: int) -> asyncio.subprocess.Process:
        spec = self.spec
        config_path = spec.run_dir / f"{spec.name}.yaml"
        config_reader.write_file(config_path, spec.config)
        with spec.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "localmesh.app", spec.role, "--config", str(config_path)),
                *("--status-fd", str(status_fd), "--parent-pid", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(status_fd,),
                start_new_session=True,
                env=config_reader.child_environment(),
            )

    async def _follow(self, fd: int, on_ready: Callable[[Ready], None]) -> Failed | None:
        """Read status lines until the process closes its end."""
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(fd, "rb", buffering=0)
        )
        failure = None
        try:
            async for line in stream:
                match parse_line(line):
                    case Ready() as ready:
                        self._served(ready)
                        on_ready(ready)
                    case Failed() as failed:
                        failure = failed
        finally:
            transport.close()
        return failure

    def _served(self, ready: Ready) -> None:
        if self.address is None:
            # The next life takes the same port, so that whoever knows the address finds it again.
            self.spec = replace(self.spec, config=_pin(self.spec, ready.port))
        self.address = ready
        self.ready.set()

    def _kill_group(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def _tail(self) -> str:
        try:
            data = self.spec.log_path.read_bytes()[-_TAIL_BYTES:]
        except OSError:
            data = b""
        lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "none"


def _pin(spec: ChildSpec, port: int) -> Config:
    section = getattr(spec.config, spec.role)
    host = section.listen.rpartition(":")[0]
    return replace(spec.config, **{spec.role: replace(section, listen=f"{host}:{port}")})


def _describe_exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
