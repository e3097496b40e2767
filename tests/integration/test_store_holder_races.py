"""T2 against T3, and many holders at once, on a real etcd."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.store import Hold, Holder, HolderConfig
from tests.integration.store_kit import (
    GIB,
    Kit,
    M,
    N,
    holding,
    mirrored,
    soon,
    store_kit,
)


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def acquire(kit: Kit, holder: Holder, record: ReplicaRecord) -> Hold:
    snapshot = await kit.seen(record.mod_revision)
    return await holder.acquire(record, snapshot, soon())


async def test_locks_and_unloads_under_load_never_meet(kit: Kit) -> None:
    """F12; invariant 2: holders work on replicas while an evictor tries to unload whatever is idle."""
    await kit.model()
    await kit.node(gib=8, slots=8)
    for index in range(4):
        await kit.ready(ReplicaId(M, N, index))
    quickest = HolderConfig(linger_seconds=0.0)
    broken: list[str] = []
    served = unloaded = 0
    async with mirrored(kit), holding(kit, quickest) as one, holding(kit, quickest) as two:

        async def work(holder: Holder, number: int) -> None:
            nonlocal served
            for round_ in itertools.count():
                if unloaded >= 3 and served >= 100:
                    return
                snapshot = kit.mirror.snapshot
                routable = [r for r in snapshot.replicas_of(M) if snapshot.routable(r)]
                if not routable:
                    await asyncio.sleep(0.01)
                    continue
                replica = routable[(number % 2 + round_ // 20) % len(routable)]
                try:
                    hold = await holder.acquire(replica, snapshot, soon())
                except Conflict:
                    await asyncio.sleep(0)
                    continue
                try:
                    if not hold.protected:
                        continue
                    stored = await kit.store.stored_replica(replica.id)
                    if hold.protected and (stored is None or stored.record.state.leaving):
                        broken.append(f"{replica.id} was unloaded under a request")
                    served += 1
                finally:
                    hold.release()

        async def evict(working: asyncio.Event) -> None:
            nonlocal unloaded
            while not working.is_set():
                for replica in list(kit.mirror.snapshot.replicas_of(M)):
                    try:
                        if await kit.store.unload_replica(replica):
                            unloaded += 1
                            await kit.store.exited(replica)
                            await kit.ready(replica.id)
                    except Conflict:
                        continue
                await asyncio.sleep(0.005)

        done = asyncio.Event()
        async with asyncio.TaskGroup() as group, asyncio.timeout(60):
            group.create_task(evict(done))
            async with asyncio.TaskGroup() as workers:
                for number in range(4):
                    workers.create_task(work(one if number % 2 else two, number))
            done.set()
    assert broken == []


async def test_models_do_not_get_in_each_other_s_way(kit: Kit) -> None:
    """An edit of one model makes no lock on another one fail."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        snapshot = await kit.seen(record.mod_revision)
        await kit.model(ModelName("another"))
        assert (await holder.acquire(record, snapshot, soon())).protected
        assert snapshot.free_bytes(record) == 3 * GIB
