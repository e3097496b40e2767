"""The elected reconciler: what is wanted comes about, and stays. Real etcd, real gRPC, no engine."""

import asyncio

import grpc
import pytest

from localmesh.core.errors import ModelNotFound
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.records import FailureRecord, Policy
from localmesh.rpc.errors import from_rpc_error
from localmesh.scheduling.failures import FailurePolicy
from localmesh.scheduling.reconcile import ReconcileConfig
from tests.integration.router_kit import MIB, FakeNode, RouterMesh, declare, eventually, ready, router_mesh

QUICK = ReconcileConfig(dead_after_seconds=1.0)


async def test_the_minimum_is_there_before_anybody_asks_and_a_replica_that_exits_is_replaced(
    etcd_endpoint: str, mesh_name: str
) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        nodes = {name: await mesh.node(name) for name in "ab"}
        await mesh.router()
        snapshot = await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        victim = ready(snapshot, "tiny")[0]
        node = nodes[victim.id.node]
        await node.replicas[victim.id].stop()
        await node.exit_of(victim.id)
        await eventually(
            mesh.mirror,
            lambda s: len({r.create_revision for r in ready(s, "tiny")} - {victim.create_revision}) == 2,
        )
        assert node.loads["tiny"] == 2


@pytest.mark.parametrize("maximum", [0, 1])
async def test_a_node_that_stays_away_is_replaced(etcd_endpoint: str, mesh_name: str, maximum: int) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1, max_replicas=maximum))
        nodes = [
            await mesh.node("a", memory_mib=2000, presence_seconds=1),
            await mesh.node("b", memory_mib=1000, presence_seconds=1),
        ]
        router = await mesh.router(reconcile=QUICK)
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        assert list(nodes[0].replicas) == [ReplicaId("tiny", "a", 0)]
        await mesh.kill_node(nodes[0])
        await eventually(mesh.mirror, lambda s: [r.id.node for r in ready(s, "tiny")] == ["b"], within=30.0)
        assert await mesh.call(router, "tiny") == "tiny/b/0"


async def test_a_deleted_model_is_unloaded_and_unknown(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        await mesh.call(router, "tiny")
        (replica,) = node.replicas.values()
        assert replica.endpoint in repr(mesh.channels_of[router])
        await mesh.store.delete_model(model)
        snapshot = await eventually(mesh.mirror, lambda s: model not in s.models and not list(s.replicas_of(model)))
        assert node.replicas == {}
        async with asyncio.timeout(10):
            while replica.endpoint in repr(mesh.channels_of[router]):
                await asyncio.sleep(0.01)
        assert snapshot.devices[node.name]["cpu"].claimed_bytes == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.call(router, "tiny")
        assert isinstance(from_rpc_error(caught.value), ModelNotFound)


async def test_an_edit_rolls_in_without_a_failed_request(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a", max_replicas_per_model=2)
        router = await mesh.router()
        old = (await eventually(mesh.mirror, lambda s: ready(s, "tiny"))).models[model].revision
        stop = asyncio.Event()
        served: set[str] = set()

        async def traffic() -> None:
            while not stop.is_set():
                served.add(await mesh.call(router, "tiny"))

        async with asyncio.TaskGroup() as group:
            group.create_task(traffic())
            await declare(mesh.store, "tiny", Policy(min_replicas=1), context_tokens=64)
            await eventually(
                mesh.mirror,
                lambda s: [r.revision for r in s.replicas_of(model)] not in ([], [old]) and not _of(s, model, old),
            )
            stop.set()
        assert served == {"tiny/a/0", "tiny/a/1"}
        assert list(node.replicas) == [ReplicaId("tiny", "a", 1)]


def _of(snapshot: object, model: str, revision: str) -> list[object]:
    return [r for r in snapshot.replicas_of(model) if r.revision == revision]


async def test_one_of_two_routers_leads_and_the_other_takes_over(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        nodes = {name: await mesh.node(name) for name in "ab"}
        routers = {name: await mesh.router(name, ttl_seconds=2) for name in ("r1", "r2")}
        leader = (await eventually(mesh.mirror, lambda s: s.leader)).leader
        other = ({*routers} - {leader}).pop()
        await mesh.stop_router(routers[leader])
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        await eventually(mesh.mirror, lambda s: s.leader == other and len(ready(s, "tiny")) == 2, within=30.0)
        assert [node.loads["tiny"] for node in nodes.values()] == [1, 1]
        assert await mesh.call(routers[other], "tiny")


async def test_a_router_that_ends_in_the_middle_of_a_request_leaves_no_presence_behind(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F17: its requests are not counted for ever."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        doomed, other = await mesh.router("r1"), await mesh.router("r2")
        (replica,) = ready(await eventually(mesh.mirror, lambda s: ready(s, "tiny")), "tiny")
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            call = group.create_task(_status_of(mesh, doomed))
            await eventually(mesh.mirror, lambda s: s.in_flight(replica.id) == 1)
            await mesh.stop_router(doomed)
        assert call.result() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await eventually(mesh.mirror, lambda s: not s.inflight.get(replica.id))
        node.open_gate.set()
        assert await mesh.call(other, "tiny") == str(replica.id)


async def _status_of(mesh: RouterMesh, router: object) -> grpc.StatusCode:
    try:
        await mesh.call(router, "tiny", timeout=30.0)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_slow_action_holds_up_no_other(
    etcd_endpoint: str, mesh_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "old", Policy(min_replicas=1))
        await mesh.node("a")
        await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "old"))
        drain = mesh.store.drain_replica
        tried: list[int] = []

        async def hang_once(*args: object, **kwargs: object) -> object:
            tried.append(1)
            if len(tried) == 1:
                await asyncio.Event().wait()
            return await drain(*args, **kwargs)

        monkeypatch.setattr(mesh.store, "drain_replica", hang_once)
        await mesh.store.delete_model("old")
        await eventually(mesh.mirror, lambda s: "old" not in s.models)
        await declare(mesh.store, "new", Policy(min_replicas=1))
        await eventually(mesh.mirror, lambda s: ready(s, "new"))
        assert tried == [1]


async def test_ten_cold_models_at_once_on_two_nodes_all_come_up(etcd_endpoint: str, mesh_name: str) -> None:
    """Placements of one process follow one another; none is lost to a conflict, and no device is over-claimed."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        names = [await declare(mesh.store, f"m{i}", memory_bytes=100 * MIB) for i in range(10)]
        nodes: list[FakeNode] = [await mesh.node(name, memory_mib=500) for name in "ab"]
        router = await mesh.router()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, name, timeout=60.0)) for name in names]
        assert sorted(call.result().split("/")[0] for call in calls) == sorted(names)
        assert [len(node.replicas) for node in nodes] == [5, 5]


async def test_a_model_that_dies_again_and_again_is_left_alone_until_its_pause_is_over(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F42: a minimum is no reason to crash for ever; an edit is tried at once."""
    policy = FailurePolicy(first_seconds=60, deaths=2)
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        node = await mesh.node("a")
        await mesh.router()
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        for _ in range(2):
            now = await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
            [record] = ready(now, "tiny")
            failure = FailureRecord(
                model=record.id.model, node=node.name, reason="REPLICA_LOST", message="x", revision=record.revision
            )
            await node.replicas.pop(record.id).stop()
            await mesh.store.exited(record, failure=failure, died=True, policy=policy)
            await eventually(mesh.mirror, lambda s, gone=record: s.replica(gone.id) != gone)
        assert node.loads["tiny"] == 2
        kept = await eventually(mesh.mirror, lambda s: s.failures.get(ModelName("tiny")))
        assert not list(kept.replicas_of(ModelName("tiny")))
        await declare(mesh.store, "tiny", Policy(min_replicas=1), context_tokens=64)
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        assert node.loads["tiny"] == 3
