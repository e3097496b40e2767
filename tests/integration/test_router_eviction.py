"""More models than memory: what is idle makes room, what is busy is waited for. Real etcd, real gRPC, no engine."""

import asyncio
from itertools import groupby, pairwise

import grpc
import pytest

from localmesh.core.errors import NoCapacity
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import Policy, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EventKind
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.store.builder import Complaints, SnapshotBuilder
from localmesh.store.eviction import Eviction
from localmesh.store.mesh import MeshStore
from tests.integration.router_kit import MIB, FakeNode, RouterMesh, declare, eventually, ready, router_mesh, unary

NODE = NodeName("a")


async def every_revision(store: MeshStore, start: Snapshot) -> list[Snapshot]:
    """Return the mesh at each revision since then: what views coalesce, this does not."""
    end = (await store.load()).revision
    found, now = [], start
    async with store.etcd.watch(store.keys.prefix, start_revision=start.revision + 1) as watcher:
        async for batch in watcher:
            for revision, events in groupby(batch.events, key=lambda event: event.kv.mod_revision):
                builder = SnapshotBuilder(now, store.keys, Complaints())
                for event in events:
                    if event.kind is EventKind.PUT:
                        builder.put(event.kv)
                    else:
                        builder.delete(event.kv.key)
                now = builder.build(revision)
                found.append(now)
            if batch.revision >= end:
                return found
    raise AssertionError("the watch ended")


def check(history: list[Snapshot]) -> None:
    """Invariants 1, 2 and 4: claims within budget, nothing unloaded while held, never more than the slots."""
    assert history
    for before, now in pairwise(history):
        for devices in now.devices.values():
            for device in devices.values():
                assert device.claimed_bytes <= device.budget_bytes
        for replica in now.all_replicas():
            claims = {d: now.devices[replica.id.node][d].claims.get(replica.id) for d in replica.devices}
            assert claims == dict(replica.devices)
            known = before.replica(replica.id)
            if replica.state is ReplicaState.UNLOADING and (known is None or known.state is not replica.state):
                assert not before.inflight.get(replica.id)
        for model in now.replicas:
            here = [replica.id.node for replica in now.replicas_of(model)]
            assert len(here) == len(set(here))


async def two_models_and_room_for_one(mesh: RouterMesh, policy: Policy | None = None) -> tuple[FakeNode, Snapshot]:
    node = await mesh.node("a", memory_mib=100)
    start = await mesh.store.load()
    await declare(mesh.store, "one", policy, memory_bytes=80 * MIB)
    await declare(mesh.store, "two", memory_bytes=80 * MIB)
    return node, start


async def test_models_that_do_not_fit_together_take_turns(etcd_endpoint: str, mesh_name: str) -> None:
    """F36; invariants 1, 2 and 4: each request is answered, and they are never loaded both."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        _, start = await two_models_and_room_for_one(mesh)
        router = await mesh.router()
        for model in ("one", "two", "one", "two"):
            assert await mesh.call(router, model, timeout=30.0) == f"{model}/a/0"
        history = await every_revision(mesh.store, start)
        check(history)
        assert max(len(list(s.all_replicas())) for s in history) == 1
        handed = [s for s in history if not list(s.all_replicas()) and s.devices[NODE][CPU].claims]
        assert handed  # the memory was somebody's all the time


async def test_callers_of_both_are_all_served_in_the_end(etcd_endpoint: str, mesh_name: str) -> None:
    """F36, F38: from two routers at once, with nobody starving."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        _, start = await two_models_and_room_for_one(mesh)
        routers = [await mesh.router(name) for name in ("r1", "r2")]
        async with asyncio.TaskGroup() as group:
            for model in ("one", "two"):
                for router in routers:
                    group.create_task(mesh.call(router, model, timeout=50.0))
        check(await every_revision(mesh.store, start))


async def test_a_busy_replica_is_waited_for(etcd_endpoint: str, mesh_name: str) -> None:
    """F36; invariant 2."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        node, start = await two_models_and_room_for_one(mesh)
        router = await mesh.router()
        await mesh.call(router, "one")
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            busy = group.create_task(mesh.call(router, "one", timeout=30.0))
            await eventually(mesh.mirror, lambda s: s.in_flight(ReplicaId(ModelName("one"), NODE, 0)))
            waits = group.create_task(mesh.call(router, "two", timeout=30.0))
            async with asyncio.timeout(10):
                while router.short_of(ModelName("two")) is None:
                    await asyncio.sleep(0.01)
            assert not waits.done()
            assert ready(mesh.mirror.snapshot, "one")
            node.open_gate.set()
        assert (busy.result(), waits.result()) == ("one/a/0", "two/a/0")
        check(await every_revision(mesh.store, start))


async def test_a_caller_whose_patience_ends_is_told_what_is_in_the_way(etcd_endpoint: str, mesh_name: str) -> None:
    """F36, F44."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        node, _ = await two_models_and_room_for_one(mesh)
        router = await mesh.router(hold_seconds=1.5)
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            busy = group.create_task(mesh.call(router, "one", timeout=30.0))
            await eventually(mesh.mirror, lambda s: s.in_flight(ReplicaId(ModelName("one"), NODE, 0)))
            with pytest.raises(grpc.RpcError) as refused:
                await unary(mesh.channel(router))(b"x", metadata=((MODEL, "two"),), timeout=30.0)
            node.open_gate.set()
        error = from_rpc_error(refused.value)
        assert isinstance(error, NoCapacity)
        assert "on a 'one' has requests in flight" in error.message
        assert error.retry_after_seconds
        assert busy.result() == "one/a/0"


