"""The life of a replica process: listen, load, serve, drain, end."""

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

from localmesh.core.clock import Clock
from localmesh.core.errors import EngineFailed, InternalError, MeshError
from localmesh.core.replica_process import (
    FailedEvent,
    ListeningEvent,
    LoadEvent,
    PhaseEvent,
    ReadyEvent,
    ReplicaSpecFile,
)
from localmesh.replica.admission import Admission
from localmesh.replica.engines.base import Engine
from localmesh.replica.engines.create import create_engine
from localmesh.replica.memory import own_memory_bytes
from localmesh.replica.race import first_of
from localmesh.replica.served_by import ServedBy
from localmesh.replica.services import add_services
from localmesh.replica.status import StatusWriter
from localmesh.rpc.errors import ListenFailed
from localmesh.rpc.identity import replica_policy
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.rpc.tls import TlsFiles

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_REQUESTS_PER_SLOT = 16
_LOAD_EVENT_SECONDS = 1.0
_PHASE_SECONDS = 0.2
_MEMORY_SECONDS = 10.0
_MEMORY_CHANGE = 0.05
_CANCEL_SECONDS = 0.5
"""For calls that are still running after the drain: they are cancelled, and told so."""
_STOP_SECONDS = 8.0
"""An engine's own stop takes less."""
_HARD_EXIT_SECONDS = 3.0
"""After the drain and the engine's stop: by then the process is gone, whatever native code does."""


def die_with(parent_pid: int) -> bool:
    """Have this process receive SIGTERM when the thread that started it ends.

    Returns:
        Whether the parent is still the one expected; if not, it has died before this call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent_pid


def limit_of(file: ReplicaSpecFile) -> int:
    """Return how many requests the replica accepts at once."""
    return file.spec.max_concurrent_requests or _REQUESTS_PER_SLOT * max(1, file.spec.slots)


class ReplicaProcess:
    """One replica, from start to end, on the running loop."""

    def __init__(self, file: ReplicaSpecFile, status: StatusWriter, clock: Clock) -> None:
        self._file = file
        self._status = status
        self._clock = clock
        self._admission = Admission(file.replica, file.revision, limit_of(file))
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._admission.on_change(self._changed.set)
        self._phase = ""
        self._phase_told = 0.0

    def request_stop(self) -> None:
        """Begin the end: no new request, running ones finish within the limit. A load is abandoned."""
        self._stopping.set()

    async def run(self) -> int:
        """Live.

        Returns:
            The exit code: 0 after a stop that was asked for, 1 after a failure, of which the worker was told.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        self._status.send(PhaseEvent(phase="starting"))
        try:
            engine = create_engine(self._file, self._admission.limit, self._clock)
            try:
                return await self._serve(engine)
            finally:
                await engine.stop()
        except ListenFailed as error:
            reason = "PORT_IN_USE" if "port" in error.metadata else error.reason
            return self._failed(reason, error.message)
        except MeshError as error:
            return self._failed(error.reason, error.message)
        except Exception as error:  # noqa: BLE001 - the process's edge: the worker is told, the log has the traceback
            _log.error("the replica failed", exc_info=error)
            return self._failed(InternalError.reason, f"{type(error).__name__}: {error}")

    def _on_signal(self) -> None:
        # a watchdog in C: it ends the process even when native code holds the interpreter
        seconds = self._file.drain_seconds + _STOP_SECONDS + _HARD_EXIT_SECONDS
        with suppress(ValueError, RuntimeError, OSError):  # stderr may be no real file
            faulthandler.dump_traceback_later(seconds, exit=True)
        self.request_stop()

    def _failed(self, reason: str, message: str) -> int:
        if self._stopping.is_set():
            return 0  # it was to end anyway; what broke on the way is no news
        _log.error("%s: %s", reason, message)
        self._status.send(FailedEvent(reason=reason, message=message))
        return 1

    async def _serve(self, engine: Engine) -> int:
        file = self._file
        server = GrpcServer(
            _server_config(file),
            name=f"replica {file.replica}",
            interceptors=(ServedBy(file.replica),) if file.served_by_trailers else (),
            identity_policy=replica_policy(file.mesh),
        )
        add_services(
            server,
            engine=engine,
            admission=self._admission,
            spec=file.spec,
            clock=self._clock,
        )
        await server.start(serving=False)
        try:
            self._status.send(ListeningEvent(endpoint=server.endpoint))
            if await first_of(engine.load(self._report), self._stopping.wait()) == 0:
                await self._live(engine, server)
            return 0
        finally:
            self._admission.drain()
            await server.stop(_CANCEL_SECONDS)

    def _report(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = self._clock.monotonic()
        if phase == self._phase and now < self._phase_told + _PHASE_SECONDS and done_bytes < total_bytes:
            return
        self._phase, self._phase_told = phase, now
        self._status.send(PhaseEvent(phase=phase, done_bytes=done_bytes, total_bytes=total_bytes))

    async def _live(self, engine: Engine, server: GrpcServer) -> None:
        """Serve until told to stop, then let what runs finish within the limit."""
        memory = await asyncio.to_thread(own_memory_bytes)
        self._admission.open()
        for service in server.health.serving:
            server.health.set_serving(service, True)
        self._status.send(ReadyEvent(endpoint=server.endpoint, limit=self._admission.limit, memory_bytes=memory))
        ended = await first_of(self._stopping.wait(), engine.lost(), self._tell_load(memory))
        if ended != 0:
            raise EngineFailed(f"the engine died: {await engine.lost()}", engine=engine.name)
        server.health.close()
        self._admission.drain()
        _log.info("stopping: %d requests are running", self._admission.in_flight)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._file.drain_seconds):
                await first_of(self._admission.idle(), engine.lost(), self._tell_load(memory))

    async def _tell_load(self, memory: int) -> None:
        """Tell the worker the running requests and the memory when they have changed, once a second at most."""
        told = (0, memory)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_MEMORY_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            memory = await asyncio.to_thread(own_memory_bytes)
            if abs(memory - told[1]) < told[1] * _MEMORY_CHANGE:
                memory = told[1]
            now = (self._admission.in_flight, memory)
            if now != told:
                self._status.send(LoadEvent(in_flight=now[0], memory_bytes=now[1]))
                told = now
            await asyncio.sleep(_LOAD_EVENT_SECONDS)


def _server_config(file: ReplicaSpecFile) -> ServerConfig:
    tls = file.tls
    return ServerConfig(
        listen=file.listen,
        tls=None if tls is None else TlsFiles(cert=Path(tls.cert), key=Path(tls.key), ca=Path(tls.ca)),
        insecure=file.insecure,
        max_message_bytes=file.max_message_bytes,
        drain_seconds=file.drain_seconds,
        advertise=file.advertise_host,
    )
