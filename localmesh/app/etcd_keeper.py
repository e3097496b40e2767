"""The etcd that `up` runs: found, started, and started again when it dies."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from localmesh.app.children import StartFailed
from localmesh.app.restart import Crashes, RestartPolicy, after_crash
from localmesh.core.clock import Clock
from localmesh.etcd import EtcdBinary, EtcdServer, ServerStartError, find_etcd

_LOG = logging.getLogger(__name__)


class EtcdKeeper:
    """Keeps one etcd alive on one port.

    A durable binary goes on with its data folder. Any other starts empty each time, also after a crash: the registry
    then fills it from its folder of desired state, and the workers register again.
    """

    def __init__(
        self, *, binary: Path | None, data_dir: Path, run_dir: Path, log_path: Path, throw_away: bool, clock: Clock
    ) -> None:
        self._explicit = str(binary) if binary is not None else None
        self._data_dir = data_dir
        self._run_dir = run_dir
        self._log_path = log_path
        self._throw_away = throw_away
        self._clock = clock
        self._policy = RestartPolicy()
        self._server: EtcdServer | None = None
        self._binary: EtcdBinary | None = None
        self._port = 0
        self.starts = 0
        """How often it was started."""

    @property
    def binary(self) -> EtcdBinary:
        """The binary, once started."""
        if self._binary is None:
            raise RuntimeError("etcd is not started")
        return self._binary

    @property
    def durable(self) -> bool:
        """Whether its data lasts."""
        return self.binary.durable and not self._throw_away

    @property
    def endpoint(self) -> str:
        """Its client address, once started."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Its process, 0 between two lives."""
        process = self._server.process if self._server is not None else None
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        """Start it for the first time.

        Raises:
            StartFailed: There is no binary, or it does not start.
        """
        try:
            self._binary = await asyncio.to_thread(find_etcd, self._explicit)
            if self.durable:
                self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            await self._start_server()
        except ServerStartError as problem:
            raise StartFailed(f"etcd cannot start: {problem}") from problem

    async def run(self, on_crash: Callable[[str], None]) -> None:
        """Start it again whenever it ends, until cancelled."""
        crashes = Crashes()
        while True:
            began = self._clock.monotonic()
            code = await self._server.process.wait() if self._server is not None else None
            await self._stop_server()
            ran = self._clock.monotonic() - began
            crashes, delay = after_crash(self._policy, crashes, ran_seconds=ran)
            how = "with its data" if self.durable else "empty"
            on_crash(f"etcd ended (exit code {code}); it starts again, {how}, in {delay:.1f} s")
            await asyncio.sleep(delay)
            try:
                await self._start_server()
            except ServerStartError as problem:
                _LOG.warning("etcd does not start again: %s", problem)

    async def stop(self) -> None:
        """Stop it. `run` must have been cancelled before."""
        await self._stop_server()

    async def _start_server(self) -> None:
        server = EtcdServer(
            self.binary,
            data_dir=self._data_dir if self.durable else None,
            port=self._port,
            log_path=self._log_path,
            temporary_parent=self._run_dir,
            clock=self._clock,
        )
        await server.start()
        self._server, self._port = server, server.port
        self.starts += 1

    async def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop()
