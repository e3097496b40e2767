"""Placement: groups, gangs of devices, shared memory, disk, and spreading over all nodes."""

from dataclasses import replace
from typing import Any

import pytest

from localmesh.core.errors import EngineUnavailable, NoCapacity
from localmesh.core.ids import CPU, DeviceId, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.placement import plan_placement
from localmesh.scheduling.question import GANG_OVERHEAD_BYTES, Question
from localmesh.scheduling.scorers import SCORERS, Option, rank, scores

GIB = 1 << 30
M, OTHER = ModelName("m"), ModelName("other")


def gpu(node: str, number: int, *, gib: float = 8, unified: bool = False) -> DeviceRecord:
    size = int(gib * GIB)
    return DeviceRecord(
        node=NodeName(node),
        id=DeviceId(f"GPU-{number}"),
        kind="gpu",
        total_bytes=size,
        budget_bytes=size,
        unified=unified,
    )


def mesh(
    *nodes: str, gpus: tuple[DeviceRecord, ...] = (), policy: Policy | None = None, ram: float = 8, **spec: Any
) -> Snapshot:
    """A mesh of equal nodes; the model `m` needs a GiB, as `other` does."""
    wanted = {"backend": "llama", "source": "m.gguf", "memory_bytes": GIB, **spec}
    specs = [ModelSpec(name=M, **wanted), ModelSpec(name=OTHER, backend="llama", source="o.gguf", memory_bytes=GIB)]
    names = [NodeName(n) for n in nodes]
    kinds = ("cpu", "gpu") if gpus else ("cpu",)
    engines = tuple(EngineInfo(name=n, available=True, device_kinds=kinds) for n in ("llama", "minilm"))
    source = SourceRecord(revision="r1", present=True, path="/f", weights_bytes=GIB, memory_bytes=GIB)
    size = int(ram * GIB)
    cpu = {n: DeviceRecord(node=n, id=CPU, kind="cpu", total_bytes=size, budget_bytes=size) for n in names}
    return Snapshot(
        models={s.name: ModelRecord(spec=s, revision="r1") for s in specs},
        policies={M: PolicyRecord(policy=policy or Policy())},
        approvals={n: ApprovalRecord(key_fingerprint="k") for n in names},
        nodes={
            n: NodeRecord(
                name=n,
                incarnation=1,
                record_lease=1,
                endpoint="",
                engines=engines,
                max_replicas_per_model=2,
                disk_total_bytes=100 * GIB,
            )
            for n in names
        },
        sources={n: {M: source, OTHER: source} for n in names},
        devices={n: {CPU: cpu[n], **{g.id: g for g in gpus if g.node == n}} for n in names},
    )


def place(snapshot: Snapshot, model: ModelName = M) -> Snapshot:
    return with_placement(snapshot, plan_placement(snapshot, model))


def with_policy(snapshot: Snapshot, model: ModelName, **policy: Any) -> Snapshot:
    return replace(snapshot, policies={**snapshot.policies, model: PolicyRecord(policy=Policy(**policy))})


def with_state(snapshot: Snapshot, state: ReplicaState) -> Snapshot:
    """The snapshot with all replicas in a state."""
    replicas = {m: {i: replace(r, state=state) for i, r in found.items()} for m, found in snapshot.replicas.items()}
    return replace(snapshot, replicas=replicas)


def measured(snapshot: Snapshot, node: str, *, disk_gib: float = 50, **free: int) -> Snapshot:
    record = MeasuredRecord(
        free_bytes={DeviceId(d.replace("_", "-")): n for d, n in free.items()}, disk_free_bytes=int(disk_gib * GIB)
    )
    return replace(snapshot, measured={**snapshot.measured, NodeName(node): record})


# groups


