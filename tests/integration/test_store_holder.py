"""T2 and the life of a holder against a real etcd."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from localmesh.core.errors import Conflict, StoreUnavailable
from localmesh.core.ids import HolderId, ReplicaId
from localmesh.core.records import ModelSpec, ReplicaRecord
from localmesh.store import Hold, Holder, HolderConfig
from localmesh.store.access import LeaseGone
from localmesh.store.presence import PresenceKeys
from tests.integration.store_kit import (
    CLOCK,
    M0,
    Kit,
    M,
    N,
    eventually,
    holding,
    mirrored,
    soon,
    store_kit,
)

QUICK = HolderConfig(linger_seconds=0.4)
STICKY = HolderConfig(linger_seconds=600.0)


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def acquire(kit: Kit, holder: Holder, record: ReplicaRecord) -> Hold:
    snapshot = await kit.seen(record.mod_revision)
    return await holder.acquire(record, snapshot, soon())


async def version(kit: Kit, holder: Holder, replica: ReplicaId = M0) -> int:
    """Puts of the holder's key; 0 where there is none."""
    stored = await kit.etcd.get(kit.store.keys.inflight(replica, holder.holder_id))
    return stored.version if stored is not None else 0


async def test_a_lock_is_a_key_under_the_holder_s_lease(kit: Kit) -> None:
    """F12."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        hold = await acquire(kit, holder, record)
        assert hold.protected
        assert hold.replica == M0
        stored = await kit.etcd.get(kit.store.keys.inflight(M0, holder.holder_id))
        assert stored is not None
        assert stored.lease != 0
        assert not await kit.store.unload_replica(record)
        assert holder.in_flight(M0) == 1


async def test_further_requests_write_nothing(kit: Kit) -> None:
    """F12: neither taking nor ending them awaits, or reaches the store."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, STICKY) as holder:
        hold = await acquire(kit, holder, record)
        await eventually(lambda: kit.mirror.snapshot.in_flight(M0) == 1)
        calls = kit.etcd.statistics().calls
        for _ in range(10_000):
            more = holder.try_acquire(record)
            assert more is not None
            more.release()
        assert kit.etcd.statistics().calls == calls
        assert holder.in_flight(M0) == 1
        # The count is what it was published as: nothing is to be written later, either.
        await asyncio.sleep(0.2)
        assert await version(kit, holder) == 1
        hold.release()


async def test_counts_are_written_coalesced_and_end_up_right(kit: Kit) -> None:
    """F17: at most 20 writes a second for each replica."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, STICKY) as holder:
        first = await acquire(kit, holder, record)
        holds = []
        began = CLOCK.monotonic()
        for _ in range(300):
            hold = holder.try_acquire(record)
            assert hold is not None
            holds.append(hold)
            await asyncio.sleep(0.002)
        await eventually(lambda: kit.mirror.snapshot.in_flight(M0) == 301)
        seconds = CLOCK.monotonic() - began
        assert 2 <= await version(kit, holder) <= 2 + 20 * seconds
        for hold in holds:
            hold.release()
            hold.release()
        await eventually(lambda: kit.mirror.snapshot.in_flight(M0) == 1)
        assert holder.in_flight(M0) == 1
        first.release()
        await eventually(lambda: kit.mirror.snapshot.inflight[M0] == {holder.holder_id: 0})


async def test_all_count_writes_together_stay_below_the_limit(kit: Kit) -> None:
    """F17: at most 50 a second for each holder."""
    await kit.model()
    await kit.node(gib=20, slots=20)
    records = [await kit.ready(ReplicaId(M, N, index)) for index in range(12)]
    async with mirrored(kit), holding(kit, STICKY) as holder:
        for record in records:
            await acquire(kit, holder, record)
        began = CLOCK.monotonic()
        writes = holder.statistics().count_writes
        for _ in range(60):
            for record in records:
                assert holder.try_acquire(record) is not None
            await asyncio.sleep(0.01)
        seconds = CLOCK.monotonic() - began
        assert 0 < holder.statistics().count_writes - writes <= 50 * seconds + 1
        await eventually(lambda: all(kit.mirror.snapshot.in_flight(r.id) == 61 for r in records))


async def test_requests_at_the_same_time_share_one_transaction(kit: Kit) -> None:
    """F12."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, STICKY) as holder:
        holds = await asyncio.gather(*(acquire(kit, holder, record) for _ in range(50)))
        assert all(hold.protected for hold in holds)
        assert holder.statistics().locks_taken == 1
        assert holder.in_flight(M0) == 50


