"""A whole mesh on this machine: etcd, registry, router and workers as child processes, started and stopped in order."""

import asyncio
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from localmesh.app import reach, running
from localmesh.app.certificates import Certificates
from localmesh.app.children import Child, ChildSpec, StartFailed
from localmesh.app.config import ENROLMENT_PORT, Config, TlsSection
from localmesh.app.etcd_keeper import EtcdKeeper
from localmesh.app.lifeline import Ready
from localmesh.app.names import node_name_of_host, worker_folder
from localmesh.app.running import RunningMesh
from localmesh.core.clock import Clock, SystemClock
from localmesh.etcd.tasks import TaskOwner
from localmesh.rpc.addresses import join_host_port, split_host_port

_READY_SECONDS = 60.0
_KILL_SECONDS = 15.0
"""More than a worker takes to kill replicas that do not end in time."""


class Household:
    """Runs the mesh that a configuration describes. An async context manager: entered, all of it serves.

    Every crashed process is started again. Leaving stops router, workers, registry and etcd, in this order, and removes
    what was temporary. Tasks are its own: it may be left by another task than the one that entered it.
    """

    def __init__(
        self,
        config: Config,
        *,
        say: Callable[[str], None] = lambda _: None,
        throw_away_etcd: bool = False,
        node_names: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        """Prepare it.

        Args:
            config: The configuration of `up`.
            say: Told a sentence when something is started again.
            throw_away_etcd: Never keep etcd's data.
            node_names: Names of the workers; the host's name and a number where they are missing.
            clock: Time.
        """
        self.config = config
        self.etcd: EtcdKeeper | None = None
        """The etcd that runs here; None where another one is used."""
        self.registry: Child | None = None
        self.router: Child | None = None
        self.workers: list[Child] = []
        self.certificates: Certificates | None = None
        self._say = say
        self._throw_away_etcd = throw_away_etcd
        self._node_names = tuple(node_names)
        self._clock = clock or SystemClock()
        self._tasks = TaskOwner()
        self._host = ""
        self._lock: int | None = None
        self._failure: asyncio.Future[None] | None = None
        self._join_token = ""

    @property
    def children(self) -> list[Child]:
        """All processes but etcd."""
        return [child for child in (self.registry, self.router, *self.workers) if child is not None]

    @property
    def join_line(self) -> str:
        """The command that makes another machine a node; empty where no other may come in."""
        return f"localmesh worker --join {self._join_token}" if self._join_token else ""

    @property
    def log_dir(self) -> Path:
        """Folder of the processes' output."""
        return self.config.state_dir / "logs"

    @property
    def _run_dir(self) -> Path:
        return self.config.state_dir / "up"

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """Where the store is."""
        return (self.etcd.endpoint,) if self.etcd is not None else self.config.etcd.endpoints

    async def __aenter__(self) -> Self:
        """Start everything and wait until it serves.

        Raises:
            StartFailed: Something does not start; nothing is left behind.
            ConfigError: What it shall listen on cannot be used.
        """
        self._failure = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._start()
        except TimeoutError:
            waiting = ", ".join(c.spec.name for c in self.children if not c.ready.is_set()) or "etcd"
            await self.stop()
            raise StartFailed(
                f"{waiting} did not become ready within {_READY_SECONDS:.0f} s; its output is in {self.log_dir}"
            ) from None
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        await self.stop()

    async def stop(self) -> None:
        """Stop everything, in order. Idempotent."""
        grace = self.config.drain_seconds + _KILL_SECONDS
        running.remove(self.config.state_dir) if self._lock is not None else None
        for group in ((self.router,), self.workers, (self.registry,)):
            await asyncio.gather(*(child.stop(grace) for child in group if child is not None))
        await self._tasks.close()
        if self.etcd is not None:
            await self.etcd.stop()
        if self._failure is not None and self._failure.done():
            self._failure.exception()  # it was raised already, or is of no interest any more
        if self._lock is not None:
            await asyncio.to_thread(shutil.rmtree, self._run_dir, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    async def _start(self) -> None:
        if self.config.up.listen:
            self._host = reach.listen_host(self.config)
        config = self.config
        self._prepare_folders()
        if config.up.listen:
            self.certificates = await asyncio.to_thread(Certificates.open, config.state_dir, config.mesh)
        if not config.etcd.endpoints:
            await self._start_etcd()
        self.registry = self._child("registry", self._registry_config())
        self.router = self._child("router", self._router_config())
        await self._ready(self.registry, self.router)
        for number in range(config.up.workers):
            self.workers.append(self._child(f"worker-{number}", self._worker_config(number), role="worker"))
        await self._ready(*self.workers)
        running.write(config.state_dir, self._running())

    def _prepare_folders(self) -> None:
        state = self.config.state_dir
        try:
            for folder in (state, self.log_dir, state / "desired"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.config.models_folder, self.config.backends_folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._take_lock(state / "up.lock")
            shutil.rmtree(self._run_dir, ignore_errors=True)  # of one that was killed
            self._run_dir.mkdir(mode=0o700)
        except OSError as problem:
            raise StartFailed(f"cannot use {problem.filename}: {problem.strerror}. Name another --state-dir.") from None

    def _take_lock(self, path: Path) -> None:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StartFailed(
                f"a mesh already runs with its state in {path.parent}: stop it first, or name another --state-dir."
            ) from None
        self._lock = lock

    async def _start_etcd(self) -> None:
        config = self.config
        self.etcd = EtcdKeeper(
            binary=config.etcd.bin,
            data_dir=config.etcd_folder,
            run_dir=self._run_dir,
            log_path=self.log_dir / "etcd.log",
            throw_away=self._throw_away_etcd,
            clock=self._clock,
        )
        await self.etcd.start()
        if not self.etcd.durable and not self._throw_away_etcd:
            self._say(self.etcd.binary.warning)
        self._tasks.start(self.etcd.run(self._say), "etcd")

    def _child(self, name: str, config: Config, *, role: str = "") -> Child:
        spec = ChildSpec(name=name, role=role or name, config=config, run_dir=self._run_dir, log_dir=self.log_dir)
        child = Child(spec, self._clock)
        self._tasks.start(self._keep(child), name)
        return child

    async def _keep(self, child: Child) -> None:
        try:
            await child.run(on_ready=self._noticed, on_crash=self._say)
        except StartFailed as problem:
            if self._failure is not None and not self._failure.done():
                self._failure.set_exception(problem)

    def _noticed(self, ready: Ready) -> None:
        """Say it when the token for other machines is another one: it ends with the registry's process."""
        if ready.join_token:
            if self._join_token:
                self._say(f"the line for other machines has changed: localmesh worker --join {ready.join_token}")
            self._join_token = ready.join_token

    async def _ready(self, *children: Child) -> None:
        """Wait until all serve, or one of all children fails at its start."""
        assert self._failure is not None  # noqa: S101 - set when entered
        everyone = asyncio.gather(*(child.ready.wait() for child in children))
        try:
            await asyncio.wait((everyone, self._failure), return_when=asyncio.FIRST_COMPLETED)
        finally:
            everyone.cancel()
            await asyncio.wait((everyone,))
            _ = everyone.cancelled() or everyone.exception()
        if self._failure.done():
            self._failure.result()

    def _base(self) -> Config:
        etcd = replace(self.config.etcd, endpoints=self.etcd_endpoints)
        return replace(
            self.config,
            etcd=etcd,
            models_dir=self.config.models_folder,
            backends_dir=self.config.backends_folder,
        )

    def _tls(self, role: str, name: str) -> TlsSection:
        if self.certificates is None:
            return self.config.tls
        hosts = reach.names(self.config, self._host)
        if role == "node":
            return self.certificates.issue_node(worker_folder(self.config.state_dir, name), name, hosts)
        return self.certificates.issue(role, name, hosts)

    def _registry_config(self) -> Config:
        base = self._base()
        registry = replace(base.registry, desired_dir=self._desired_dir())
        if self.config.up.listen:
            registry = replace(
                registry,
                listen=_on(self._host, registry.listen),
                enrolment_listen=registry.enrolment_listen or join_host_port(self._host, ENROLMENT_PORT),
                ca_dir=self.config.state_dir / "ca",
            )
        return replace(base, tls=self._tls("registry", "registry"), registry=registry)

    def _desired_dir(self) -> Path | None:
        if self.config.registry.desired_dir is not None:
            return self.config.registry.desired_dir
        # With data that lasts, etcd alone is the truth: a second copy could only disagree.
        return None if self.etcd is None or self.etcd.durable else self.config.state_dir / "desired"

    def _router_config(self) -> Config:
        base = self._base()
        router = base.router
        if self.config.up.listen:
            router = replace(router, listen=_on(self._host, router.listen))
        return replace(base, tls=self._tls("router", router.name or socket.gethostname()), router=router)

    def _worker_config(self, number: int) -> Config:
        base = self._base()
        assert self.registry is not None  # noqa: S101 - workers start after the registry
        assert self.registry.address is not None  # noqa: S101 - which is ready by then
        name = self._node_name(number)
        token = base.worker.join_token or base.registry.join_token
        registries = (self.registry.address.endpoint,)
        worker = replace(base.worker, name=name, registries=registries, join="", join_token=token)
        if self.config.up.listen:
            worker = replace(worker, listen=_on(self._host, worker.listen))
        return replace(base, tls=self._tls("node", name), worker=worker)

    def _node_name(self, number: int) -> str:
        if number < len(self._node_names):
            return self._node_names[number]
        return node_name_of_host(self.config.worker.name or socket.gethostname(), f"-{number}")

    def _running(self) -> RunningMesh:
        assert self.registry is not None  # noqa: S101 - all is ready
        assert self.router is not None  # noqa: S101 - all is ready
        assert self.registry.address is not None  # noqa: S101 - all is ready
        assert self.router.address is not None  # noqa: S101 - all is ready
        pid = os.getpid()
        tls = self._tls("operator", "operator")
        return RunningMesh(
            pid=pid,
            started=running.process_started(pid),
            mesh=self.config.mesh,
            router=self.router.address.endpoint,
            registry=self.registry.address.endpoint,
            etcd=",".join(self.etcd_endpoints),
            tls_cert=str(tls.cert or ""),
            tls_key=str(tls.key or ""),
            tls_ca=str(tls.ca or ""),
        )


def _on(address: str, listen: str) -> str:
    """Return a listening address moved to another address of this machine, with its port."""
    return join_host_port(address, split_host_port(listen)[1])