@pytest.mark.parametrize("state", list(ReplicaState), ids=lambda s: s.name)
def test_members_of_a_group_never_share_a_node_in_whatever_state_they_are(state: ReplicaState) -> None:
    """F37."""
    snapshot = with_policy(mesh("a", policy=Policy(groups=("large", "x"))), OTHER, groups=("large",))
    snapshot = with_state(place(snapshot, OTHER), state)
    with pytest.raises(NoCapacity, match=r"a holds 'other', which never shares a node with it \(group large\)"):
        plan_placement(snapshot, M)


def test_a_member_goes_to_a_node_without_another_one() -> None:
    """F37."""
    snapshot = with_policy(mesh("a", "b", policy=Policy(groups=("large",))), OTHER, groups=("large",))
    snapshot = place(snapshot, OTHER)
    (held,) = snapshot.replicas[OTHER]
    assert plan_placement(snapshot, M).replica.node != held.node


def test_replicas_of_one_model_may_share_a_node_although_it_has_a_group() -> None:
    """F37."""
    assert len(place(place(mesh("a", policy=Policy(groups=("large",))))).replicas[M]) == 2


# gangs


def two_gpus(*, gib: float = 8, **spec: Any) -> Snapshot:
    return mesh("a", gpus=(gpu("a", 1, gib=gib), gpu("a", 2, gib=gib)), **spec)


def test_a_gang_is_charged_its_part_and_an_overhead_on_each_device() -> None:
    """F28."""
    plan = plan_placement(two_gpus(device_count=2, memory_bytes=3 * GIB + 1), M)
    part = (3 * GIB + 2) // 2 + GANG_OVERHEAD_BYTES
    assert dict(plan.devices) == {DeviceId("GPU-1"): part, DeviceId("GPU-2"): part}


def test_a_gang_is_all_or_nothing() -> None:
    """F28: the CPU is no part of it, and no node lends half of its GPUs."""
    snapshot = two_gpus(device_count=2, memory_bytes=12 * GIB)
    other = ReplicaId(OTHER, NodeName("a"), 0)
    full = replace(snapshot.devices[NodeName("a")][DeviceId("GPU-2")], claims={other: 2 * GIB})
    devices = {**snapshot.devices[NodeName("a")], full.id: full}
    with pytest.raises(NoCapacity, match=r"6\.5 GiB on each of 2 GPUs \(512 MiB of it by itself\) needed"):
        plan_placement(replace(snapshot, devices={NodeName("a"): devices}), M)


def test_a_node_with_too_few_gpus_says_so() -> None:
    """F28."""
    with pytest.raises(NoCapacity, match="a has 2 of the 3 GPUs that a replica takes"):
        plan_placement(two_gpus(device_count=3), M)


def test_a_gang_needs_an_engine_that_computes_on_gpus() -> None:
    """F28."""
    with pytest.raises(EngineUnavailable, match="on cpu only, not on 'gpu'"):
        plan_placement(mesh("a", device_count=2), M)


def test_the_gpus_with_most_room_are_chosen_equal_ones_by_name() -> None:
    """F28."""
    gpus = (gpu("a", 3), gpu("a", 1), gpu("a", 2), gpu("a", 4, gib=9))
    plan = plan_placement(mesh("a", gpus=gpus, device_count=2), M)
    assert sorted(plan.devices) == ["GPU-1", "GPU-4"]


def test_a_gang_that_is_gone_gives_all_of_its_devices_back() -> None:
    """F28."""
    before = two_gpus(device_count=2)
    after = place(before)
    (record,) = after.replicas[M].values()
    assert without_replica(after, record).devices == before.devices


# unified memory


def unified(*, ram: float = 8, gib: float = 8, **spec: Any) -> Snapshot:
    return mesh("a", ram=ram, gpus=(gpu("a", 1, gib=gib, unified=True),), **spec)


def test_a_unified_gpu_and_the_cpu_share_one_budget() -> None:
    """F9, F27: what is claimed on one is missing on the other."""
    snapshot = place(unified(memory_bytes=6 * GIB))
    assert [dict(r.devices) for r in snapshot.replicas[M].values()] == [{"GPU-1": 6 * GIB}]
    with pytest.raises(NoCapacity, match=r"GPU-1 has 2\.0 GiB free .* in memory that they share"):
        plan_placement(snapshot, M)


def test_what_loads_on_a_unified_gpu_comes_off_the_memory_measured_for_the_cpu() -> None:
    """F9."""
    snapshot = place(unified(memory_bytes=3 * GIB))
    snapshot = measured(snapshot, "a", cpu=5 * GIB, GPU_1=5 * GIB)
    with pytest.raises(NoCapacity, match=r"3\.0 GiB needed, GPU-1 has 2\.0 GiB free of 8\.0 GiB, cpu has 2\.0 GiB"):
        plan_placement(snapshot, M)


def test_a_gang_of_unified_gpus_must_fit_into_the_memory_once() -> None:
    """F28."""
    gpus = (gpu("a", 1, unified=True), gpu("a", 2, unified=True))
    fits = mesh("a", ram=8, gpus=gpus, device_count=2, memory_bytes=7 * GIB)
    assert sum(plan_placement(fits, M).devices.values()) == 8 * GIB
    with pytest.raises(NoCapacity, match="lacks memory"):
        plan_placement(mesh("a", ram=8, gpus=gpus, device_count=2, memory_bytes=8 * GIB), M)


def test_the_end_of_a_replica_frees_shared_memory_everywhere() -> None:
    before = measured(with_state(place(unified(memory_bytes=3 * GIB)), ReplicaState.READY), "a", cpu=GIB, GPU_1=GIB)
    (record,) = before.replicas[M].values()
    after = without_replica(before, record)
    assert dict(after.measured[NodeName("a")].free_bytes) == {CPU: 4 * GIB, "GPU-1": 4 * GIB}


# disk


def test_a_model_that_must_be_converted_needs_room_on_the_disk_and_a_twentieth_besides() -> None:
    """F31."""
    snapshot = measured(mesh("a", backend="minilm"), "a", disk_gib=5.5)
    words = r"a lacks 512 MiB of disk: 1\.0 GiB to convert the model and 5\.0 GiB to be left free, 5\.5 GiB free"
    with pytest.raises(NoCapacity, match=words):
        plan_placement(snapshot, M)
    assert plan_placement(measured(snapshot, "a", disk_gib=6), M)


def test_a_small_disk_keeps_a_gib() -> None:
    """F31."""
    snapshot = mesh("a", backend="minilm")
    node = replace(snapshot.nodes[NodeName("a")], disk_total_bytes=4 * GIB)
    snapshot = measured(replace(snapshot, nodes={node.name: node}), "a", disk_gib=1.5)
    with pytest.raises(NoCapacity, match=r"1\.0 GiB to be left free"):
        plan_placement(snapshot, M)


def test_a_disk_that_nobody_measured_is_not_full() -> None:
    """F9, F31."""
    snapshot = mesh("a", backend="minilm")
    assert plan_placement(snapshot, M)
    unknown = replace(snapshot.nodes[NodeName("a")], disk_total_bytes=0)
    assert plan_placement(measured(replace(snapshot, nodes={unknown.name: unknown}), "a", disk_gib=0), M)


def test_what_was_converted_for_a_replica_needs_no_disk_again_and_gguf_files_need_none() -> None:
    """F31."""
    ready = with_state(place(mesh("a", backend="minilm")), ReplicaState.READY)
    assert plan_placement(measured(ready, "a", disk_gib=0), M)
    assert plan_placement(measured(mesh("a"), "a", disk_gib=0), M)


# selectors and spreading


def test_a_selector_looks_at_what_nodes_are() -> None:
    """F26, F6."""
    big = SelectorTerm(key="gpu.memory", operator=Operator.IN, values=("24GiB", "48GiB"))
    gpus = (gpu("a", 1, gib=8), gpu("b", 1, gib=24))
    snapshot = mesh("a", "b", "c", gpus=gpus, policy=Policy(selector_terms=(big,)))
    assert plan_placement(snapshot, M).replica.node == "b"
    with pytest.raises(NoCapacity, match=r"has no label 'gpu\.memory'"):
        plan_placement(snapshot, M, exclude_nodes=frozenset({NodeName("a"), NodeName("b")}))
    none = Policy(selector_terms=(SelectorTerm(key="gpu.memory", operator=Operator.DOES_NOT_EXIST),))
    assert plan_placement(mesh("a", "b", "c", gpus=gpus, policy=none), M).replica.node == "c"


