"""The part of WorkerService that installs, upgrades, deletes and lists foreign backends."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from google.protobuf.timestamp_pb2 import Timestamp

from localmesh.core.errors import BackendInvalid, InvalidRequest
from localmesh.core.ids import NodeName
from localmesh.core.records import EngineInfo
from localmesh.rpc import convert
from localmesh.v1 import backends_pb2
from localmesh.v1 import worker_service_pb2 as pb
from localmesh.worker.backend_folder import Manifest
from localmesh.worker.backends import (
    ArchiveSource,
    Backends,
    DirectorySource,
    Installed,
    Order,
    Phase,
    Progress,
)
from localmesh.worker.pip_install import PipRequest

_FIRST_MESSAGE_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20
_TELL_BYTES = 4 << 20

_PHASES = {
    Phase.WAITING: backends_pb2.BACKEND_PHASE_WAITING,
    Phase.UPLOADING: backends_pb2.BACKEND_PHASE_UPLOADING,
    Phase.UNPACKING: backends_pb2.BACKEND_PHASE_UNPACKING,
    Phase.INSTALLING: backends_pb2.BACKEND_PHASE_INSTALLING,
    Phase.STOPPING: backends_pb2.BACKEND_PHASE_STOPPING,
    Phase.SWITCHING: backends_pb2.BACKEND_PHASE_SWITCHING,
    Phase.DONE: backends_pb2.BACKEND_PHASE_DONE,
}

Tell = Callable[[Progress], Awaitable[None]]


class BackendCalls:
    """Serves the calls on backends.

    Args:
        node: Name of the node.
        backends: Its backends.
        engines: Returns the node's engines as they are now.
        upload_bytes: What an archive may have at most.
    """

    def __init__(
        self,
        node: NodeName,
        backends: Backends,
        *,
        engines: Callable[[], Iterable[EngineInfo]],
        upload_bytes: int,
    ) -> None:
        self._node = node
        self._backends = backends
        self._engines = engines
        self._upload_bytes = upload_bytes

    async def install(self, requests: AsyncIterator[Any], write: Callable[[Any], Awaitable[None]]) -> None:
        """Serve InstallBackend.

        Raises:
            MeshError: As documented at the RPC.
        """

        async def tell(progress: Progress) -> None:
            await write(pb.InstallBackendResponse(progress=_progress(progress)))

        done = await self._carry_out(requests, tell, upgrade=False)
        await write(
            pb.InstallBackendResponse(
                progress=_progress(Progress(phase=Phase.DONE)),
                backend=self._installed(done.manifest),
                unchanged=done.unchanged,
            )
        )

    async def upgrade(self, requests: AsyncIterator[Any], write: Callable[[Any], Awaitable[None]]) -> None:
        """Serve UpgradeBackend.

        Raises:
            MeshError: As documented at the RPC.
        """

        async def tell(progress: Progress) -> None:
            await write(pb.UpgradeBackendResponse(progress=_progress(progress)))

        done = await self._carry_out(requests, tell, upgrade=True)
        await write(
            pb.UpgradeBackendResponse(
                progress=_progress(Progress(phase=Phase.DONE)),
                backend=self._installed(done.manifest),
                stopped=[convert.replica_ref(replica) for replica in done.stopped],
            )
        )

    async def delete(self, request: pb.DeleteBackendRequest) -> pb.DeleteBackendResponse:
        """Serve DeleteBackend.

        Raises:
            MeshError: As documented at the RPC.
        """
        stopped = await self._backends.delete(request.name, force=request.force)
        return pb.DeleteBackendResponse(stopped=[convert.replica_ref(replica) for replica in sorted(stopped)])

    async def list_all(self) -> pb.ListBackendsResponse:
        """Serve ListBackends."""
        folder = self._backends.folder
        names = await asyncio.to_thread(folder.names)
        manifests = await asyncio.to_thread(lambda: [folder.installed(name) for name in names])
        found = []
        for name, manifest in zip(names, manifests, strict=True):
            by_hand = Manifest(
                name=name, generation=0, sha256="", source="put there by hand", installed_at=0.0, size_bytes=0
            )
            found.append(self._installed(manifest or by_hand))
        return pb.ListBackendsResponse(node=self._node, backends=found)

    async def _carry_out(self, requests: AsyncIterator[Any], tell: Tell, *, upgrade: bool) -> Installed:
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_SECONDS):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("part") != "order":
            raise InvalidRequest("the first message must be the order", field="order")
        order = _order(first.order, upgrade=upgrade)
        order.check()
        if isinstance(order.source, ArchiveSource) and order.source.uploaded:
            order = await self._uploaded(order, requests, tell, total=first.order.source.archive.size_bytes)
        operation = self._backends.start(order)  # which deletes the upload
        async with aclosing(operation.watch()) as news:
            async for progress in news:
                await tell(progress)
        if operation.result is None:
            raise operation.error or InvalidRequest("the order ended without a result", field="order")
        return operation.result

    async def _uploaded(self, order: Order, requests: AsyncIterator[Any], tell: Tell, *, total: int) -> Order:
        """Take an archive in; return the order with it, or as it was where it is not needed after all.

        Raises:
            BackendInvalid: It is not the one that was announced.
        """
        if self._backends.needs_no_upload(order):
            return order
        if total > self._upload_bytes:
            raise BackendInvalid(f"the archive has more than {self._upload_bytes} bytes", backend=order.name)
        path = await asyncio.to_thread(self._backends.folder.new_file, order.name)
        kept = False
        try:
            with path.open("wb") as file:
                await self._receive(order, requests, file, tell, total)
            kept = True
        finally:
            if not kept:
                path.unlink(missing_ok=True)
        return replace(order, source=ArchiveSource(path=path, sha256=order.sha256, uploaded=True))

    async def _receive(
        self, order: Order, requests: AsyncIterator[Any], file: IO[bytes], tell: Tell, total: int
    ) -> None:
        # A caller sends nothing before this: so what was refused until here reaches it whole. (What a server says while
        # the client still sends is lost in grpc.aio when the sending fails first.)
        await tell(Progress(phase=Phase.UPLOADING, total_bytes=total))
        digest, size, told = hashlib.sha256(), 0, 0
        async for message in requests:
            if message.WhichOneof("part") != "chunk" or len(message.chunk) > _CHUNK_BYTES:
                raise InvalidRequest(f"after the order there must be chunks of {_CHUNK_BYTES} bytes", field="chunk")
            size += len(message.chunk)
            if size > self._upload_bytes:
                raise BackendInvalid(f"the archive has more than {self._upload_bytes} bytes", backend=order.name)
            digest.update(message.chunk)
            await asyncio.to_thread(file.write, message.chunk)
            if size - told >= _TELL_BYTES:
                told = size
                await tell(Progress(phase=Phase.UPLOADING, done_bytes=size, total_bytes=total))
        if digest.hexdigest() != order.sha256:
            raise BackendInvalid(
                f"the archive that came has {size} bytes and the SHA-256 {digest.hexdigest()}, not {order.sha256}: it"
                " was damaged on its way, or is another one",
                backend=order.name,
            )

    def _installed(self, manifest: Manifest) -> backends_pb2.InstalledBackend:
        engine = next((e for e in self._engines() if e.name == f"process:{manifest.name}"), None)
        return backends_pb2.InstalledBackend(
            name=manifest.name,
            generation=manifest.generation,
            sha256=manifest.sha256,
            source=manifest.source,
            installed_at=_timestamp(manifest.installed_at),
            size_bytes=manifest.size_bytes,
            replicas=[convert.replica_ref(replica) for replica in sorted(self._backends.users(manifest.name))],
            runnable=engine is not None and engine.available,
            detail=engine.detail if engine is not None else "",
        )


def _order(message: backends_pb2.BackendOrder, *, upgrade: bool) -> Order:
    given = message.source
    source: DirectorySource | ArchiveSource | PipRequest
    match given.WhichOneof("source"):
        case "directory":
            source = DirectorySource(path=Path(given.directory))
        case "archive":
            path = Path(given.archive.path) if given.archive.path else None
            source = ArchiveSource(path=path, sha256=given.archive.sha256.lower(), uploaded=path is None)
        case "pip":
            source = PipRequest(
                requirements=tuple(given.pip.requirements), module=given.pip.module, script=given.pip.script
            )
        case _:
            raise InvalidRequest("the order names no source", field="order.source")
    return Order(name=message.name, source=source, upgrade=upgrade)


def _progress(value: Progress) -> backends_pb2.BackendProgress:
    return backends_pb2.BackendProgress(
        phase=_PHASES[value.phase],
        done_bytes=value.done_bytes,
        total_bytes=value.total_bytes,
        message=value.message,
    )


def _timestamp(seconds: float) -> Timestamp | None:
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp
