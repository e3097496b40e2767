"""T3a and T3 against a real etcd, and T3 against T2."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import CPU, HolderId, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import Leadership, RangeResult
from localmesh.etcd import transactions as t
from localmesh.store.presence import PresenceKeys
from tests.integration.store_kit import GIB, M0, Kit, M, N, store_kit

HEIR = ReplicaId(M, N, 5)

Read = Callable[..., Awaitable[tuple[RangeResult, ...]]]


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def lock(kit: Kit, replica: ReplicaRecord, holder: str = "h") -> int:
    """Take T2 by hand; return the holder's lease."""
    lease = (await kit.etcd.lease_grant(60)).id
    await PresenceKeys(kit.store, HolderId(holder)).take(replica, await kit.load(), lease, 1)
    return lease


async def test_a_drained_replica_takes_no_new_lock(kit: Kit) -> None:
    """F7; invariant 3."""
    ready = await kit.mesh_with_a_ready_replica()
    stale = await kit.load()
    drained = await kit.store.drain_replica(ready)
    assert drained.state is ReplicaState.DRAINING
    assert (await kit.load()).replica(M0) == drained
    lease = (await kit.etcd.lease_grant(60)).id
    with pytest.raises(Conflict):
        await PresenceKeys(kit.store, HolderId("h")).take(ready, stale, lease, 1)


async def test_draining_what_drains_already_changes_nothing(kit: Kit) -> None:
    ready = await kit.mesh_with_a_ready_replica()
    drained = await kit.store.drain_replica(ready)
    assert await kit.store.drain_replica(ready) == drained
    assert await kit.store.drain_replica(drained) == drained


async def test_a_replica_that_is_held_is_not_unloaded(kit: Kit) -> None:
    """F12; invariant 2."""
    ready = await kit.mesh_with_a_ready_replica()
    lease = await lock(kit, ready)
    assert not await kit.store.unload_replica(ready)
    assert (await kit.load()).replica(M0) == ready
    await kit.etcd.lease_revoke(lease)
    assert await kit.store.unload_replica(ready)
    assert await kit.store.unload_replica(ready)


async def test_the_replica_s_own_running_calls_keep_it_too(kit: Kit) -> None:
    """Invariant 2, for callers that no holder sees."""
    ready = await kit.mesh_with_a_ready_replica()
    assert await kit.store.put_self_inflight(ready, 2)
    assert not await kit.store.unload_replica(ready)
    assert await kit.store.put_self_inflight(ready, 0)
    assert await kit.store.unload_replica(ready)


async def test_a_holder_of_a_neighbour_does_not_matter(kit: Kit) -> None:
    """F36."""
    ready = await kit.mesh_with_a_ready_replica()
    sibling = await kit.ready(ReplicaId(M, N, 1))
    await lock(kit, sibling)
    assert await kit.store.unload_replica(ready)
    assert not await kit.store.unload_replica(sibling)


async def test_a_replica_that_changed_since_it_was_seen_is_neither_drained_nor_unloaded(kit: Kit) -> None:
    await kit.model()
    await kit.node()
    placed = await kit.place()
    await kit.report_ready(placed)
    with pytest.raises(Conflict):
        await kit.store.drain_replica(placed)
    with pytest.raises(Conflict):
        await kit.store.unload_replica(placed)


async def test_a_later_life_of_the_same_name_is_not_unloaded(kit: Kit) -> None:
    """F49."""
    first = await kit.mesh_with_a_ready_replica()
    await kit.store.exited(first)
    second = await kit.ready()
    for end in (kit.store.drain_replica, kit.store.unload_replica):
        with pytest.raises(Conflict):
            await end(first)
    assert (await kit.load()).replica(M0) == second


async def test_unloading_keeps_lease_and_claim_and_names_the_heir(kit: Kit) -> None:
    ready = await kit.mesh_with_a_ready_replica()
    assert await kit.store.unload_replica(ready, memory_for=HEIR)
    snapshot = await kit.load()
    record = snapshot.replica(M0)
    assert record is not None
    assert (record.state, record.memory_for) == (ReplicaState.UNLOADING, HEIR)
    assert snapshot.devices[N][CPU].claims == {M0: GIB}
    stored = await kit.etcd.get(kit.store.keys.replica(M0))
    assert stored is not None
    assert stored.lease == kit.nodes[N].record_lease


async def test_a_deposed_leader_ends_nothing(kit: Kit) -> None:
    ready = await kit.mesh_with_a_ready_replica()
    deposed = Leadership(kit.store.keys.leader(), 1)
    with pytest.raises(Conflict):
        await kit.store.drain_replica(ready, leader=deposed)
    with pytest.raises(Conflict):
        await kit.store.unload_replica(ready, leader=deposed)
    assert (await kit.load()).replica(M0) == ready


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_lost_answers_are_settled(kit: Kit, losses: list[str | None]) -> None:
    ready = await kit.mesh_with_a_ready_replica()
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    drained = await kit.store.drain_replica(ready)
    assert (await kit.load()).replica(M0) == drained
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    assert await kit.store.unload_replica(drained)


async def test_of_a_lock_and_an_unload_at_the_same_time_exactly_one_wins(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F12; invariants 2 and 3. In every other round the lock sets out only when T3 has read and is about to write."""
    await kit.model()
    await kit.node(gib=100, slots=100)
    locks = 0
    for index in range(40):
        replica = ReplicaId(M, N, index)
        ready = await kit.ready(replica)
        snapshot = await kit.load()
        lease = (await kit.etcd.lease_grant(60)).id
        off = asyncio.Event()
        read = kit.store.read

        async def reading(*gets: t.Get, read: Read = read, off: asyncio.Event = off) -> tuple[RangeResult, ...]:
            answer = await read(*gets)
            off.set()
            return answer

        async def take(ready: ReplicaRecord, snapshot: Snapshot, lease: int, off: asyncio.Event) -> bool:
            await off.wait()
            try:
                await PresenceKeys(kit.store, HolderId("h")).take(ready, snapshot, lease, 1)
            except Conflict:
                return False
            return True

        if index % 2:
            off.set()
        with monkeypatch.context() as patch:
            patch.setattr(kit.store, "read", reading)
            unloaded, locked = await asyncio.gather(kit.store.unload_replica(ready), take(ready, snapshot, lease, off))
        assert unloaded is not locked
        after = await kit.load()
        record = after.replica(replica)
        assert record is not None
        assert (record.state is ReplicaState.UNLOADING) is unloaded
        assert bool(after.inflight.get(replica)) is locked
        locks += locked
        await kit.etcd.lease_revoke(lease)
    assert 0 < locks < 40