async def test_an_unused_lock_lingers_and_is_then_deleted(kit: Kit) -> None:
    """F12."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, QUICK) as holder:
        hold = await acquire(kit, holder, record)
        hold.release()
        assert holder.statistics().replicas == 1
        again = holder.try_acquire(record)  # within the linger
        assert again is not None
        again.release()
        await kit.until(lambda s: not s.inflight)
        await eventually(lambda: holder.statistics().replicas == 0)
        assert await kit.store.unload_replica(record)


async def test_a_request_while_the_lock_is_given_up_takes_it_anew(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: first RELEASING here, then deleted there."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, QUICK) as holder:
        hold = await acquire(kit, holder, record)
        about, go = asyncio.Event(), asyncio.Event()
        release = holder._keys.release

        async def slowly(*args: object) -> None:
            about.set()
            await go.wait()
            await release(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(holder._keys, "release", slowly)
        hold.release()
        await asyncio.wait_for(about.wait(), 20)
        assert holder.try_acquire(record) is None
        async with asyncio.TaskGroup() as group:
            again = group.create_task(acquire(kit, holder, record))
            done, _ = await asyncio.wait([again], timeout=0.05)
            assert not done
            go.set()
        assert again.result().protected
        assert await version(kit, holder) >= 1
        assert holder.statistics().locks_taken == 2


async def cordon(kit: Kit) -> None:
    approval = (await kit.load()).approvals[N]
    await kit.store.put_approval(N, expected=approval, new=replace(approval, cordoned=True))


async def edit(kit: Kit) -> None:
    await kit.store.put_model(ModelSpec(name=M, backend="llama", source="new"), None)


async def drain(kit: Kit) -> None:
    record = (await kit.load()).replica(M0)
    assert record is not None
    await kit.store.drain_replica(record)


async def lose(kit: Kit) -> None:
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)


@pytest.mark.parametrize("change", [cordon, edit, drain, lose], ids=lambda change: change.__name__)
async def test_there_is_no_new_lock_from_the_revision_of_a_change_on(kit: Kit, change: object) -> None:
    """Invariant 3: cordon, edit, drain and loss of the node, with a snapshot from before."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        stale = await kit.seen(record.mod_revision)
        assert callable(change)
        await change(kit)
        with pytest.raises(Conflict):
            await holder.acquire(record, stale, soon())
        assert holder.statistics().conflicts == 1
        assert holder.statistics().replicas == 0
        assert await version(kit, holder) == 0


