"""T1 against a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec, Policy, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import Leadership
from localmesh.store import DeviceFacts, LeaseTimes, Registration
from localmesh.store.v1 import records_pb2 as pb
from tests.integration.store_kit import GIB, M0, Kit, M, N, store_kit

M1 = ReplicaId(M, N, 1)


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        await opened.model(max_replicas=3)
        await opened.node()
        yield opened


async def test_a_placement_writes_record_and_claim_under_the_record_lease(kit: Kit) -> None:
    """F27."""
    record = await kit.place()
    snapshot = await kit.load()
    assert snapshot.replica(M0) == record
    assert record.state is ReplicaState.PLACED
    assert snapshot.devices[N][CPU].claims == {M0: GIB}
    for key in (kit.store.keys.replica(M0), kit.store.keys.device(N, CPU)):
        stored = await kit.etcd.get(key)
        assert stored is not None
        assert stored.lease == kit.nodes[N].record_lease


async def put_device(kit: Kit) -> None:
    key = kit.store.keys.device(N, CPU)
    stored = await kit.etcd.get(key)
    assert stored is not None
    await kit.etcd.put(key, stored.value, ignore_lease=True)


async def cordon(kit: Kit) -> None:
    approval = (await kit.load()).approvals[N]
    await kit.store.put_approval(N, expected=approval, new=replace(approval, cordoned=True))


async def edit(kit: Kit) -> None:
    await kit.store.put_model(ModelSpec(name=M, backend="llama", source="y"), None)


async def change_policy(kit: Kit) -> None:
    await kit.store.put_model(ModelSpec(name=M, backend="llama", source="x.gguf"), Policy(max_replicas=1))


async def delete(kit: Kit) -> None:
    await kit.store.delete_model(M)


async def register_again(kit: Kit) -> None:
    await kit.node()


async def lose_presence(kit: Kit) -> None:
    await kit.etcd.lease_revoke(kit.nodes[N].incarnation)


async def lose_records(kit: Kit) -> None:
    await kit.etcd.lease_revoke(kit.nodes[N].record_lease)


async def place_elsewhere(kit: Kit) -> None:
    other = NodeName("other")
    await kit.node(other)
    await kit.place(ReplicaId(M, other, 0))


@pytest.mark.parametrize(
    "change",
    [
        put_device,
        cordon,
        edit,
        change_policy,
        delete,
        register_again,
        lose_presence,
        lose_records,
        place_elsewhere,
    ],
    ids=lambda change: change.__name__,
)
async def test_whatever_changes_between_plan_and_placement_is_a_conflict(
    kit: Kit, change: Callable[[Kit], Awaitable[None]]
) -> None:
    """F27."""
    snapshot = await kit.load()
    await change(kit)
    with pytest.raises(Conflict):
        await kit.place(snapshot=snapshot)
    after = await kit.load()
    assert after.replica(M0) is None
    assert M0 not in after.devices.get(N, {CPU: snapshot.devices[N][CPU]})[CPU].claims


OTHER, THIRD = ModelName("other"), ModelName("third")


async def grouped(kit: Kit, *, members: int = 1) -> None:
    """Put the model and others into a group."""
    for name in (M, OTHER, *(ModelName(f"member-{i}") for i in range(1, members))):
        await kit.model(name, groups=("large",))


@pytest.mark.parametrize("members", [1, 100], ids=["few members", "more members than are compared one by one"])
async def test_of_two_members_of_a_group_that_are_placed_on_a_node_at_once_one_wins(kit: Kit, members: int) -> None:
    """F37: invariant 4 holds also where the two take different devices."""
    gpu = DeviceId("GPU-1")
    await kit.node(devices={CPU: GIB, gpu: GIB})
    await grouped(kit, members=members)
    snapshot = await kit.load()
    on_gpu = replace(kit.plan(ReplicaId(OTHER, N, 0), snapshot), devices={gpu: GIB})
    outcomes = await asyncio.gather(kit.place(snapshot=snapshot), kit.store.place(on_gpu), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["Conflict", "ReplicaRecord"]
    assert sum(1 for _ in (await kit.load()).all_replicas()) == 1


async def test_members_of_a_group_are_placed_on_different_nodes_at_once(kit: Kit) -> None:
    """F37: they are in nobody's way there."""
    elsewhere = NodeName("elsewhere")
    await kit.node(elsewhere)
    await grouped(kit)
    snapshot = await kit.load()
    await asyncio.gather(kit.place(snapshot=snapshot), kit.place(ReplicaId(OTHER, elsewhere, 0), snapshot=snapshot))


