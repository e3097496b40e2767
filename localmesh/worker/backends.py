"""Installs, upgrades and deletes the foreign backends of this node, one change of each at a time."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum, unique
from pathlib import Path
from typing import Protocol, Self

from localmesh.core.clock import Clock
from localmesh.core.errors import (
    BackendExists,
    BackendInstallFailed,
    BackendInUse,
    BackendInvalid,
    BackendNotFound,
    InternalError,
    InvalidRequest,
    MeshError,
)
from localmesh.core.ids import ReplicaId
from localmesh.worker import pip_install, unpack
from localmesh.worker.backend_folder import BackendFolder, Manifest
from localmesh.worker.config import WorkerConfig
from localmesh.worker.pip_install import PipRequest

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@unique
class Phase(Enum):
    """What is being done."""

    WAITING = 1
    UPLOADING = 2
    UNPACKING = 3
    INSTALLING = 4
    STOPPING = 5
    SWITCHING = 6
    DONE = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a change is."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A folder on this node."""

    path: Path

    def __str__(self) -> str:
        """Return it in words."""
        return f"folder {self.path}"


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """An archive on this node; one that was uploaded is deleted when it is done with."""

    path: Path | None = field(compare=False)
    """None while it is uploaded."""
    sha256: str
    uploaded: bool = False

    def __str__(self) -> str:
        """Return it in words."""
        return "uploaded archive" if self.uploaded else f"archive {self.path}"


@dataclass(frozen=True, slots=True)
class Order:
    """What to install. Two orders that are equal are the same install."""

    name: str
    source: DirectorySource | ArchiveSource | PipRequest
    upgrade: bool

    def check(self) -> None:
        """Check that it can be carried out.

        Raises:
            InvalidRequest: It cannot.
            BackendInvalid: The source cannot be one.
        """
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"not a name of a backend: {self.name!r} (1 to 63 of letters, digits, '.', '_', '-', the first a letter"
                " or digit)",
                field="order.name",
            )
        source = self.source
        if isinstance(source, PipRequest):
            source.check()
        elif isinstance(source, ArchiveSource) and not _SHA256.fullmatch(source.sha256):
            raise InvalidRequest(
                "sha256 must be the archive's SHA-256, 64 hexadecimal digits", field="order.source.archive.sha256"
            )
        if isinstance(source, DirectorySource | ArchiveSource) and source.path and not source.path.is_absolute():
            raise InvalidRequest(f"not an absolute path: {source.path}", field="order.source")

    @property
    def sha256(self) -> str:
        """Of what is to be installed; empty where that is not known before it is read."""
        return "" if isinstance(self.source, DirectorySource) else self.source.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What came of an order."""

    manifest: Manifest
    unchanged: bool = False
    stopped: tuple[ReplicaId, ...] = ()


class Operation:
    """An order being carried out, watched by any number of callers."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.result: Installed | None = None
        self.error: MeshError | None = None
        self._progress = Progress(phase=Phase.WAITING)
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.result is not None or self.error is not None

    def tell(self, progress: Progress) -> None:
        """Say how far it is."""
        self._progress = progress
        self._wake()

    def end(self, outcome: Installed | MeshError) -> None:
        """Say what came of it."""
        if isinstance(outcome, Installed):
            self.result = outcome
        else:
            self.error = outcome
        self._wake()

    async def watch(self) -> AsyncGenerator[Progress, None]:
        """Return how far it is, at once and on changes, until it has ended. Leaving early ends nothing."""
        while not self.done:
            changed = self._changed
            yield self._progress
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Processes(Protocol):
    """The processes that run backends."""

    def users(self, backend: str) -> frozenset[ReplicaId]:
        """Return the replicas with a process of a backend."""
        ...

    def held_back(self, backend: str) -> AbstractContextManager[None]:
        """Keep replicas of a backend from starting meanwhile."""
        ...

    async def vacate(self, backend: str, why: str) -> frozenset[ReplicaId]:
        """Let the replicas of a backend finish what they do and stop; return which when their processes are gone."""
        ...


