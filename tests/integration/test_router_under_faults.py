"""Traffic while replicas exit, nodes die and models are edited. Real etcd, real gRPC, no engine."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc

from localmesh.core.errors import MeshError, ReplicaLost
from localmesh.core.records import Policy
from localmesh.rpc.errors import from_rpc_error
from localmesh.scheduling.reconcile import ReconcileConfig
from tests.integration.router_kit import CLOCK, FakeNode, RouterMesh, declare, eventually, ready, router_mesh

_SECONDS = 5.0
_KINDS = ("Unary", "ServerStream")


async def _call(mesh: RouterMesh, router: Any, model: str, kind: str) -> MeshError | None:
    channel = mesh.channel(router)
    metadata = (("localmesh-model", model),)
    try:
        if kind == "Unary":
            assert await channel.unary_unary(f"/t.T/{kind}")(b"m", metadata=metadata, timeout=30) == b"m"
        else:
            stream = channel.unary_stream(f"/t.T/{kind}")(b"m", metadata=metadata, timeout=30)
            assert [m async for m in stream] == [b"m", b"m"]
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


async def _traffic(
    mesh: RouterMesh, routers: list[Any], until: float, chance: random.Random, seen: Counter[str]
) -> None:
    while CLOCK.monotonic() < until:
        kind = chance.choice(_KINDS)
        failed = await _call(mesh, chance.choice(routers), chance.choice(["one", "two"]), kind)
        seen[type(failed).__name__ if failed is not None else "OK"] += 1
        # A stream that has begun cannot be retried; nothing else may reach the caller.
        assert failed is None or (kind == "ServerStream" and isinstance(failed, ReplicaLost)), failed


async def _trouble(mesh: RouterMesh, nodes: list[FakeNode], until: float, chance: random.Random) -> None:
    edits = 0
    while CLOCK.monotonic() < until:
        await asyncio.sleep(0.25)  # the rhythm of the faults, not a wait for something
        node = chance.choice(nodes)
        if node.replicas and chance.random() < 0.6:
            name, fake = chance.choice(sorted(node.replicas.items(), key=lambda item: str(item[0])))
            await fake.stop()
            await node.exit_of(name)
        else:
            edits += 1
            await declare(mesh.store, "two", Policy(min_replicas=1), context_tokens=edits)


async def test_callers_see_no_failure_but_broken_streams_and_nothing_is_left_counted(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F5, F17, F19."""
    chance = random.Random(7)
    seen: Counter[str] = Counter()
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "one", Policy(min_replicas=2))
        await declare(mesh.store, "two", Policy(min_replicas=1))
        nodes = [await mesh.node(name, max_replicas_per_model=2, limit=8) for name in "abc"]
        routers = [await mesh.router(name, reconcile=ReconcileConfig(dead_after_seconds=1.0)) for name in ("r1", "r2")]
        await eventually(mesh.mirror, lambda s: len(ready(s, "one")) == 2 and ready(s, "two"))
        until = CLOCK.monotonic() + _SECONDS
        async with asyncio.TaskGroup() as group:
            group.create_task(_trouble(mesh, nodes, until, chance))
            for number in range(8):
                group.create_task(_traffic(mesh, routers, until, random.Random(number), seen))
        assert seen["OK"] > 100, seen
        async with asyncio.timeout(10):
            while any(router.in_flight for router in routers):
                await asyncio.sleep(0.01)
        await eventually(mesh.mirror, lambda s: not any(s.inflight.values()))
        await eventually(mesh.mirror, lambda s: len(ready(s, "one")) == 2 and len(ready(s, "two")) == 1)
        snapshot = mesh.mirror.snapshot
        claims = sum(device.claimed_bytes for by_id in snapshot.devices.values() for device in by_id.values())
        assert claims == sum(sum(r.devices.values()) for r in snapshot.all_replicas())