async def test_a_holder_that_has_the_lock_stops_when_it_sees_the_replica_leave(kit: Kit) -> None:
    """Invariant 3."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        hold = await acquire(kit, holder, record)
        drained = await kit.store.drain_replica(record)
        snapshot = await kit.seen(drained.mod_revision)
        assert holder.try_acquire(drained) is None
        with pytest.raises(Conflict):
            await holder.acquire(drained, snapshot, soon())
        assert hold.protected
        assert not await kit.store.unload_replica(drained)
        hold.release()


async def test_a_later_life_of_the_replica_is_locked_anew(kit: Kit) -> None:
    """F16."""
    first = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, STICKY) as holder:
        (await acquire(kit, holder, first)).release()
        await kit.store.exited(first)
        second = await kit.ready()
        assert holder.try_acquire(second) is None
        hold = await acquire(kit, holder, second)
        assert hold.protected
        assert holder.statistics().locks_taken == 2
        assert not await kit.store.unload_replica(second)


async def test_a_caller_that_gives_up_leaves_no_lock_behind(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """F17."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, QUICK) as holder:
        commit, about, go = kit.store.commit, asyncio.Event(), asyncio.Event()

        async def slowly(*args: object, **kwargs: object) -> object:
            about.set()
            await go.wait()
            return await commit(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(kit.store, "commit", slowly)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(acquire(kit, holder, record))
            await asyncio.wait_for(about.wait(), 20)
            task.cancel()
        go.set()
        await kit.until(lambda s: s.inflight.get(M0) == {holder.holder_id: 0})
        assert holder.in_flight(M0) == 0
        await eventually(lambda: holder.statistics().replicas == 0)
        await kit.until(lambda s: not s.inflight)


async def test_a_lost_lease_is_replaced_and_every_lock_taken_anew(kit: Kit) -> None:
    """F17."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, STICKY) as holder:
        hold = await acquire(kit, holder, record)
        stored = await kit.etcd.get(kit.store.keys.inflight(M0, holder.holder_id))
        assert stored is not None
        await kit.etcd.lease_revoke(stored.lease)
        assert await version(kit, holder) == 0
        await eventually(lambda: holder.statistics().locks_taken == 2)
        assert hold.protected
        anew = await kit.etcd.get(kit.store.keys.inflight(M0, holder.holder_id))
        assert anew is not None
        assert anew.lease != stored.lease
        assert holder.in_flight(M0) == 1


async def test_a_lock_that_fails_with_a_lease_of_yesterday_does_not_cost_the_new_one(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await kit.mesh_with_a_ready_replica()
    leases: list[int] = []
    late, answered = asyncio.Event(), asyncio.Event()
    take = PresenceKeys.take

    async def slow_at_first(self, replica, snapshot, lease: int, count: int):
        leases.append(lease)
        if len(leases) > 1:
            return await take(self, replica, snapshot, lease, count)
        await late.wait()
        answered.set()
        raise LeaseGone("A lease has expired meanwhile.")

    monkeypatch.setattr(PresenceKeys, "take", slow_at_first)
    async with mirrored(kit), holding(kit, STICKY) as holder:
        hold = await acquire(kit, holder, record)  # unprotected: etcd is slow
        await kit.etcd.lease_revoke(leases[0])
        granted = set(await kit.etcd.leases())
        async with asyncio.timeout(10):
            while not (new := set(await kit.etcd.leases()) - granted):
                await asyncio.sleep(0.02)
        await holder.ready()
        late.set()
        await answered.wait()
        await eventually(lambda: hold.protected)
        assert leases[-1] in new
        hold.release()


async def test_a_lock_is_not_taken_anew_on_a_replica_that_leaves(kit: Kit) -> None:
    """Invariant 3: the request goes on, unprotected; the replica finishes it."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        hold = await acquire(kit, holder, record)
        stored = await kit.etcd.get(kit.store.keys.inflight(M0, holder.holder_id))
        assert stored is not None
        drained = await kit.store.drain_replica(record)
        await kit.seen(drained.mod_revision)
        await kit.etcd.lease_revoke(stored.lease)
        await eventually(lambda: not hold.protected)
        await holder.ready()
        assert await kit.store.unload_replica(drained)
        assert holder.statistics().unprotected == 1
        hold.release()
        assert holder.statistics().replicas == 0


async def test_a_presence_that_somebody_deleted_is_noticed_and_put_back(kit: Kit) -> None:
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        hold = await acquire(kit, holder, record)
        await kit.until(lambda s: M0 in s.inflight)
        await kit.etcd.delete(kit.store.keys.inflight(M0, holder.holder_id))
        await eventually(lambda: holder.statistics().locks_taken == 2)
        assert hold.protected
        assert await version(kit, holder) == 1


async def test_an_own_key_that_nobody_holds_is_deleted(kit: Kit) -> None:
    """F17: a late unknown outcome."""
    await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit) as holder:
        await kit.etcd.put(kit.store.keys.inflight(M0, holder.holder_id), b"")
        await kit.until(lambda s: M0 in s.inflight)
        await kit.until(lambda s: M0 not in s.inflight)
        await kit.etcd.put(kit.store.keys.inflight(M0, HolderId("somebody-else")), b"")
        await kit.until(lambda s: M0 in s.inflight)
        await asyncio.sleep(1.2)  # longer than from one look to the next
        assert M0 in kit.mirror.snapshot.inflight


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_a_lost_answer_is_settled_by_the_token(kit: Kit, losses: list[str | None]) -> None:
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, QUICK) as holder:
        snapshot = await kit.seen(record.mod_revision)
        kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
        hold = await holder.acquire(record, snapshot, soon())
        assert hold.protected
        assert not await kit.store.unload_replica(record)
        hold.release()
        await kit.until(lambda s: not s.inflight)


