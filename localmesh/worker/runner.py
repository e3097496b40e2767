"""Starts and ends replica processes. One task for each process, from the lookup of its files to its confirmed end."""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from localmesh.core.clock import Clock
from localmesh.core.errors import MeshError
from localmesh.core.ids import CPU, DeviceId, ReplicaId
from localmesh.core.replica_process import LoadEvent, ReadyEvent, StatusEvent, parse_status
from localmesh.rpc.errors import ConfigError
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Event, Exited, Said, Spawned, Start, StartFailed, Stop, StopAsked
from localmesh.worker.launch import (
    ReplicaFolder,
    command,
    folder_of,
    port_is_free,
    replica_environment,
    spec_file,
)
from localmesh.worker.logbook import LogBook
from localmesh.worker.logs import ReplicaLog
from localmesh.worker.ports import PortAllocator
from localmesh.worker.processes import ExitWatch, belonging, command_line, kill_belonging, read_stat
from localmesh.worker.sources import CatalogItem, SourceProblem, facts, resolve

_log = logging.getLogger(__name__)
LAST_LINES_BYTES = 4096
_LINE_BYTES = 64 << 10
_HASTY_SECONDS = 5.0
"""What a process gets that has nothing to finish."""
_EXTRA_SECONDS = 5.0
"""On top of the time to drain, for the rest of a process's end."""

GpuBytes = Callable[[Iterable[int]], Mapping[DeviceId, int]]
"""Returns the GPU memory that processes use. Called in a thread."""