class Backends:
    """The foreign backends of one node.

    Args:
        config: The worker.
        clock: Time of installs.
        processes: Who runs them.
        changed: Called when there is a backend more, less or another.
    """

    def __init__(
        self, config: WorkerConfig, *, clock: Clock, processes: Processes, changed: Callable[[], Awaitable[None]]
    ) -> None:
        self.folder = BackendFolder(config.installed_dir.absolute(), by_hand=config.backends_dir.absolute())
        self._config = config
        self._limits = unpack.Limits(size_bytes=config.backend_bytes, entries=config.backend_entries)
        self._clock = clock
        self._processes = processes
        self._changed = changed
        self._operations: dict[Order, Operation] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, until: asyncio.Event) -> None:
        """Own what is being done, until the event is set; then give up what is not done."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await until.wait()
            self._group = None
            for task in self._tasks:
                task.cancel()

    def users(self, name: str) -> frozenset[ReplicaId]:
        """Return the replicas that run a backend."""
        return self._processes.users(name)

    def needs_no_upload(self, order: Order) -> bool:
        """Whether an order for an archive has its answer already, or will have it without the caller's bytes."""
        manifest = self.folder.installed(order.name)
        there = not order.upgrade and manifest is not None and manifest.sha256 == order.sha256
        return there or order in self._operations

    def start(self, order: Order) -> Operation:
        """Carry an order out, or join those who wait for the same.

        Raises:
            InvalidRequest: It cannot be carried out.
            BackendInvalid: Its source cannot be one.
        """
        order.check()
        operation = self._operations.get(order)
        if operation is not None or self._group is None:
            _discard(order)
            return operation or _ended(order, BackendInstallFailed("the worker stops", backend=order.name))
        operation = self._operations[order] = Operation(order)
        task = self._group.create_task(self._carry_out(operation), name=f"backend {order.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def delete(self, name: str, *, force: bool) -> frozenset[ReplicaId]:
        """Delete a backend, and return the replicas that were stopped for it.

        Raises:
            BackendNotFound: There is none that was installed.
            BackendInUse: Replicas run it, and `force` is not set.
        """
        async with self.lock(name):
            if self.folder.installed(name) is None:
                raise self._not_found(name)
            with self._processes.held_back(name):
                stopped = self._processes.users(name)
                if stopped and not force:
                    raise self._in_use(name, stopped)
                stopped |= await self._processes.vacate(name, f"its backend {name} is deleted")
                version = self.folder.unlink(name)
                await self._changed()
            await asyncio.to_thread(self.folder.remove, version)
        _log.info("backend %s deleted", name)
        return stopped

    async def _carry_out(self, operation: Operation) -> None:
        order = operation.order
        try:
            async with self.lock(order.name):
                operation.end(await self._install(order, operation.tell))
        except MeshError as error:
            error.metadata = {**error.metadata, "backend": order.name, "node": self._config.node}
            operation.end(error)
        except OSError as error:
            operation.end(BackendInstallFailed(f"{order.source}: {error}", backend=order.name, node=self._config.node))
        except Exception:  # noqa: BLE001 - a fault with one backend must not end the replicas of others
            _log.exception("backend %s: the install failed", order.name)
            operation.end(InternalError("internal error: the worker's log has it"))
        finally:
            del self._operations[order]
            _discard(order)
            if not operation.done:
                operation.end(BackendInstallFailed("the worker stops", backend=order.name))
        if operation.error is not None:
            _log.warning("backend %s is not installed: %s", order.name, operation.error.message)

    async def _install(self, order: Order, tell: Callable[[Progress], None]) -> Installed:
        name, before = order.name, self.folder.installed(order.name)
        self._admit(order, before)
        if before is not None and not order.upgrade and before.sha256 == order.sha256:
            return Installed(manifest=before, unchanged=True)
        with ExitStack() as stack:
            staged = stack.enter_context(self.folder.staging(name))
            root, sha256 = await self._prepare(order, staged, tell)
            if before is not None and not order.upgrade:
                if before.sha256 != sha256:
                    raise self._exists(name)
                return Installed(manifest=before, unchanged=True)
            manifest = Manifest(
                name=name,
                generation=self.folder.last_generation(name) + 1,
                sha256=sha256,
                source=str(order.source),
                installed_at=self._clock.time(),
                size_bytes=await asyncio.to_thread(unpack.size_of, root),
            )
            stopped: frozenset[ReplicaId] = frozenset()
            if before is not None:
                tell(Progress(phase=Phase.STOPPING, message="replicas finish what they do"))
                stack.enter_context(self._processes.held_back(name))
                stopped = await self._processes.vacate(name, f"its backend {name} is upgraded")
            tell(Progress(phase=Phase.SWITCHING))
            version = await asyncio.to_thread(self.folder.keep, root, manifest)
            old = self.folder.switch(name, version)
            await self._changed()
        await asyncio.to_thread(self.folder.remove, old)
        _log.info("backend %s: generation %d from %s", name, manifest.generation, manifest.source)
        return Installed(manifest=manifest, stopped=tuple(sorted(stopped)))

    def _admit(self, order: Order, before: Manifest | None) -> None:
        if before is None and order.upgrade:
            raise self._not_found(order.name)
        if before is None and self.folder.is_by_hand(order.name):
            raise self._exists(order.name)
        if before is not None and not order.upgrade and order.sha256 not in ("", before.sha256):
            raise self._exists(order.name)

    async def _prepare(self, order: Order, staged: Path, tell: Callable[[Progress], None]) -> tuple[Path, str]:
        """Make what is to be installed in an empty folder; return where it lies and its SHA-256."""
        source = order.source
        if isinstance(source, PipRequest):
            await pip_install.install(
                source,
                staged,
                environment=self._config.environment,
                silence_seconds=self._config.loads.install_seconds,
                told=lambda text: tell(Progress(phase=Phase.INSTALLING, message=text)),
            )
            return staged, source.sha256
        async with _Bytes(tell) as told:
            if isinstance(source, DirectorySource):
                sha256 = await asyncio.to_thread(_copy_checked, source, staged, self._limits, told)
            else:
                sha256 = source.sha256
                await asyncio.to_thread(_unpack_checked, source, staged, self._limits, told)
        return await asyncio.to_thread(unpack.root_of, staged), sha256

    def lock(self, name: str) -> asyncio.Lock:
        """Return what is held by the one who changes a backend."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _not_found(self, name: str) -> BackendNotFound:
        node = self._config.node
        by_hand = self.folder.is_by_hand(name)
        where = f": it was put by hand into {self.folder.by_hand}, and is changed there" if by_hand else ""
        return BackendNotFound(f"{node} has no backend {name!r} that was installed{where}", backend=name, node=node)

    def _exists(self, name: str) -> BackendExists:
        node = self._config.node
        if self.folder.installed(name) is None:
            text = f"{node} has a backend {name!r} that was put by hand into {self.folder.by_hand}: remove it there"
        else:
            text = f"{node} has another backend {name!r}: upgrade it, or delete it first"
        return BackendExists(text, backend=name, node=node)

    def _in_use(self, name: str, users: frozenset[ReplicaId]) -> BackendInUse:
        names = ", ".join(str(replica) for replica in sorted(users))
        return BackendInUse(
            f"the backend {name!r} is run by {names}: delete the models, or force it",
            backend=name,
            node=self._config.node,
            replicas=names,
        )


class _GivenUp(Exception):
    """Nobody waits any more for what a thread does."""


class _Bytes:
    """Tells progress of a thread to the loop, and the thread when to give up."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._last = -1
        self._given_up = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._given_up = True

    def __call__(self, done: int, total: int) -> None:
        """Take bytes done and in all, in any thread."""
        if self._given_up:
            raise _GivenUp
        if abs(done - self._last) >= 1 << 20 or self._last < 0 or done >= total:
            self._last = done
            progress = Progress(phase=Phase.UNPACKING, done_bytes=done, total_bytes=total)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._tell, progress)