def test_spreading_over_all_gives_each_node_one_replica() -> None:
    """F33."""
    snapshot = place(place(mesh("a", "b", policy=Policy(spread_all=True))))
    assert {r.node for r in snapshot.replicas[M]} == {"a", "b"}
    with pytest.raises(NoCapacity, match=r"has the one replica that each node gets \(spread_all\)"):
        plan_placement(snapshot, M)


# scorers


def options(snapshot: Snapshot, **rooms: int) -> tuple[Question, list[Option]]:
    question = Question(snapshot=snapshot, model=snapshot.models[M], policy=Policy())
    return question, [Option(node=NodeName(n), devices={CPU: 1}, room_bytes=room) for n, room in rooms.items()]


def holding(snapshot: Snapshot, node: str, model: ModelName = OTHER, *, in_flight: int = 0) -> Snapshot:
    """The snapshot with another model's replica on a node."""
    replica = ReplicaId(model, NodeName(node), 0)
    record = ReplicaRecord(id=replica, state=ReplicaState.READY, revision="r1", incarnation=1, devices={CPU: 1})
    device = replace(snapshot.devices[replica.node][CPU], claims={replica: 1})
    return replace(
        snapshot,
        replicas={**snapshot.replicas, model: {**snapshot.replicas.get(model, {}), replica: record}},
        devices={**snapshot.devices, replica.node: {CPU: device}},
        inflight={**snapshot.inflight, replica: {HolderId("h"): in_flight}},
    )


def test_an_idle_node_comes_before_one_with_more_memory() -> None:
    """F26."""
    question, found = options(holding(mesh("a", "b"), "a"), a=8 * GIB, b=GIB)
    assert [o.node for o in rank(question, found)] == ["b", "a"]


def test_with_memory_alike_the_node_with_fewer_requests_in_flight_is_taken() -> None:
    """F26: a difference that is noise of the measurement is none."""
    snapshot = holding(holding(mesh("a", "b"), "a", in_flight=3), "b", in_flight=2)
    question, found = options(snapshot, a=GIB + 1, b=GIB)
    assert [o.node for o in rank(question, found)] == ["b", "a"]


def test_a_node_that_has_the_files_comes_before_one_that_would_fetch_them() -> None:
    """F26."""
    snapshot = mesh("a", "b")
    absent = replace(snapshot.sources[NodeName("a")][M], present=False)
    snapshot = replace(snapshot, sources={**snapshot.sources, NodeName("a"): {M: absent}})
    question, found = options(snapshot, a=GIB, b=GIB)
    assert [o.node for o in rank(question, found)] == ["b", "a"]


def test_every_scorer_has_a_say() -> None:
    """F44."""
    question, (option,) = options(mesh("a"), a=GIB)
    assert len(scores(question, option)) == len(SCORERS)


# budgets and measurements


def test_a_claim_that_was_raised_over_the_budget_only_stops_new_placements() -> None:
    """F27, F29, F30: what runs, runs on; T6 charges the larger of estimate and measurement."""
    snapshot = with_state(place(mesh("a", ram=3)), ReplicaState.READY)
    (replica,) = snapshot.replicas[M]
    raised = replace(snapshot.devices[NodeName("a")][CPU], claims={replica: 4 * GIB})
    over = replace(snapshot, devices={NodeName("a"): {CPU: raised}})
    with pytest.raises(NoCapacity, match=r"0 B free of 3\.0 GiB"):
        plan_placement(over, M)
    assert over.routable_replicas(M) == list(over.replicas[M].values())
