"""The watched snapshot against a real etcd."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Self

import pytest

from localmesh.core.ids import CPU, ModelName, ReplicaId
from localmesh.core.records import ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import RevisionCompactedError, WatchBatch, Watcher
from localmesh.store import Mirror
from tests.integration.store_kit import CLOCK, M0, Kit, M, N, background, mirrored, soon, store_kit


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def test_a_mirror_shows_what_was_there_and_what_comes(kit: Kit) -> None:
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit) as mirror:
        assert mirror.snapshot.replica(M0) == record
        drained = await kit.store.drain_replica(record)
        snapshot = await kit.seen(drained.mod_revision)
        assert snapshot.replica(M0) == drained


async def test_a_mirror_agrees_with_the_store_after_many_changes(kit: Kit) -> None:
    await kit.model()
    await kit.node(gib=50, slots=50)
    async with mirrored(kit):
        for index in range(10):
            record = await kit.ready(ReplicaId(M, N, index))
            if index % 2:
                await kit.store.exited(record)
        await kit.node(running=[], gib=9)
        loaded = await kit.load()
        snapshot = await kit.seen(loaded.revision)
        assert snapshot == Snapshot(**{**fields_of(loaded), "revision": snapshot.revision})


def fields_of(snapshot: Snapshot) -> dict[str, object]:
    return {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}


async def test_record_and_claim_of_one_transaction_are_seen_together(kit: Kit) -> None:
    """F27: a revision is never seen in part."""
    await kit.model()
    await kit.node(gib=50, slots=50)
    torn: list[int] = []
    async with mirrored(kit) as mirror:
        done = asyncio.Event()

        async def check() -> None:
            async for snapshot in mirror.changes():
                claims = set(snapshot.devices[N][CPU].claims)
                if claims != {r.id for r in snapshot.all_replicas()}:
                    torn.append(snapshot.revision)
                if len(claims) == 10:
                    done.set()

        async with background(check()):
            for index in range(10):
                await kit.place(ReplicaId(M, N, index))
            await asyncio.wait_for(done.wait(), 20)
    assert torn == []


async def test_garbage_under_the_prefix_is_named_once_and_harms_nothing(
    kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    record = await kit.mesh_with_a_ready_replica()
    prefix = kit.store.keys.prefix
    await kit.etcd.put(prefix + b"replicas/m/n1/00", b"x")
    async with mirrored(kit) as mirror:
        with caplog.at_level(logging.WARNING, logger="localmesh.store"):
            for _ in range(3):
                await kit.etcd.put(prefix + b"\xff\x00garbage", b"x")
                await kit.etcd.put(prefix + b"models/bad", b"\xff\xff")
            last = await kit.etcd.put(prefix + b"nodes/n2", b"")  # a node without a lease
            snapshot = await kit.seen(last.revision)
        assert snapshot.replica(M0) == record
        assert set(snapshot.models) == {M}
        assert set(snapshot.nodes) == {N}
        assert len([r for r in caplog.records if r.name == "localmesh.store.builder"]) == 4
        assert mirror.connected


async def test_a_state_of_a_newer_version_hides_the_replica_until_it_is_known_again(kit: Kit) -> None:
    """F64."""
    await kit.mesh_with_a_ready_replica()
    key = kit.store.keys.replica(M0)
    stored = await kit.etcd.get(key)
    assert stored is not None
    async with mirrored(kit):
        put = await kit.etcd.put(key, b"\x08\x63" + stored.value[2:], ignore_lease=True)
        assert (await kit.seen(put.revision)).replica(M0) is None
        put = await kit.etcd.put(key, stored.value, ignore_lease=True)
        back = (await kit.seen(put.revision)).replica(M0)
        assert back is not None
        assert back.state is ReplicaState.READY


async def test_a_lease_that_ends_takes_its_keys_out_of_the_snapshot(kit: Kit) -> None:
    """F5."""
    await kit.mesh_with_a_ready_replica()
    async with mirrored(kit):
        await kit.etcd.lease_revoke(kit.nodes[N].incarnation)
        snapshot = await kit.until(lambda s: N not in s.nodes)
        replica = snapshot.replica(M0)
        assert replica is not None
        assert not snapshot.present(replica)


async def test_other_meshes_are_not_seen(kit: Kit, mesh_name: str) -> None:
    other = f"/localmesh/{mesh_name}x/models/stranger"
    async with mirrored(kit) as mirror:
        await kit.etcd.put(other, b"")
        try:
            await kit.model()
            await kit.until(lambda s: M in s.models)
            assert set(mirror.snapshot.models) == {M}
        finally:
            await kit.etcd.delete(other)


async def test_waiting_ends_with_what_the_predicate_found_or_at_the_deadline(kit: Kit) -> None:
    async with mirrored(kit) as mirror:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(mirror.wait_for(lambda s: s.models.get(M), soon()))
            record = await kit.model()
        assert waiting.result() == record
        with pytest.raises(TimeoutError):
            await mirror.wait_for(lambda s: s.models.get(ModelName("never")), CLOCK.monotonic() + 0.05)
        assert await mirror.wait_for(lambda s: s.models.get(M), CLOCK.monotonic() - 1) == record


async def test_changes_begin_with_what_is_there_and_come_as_levels(kit: Kit) -> None:
    await kit.model()
    async with mirrored(kit) as mirror:
        changes = mirror.changes()
        assert M in (await anext(changes)).models
        for index in range(5):
            last = await kit.model(ModelName(f"m{index}"))
        await kit.seen(last.mod_revision)
        seen = await anext(changes)
        assert len(seen.models) == 6
        async with asyncio.TaskGroup() as group:
            following = group.create_task(next_of(changes))
            done, _ = await asyncio.wait([following], timeout=0.05)
            assert not done
            await kit.store.delete_model(M)
        assert M not in following.result().models
        await changes.aclose()


async def next_of(changes: AsyncGenerator[Snapshot, None]) -> Snapshot:
    return await anext(changes)


async def test_silence_is_counted_from_the_last_that_was_heard(kit: Kit) -> None:
    assert Mirror(kit.store).silence(CLOCK.monotonic()) == float("inf")
    assert not Mirror(kit.store).connected
    async with mirrored(kit) as mirror:
        now = CLOCK.monotonic()
        assert mirror.silence(now + 100) > 50
        assert mirror.silence(now - 100) == 0
        assert mirror.connected


async def test_revisions_move_on_while_nothing_changes(kit: Kit) -> None:
    """What waits for a newer snapshot must not wait for the next accident."""
    async with mirrored(kit) as mirror:
        before = mirror.snapshot
        elsewhere = await kit.etcd.put("/elsewhere", b"x")
        await kit.etcd.delete("/elsewhere")
        after = await kit.seen(elsewhere.revision)
        assert after.models is before.models


async def test_a_gap_in_the_history_is_closed_by_reading_anew(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compacted away while the mirror was cut off."""
    await kit.model()
    watch, cut = kit.etcd.watch, asyncio.Event()

    class Cut:
        """A watch that ends as etcd ends one whose revisions are compacted."""

        def __init__(self, watcher: Watcher) -> None:
            self._watcher = watcher

        async def __aenter__(self) -> Self:
            await self._watcher.__aenter__()
            return self

        async def __aexit__(self, *_: object) -> None:
            await self._watcher.__aexit__(None, None, None)

        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> WatchBatch:
            await cut.wait()
            raise RevisionCompactedError(7)

    watches: list[int] = []

    def cutting(key: bytes, *, start_revision: int) -> Watcher | Cut:
        watches.append(start_revision)
        watcher = watch(key, start_revision=start_revision)
        return Cut(watcher) if len(watches) == 1 else watcher

    monkeypatch.setattr(kit.etcd, "watch", cutting)
    async with mirrored(kit) as mirror:
        await kit.store.delete_model(M)
        changed = await kit.model(ModelName("later"))
        assert M in mirror.snapshot.models
        cut.set()
        snapshot = await kit.seen(changed.mod_revision)
        assert set(snapshot.models) == {ModelName("later")}
        after = await kit.model(ModelName("afterwards"))
        await kit.seen(after.mod_revision)
    assert len(watches) == 2
    assert watches[1] > changed.mod_revision
