"""Orders for backends through the router: relayed to the node they name, message by message, errors included."""

import asyncio
from typing import Any

import grpc
import pytest

from localmesh.core.errors import BackendExists, BackendInUse, ComponentUnreachable, InvalidRequest, NodeNotFound
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import backends_pb2 as types
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import router_service_pb2_grpc, types_pb2, worker_service_pb2, worker_service_pb2_grpc
from tests.integration.router_kit import router_mesh


class _Worker(worker_service_pb2_grpc.WorkerServiceServicer):  # type: ignore[misc]
    """Takes an upload and counts it, and refuses what the tests want refused."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def InstallBackend(self, request_iterator: Any, context: Any) -> None:
        requests = aiter(request_iterator)
        order = (await anext(requests)).order
        if order.name == "there":
            raise BackendExists("there is another one", backend="there")
        respond = worker_service_pb2.InstallBackendResponse
        await context.write(respond(progress=types.BackendProgress(phase=types.BACKEND_PHASE_UPLOADING)))
        try:
            size = 0
            async for request in requests:
                size += len(request.chunk)
            await context.write(respond(backend=types.InstalledBackend(name=order.name, size_bytes=size)))
        finally:
            # of a caller that leaves gRPC shows the end of its messages, or the cancellation: whichever comes first
            if order.name == "left":
                self.gone.set()

    async def UpgradeBackend(self, request_iterator: Any, context: Any) -> None:
        order = (await anext(aiter(request_iterator))).order
        backend = types.InstalledBackend(name=order.name, generation=2)
        stopped = [types_pb2.ReplicaRef(model="m", node="a", index=3)]
        await context.write(worker_service_pb2.UpgradeBackendResponse(backend=backend, stopped=stopped))

    async def DeleteBackend(self, request: Any, context: Any) -> Any:
        if not request.force:
            raise BackendInUse("m/a/3 runs it", backend=request.name, replicas="m/a/3")
        return worker_service_pb2.DeleteBackendResponse(stopped=[types_pb2.ReplicaRef(model="m", node="a", index=3)])

    async def ListBackends(self, request: Any, context: Any) -> Any:
        return worker_service_pb2.ListBackendsResponse(node="a", backends=[types.InstalledBackend(name="x")])


async def test_orders_for_backends_reach_the_node_that_they_name(etcd_endpoint: str, mesh_name: str) -> None:
    """F48."""
    worker = _Worker()
    server = GrpcServer(ServerConfig(drain_seconds=0.0), name="worker")
    server.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, worker, "localmesh.v1.WorkerService")
    async with server, router_mesh(etcd_endpoint, mesh_name) as mesh:
        await mesh.node("a", endpoint=server.endpoint)
        await mesh.node("b", endpoint="127.0.0.1:1")
        stub = router_service_pb2_grpc.RouterServiceStub(mesh.channel(await mesh.router()))

        def order(node: str, name: str) -> Any:
            request = worker_service_pb2.InstallBackendRequest(order=types.BackendOrder(name=name))
            return pb.InstallNodeBackendRequest(node=node, request=request)

        async def begin(node: str, name: str) -> tuple[Any, Any]:
            call = stub.InstallNodeBackend(timeout=30)
            await call.write(order(node, name))
            return call, await call.read()

        call, first = await begin("a", "new")
        assert first.response.progress.phase == types.BACKEND_PHASE_UPLOADING
        for _ in range(50):
            chunk = worker_service_pb2.InstallBackendRequest(chunk=b"x" * 10_000)
            await call.write(pb.InstallNodeBackendRequest(request=chunk))
        await call.done_writing()
        assert (await call.read()).response.backend.size_bytes == 500_000
        assert await call.read() is grpc.aio.EOF

        for node, name, kind in (
            ("a", "there", BackendExists),
            ("nowhere", "new", NodeNotFound),
            ("b", "new", ComponentUnreachable),
            ("", "new", InvalidRequest),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await begin(node, name)
            assert isinstance(from_rpc_error(caught.value), kind)

        leaving, _ = await begin("a", "left")
        leaving.cancel()
        async with asyncio.timeout(20):
            await worker.gone.wait()

        upgrade = stub.UpgradeNodeBackend(timeout=30)
        request = worker_service_pb2.UpgradeBackendRequest(order=types.BackendOrder(name="x"))
        await upgrade.write(pb.UpgradeNodeBackendRequest(node="a", request=request))
        assert [ref.index for ref in (await upgrade.read()).response.stopped] == [3]

        delete = worker_service_pb2.DeleteBackendRequest(name="x")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.DeleteNodeBackend(pb.DeleteNodeBackendRequest(node="a", request=delete), timeout=30)
        error = from_rpc_error(refused.value)
        assert isinstance(error, BackendInUse)
        assert error.metadata["replicas"] == "m/a/3"
        delete.force = True
        done = await stub.DeleteNodeBackend(pb.DeleteNodeBackendRequest(node="a", request=delete), timeout=30)
        assert [ref.index for ref in done.response.stopped] == [3]
        found = await stub.ListNodeBackends(pb.ListNodeBackendsRequest(node="a"), timeout=30)
        assert [backend.name for backend in found.response.backends] == ["x"]
