"""T0 and the life of a node against a real etcd."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from localmesh.core.errors import IncarnationLost, InternalError, InvalidRequest, NodeNameTaken, NodePending
from localmesh.core.ids import CPU, DeviceId, ModelName, ReplicaId
from localmesh.core.records import ApprovalRecord, MeasuredRecord, ProgressRecord, ReplicaState, SourceRecord
from localmesh.store.registration import RunningReplica
from tests.integration.store_kit import GIB, M0, Kit, M, N, store_kit


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


def process(replica: ReplicaId, revision: str, **changes: object) -> RunningReplica:
    base = RunningReplica(
        id=replica, revision=revision, state=ReplicaState.READY, endpoint="e:2", limit=8, devices={CPU: GIB}
    )
    return replace(base, **changes)  # type: ignore[arg-type]


async def test_a_node_registers_with_its_devices_under_two_leases(kit: Kit) -> None:
    """F1."""
    registered = await kit.node(gib=4)
    snapshot = await kit.load()
    node = snapshot.nodes[N]
    assert (node.incarnation, node.record_lease) == (registered.incarnation, registered.record_lease)
    assert snapshot.devices[N][CPU].budget_bytes == 4 * GIB
    assert snapshot.approvals[N].approved
    device = await kit.etcd.get(kit.store.keys.device(N, CPU))
    assert device is not None
    assert device.lease == registered.record_lease
    approval = await kit.etcd.get(kit.store.keys.approval(N))
    assert approval is not None
    assert approval.lease == 0


async def test_of_a_node_that_nobody_approved_only_its_key_is_kept(kit: Kit) -> None:
    """F2, F3: for an operator to look at, once."""
    for _ in range(2):
        with pytest.raises(NodePending):
            await kit.node(auto_approve=False)
    (kept,) = (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs
    assert (kept.key, kept.version, kept.lease) == (kit.store.keys.approval(N), 1, 0)
    assert (await kit.load()).approvals[N].approved is False


async def test_another_key_does_not_get_the_name_of_a_node(kit: Kit) -> None:
    """F3."""
    await kit.node()
    before = (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs
    with pytest.raises(NodeNameTaken):
        await kit.node(key="another")
    assert (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs == before


async def test_registering_again_adopts_what_runs_and_ends_the_earlier_incarnation(kit: Kit) -> None:
    """F4."""
    before = await kit.mesh_with_a_ready_replica()
    await kit.store.put_progress(before, ProgressRecord(phase="x"), record_lease=kit.nodes[N].record_lease)
    first = kit.nodes[N]
    second = await kit.node(running=[process(M0, before.revision)])
    assert (second.adopted, second.stop) == ((M0,), ())
    snapshot = await kit.load()
    after = snapshot.replica(M0)
    assert after is not None
    assert snapshot.routable(after)
    assert (after.incarnation, after.create_revision) == (second.incarnation, before.create_revision)
    assert snapshot.devices[N][CPU].claims == {M0: GIB}
    leases = await kit.etcd.leases()
    assert first.incarnation not in leases
    assert first.record_lease not in leases
    with pytest.raises(IncarnationLost):
        await kit.store.renew(N, first.incarnation, first.record_lease)
    assert await kit.store.renew(N, second.incarnation, second.record_lease) > 0


async def test_a_node_whose_presence_ran_out_finds_its_records_again(kit: Kit) -> None:
    """F4."""
    before = await kit.mesh_with_a_ready_replica()
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)
    assert N not in (await kit.load()).nodes
    assert (await kit.node(running=[process(M0, before.revision)])).adopted == (M0,)
    replica = (await kit.load()).replica(M0)
    assert replica is not None
    assert replica.create_revision == before.create_revision


async def test_a_replica_whose_record_ran_out_too_is_adopted_if_it_fits(kit: Kit) -> None:
    """F4."""
    before = await kit.mesh_with_a_ready_replica()
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)
    await kit.etcd.lease_revoke(kit.nodes[N].record_lease)
    assert (await kit.load()).replica(M0) is None
    stranger = ReplicaId(ModelName("deleted"), N, 0)
    second = await kit.node(running=[process(M0, before.revision), process(stranger, "r")])
    assert (second.adopted, second.stop) == ((M0,), (stranger,))
    snapshot = await kit.load()
    assert snapshot.routable(next(iter(snapshot.replicas_of(M))))
    assert snapshot.devices[N][CPU].claims == {M0: GIB}


async def test_records_without_a_process_are_deleted_and_their_claims_given_back(kit: Kit) -> None:
    await kit.mesh_with_a_ready_replica()
    await kit.node()
    snapshot = await kit.load()
    assert snapshot.replica(M0) is None
    assert snapshot.devices[N][CPU].claims == {}


async def test_a_device_that_is_gone_disappears(kit: Kit) -> None:
    gpu = DeviceId("GPU-1")
    await kit.node(devices={CPU: GIB, gpu: GIB})
    assert set((await kit.load()).devices[N]) == {CPU, gpu}
    await kit.node(devices={CPU: 2 * GIB})
    devices = (await kit.load()).devices[N]
    assert set(devices) == {CPU}
    assert devices[CPU].budget_bytes == 2 * GIB


async def test_more_replicas_than_fit_into_one_transaction_are_adopted(kit: Kit) -> None:
    models = [ModelName(f"m{n}") for n in range(15)]
    replicas = [ReplicaId(model, N, index) for model in models for index in range(10)]
    revision = ""
    for model in models:
        revision = (await kit.model(model)).revision
    first = await kit.node(gib=200, slots=10, running=[process(r, revision) for r in replicas])
    assert set(first.adopted) | set(first.stop) == set(replicas)
    assert first.stop == ()
    gone = replicas[::2]
    second = await kit.node(gib=200, slots=10, running=[process(r, revision) for r in replicas if r not in gone])
    assert set(second.adopted) == set(replicas) - set(gone)
    snapshot = await kit.load()
    records = list(snapshot.all_replicas())
    assert {r.id for r in records} == set(second.adopted)
    assert {r.incarnation for r in records} == {second.incarnation}
    assert snapshot.devices[N][CPU].claims == dict.fromkeys(second.adopted, GIB)


async def test_too_many_devices_are_refused(kit: Kit) -> None:
    with pytest.raises(InvalidRequest):
        await kit.node(devices={DeviceId(f"GPU-{n}"): 1 for n in range(49)})


async def test_an_approval_that_cannot_be_read_is_not_taken_for_none(kit: Kit) -> None:
    """F3."""
    await kit.etcd.put(kit.store.keys.approval(N), b"\xff")
    with pytest.raises(InternalError):
        await kit.node()
    assert N not in (await kit.load()).nodes


async def test_a_cordon_survives_a_registration(kit: Kit) -> None:
    """F3, F6."""
    await kit.node()
    approval = (await kit.load()).approvals[N]
    cordoned = replace(approval, cordoned=True, labels={"a": "b"})
    put = await kit.store.put_approval(N, expected=approval, new=cordoned)
    await kit.node()
    assert (await kit.load()).approvals[N] == put


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_a_lost_answer_to_a_registration_is_settled(kit: Kit, losses: list[str | None]) -> None:
    before = await kit.mesh_with_a_ready_replica()
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    registered = await kit.node(running=[process(M0, before.revision)])
    assert (await kit.load()).nodes[N].incarnation == registered.incarnation
    assert registered.adopted == (M0,)
    assert registered.incarnation in await kit.etcd.leases()


async def test_deregistering_takes_everything_of_the_node_but_what_the_operator_said(kit: Kit) -> None:
    await kit.mesh_with_a_ready_replica()
    registered = kit.nodes[N]
    await kit.store.deregister(N, registered.incarnation)
    snapshot = await kit.load()
    assert not snapshot.nodes
    assert not snapshot.devices
    assert not snapshot.replicas
    assert snapshot.approvals[N] == replace(snapshot.approvals[N], approved=True)
    assert not {registered.incarnation, registered.record_lease} & set(await kit.etcd.leases())
    with pytest.raises(IncarnationLost):
        await kit.store.deregister(N, registered.incarnation)


async def test_an_earlier_incarnation_cannot_deregister_the_node(kit: Kit) -> None:
    first = await kit.node()
    await kit.node()
    with pytest.raises(IncarnationLost):
        await kit.store.deregister(N, first.incarnation)
    assert N in (await kit.load()).nodes


async def test_measurements_and_sources_hang_on_the_presence(kit: Kit) -> None:
    """F9."""
    registered = await kit.node()
    measured = MeasuredRecord(free_bytes={CPU: 5}, cpu_load=0.5, disk_free_bytes=7)
    sources = {M: SourceRecord(revision="r", present=True, path="/x", memory_bytes=3)}
    await kit.store.put_measured(N, registered.incarnation, measured)
    await kit.store.put_sources(N, registered.incarnation, sources)
    snapshot = await kit.load()
    assert snapshot.measured[N] == measured
    assert snapshot.sources[N] == sources
    await kit.etcd.lease_revoke(registered.incarnation)
    snapshot = await kit.load()
    assert not snapshot.measured
    assert not snapshot.sources
    with pytest.raises(IncarnationLost):
        await kit.store.put_measured(N, registered.incarnation, measured)


async def test_a_measurement_of_an_earlier_incarnation_is_refused(kit: Kit) -> None:
    first = await kit.node()
    await kit.node()
    with pytest.raises(IncarnationLost):
        await kit.store.put_sources(N, first.incarnation, {})


async def test_the_store_keeps_what_an_operator_said_of_a_node_before_it_came(kit: Kit) -> None:
    """F3."""
    await kit.store.put_approval(N, expected=None, new=ApprovalRecord(key_fingerprint="", cordoned=True))
    await kit.node()
    approval = (await kit.load()).approvals[N]
    assert (approval.cordoned, approval.key_fingerprint) == (True, f"key-of-{N}")
