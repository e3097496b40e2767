"""The mass-expiry guard, as router and reconciler keep it. Real etcd, real gRPC, no engine."""

import asyncio

from localmesh.core.records import Policy
from localmesh.scheduling.reconcile import ReconcileConfig
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1.router_service_pb2_grpc import RouterServiceStub
from tests.integration.router_kit import FakeNode, RouterMesh, declare, eventually, ready, router_mesh

QUICK = ReconcileConfig(dead_after_seconds=0.5)


async def silenced(mesh: RouterMesh, nodes: list[FakeNode]) -> None:
    """The nodes' leases end, as when nobody renews them; their replicas go on."""
    for node in nodes:
        await node.fall_silent()
    await eventually(mesh.mirror, lambda s: s.guarded and not {n.name for n in nodes} & s.nodes.keys())


async def test_nodes_that_fall_silent_together_go_on_serving_and_nothing_is_replaced(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F10: until an operator says go."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=3))
        nodes = [await mesh.node(name) for name in "abc"]
        router = await mesh.router(reconcile=QUICK)
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 3)
        spare = await mesh.node("d")
        await silenced(mesh, nodes)
        assert {await mesh.call(router, "tiny") for _ in range(6)} == {f"tiny/{n}/0" for n in "abc"}
        stub = RouterServiceStub(mesh.channel(router))
        (warning,) = [w for w in (await stub.GetStatus(pb.GetStatusRequest())).warnings if "guard release" in w]
        assert "(a, b, c)" in warning
        assert spare.loads["tiny"] == 0
        released = await stub.ReleaseGuard(pb.ReleaseGuardRequest())
        assert (released.released, [*released.nodes]) == (True, ["a", "b", "c"])
        await eventually(mesh.mirror, lambda s: not s.guarded and [r.id.node for r in ready(s, "tiny")] == ["d"])
        assert not (await stub.ReleaseGuard(pb.ReleaseGuardRequest())).released


async def test_nodes_that_are_heard_again_lift_the_guard_and_nothing_was_touched(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F10."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        nodes = [await mesh.node(name) for name in "ab"]
        router = await mesh.router(reconcile=QUICK)
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        await silenced(mesh, nodes)
        for node in nodes:
            node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(mesh.call(router, "tiny", timeout=30.0))
            async with asyncio.timeout(10):
                while not any(r.running for n in nodes for r in n.replicas.values()):
                    await asyncio.sleep(0.01)
            for node in nodes:
                await node.register()
            await eventually(mesh.mirror, lambda s: not s.guarded and len(s.nodes) == 2)
            for node in nodes:
                node.open_gate.set()
        assert running.result() in {"tiny/a/0", "tiny/b/0"}
        snapshot = await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        assert {r.id.node for r in ready(snapshot, "tiny")} == {"a", "b"}
        assert [node.loads["tiny"] for node in nodes] == [1, 1]
