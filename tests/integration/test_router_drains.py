"""A node that drains, as the elected reconciler does it. Real etcd, real gRPC, no engine."""

import asyncio
from dataclasses import replace

from localmesh.core.records import Policy
from localmesh.scheduling.reconcile import ReconcileConfig
from tests.integration.router_kit import FakeNode, RouterMesh, declare, eventually, ready, router_mesh


async def set_draining(mesh: RouterMesh, node: FakeNode, draining: bool) -> None:
    known = mesh.mirror.snapshot.approvals[node.name]
    await mesh.store.put_approval(node.name, expected=known, new=replace(known, draining=draining))
    await eventually(mesh.mirror, lambda s: s.approvals[node.name].draining is draining)


async def test_a_drained_nodes_replica_is_replaced_first_and_its_request_finishes(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F7."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        old, new = await mesh.node("a", memory_mib=2000), await mesh.node("b")
        router = await mesh.router()
        snapshot = await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        (replica,) = ready(snapshot, "tiny")
        assert replica.id.node == old.name
        old.open_gate.clear()
        new.may_load.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(mesh.call(router, "tiny", timeout=30.0))
            await eventually(mesh.mirror, lambda s: s.in_flight(replica.id) == 1)
            await set_draining(mesh, old, True)
            snapshot = await eventually(mesh.mirror, lambda s: len([*s.replicas_of("tiny")]) == 2)
            waiting = group.create_task(mesh.call(router, "tiny", timeout=30.0))
            assert [r.id.node for r in ready(snapshot, "tiny")] == ["a"]
            new.may_load.set()
            assert await waiting == "tiny/b/0"
            old.open_gate.set()
            assert await running == "tiny/a/0"
        await eventually(mesh.mirror, lambda s: [r.id.node for r in s.replicas_of("tiny")] == ["b"])
        assert old.replicas == {}


async def test_with_no_other_place_the_node_is_drained_in_the_end_and_resume_restores(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F7."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router(reconcile=ReconcileConfig(drain_patience_seconds=1.0))
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        await set_draining(mesh, node, True)
        await eventually(mesh.mirror, lambda s: not [*s.replicas_of("tiny")])
        await set_draining(mesh, node, False)
        assert await mesh.call(router, "tiny") == "tiny/a/0"
        assert node.loads["tiny"] == 2