class StatusPipe:
    """The reading end of a replica's status events. Never blocks; a line that is too long is dropped."""

    def __init__(self, fd: int, *, on_data: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._on_data = on_data
        self._rest = b""
        self._lines: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def take(self) -> list[bytes]:
        """Return the lines that have come, oldest first."""
        taken = list(self._lines)
        self._lines.clear()
        return taken

    def close(self) -> None:
        """Read what is left and stop. Others may hold the writing end still: that does not matter."""
        if self._fd >= 0:
            while self._read():
                pass
            self._forget()

    def _readable(self) -> None:
        self._read()
        self._on_data()

    def _read(self) -> bool:
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, _LINE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._forget()
            return False
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(line for line in whole if line)
        if len(self._rest) > _LINE_BYTES:
            self._rest = b""
        return True

    def _forget(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1


class _Life:
    """One process of a replica, from the order to start it on."""

    def __init__(self, start: Start, folder: ReplicaFolder, log: ReplicaLog) -> None:
        self.start = start
        self.folder = folder
        self.log = log
        self.pid = 0
        self.preparing: asyncio.Future[tuple[Path | None, int]] | None = None
        self.stop: Stop | None = None
        self.wake = asyncio.Event()


class Runner:
    """Runs the processes of a worker.

    Args:
        config: The worker.
        clock: Time for the rest of ports.
        on_event: Told what happens: Spawned, Said and Exited in this order, or StartFailed alone.
        gpu_bytes: Measures GPU memory.
    """

    def __init__(
        self, config: WorkerConfig, *, clock: Clock, on_event: Callable[[Event], None], gpu_bytes: GpuBytes
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_event = on_event
        self._gpu_bytes = gpu_bytes
        self._group: asyncio.TaskGroup | None = None
        self._lives: dict[ReplicaId, _Life] = {}
        self._held_back: set[str] = set()
        self._life_ended = asyncio.Event()
        self.logs = LogBook(
            clock=clock,
            limit_bytes=config.log_bytes,
            kept_lives=config.kept_logs,
            kept_bytes=config.kept_log_bytes,
        )
        """All output on this node."""
        host = config.replica_listen_host
        self._ports = PortAllocator(config.replica_ports, is_free=lambda port: port_is_free(host, port))
        self._lock_fd = -1

    async def open(self) -> None:
        """Take the run folder and end what an earlier worker left running in it.

        Raises:
            ConfigError: Another worker has it.
            OSError: It cannot be used.
        """
        self._config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._config.run_dir / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"another worker uses the folder {self._config.run_dir}: stop it, or give this one a run folder of its"
                " own",
                field="run_dir",
            ) from error
        self._lock_fd = fd
        folders = await sweep(self._config.run_dir)
        await asyncio.to_thread(self.logs.adopt, [folder.path for folder in folders])

    def close(self) -> None:
        """Give the run folder up."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def run(self, until: asyncio.Event) -> None:
        """Own the processes until the event is set and all have ended. Cancelled, kill them at once."""
        async with asyncio.TaskGroup() as keepers:
            looking = keepers.create_task(self.logs.run(), name="output")
            async with asyncio.TaskGroup() as group:
                self._group = group
                await until.wait()
            self._group = None
            looking.cancel()

    def start(self, order: Start) -> None:
        """Start a replica's process. What comes of it is told to `on_event`."""
        if self._group is None or order.id in self._lives:
            raise AssertionError(f"{order.id}: started twice, or while the runner does not run")
        folder = folder_of(self._config.run_dir.absolute(), order.id)
        life = _Life(order, folder, self.logs.begin(order.id, folder.path))
        self._lives[order.id] = life
        self._group.create_task(self._live(life), name=f"replica {order.id}")

    def stop(self, order: Stop) -> None:
        """End a replica's process, or the preparation of it."""
        life = self._lives.get(order.id)
        if life is not None and life.stop is None:
            life.stop = order
            if life.preparing is not None:
                life.preparing.cancel()
            life.wake.set()

    def users(self, backend: str) -> frozenset[ReplicaId]:
        """Return the replicas with a process of the foreign backend of that name."""
        return frozenset(i for i, x in self._lives.items() if x.pid and x.start.spec.backend == f"process:{backend}")

    @contextlib.contextmanager
    def held_back(self, backend: str) -> Iterator[None]:
        """Let no process of the foreign backend start meanwhile: those that are wanted wait."""
        self._held_back.add(f"process:{backend}")
        try:
            yield
        finally:
            self._held_back.discard(f"process:{backend}")
            for life in self._lives.values():
                life.wake.set()

    async def vacate(self, backend: str, why: str) -> frozenset[ReplicaId]:
        """Let the replicas of a foreign backend stop, and return which when their processes are gone."""
        stopped: frozenset[ReplicaId] = frozenset()
        while found := self.users(backend):
            ended = self._life_ended
            if found - stopped:
                self._on_event(StopAsked(ids=found, message=why))
                stopped |= found
            await ended.wait()
        return stopped

    async def _live(self, life: _Life) -> None:
        try:
            event = await self._whole_life(life)
        except Exception as error:  # noqa: BLE001 - a fault with one replica must not end the others
            _log.exception("%s: lost track of its process", life.start.id)
            event = StartFailed(id=life.start.id, reason="INTERNAL", message=f"the worker failed: {error}")
        finally:
            self.logs.end(life.log)
            del self._lives[life.start.id]
            self._life_ended.set()
            self._life_ended = asyncio.Event()
        self._on_event(event)

    async def _whole_life(self, life: _Life) -> Event:
        replica, port, private = life.start.id, 0, None
        try:
            try:
                source, weights = await self._prepare(life)
                port = self._ports.take(now=self._clock.monotonic())
                private = life.folder.prepare()
                process, status = self._spawn(life, source=source, port=port, private=private)
            except _StoppedEarly:
                return StartFailed(id=replica, reason="", message="stopped before it began")
            except SourceProblem as problem:
                return StartFailed(id=replica, reason="SOURCE_MISSING", message=str(problem))
            except MeshError as error:
                return StartFailed(id=replica, reason=error.reason, message=error.message)
            except OSError as error:
                return StartFailed(id=replica, reason="LOAD_FAILED", message=f"its process cannot be started: {error}")
            try:
                self._on_event(Spawned(id=replica, pid=process.pid, weights_bytes=weights))
                await self._attend(life, status)
            finally:
                returncode = await self._bury(life, process, status)
            await self._hear(life, status)
            last_lines = life.log.last_lines(LAST_LINES_BYTES)
            return Exited(id=replica, returncode=returncode, last_lines=last_lines)
        finally:
            self._ports.give_back(port, now=self._clock.monotonic())
            life.folder.clear(private)

    async def _prepare(self, life: _Life) -> tuple[Path | None, int]:
        """Return the model's file and its size.

        Raises:
            _StoppedEarly: The replica is not wanted any more.
        """
        loop = asyncio.get_running_loop()
        life.preparing = loop.run_in_executor(None, _look_up, life.start, self._config.models_dir)
        try:
            if life.stop is not None:
                raise _StoppedEarly
            found = await life.preparing
        except asyncio.CancelledError:
            if life.stop is None:
                raise
            raise _StoppedEarly from None
        finally:
            life.preparing = None
        while life.start.spec.backend in self._held_back and life.stop is None:
            await life.wake.wait()
            life.wake.clear()
        if life.stop is not None:
            raise _StoppedEarly
        return found

    def _spawn(
        self, life: _Life, *, source: Path | None, port: int, private: Path
    ) -> tuple["subprocess.Popen[bytes]", StatusPipe]:
        """Start the process. In the loop's own thread: a process ends with the thread that started it (PDEATHSIG)."""
        folder, config = life.folder, self._config
        spec = spec_file(config, life.start, source=source, port=port, private=private, pid=os.getpid())
        config.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.spec.unlink(missing_ok=True)
        with os.fdopen(os.open(folder.spec, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(spec.to_json())
        reading, writing = os.pipe()
        output = life.log.open()
        try:
            process = subprocess.Popen(
                command(config, spec=folder.spec, status_fd=writing),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=replica_environment(config.environment, folder=folder, devices=life.start.devices),
                process_group=0,
                pass_fds=(writing,),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(output)
            os.close(writing)
        life.pid = process.pid
        _log.info("%s: process %d starts", life.start.id, process.pid)
        stat = read_stat(process.pid)
        folder.write_record(pid=process.pid, start_ticks=stat.start_ticks if stat else 0, private=private)
        return process, StatusPipe(reading, on_data=life.wake.set)

    async def _attend(self, life: _Life, status: StatusPipe) -> None:
        """Listen to a process until it has ended, and end it when told."""
        loop = asyncio.get_running_loop()
        kill: asyncio.TimerHandle | None = None
        with ExitWatch(life.pid, on_exit=life.wake.set) as watch, contextlib.ExitStack() as stack:
            while not watch.exited.is_set():
                await life.wake.wait()
                life.wake.clear()
                await self._hear(life, status)
                if life.stop is not None and kill is None:
                    grace = self._config.drain_seconds + _EXTRA_SECONDS if life.stop.drain else _HASTY_SECONDS
                    # it alone: helpers of its group may be needed to finish what runs
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(life.pid, signal.SIGTERM)
                    kill = loop.call_later(grace, _signal_group, life.pid, signal.SIGKILL)
                    stack.callback(kill.cancel)

    async def _bury(self, life: _Life, process: "subprocess.Popen[bytes]", status: StatusPipe) -> int:
        """Kill what is left of a process and its group, reap it, and return how it ended."""
        _signal_group(life.pid, signal.SIGKILL)
        with ExitWatch(life.pid) as watch:
            await watch.exited.wait()
        if not await kill_belonging(life.folder.path, group=life.pid):
            _log.warning("%s: some of its processes do not die", life.start.id)
        status.close()
        # last, because until now its number, which names the group, could not be given to another
        returncode = process.wait()
        _log.info("%s: process %d has ended (%d)", life.start.id, process.pid, returncode)
        return returncode

    async def _hear(self, life: _Life, status: StatusPipe) -> None:
        for line in status.take():
            try:
                event = parse_status(line)
            except ValueError as error:
                _log.warning("%s: %s", life.start.id, error)
                continue
            self._on_event(Said(id=life.start.id, event=event, measured=await self._measure(life, event)))

    async def _measure(self, life: _Life, event: StatusEvent) -> Mapping[DeviceId, int]:
        if not isinstance(event, ReadyEvent | LoadEvent):
            return {}
        devices = life.start.devices
        found = {CPU: event.memory_bytes} if CPU in devices and event.memory_bytes else {}
        if any(d != CPU for d in devices):
            used = await asyncio.to_thread(self._gpu_bytes_of, life)
            found |= {d: n for d, n in used.items() if d in devices}
        return found

    def _gpu_bytes_of(self, life: _Life) -> Mapping[DeviceId, int]:
        return self._gpu_bytes(stat.pid for stat in belonging(life.folder.path, group=life.pid))


class _StoppedEarly(Exception):
    """The replica was stopped before its process was started."""


def _look_up(start: Start, models_dir: Path) -> tuple[Path | None, int]:
    source = resolve(start.spec, models_dir=models_dir)
    record = facts(CatalogItem(revision=start.revision, spec=start.spec), models_dir=models_dir)
    if not record.present:
        raise SourceProblem(record.problem, path=record.path)
    return source, record.weights_bytes


def _signal_group(group: int, number: signal.Signals) -> None:
    # its leader is our child and not reaped: the number is still its own
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


async def sweep(run_dir: Path) -> list[ReplicaFolder]:
    """End the processes that an earlier worker left behind in a run folder, and remove their files but the output.

    Returns:
        The folders of its replicas.
    """
    try:
        folders = [ReplicaFolder(path=p) for p in (run_dir.absolute() / "replicas").iterdir() if p.is_dir()]
    except OSError:
        return []
    for folder in folders:
        pid, start_ticks, private = folder.read_record()
        stat = read_stat(pid) if pid else None
        # a number alone proves nothing: others may have been given it since
        same = stat is not None and stat.start_ticks == start_ticks and str(folder.spec) in command_line(pid)
        if not await kill_belonging(folder.path, group=pid if same else 0):
            _log.warning("%s: processes of an earlier worker do not die", folder.path)
        folder.clear(private)
    return folders
