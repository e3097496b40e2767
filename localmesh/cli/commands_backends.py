"""Commands that show the backends of nodes, and install, upgrade and delete them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import grpc

from localmesh.app.exits import Exit
from localmesh.cli import output, tables
from localmesh.cli.connection import Command, Connection, connect, pages
from localmesh.cli.progress import ProgressLine
from localmesh.cli.tables import Column
from localmesh.core.errors import BackendNotFound, InternalError, InvalidRequest, NoNodes
from localmesh.v1 import backends_pb2 as backends
from localmesh.v1 import registry_service_pb2 as registry
from localmesh.v1 import router_service_pb2 as router
from localmesh.v1 import types_pb2 as types
from localmesh.v1 import worker_service_pb2 as worker

_CHUNK_BYTES = 1 << 20
_HASH_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where a backend comes from, and the archive that is uploaded for it."""

    message: backends.BackendSource
    upload: Path | None = None


async def backends_of(command: Command) -> int:
    """`backends [NODE]`: list the foreign backends of nodes."""
    async with connect(command.config) as mesh:
        wanted = [command.arguments.node] if command.arguments.node else await _live_nodes(mesh, command)
        found = [await _listed(mesh, node, command) for node in wanted]
    if command.json:
        output.print_document({"nodes": [output.as_dict(response) for response in found]})
        return Exit.OK
    columns = [
        *(Column("NODE"), Column("BACKEND"), Column("GENERATION", right=True), Column("SIZE", right=True)),
        *(Column("RUNS"), Column("REPLICAS"), Column("SHA256"), Column("SOURCE")),
    ]
    rows = [
        [
            *(response.node, backend.name, str(backend.generation or "-")),
            *(tables.size(backend.size_bytes) if backend.size_bytes else "", "yes" if backend.runnable else "NO"),
            ",".join(f"{ref.model}#{ref.index}" for ref in backend.replicas),
            *(backend.sha256[:_HASH_DIGITS], backend.source),
        ]
        for response in found
        for backend in response.backends
    ]
    output.write_line(
        tables.render(columns, rows) if rows else "no backends; install one with `localmesh backend install`"
    )
    for note in (f"{b.name} on {r.node}: {b.detail}" for r in found for b in r.backends if not b.runnable):
        output.write_line(note)
    return Exit.OK


async def install(command: Command) -> int:
    """`backend install NAME`: bring a backend to nodes."""
    return await _change(command, upgrade=False)


async def upgrade(command: Command) -> int:
    """`backend upgrade NAME`: replace a backend on nodes that have it."""
    return await _change(command, upgrade=True)


async def delete(command: Command) -> int:
    """`backend delete NAME`: take a backend from nodes."""
    given, results = command.arguments, {}
    async with connect(command.config) as mesh:
        for node in await _nodes(mesh, command, having=given.name):
            request = worker.DeleteBackendRequest(name=given.name, force=given.force)
            done = await mesh.router.DeleteNodeBackend(router.DeleteNodeBackendRequest(node=node, request=request))
            results[node] = output.as_dict(done.response)
            if not command.json:
                output.write_line(f"backend {given.name} deleted on {node}{_stopped(done.response.stopped)}")
    if command.json:
        output.print_document({"results": results})
    return Exit.OK


async def _change(command: Command, *, upgrade: bool) -> int:
    given, results = command.arguments, {}
    source = await asyncio.to_thread(_source, command)
    order = backends.BackendOrder(name=given.name, source=source.message)
    async with connect(command.config) as mesh:
        for node in await _nodes(mesh, command, having=given.name if upgrade else ""):
            last = await _carry_out(mesh, node, order, source.upload, upgrade=upgrade)
            results[node] = output.as_dict(last)
            if not command.json:
                output.write_line(_outcome(last, node, upgrade=upgrade))
    if command.json:
        output.print_document({"results": results})
    return Exit.OK


async def _carry_out(
    mesh: Connection, node: str, order: backends.BackendOrder, upload: Path | None, *, upgrade: bool
) -> Any:
    """Give one node an order, show how it goes, and return the last message."""
    inner = "Upgrade" if upgrade else "Install"
    call = getattr(mesh.router, f"{inner}NodeBackend")()
    outer: Any = getattr(router, f"{inner}NodeBackendRequest")
    request: Any = getattr(worker, f"{inner}BackendRequest")

    async def send(path: Path) -> None:
        # what ends the call is told to the reader
        with suppress(asyncio.InvalidStateError, grpc.RpcError), path.open("rb") as file:
            async for chunk in _chunks(file):
                await call.write(outer(request=request(chunk=chunk)))
            await call.done_writing()

    last: Any = None
    with ProgressLine() as line:
        async with asyncio.TaskGroup() as group:
            sender: asyncio.Task[None] | None = None
            try:
                await call.write(outer(node=node, request=request(order=order)))
                while (message := await call.read()) is not grpc.aio.EOF:
                    last = message.response
                    if sender is None and upload and last.progress.phase == backends.BACKEND_PHASE_UPLOADING:
                        sender = group.create_task(send(upload))
                    line.show(_describe(node, last.progress))
            except grpc.RpcError as error:
                failure: grpc.RpcError | None = error
            else:
                failure = None
            if sender is not None:
                sender.cancel()
    if failure is not None:
        raise failure
    if last is None or not last.backend.name:
        raise InternalError(f"{node} ended the order without a result; its log may say why")
    return last


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while data := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield data


