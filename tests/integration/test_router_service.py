"""RouterService, health and reflection of a router; and a router whose etcd is silent."""

import asyncio
import signal
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from localmesh.core.errors import StoreUnavailable
from localmesh.core.records import Policy
from localmesh.etcd import EtcdBinary, EtcdServer
from localmesh.router.config import RouterConfig
from localmesh.router.node import Router
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import ListenFailed, from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.store.holder import Holder
from localmesh.store.leader import LeaderElection
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import router_service_pb2_grpc
from tests.integration.router_kit import CLOCK, declare, eventually, ready, router_mesh

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_requests_go_on_while_etcd_is_silent_and_a_cold_model_is_refused_until_it_is_back(
    etcd_binary: EtcdBinary, mesh_name: str
) -> None:
    """F4: the last view is used; nothing that runs depends on etcd."""
    async with EtcdServer(etcd_binary) as etcd, router_mesh(etcd.endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        await declare(mesh.store, "cold")
        for name in "ab":
            await mesh.node(name, presence_seconds=60)
        router = await mesh.router(hold_seconds=10.0)
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        stub = router_service_pb2_grpc.RouterServiceStub(mesh.channel(router))
        etcd.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                served: list[str] = []
                while (status := await stub.GetStatus(pb.GetStatusRequest())).store_connected:
                    served.append(await mesh.call(router, "tiny"))
            served += [await mesh.call(router, "tiny") for _ in range(4)]
            assert set(served) == {"tiny/a/0", "tiny/b/0"}
            assert status.store_silence.seconds >= 3
            assert any("silent" in warning for warning in status.warnings)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await mesh.call(router, "cold", timeout=30.0)
            assert isinstance(from_rpc_error(caught.value), StoreUnavailable)
            assert (await _health(mesh.channel(router), "")) == SERVING
        finally:
            etcd.process.send_signal(signal.SIGCONT)
        await eventually(mesh.mirror, lambda s: mesh.mirror.connected, within=30.0)
        assert await mesh.call(router, "cold", timeout=60.0) in ("cold/a/0", "cold/b/0")


async def test_requests_go_on_when_etcd_is_killed(etcd_binary: EtcdBinary, mesh_name: str) -> None:
    """F4."""
    async with EtcdServer(etcd_binary) as etcd, router_mesh(etcd.endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        await mesh.node("a")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        assert await mesh.call(router, "tiny") == "tiny/a/0"
        await etcd.stop()
        assert [await mesh.call(router, "tiny") for _ in range(20)] == ["tiny/a/0"] * 20
        await asyncio.wait_for(_until_disconnected(mesh.mirror), 20)
        assert await mesh.call(router, "tiny") == "tiny/a/0"


async def _until_disconnected(mirror: Any) -> None:
    while mirror.connected:
        await asyncio.sleep(0.1)


async def _health(channel: Any, service: str) -> Any:
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return reply.status


async def test_health_tells_of_each_model_whether_a_request_would_be_served(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        router = await mesh.router()
        channel = mesh.channel(router)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="tiny"), timeout=30)
        while (await watch.read()).status != NOT_SERVING:  # unknown at first, perhaps
            pass
        await mesh.node("a")
        assert (await watch.read()).status == SERVING  # it could be loaded
        for service in ("", "localmesh.v1.RouterService", "localmesh.v1.InferenceService", "backend.Backend"):
            assert await _health(channel, service) == SERVING
        watch.cancel()


async def test_a_router_that_stops_lets_running_calls_end_and_takes_no_new_one(
    etcd_endpoint: str, mesh_name: str
) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router()
        (replica,) = ready(await eventually(mesh.mirror, lambda s: ready(s, "tiny")), "tiny")
        watch = health_pb2_grpc.HealthStub(mesh.channel(router)).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        while (await watch.read()).status != SERVING:
            pass
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            call = group.create_task(mesh.call(router, "tiny"))
            await eventually(mesh.mirror, lambda s: s.in_flight(replica.id) == 1)
            stopping = group.create_task(mesh.stop_router(router))
            assert (await watch.read()).status == NOT_SERVING
            assert not stopping.done()
            node.open_gate.set()
        assert call.result() == str(replica.id)
        async with ChannelPool() as channels:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channels.get(router.endpoint).unary_unary("/t.T/Unary")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_port_that_is_in_use_is_named(etcd_endpoint: str, mesh_name: str) -> None:
    async with GrpcServer(ServerConfig(), name="other") as other:
        async with router_mesh(etcd_endpoint, mesh_name) as mesh:
            mirror = mesh.mirror
            async with ChannelPool() as channels:
                router = Router(
                    RouterConfig(mesh=mesh_name, name="r", server=ServerConfig(listen=other.endpoint)),
                    store=mesh.store,
                    mirror=mirror,
                    holder=Holder(mirror, "r"),
                    election=LeaderElection(mesh.store, "r"),
                    channels=channels,
                    clock=CLOCK,
                )
                with pytest.raises(ListenFailed, match=f"port {other.port} of 127.0.0.1 is in use"):
                    await router.run()


async def test_reflection_shows_what_can_be_called(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        router = await mesh.router()
        stub = reflection_pb2_grpc.ServerReflectionStub(mesh.channel(router))
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
        answer = await call.read()
        await call.done_writing()
        names = {service.name for service in answer.list_services_response.service}
        assert {"localmesh.v1.RouterService", "localmesh.v1.InferenceService", "backend.Backend"} <= names


async def test_status_shows_the_mesh_at_a_glance(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        await declare(mesh.store, "wide", Policy(min_replicas=2))
        await mesh.node("a")
        router = await mesh.router("r1")
        await eventually(mesh.mirror, lambda s: s.leader and ready(s, "tiny") and ready(s, "wide"))
        stub = router_service_pb2_grpc.RouterServiceStub(mesh.channel(router))
        async with asyncio.timeout(10):
            # The router's view and plans follow those of the test.
            while "max-replicas-per-model" not in str((status := await _status(stub)).warnings):
                await asyncio.sleep(0.05)
        assert (status.mesh, status.router, status.reconciler, status.version) == (mesh_name, "r1", "r1", "test")
        assert (status.live_nodes, status.nodes, status.models, status.replicas) == (1, 1, 2, 2)
        assert status.store_connected
        assert status.store_revision > 0
        assert any("wide has 1 of at least 2" in warning for warning in status.warnings)


async def _status(stub: Any) -> Any:
    return await stub.GetStatus(pb.GetStatusRequest())