async def test_a_model_that_joins_the_group_meanwhile_is_a_conflict(kit: Kit) -> None:
    """F37: in force from the first second."""
    await kit.model(groups=("large",))
    await kit.model(OTHER)
    await kit.place(ReplicaId(OTHER, N, 0))
    snapshot = await kit.load()
    await kit.model(OTHER, groups=("large",))
    with pytest.raises(Conflict):
        await kit.place(snapshot=snapshot)


async def test_policies_of_others_are_no_hindrance_to_a_model_without_groups(kit: Kit) -> None:
    snapshot = await kit.load()
    await kit.model(THIRD, groups=("large",))
    await kit.place(snapshot=snapshot)


async def test_memory_that_two_devices_share_is_not_claimed_twice_at_once(kit: Kit) -> None:
    """F9, F27: invariant 1 for a unified GPU and the CPU."""
    gpu = DeviceId("GPU-1")
    facts = {
        CPU: DeviceFacts(id=CPU, kind="cpu", total_bytes=GIB, budget_bytes=GIB),
        gpu: DeviceFacts(id=gpu, kind="gpu", total_bytes=GIB, budget_bytes=GIB, unified=True),
    }
    registration = Registration(
        node=N, key_fingerprint=f"key-of-{N}", endpoint="x:1", devices=tuple(facts.values()), auto_approve=True
    )
    await kit.model(OTHER)
    await kit.store.register(registration, LeaseTimes(presence_seconds=60, record_seconds=120))
    snapshot = await kit.load()
    on_gpu = replace(kit.plan(ReplicaId(OTHER, N, 0), snapshot), devices={gpu: GIB})
    outcomes = await asyncio.gather(kit.place(snapshot=snapshot), kit.store.place(on_gpu), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["Conflict", "ReplicaRecord"]
    devices = (await kit.load()).devices[N]
    assert sum(d.claimed_bytes for d in devices.values()) == GIB


async def test_telemetry_makes_no_placement_fail(kit: Kit) -> None:
    """F9."""
    snapshot = await kit.load()
    incarnation = kit.nodes[N].incarnation
    await kit.store.put_sources(N, incarnation, {})
    assert await kit.place(snapshot=snapshot)


async def test_the_first_policy_of_a_model_is_a_conflict_too(kit: Kit) -> None:
    plain = ModelName("plain")
    await kit.store.put_model(ModelSpec(name=plain, backend="llama", source="x"), None)
    snapshot = await kit.load()
    await kit.store.put_model(ModelSpec(name=plain, backend="llama", source="x"), Policy(max_replicas=1))
    with pytest.raises(Conflict):
        await kit.place(ReplicaId(plain, N, 0), snapshot=snapshot)


async def test_several_devices_are_claimed_all_or_none(kit: Kit) -> None:
    """F28."""
    gpu = DeviceId("GPU-1")
    await kit.node(devices={CPU: GIB, gpu: GIB})
    snapshot = await kit.load()
    plan = replace(kit.plan(M0, snapshot), devices={CPU: GIB, gpu: GIB})
    await kit.store.place(plan)
    with pytest.raises(Conflict):
        await kit.store.place(replace(plan, replica=M1, devices={gpu: 0, CPU: 1}, snapshot=await kit.load()))
    devices = (await kit.load()).devices[N]
    assert {d: dict(r.claims) for d, r in devices.items()} == {CPU: {M0: GIB}, gpu: {M0: GIB}}


async def test_fields_of_a_newer_version_on_a_device_survive_a_claim(kit: Kit) -> None:
    """F64."""
    key = kit.store.keys.device(N, CPU)
    stored = await kit.etcd.get(key)
    assert stored is not None
    await kit.etcd.put(key, stored.value + b"\x9a\x06\x03new", ignore_lease=True)
    await kit.place()
    claimed = await kit.etcd.get(key)
    assert claimed is not None
    assert b"\x9a\x06\x03new" in claimed.value


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_a_lost_answer_to_a_placement_is_settled_by_its_token(kit: Kit, losses: list[str | None]) -> None:
    """F27."""
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    record = await kit.place()
    snapshot = await kit.load()
    assert snapshot.replica(M0) == record
    assert snapshot.devices[N][CPU].claims == {M0: GIB}


async def test_the_record_of_another_placer_is_not_taken_for_our_own(kit: Kit) -> None:
    snapshot = await kit.load()
    await kit.place(snapshot=snapshot)
    kit.etcd.losses = ["not applied"]  # type: ignore[attr-defined]
    with pytest.raises(Conflict):
        await kit.place(snapshot=replace(snapshot, devices=(await kit.load()).devices))


async def test_a_deposed_leader_places_nothing(kit: Kit) -> None:
    key = kit.store.keys.leader()
    created = (await kit.etcd.put(key, b"me")).revision
    leader = Leadership(key, created)
    await kit.store.place(kit.plan(M0, await kit.load()), leader=leader)
    await kit.etcd.delete(key)
    await kit.etcd.put(key, b"somebody else")
    with pytest.raises(Conflict):
        await kit.store.place(kit.plan(M1, await kit.load()), leader=leader)


async def test_placers_at_the_same_time_never_oversell_memory_slots_or_the_maximum(kit: Kit) -> None:
    """F27; invariants 1 and 4: eight placers try all nodes and models at once."""
    models = [ModelName("a"), ModelName("b")]
    nodes = [NodeName("n1"), NodeName("n2")]
    for model in models:
        await kit.model(model, max_replicas=5)
    for node in nodes:
        await kit.node(node, gib=5, slots=3)
    stop = asyncio.Event()
    overruns: list[str] = []

    async def place(number: int) -> None:
        for round_ in range(12):
            model, node = models[(number + round_) % 2], nodes[(number + round_ // 2) % 2]
            snapshot = await kit.load()
            taken = {r.id.index for r in snapshot.replicas_of(model) if r.id.node == node}
            index = next(i for i in range(99) if i not in taken)
            try:
                await kit.place(ReplicaId(model, node, index), snapshot=snapshot)
            except Conflict:
                continue

    async def watch() -> None:
        while not stop.is_set():
            snapshot = await kit.load()
            overruns.extend(overruns_of(snapshot, models, nodes))

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        async with asyncio.TaskGroup() as placers:
            for number in range(8):
                placers.create_task(place(number))
        stop.set()
        await watching
    assert overruns == []
    snapshot = await kit.load()
    # 10 GiB in all, 3 slots for each model and node, 5 of each model: 10 fit, and everybody went on until they did.
    assert len(list(snapshot.all_replicas())) == 10


def overruns_of(snapshot: Snapshot, models: list[ModelName], nodes: list[NodeName]) -> list[str]:
    found = []
    for node in nodes:
        device = snapshot.devices[node][CPU]
        here = [r for r in snapshot.all_replicas() if r.id.node == node]
        if device.claimed_bytes > device.budget_bytes or set(device.claims) != {r.id for r in here}:
            found.append(f"{snapshot.revision}: claims of {node}: {device.claims}")
        found += [f"{snapshot.revision}: slots of {node}" for m in models if sum(r.id.model == m for r in here) > 3]
    found += [f"{snapshot.revision}: {m}" for m in models if len(list(snapshot.replicas_of(m))) > 5]
    return found


async def test_a_claim_left_for_an_heir_is_replaced_by_its_placement(kit: Kit) -> None:
    key = kit.store.keys.device(N, CPU)
    stored = await kit.etcd.get(key)
    assert stored is not None
    message = pb.Device.FromString(stored.value)
    message.claims["m/0"] = 4 * GIB
    await kit.etcd.put(key, message.SerializeToString(), ignore_lease=True)
    with pytest.raises(Conflict):
        await kit.place(M1)
    await kit.place(M0, gib=2)
    assert (await kit.load()).devices[N][CPU].claims == {M0: 2 * GIB}