@pytest.mark.parametrize(
    ("policy", "word"), [(Policy(pinned=True), "is pinned"), (Policy(min_replicas=1), "is kept by its minimum of 1")]
)
async def test_what_is_protected_stays_and_the_caller_is_told_at_once(
    etcd_endpoint: str, mesh_name: str, policy: Policy, word: str
) -> None:
    """F36."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await two_models_and_room_for_one(mesh, policy)
        router = await mesh.router()
        await mesh.call(router, "one")
        with pytest.raises(grpc.RpcError) as refused:
            await unary(mesh.channel(router))(b"x", metadata=((MODEL, "two"),), timeout=30.0)
        error = from_rpc_error(refused.value)
        assert isinstance(error, NoCapacity)
        assert f"on a 'one' {word}" in error.message
        assert ready(mesh.mirror.snapshot, "one")


async def test_the_members_of_a_group_take_turns_on_a_node_that_has_room_for_both(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F37."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await mesh.node("a", memory_mib=1000)
        start = await mesh.store.load()
        for name in ("one", "two"):
            await declare(mesh.store, name, Policy(groups=("large",)), memory_bytes=80 * MIB)
        router = await mesh.router()
        for model in ("one", "two", "one"):
            assert await mesh.call(router, model, timeout=30.0) == f"{model}/a/0"
        history = await every_revision(mesh.store, start)
        check(history)
        assert max(len(list(s.all_replicas())) for s in history) == 1


async def test_memory_made_free_by_a_router_that_died_is_taken_back(etcd_endpoint: str, mesh_name: str) -> None:
    """F36; invariant 6: it died between T3 and T1, and nobody asks for its model again."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await two_models_and_room_for_one(mesh)
        router = await mesh.router()
        await mesh.call(router, "one")
        idle = await eventually(mesh.mirror, lambda s: not s.inflight and ready(s, "one"))
        heir = ReplicaId(ModelName("two"), NODE, 0)
        eviction = Eviction(heir=heir, victims=tuple(ready(idle, "one")), keepers=(), snapshot=idle)
        assert await mesh.store.evict(eviction)
        await eventually(mesh.mirror, lambda s: heir in s.devices[NODE][CPU].claims)
        await eventually(mesh.mirror, lambda s: not s.devices[NODE][CPU].claims)


async def test_what_a_router_that_died_made_free_is_there_for_who_asks_next(etcd_endpoint: str, mesh_name: str) -> None:
    """F36; invariant 6."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        _, start = await two_models_and_room_for_one(mesh)
        router = await mesh.router()
        await mesh.call(router, "one")
        idle = await eventually(mesh.mirror, lambda s: not s.inflight and ready(s, "one"))
        heir = ReplicaId(ModelName("two"), NODE, 0)
        eviction = Eviction(heir=heir, victims=tuple(ready(idle, "one")), keepers=(), snapshot=idle)
        assert await mesh.store.evict(eviction)
        assert await mesh.call(router, "two", timeout=30.0) == "two/a/0"
        check(await every_revision(mesh.store, start))


async def test_many_models_share_few_places_under_constant_change(etcd_endpoint: str, mesh_name: str) -> None:
    """F36, F37; invariants 1, 2 and 4: two routers, callers of all models at once, and each is answered."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        for name in ("a", "b"):
            await mesh.node(name, memory_mib=100)
        start = await mesh.store.load()
        names = ["one", "two", "three", "four", "five"]
        for name in names:
            policy = Policy(groups=("g",)) if name in ("one", "two") else None
            await declare(mesh.store, name, policy, memory_bytes=60 * MIB)
        routers = [await mesh.router(name) for name in ("r1", "r2")]

        async def caller(number: int) -> None:
            for turn in range(3):
                name = names[(number + 2 * turn) % len(names)]
                await mesh.call(routers[number % 2], name, timeout=55.0)

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(caller(number))
        history = await every_revision(mesh.store, start)
        check(history)
        for now in history:
            both = {m: {r.id.node for r in now.replicas_of(ModelName(m))} for m in ("one", "two")}
            assert not both["one"] & both["two"]
