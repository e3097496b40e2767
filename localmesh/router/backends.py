"""Calls on a node's backends, relayed to its worker message by message."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from localmesh.core.errors import InvalidRequest, NodeNotFound
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.convert import node_name_of
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.identity import server_name
from localmesh.store.mirror import Mirror
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import worker_service_pb2, worker_service_pb2_grpc

_FIRST_MESSAGE_SECONDS = 10.0
_CALL_SECONDS = 30.0

Write = Callable[[Any], Awaitable[None]]


class BackendRelay:
    """Passes orders for backends on to the node that they name."""

    def __init__(self, mirror: Mirror, channels: ChannelPool) -> None:
        self._mirror = mirror
        self._channels = channels

    async def install(self, requests: AsyncIterator[Any], write: Write) -> None:
        """Relay an install.

        Raises:
            MeshError: As the worker says, or the node is not there.
        """

        async def write_one(response: Any) -> None:
            await write(pb.InstallNodeBackendResponse(response=response))

        await self._stream("InstallBackend", requests, write_one)

    async def upgrade(self, requests: AsyncIterator[Any], write: Write) -> None:
        """Relay an upgrade.

        Raises:
            MeshError: As the worker says, or the node is not there.
        """

        async def write_one(response: Any) -> None:
            await write(pb.UpgradeNodeBackendResponse(response=response))

        await self._stream("UpgradeBackend", requests, write_one)

    async def delete(self, request: pb.DeleteNodeBackendRequest, deadline_seconds: float | None) -> Any:
        """Relay a deletion, which may wait for requests that run.

        Raises:
            MeshError: As the worker says, or the node is not there.
        """
        endpoint, stub = self._worker(request.node)
        try:
            response = await stub.DeleteBackend(request.request, timeout=deadline_seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, endpoint=endpoint) from error
        return pb.DeleteNodeBackendResponse(response=response)

    async def list_all(self, request: pb.ListNodeBackendsRequest) -> Any:
        """Return a node's backends.

        Raises:
            MeshError: The node is not there, or does not answer.
        """
        endpoint, stub = self._worker(request.node)
        try:
            response = await stub.ListBackends(worker_service_pb2.ListBackendsRequest(), timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, endpoint=endpoint) from error
        return pb.ListNodeBackendsResponse(response=response)

    async def _stream(self, method: str, requests: AsyncIterator[Any], write: Write) -> None:
        source = aiter(requests)
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_SECONDS):
                first = await anext(source, None)
        except TimeoutError:
            first = None
        if first is None:
            raise InvalidRequest("the first message must name the node", field="node")
        endpoint, stub = self._worker(first.node)
        call = getattr(stub, method)()

        async def send() -> None:
            try:
                await call.write(first.request)
                async for message in source:
                    await call.write(message.request)
                await call.done_writing()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader learns why

        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(send())
                try:
                    while (response := await call.read()) is not grpc.aio.EOF:
                        await write(response)
                finally:
                    # it has its answer: what it would send still is not needed
                    sender.cancel()
        except* grpc.aio.AioRpcError as failures:
            raise from_rpc_error(failures.exceptions[0], endpoint=endpoint) from failures
        finally:
            call.cancel()

    def _worker(self, name: str) -> tuple[str, Any]:
        node = node_name_of(name)
        record = self._mirror.snapshot.nodes.get(node)
        if record is None:
            raise NodeNotFound(f"there is no live node {node!r}", node=node)
        channel = self._channels.get(record.endpoint, server_name=server_name("node", node))
        return record.endpoint, worker_service_pb2_grpc.WorkerServiceStub(channel)
