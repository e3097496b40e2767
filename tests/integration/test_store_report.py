"""T6, T7 and what goes with them against a real etcd."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from localmesh.core.errors import Conflict, InvalidRequest
from localmesh.core.ids import CPU, DeviceId, ReplicaId
from localmesh.core.records import FailureRecord, ProgressRecord, ReplicaState
from localmesh.etcd import Leadership
from localmesh.store.keys import SELF_HOLDER
from localmesh.store.registration import RunningReplica
from tests.integration.store_kit import GIB, M0, Kit, M, N, store_kit

HEIR = ReplicaId(M, N, 5)
FAILURE = FailureRecord(model=M, node=N, reason="LOAD_FAILED", message="no", revision="r")


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        await opened.model()
        await opened.node()
        yield opened


async def test_a_replica_is_reported_from_placed_to_ready_under_its_lease(kit: Kit) -> None:
    """F39."""
    record = await kit.place()
    for state in (ReplicaState.STAGING, ReplicaState.LOADING):
        record = await kit.store.report(record, state=state)
        assert (await kit.load()).replica(M0) == record
    record = await kit.store.report(record, state=ReplicaState.READY, endpoint="e:1", limit=3)
    snapshot = await kit.load()
    assert snapshot.replica(M0) == record
    assert snapshot.routable(record)
    stored = await kit.etcd.get(kit.store.keys.replica(M0))
    assert stored is not None
    assert stored.lease == kit.nodes[N].record_lease


async def test_the_same_report_again_writes_nothing(kit: Kit) -> None:
    ready = await kit.report_ready(await kit.place())
    assert await kit.report_ready(ready) == ready
    stored = await kit.etcd.get(kit.store.keys.replica(M0))
    assert stored is not None
    assert stored.mod_revision == ready.mod_revision


async def test_at_ready_the_claim_becomes_what_is_measured_if_that_is_more_once(kit: Kit) -> None:
    """F29."""
    record = await kit.place()
    measured = {CPU: 3 * GIB, DeviceId("GPU-9"): 1}
    ready = await kit.store.report(record, state=ReplicaState.READY, measured=measured)
    assert ready.devices == {CPU: 3 * GIB}
    assert (await kit.load()).devices[N][CPU].claims == {M0: 3 * GIB}
    await kit.store.report(ready, state=ReplicaState.READY, limit=9, measured={CPU: 4 * GIB})
    assert (await kit.load()).devices[N][CPU].claims == {M0: 3 * GIB}


async def test_an_estimate_that_was_too_high_stays_the_claim(kit: Kit) -> None:
    """F29."""
    record = await kit.place(gib=2)
    await kit.store.report(record, state=ReplicaState.READY, measured={CPU: 1})
    assert (await kit.load()).devices[N][CPU].claims == {M0: 2 * GIB}


async def test_a_measurement_over_the_budget_stops_new_placements_and_nothing_else(kit: Kit) -> None:
    """Invariant 1."""
    await kit.store.report(await kit.place(), state=ReplicaState.READY, measured={CPU: 9 * GIB})
    assert (await kit.load()).devices[N][CPU].unclaimed_bytes < 0
    with pytest.raises(Conflict):
        await kit.place(HEIR)


@pytest.mark.parametrize("unload", [False, True])
async def test_a_report_never_brings_back_what_leaves(kit: Kit, unload: bool) -> None:
    """Invariant 3."""
    ready = await kit.report_ready(await kit.place())
    left = await kit.store.drain_replica(ready)
    if unload:
        assert await kit.store.unload_replica(left)
    reported = await kit.store.report(ready, state=ReplicaState.READY, limit=99)
    assert reported.state is (ReplicaState.UNLOADING if unload else ReplicaState.DRAINING)
    record = (await kit.load()).replica(M0)
    assert record is not None
    assert record.state is reported.state


async def test_an_older_report_that_comes_late_changes_nothing(kit: Kit) -> None:
    ready = await kit.report_ready(await kit.place())
    assert await kit.store.report(ready, state=ReplicaState.LOADING, limit=1) == ready
    assert (await kit.load()).replica(M0) == ready


@pytest.mark.parametrize("state", [ReplicaState.PLACED, ReplicaState.DRAINING, ReplicaState.UNLOADING])
async def test_a_worker_does_not_report_what_is_not_its_to_say(kit: Kit, state: ReplicaState) -> None:
    record = await kit.place()
    with pytest.raises(InvalidRequest):
        await kit.store.report(record, state=state)


async def test_reports_of_another_life_or_incarnation_are_conflicts(kit: Kit) -> None:
    """F16."""
    first = await kit.place()
    await kit.node()  # a new incarnation, without the replica
    with pytest.raises(Conflict):
        await kit.report_ready(first)
    second = await kit.place()
    with pytest.raises(Conflict):
        await kit.report_ready(first)
    await kit.store.exited(first)
    assert (await kit.load()).replica(M0) == second


async def test_an_exit_gives_record_progress_and_memory_back(kit: Kit) -> None:
    """F17; invariant 6."""
    ready = await kit.report_ready(await kit.place())
    await kit.store.put_progress(ready, ProgressRecord(phase="x"), record_lease=kit.nodes[N].record_lease)
    await kit.store.put_self_inflight(ready, 3)
    assert (await kit.load()).inflight == {M0: {SELF_HOLDER: 3}}
    await kit.store.exited(ready)
    snapshot = await kit.load()
    assert not snapshot.replicas
    assert not snapshot.progress
    assert not snapshot.inflight
    assert snapshot.devices[N][CPU].claims == {}
    await kit.store.exited(ready)  # reported until it is taken


async def test_an_exit_is_taken_whatever_happened_to_the_record_since(kit: Kit) -> None:
    placed = await kit.place()
    ready = await kit.report_ready(placed)
    await kit.store.drain_replica(ready)
    await kit.store.exited(placed)
    assert (await kit.load()).replica(M0) is None


async def test_an_exit_that_an_earlier_incarnation_reports_of_an_adopted_replica_is_a_conflict(kit: Kit) -> None:
    ready = await kit.report_ready(await kit.place())
    running = RunningReplica(id=M0, revision=ready.revision, state=ReplicaState.READY)
    await kit.node(running=[running])
    with pytest.raises(Conflict):
        await kit.store.exited(ready)
    assert (await kit.load()).replica(M0) is not None


async def test_the_memory_of_an_evicted_replica_goes_to_the_one_it_was_evicted_for(kit: Kit) -> None:
    ready = await kit.report_ready(await kit.place(gib=3))
    assert await kit.store.unload_replica(ready, memory_for=HEIR)
    await kit.store.exited(ready)
    assert (await kit.load()).devices[N][CPU].claims == {HEIR: 3 * GIB}
    with pytest.raises(Conflict):
        await kit.place(ReplicaId(M, N, 6), gib=2)
    await kit.place(HEIR, gib=2)
    assert (await kit.load()).devices[N][CPU].claims == {HEIR: 2 * GIB}


async def test_a_failed_load_is_remembered_under_a_lease_of_its_own(kit: Kit) -> None:
    """F42."""
    await kit.store.exited(await kit.place(), failure=FAILURE)
    snapshot = await kit.load()
    assert snapshot.failures[M][N] == FAILURE
    stored = await kit.etcd.get(kit.store.keys.failure(M, N))
    assert stored is not None
    assert stored.lease not in (0, kit.nodes[N].record_lease, kit.nodes[N].incarnation)
    await kit.etcd.lease_revoke(stored.lease)
    assert not (await kit.load()).failures


async def test_a_failure_that_was_reported_before_leaves_no_lease_behind(kit: Kit) -> None:
    record = await kit.place()
    await kit.store.exited(record)
    before = set(await kit.etcd.leases())
    await kit.store.exited(record, failure=FAILURE)
    assert not (await kit.load()).failures
    assert set(await kit.etcd.leases()) <= before


async def test_exits_at_the_same_time_on_one_device_all_get_through(kit: Kit) -> None:
    records = [await kit.place(ReplicaId(M, N, n)) for n in range(4)]
    await asyncio.gather(*(kit.store.exited(record) for record in records))
    snapshot = await kit.load()
    assert not snapshot.replicas
    assert snapshot.devices[N][CPU].claims == {}


async def test_progress_is_shown_only_while_the_replica_is_there(kit: Kit) -> None:
    """F39."""
    record = await kit.place()
    lease = kit.nodes[N].record_lease
    progress = ProgressRecord(phase="loading", done_bytes=1, total_bytes=2)
    assert await kit.store.put_progress(record, progress, record_lease=lease)
    assert (await kit.load()).progress == {M0: progress}
    await kit.store.exited(record)
    assert not await kit.store.put_progress(record, progress, record_lease=lease)
    assert not await kit.store.put_self_inflight(record, 1)
    assert not (await kit.load()).progress


async def test_nothing_is_written_under_a_lease_that_is_gone(kit: Kit) -> None:
    record = await kit.place()
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)
    assert not await kit.store.put_self_inflight(record, 1)
    assert not (await kit.load()).inflight


async def test_the_record_of_a_node_that_is_away_can_be_forgotten(kit: Kit) -> None:
    """F43."""
    record = await kit.place()
    with pytest.raises(Conflict):
        await kit.store.forget_replica(record)
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)
    with pytest.raises(Conflict):
        await kit.store.forget_replica(record, leader=Leadership(kit.store.keys.leader(), 1))
    await kit.store.forget_replica(record)
    snapshot = await kit.load()
    assert snapshot.replica(M0) is None
    assert snapshot.devices[N][CPU].claims == {}
    await kit.store.forget_replica(record)


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_lost_answers_are_settled(kit: Kit, losses: list[str | None]) -> None:
    record = await kit.place()
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    ready = await kit.report_ready(record)
    assert (await kit.load()).replica(M0) == ready
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    await kit.store.exited(ready, failure=FAILURE)
    snapshot = await kit.load()
    assert snapshot.replica(M0) is None
    assert snapshot.devices[N][CPU].claims == {}
    assert snapshot.failures[M][N] == FAILURE
