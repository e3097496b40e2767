"""Eviction against a real etcd: all victims or none, never who is held, and memory that goes from hand to hand."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import CPU, HolderId, ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.store.eviction import Eviction
from localmesh.store.presence import PresenceKeys
from tests.integration.store_kit import GIB, Kit, N, store_kit

NEW = ModelName("new")
HEIR = ReplicaId(NEW, N, 0)


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def full(kit: Kit, **policy: Any) -> list[ReplicaRecord]:
    """Fill a node of 4 GiB with two models, and declare a third one."""
    await kit.node()
    for name in ("a", "b", "new"):
        await kit.model(ModelName(name), **(policy if name == "a" else {}))
    return [await kit.ready(ReplicaId(ModelName(name), N, 0), gib=2) for name in ("a", "b")]


async def decision(kit: Kit, *victims: ReplicaRecord, keepers: tuple[ReplicaRecord, ...] = ()) -> Eviction:
    return Eviction(heir=HEIR, victims=victims, keepers=keepers, snapshot=await kit.load())


async def hold(kit: Kit, replica: ReplicaRecord) -> int:
    lease = (await kit.etcd.lease_grant(60)).id
    await PresenceKeys(kit.store, HolderId("h")).take(replica, await kit.load(), lease, 0)
    return lease


async def states(kit: Kit) -> set[ReplicaState]:
    return {r.state for r in (await kit.load()).all_replicas()}


async def test_all_victims_go_and_their_memory_is_the_heirs(kit: Kit) -> None:
    """F36; invariant 1: the claims never exceed the budget, and are never nobody's."""
    a, b = await full(kit)
    assert await kit.store.evict(await decision(kit, a, b))
    for victim in (a, b):
        now = (await kit.load()).replica(victim.id)
        assert now is not None
        assert (now.state, now.memory_for) == (ReplicaState.UNLOADING, HEIR)
        await kit.store.exited(now)
    device = (await kit.load()).devices[N][CPU]
    assert dict(device.claims) == {HEIR: 4 * GIB}
    with pytest.raises(Conflict):
        await kit.place(a.id)
    await kit.place(HEIR, gib=3)
    assert dict((await kit.load()).devices[N][CPU].claims) == {HEIR: 3 * GIB}


async def test_one_that_is_held_keeps_them_all(kit: Kit) -> None:
    """F36; invariant 2: half of the room is none, so nothing is stopped for it. A count of zero holds, too."""
    a, b = await full(kit)
    lease = await hold(kit, b)
    assert not await kit.store.evict(await decision(kit, a, b))
    assert await states(kit) == {ReplicaState.READY}
    await kit.etcd.lease_revoke(lease)
    assert await kit.store.evict(await decision(kit, a, b))


async def test_of_a_lock_and_an_eviction_exactly_one_wins(kit: Kit) -> None:
    """F36; invariant 2."""
    a, _ = await full(kit)
    snapshot = await kit.load()
    lease = (await kit.etcd.lease_grant(60)).id
    eviction = await decision(kit, a)

    async def lock() -> bool:
        try:
            await PresenceKeys(kit.store, HolderId("h")).take(a, snapshot, lease, 1)
        except Conflict:
            return False
        return True

    locked, evicted = await asyncio.gather(lock(), kit.store.evict(eviction))
    assert locked is not evicted
    assert (ReplicaState.UNLOADING in await states(kit)) is evicted


async def test_nothing_is_stopped_when_what_was_decided_upon_has_changed(kit: Kit) -> None:
    """F36: pinned, minimum, cordon and edits count from their own revision on."""
    a, b = await full(kit)
    for change in (
        lambda: kit.model(ModelName("a"), pinned=True),
        lambda: kit.model(NEW, slots=3),
        lambda: kit.store.drain_replica(b),
        lambda: kit.store.delete_model(NEW),
    ):
        stale = await decision(kit, a, keepers=(b,))
        await change()
        with pytest.raises(Conflict):
            await kit.store.evict(stale)
    now = (await kit.load()).replica(a.id)
    assert now is not None
    assert now.state is ReplicaState.READY


async def test_a_cordon_ends_the_eviction_for_a_node(kit: Kit) -> None:
    """F36; invariant 3."""
    a, _ = await full(kit)
    stale = await decision(kit, a)
    approval = stale.snapshot.approvals[N]
    await kit.store.put_approval(N, expected=approval, new=replace(approval, cordoned=True))
    with pytest.raises(Conflict):
        await kit.store.evict(stale)


async def test_two_evictions_of_one_view_do_not_break_a_minimum_together(kit: Kit) -> None:
    """F36: each is decided upon the other's victim staying."""
    await kit.node(slots=4)
    await kit.model(ModelName("a"), min_replicas=1)
    await kit.model(NEW)
    one, two = [await kit.ready(ReplicaId(ModelName("a"), N, i)) for i in (0, 1)]
    first, second = await decision(kit, one, keepers=(two,)), await decision(kit, two, keepers=(one,))
    assert await kit.store.evict(first)
    with pytest.raises(Conflict):
        await kit.store.evict(second)


async def test_memory_that_nobody_came_for_is_taken_back(kit: Kit) -> None:
    """F36; invariant 6: the placer died between T3 and T1."""
    a, _ = await full(kit)
    assert await kit.store.evict(await decision(kit, a))
    victim = (await kit.load()).replica(a.id)
    assert victim is not None
    await kit.store.exited(victim)
    assert await kit.store.take_back_claims(HEIR, [CPU])
    device = (await kit.load()).devices[N][CPU]
    assert {r.model for r in device.claims} == {"b"}
    assert not await kit.store.take_back_claims(HEIR, [CPU])


async def test_what_a_record_claims_is_not_taken_back(kit: Kit) -> None:
    a, _ = await full(kit)
    before = (await kit.load()).devices[N][CPU]
    assert not await kit.store.take_back_claims(a.id, [CPU])
    assert (await kit.load()).devices[N][CPU] == before


async def test_an_heir_that_came_by_itself_is_given_nothing_more(kit: Kit) -> None:
    """F36; invariant 6: a claim above what the record says would be nobody's, for as long as the heir lives."""
    a, b = await full(kit)
    assert await kit.store.evict(await decision(kit, a))
    await kit.store.exited(b)
    await kit.place(HEIR, gib=2)
    victim = (await kit.load()).replica(a.id)
    assert victim is not None
    await kit.store.exited(victim)
    assert dict((await kit.load()).devices[N][CPU].claims) == {HEIR: 2 * GIB}