async def test_without_etcd_requests_go_on_unprotected_and_are_protected_later(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4; invariant 7."""
    record = await kit.mesh_with_a_ready_replica()
    patient = HolderConfig(patience_seconds=0.3)
    async with mirrored(kit), holding(kit, patient) as holder:
        snapshot = await kit.seen(record.mod_revision)

        async def away(*_: object, **__: object) -> None:
            raise StoreUnavailable("etcd is away")

        with monkeypatch.context() as patch:
            patch.setattr(kit.store, "commit", away)
            hold = await holder.acquire(record, snapshot, soon())
            assert not hold.protected
            quick = holder.try_acquire(record)
            assert quick is not None
            assert not quick.protected
            quick.release()
            assert holder.in_flight(M0) == 1
        await eventually(lambda: hold.protected)
        assert not await kit.store.unload_replica(record)


async def test_a_request_waits_no_longer_for_a_slow_etcd_than_it_may(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 7."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, HolderConfig(patience_seconds=600.0)) as holder:
        snapshot = await kit.seen(record.mod_revision)
        commit, go = kit.store.commit, asyncio.Event()

        async def slowly(*args: object, **kwargs: object) -> object:
            await go.wait()
            return await commit(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(kit.store, "commit", slowly)
        hold = await holder.acquire(record, snapshot, CLOCK.monotonic() + 0.1)
        assert not hold.protected
        go.set()
        await eventually(lambda: hold.protected)
        await kit.until(lambda s: s.in_flight(M0) == 1)


async def test_a_holder_that_ends_takes_its_keys_along(kit: Kit) -> None:
    """F17."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit):
        async with holding(kit, STICKY) as holder:
            await acquire(kit, holder, record)
            await kit.until(lambda s: M0 in s.inflight)
        assert await version(kit, holder) == 0
        assert await kit.store.unload_replica(record)


async def test_holders_do_not_share_ids_even_under_one_name(kit: Kit) -> None:
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit), holding(kit, name="r") as one, holding(kit, name="r") as two:
        assert one.holder_id != two.holder_id
        await acquire(kit, one, record)
        await acquire(kit, two, record)
        snapshot = await kit.until(lambda s: s.in_flight(M0) == 2)
        assert snapshot.in_flight(M0, without=one.holder_id) == 1


async def test_the_last_use_is_a_clock_of_its_own_requests(kit: Kit) -> None:
    """F11."""
    await kit.model()
    await kit.node()
    a, b = [await kit.ready(ReplicaId(M, N, index)) for index in range(2)]
    async with mirrored(kit), holding(kit, STICKY) as holder:
        assert holder.last_used(a.id) == 0
        (await acquire(kit, holder, a)).release()
        (await acquire(kit, holder, b)).release()
        assert 0 < holder.last_used(a.id) < holder.last_used(b.id)
        again = holder.try_acquire(a)
        assert again is not None
        assert holder.last_used(a.id) > holder.last_used(b.id)


async def test_a_name_that_cannot_be_part_of_a_key_is_refused(kit: Kit) -> None:
    with pytest.raises(ValueError, match="not a holder"):
        Holder(kit.mirror, "a/b")