def _source(command: Command) -> _Source:
    """Return what the flags say of the source. Reads an archive for its sum: for a thread.

    Raises:
        InvalidRequest: They do not go together, or a file cannot be read.
    """
    given = command.arguments
    if (given.module or given.script) and not given.pip:
        raise InvalidRequest("--module and --script go with --pip", field="pip")
    if bool(given.archive_on_node) != bool(given.sha256):
        raise InvalidRequest("--archive-on-node and --sha256 go together", field="sha256")
    if given.dir:
        return _Source(message=backends.BackendSource(directory=given.dir))
    if given.pip:
        asked = backends.BackendRequirement(
            requirements=given.pip, module=given.module or "", script=given.script or ""
        )
        return _Source(message=backends.BackendSource(pip=asked))
    if given.archive_on_node:
        there = backends.BackendArchive(path=given.archive_on_node, sha256=given.sha256)
        return _Source(message=backends.BackendSource(archive=there))
    path = Path(given.archive)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        archive = backends.BackendArchive(sha256=digest, size_bytes=path.stat().st_size)
    except OSError as problem:
        raise InvalidRequest(f"cannot read {path}: {problem.strerror}", field="archive") from None
    return _Source(message=backends.BackendSource(archive=archive), upload=path)


async def _nodes(mesh: Connection, command: Command, *, having: str) -> list[str]:
    """Return the nodes that are meant: those that are named, all, or the only one there is.

    Args:
        mesh: Connection.
        command: With the flags --node and --all-nodes.
        having: With --all-nodes only those with this backend, if set.

    Raises:
        InvalidRequest: None is named, and there are several.
        NoNodes: There is none.
        BackendNotFound: No node has the backend.
    """
    if command.arguments.node:
        return list(dict.fromkeys(command.arguments.node))
    live = await _live_nodes(mesh, command)
    if not live:
        raise NoNodes("the mesh has no live node")
    if command.arguments.all_nodes:
        if not having:
            return live
        listed = [await _listed(mesh, node, command) for node in live]
        found = [r.node for r in listed if any(b.name == having and b.generation for b in r.backends)]
        if not found:
            raise BackendNotFound(f"no live node has a backend {having!r} that was installed", backend=having)
        return found
    if len(live) > 1:
        raise InvalidRequest(
            f"say on which node: --node NAME, or --all-nodes (there are {', '.join(live)})", field="node"
        )
    return live


async def _live_nodes(mesh: Connection, command: Command) -> list[str]:
    listed = pages(mesh.registry.ListNodes, registry.ListNodesRequest, "nodes", command)
    return [node.name async for node in listed if node.endpoint and node.state not in _ABSENT]


_ABSENT = (types.NODE_STATE_GONE, types.NODE_STATE_PENDING)


async def _listed(mesh: Connection, node: str, command: Command) -> worker.ListBackendsResponse:
    request = router.ListNodeBackendsRequest(node=node)
    found: worker.ListBackendsResponse = (await mesh.router.ListNodeBackends(request, timeout=command.timeout)).response
    return found


def _outcome(last: Any, node: str, *, upgrade: bool) -> str:
    backend = last.backend
    what = f"backend {backend.name}"
    if upgrade:
        return f"{what} upgraded to generation {backend.generation} on {node}{_stopped(last.stopped)}"
    if last.unchanged:
        return f"{what} is there already on {node} (generation {backend.generation})"
    return f"{what} installed on {node} (generation {backend.generation}, {tables.size(backend.size_bytes)})"


def _stopped(refs: Any) -> str:
    names = ", ".join(f"{ref.model}#{ref.index}" for ref in refs)
    return f"; stopped {names}" if names else ""


def _describe(node: str, progress: backends.BackendProgress) -> str:
    phase = tables.word(backends.BackendPhase.Name(progress.phase), "BACKEND_PHASE_")
    text = f"{node}: {phase}"
    if progress.total_bytes:
        text += f" {100 * progress.done_bytes // progress.total_bytes} % of {tables.size(progress.total_bytes)}"
    return f"{text}: {progress.message[:100]}" if progress.message else text
