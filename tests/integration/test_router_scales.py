"""Replicas follow the load, as the elected reconciler does it. Real etcd, real gRPC, no engine."""

import asyncio

from localmesh.core.records import Policy
from localmesh.scheduling.autoscale import AutoscaleConfig
from localmesh.scheduling.breaker import BreakerConfig
from localmesh.scheduling.reconcile import ReconcileConfig
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1.router_service_pb2_grpc import RouterServiceStub
from tests.integration.router_kit import MIB, declare, eventually, ready, router_mesh

QUICK = ReconcileConfig(autoscale=AutoscaleConfig(busy_seconds=0.3, idle_seconds=1.0))


async def test_a_queue_brings_another_replica_and_idleness_takes_all_away(etcd_endpoint: str, mesh_name: str) -> None:
    """F35: up while all are busy, down to zero when nobody asks, and up again with the next request."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(max_replicas=2))
        nodes = [await mesh.node(name, limit=1) for name in "abc"]
        router = await mesh.router(reconcile=QUICK)
        for node in nodes:
            node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, "tiny", timeout=30.0)) for _ in range(3)]
            await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
            await eventually(mesh.mirror, lambda s: sum(s.in_flight(r.id) for r in ready(s, "tiny")) == 2)
            for node in nodes:
                node.open_gate.set()
        assert len({call.result() for call in calls}) == 2
        await eventually(mesh.mirror, lambda s: not [*s.replicas_of("tiny")])
        assert sum(node.loads["tiny"] for node in nodes) == 2
        assert await mesh.call(router, "tiny")


async def test_what_is_used_stays_while_what_is_idle_goes(etcd_endpoint: str, mesh_name: str) -> None:
    """F35."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        for name in ("used", "idle"):
            await declare(mesh.store, name)
        node = await mesh.node("a")
        router = await mesh.router(reconcile=QUICK)
        await mesh.call(router, "idle")
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            call = group.create_task(mesh.call(router, "used", timeout=30.0))
            await eventually(mesh.mirror, lambda s: ready(s, "used"))
            snapshot = await eventually(mesh.mirror, lambda s: not [*s.replicas_of("idle")])
            assert len(ready(snapshot, "used")) == 1
            node.open_gate.set()
        assert call.result() == "used/a/0"
        assert node.loads["used"] == 1


async def test_what_fits_nowhere_is_left_alone_until_a_node_is_added(etcd_endpoint: str, mesh_name: str) -> None:
    """F34: the case of LocalAI's users: room for one, two wanted. It trips, nothing flaps, and a new node wakes it."""
    config = ReconcileConfig(breaker=BreakerConfig(tick_seconds=0.1))
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "big", Policy(min_replicas=2), memory_bytes=600 * MIB)
        first = await mesh.node("a", memory_mib=1000, max_replicas_per_model=2)
        router = await mesh.router(reconcile=config, reconcile_interval_seconds=0.1)
        snapshot = await eventually(mesh.mirror, lambda s: len(ready(s, "big")) == 1)
        (replica,) = ready(snapshot, "big")
        stub = RouterServiceStub(mesh.channel(router))
        async with asyncio.timeout(20):
            while not any("is unsatisfiable" in w for w in await _warnings(stub)):
                await asyncio.sleep(0.05)
        explained = await stub.ExplainPlacement(pb.ExplainPlacementRequest(model="big"))
        assert any("is unsatisfiable" in note for note in explained.notes)
        await mesh.node("b", memory_mib=1000)
        snapshot = await eventually(mesh.mirror, lambda s: len(ready(s, "big")) == 2)
        assert {r.id.node for r in ready(snapshot, "big")} == {"a", "b"}
        assert snapshot.replica(replica.id).create_revision == replica.create_revision
        assert first.loads["big"] == 1
        async with asyncio.timeout(20):
            while any("is unsatisfiable" in w for w in await _warnings(stub)):
                await asyncio.sleep(0.05)


async def _warnings(stub: RouterServiceStub) -> list[str]:
    return list((await stub.GetStatus(pb.GetStatusRequest())).warnings)