def _copy_checked(source: DirectorySource, folder: Path, limits: unpack.Limits, told: unpack.Told) -> str:
    if not source.path.is_dir():
        raise BackendInvalid(f"there is no folder {source.path} on the node")
    if folder.resolve().is_relative_to(source.path.resolve()):
        raise BackendInvalid(f"the folder {source.path} holds this worker's own backends")
    return unpack.copy(source.path, folder, limits=limits, told=told)


def _unpack_checked(source: ArchiveSource, folder: Path, limits: unpack.Limits, told: unpack.Told) -> None:
    if source.path is None:
        raise BackendInstallFailed("the install of the same archive that this one waited for has failed: try again")
    if not source.path.is_file():
        raise BackendInvalid(f"there is no file {source.path} on the node")
    if not source.uploaded:  # the sum of an upload was checked while it came
        found = unpack.sha256_of(source.path, told)
        if found != source.sha256:
            raise BackendInvalid(f"{source.path} has the SHA-256 {found}, not {source.sha256}: it is another file")
    unpack.unpack(source.path, folder, limits=limits, told=told)


def _discard(order: Order) -> None:
    """Delete an archive that was uploaded for an order."""
    source = order.source
    if isinstance(source, ArchiveSource) and source.uploaded and source.path is not None:
        source.path.unlink(missing_ok=True)


def _ended(order: Order, error: MeshError) -> Operation:
    operation = Operation(order)
    operation.end(error)
    return operation
