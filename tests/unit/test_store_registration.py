"""T0, decided."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from localmesh.core.errors import NodeNameTaken, NodePending
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    ModelRecord,
    ModelSpec,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.store.registration import (
    DeviceFacts,
    Registration,
    RegistrationPlan,
    RunningReplica,
    plan_registration,
)

M, N, OTHER = ModelName("m"), NodeName("n"), NodeName("other")
M0, M1 = ReplicaId(M, N, 0), ReplicaId(M, N, 1)
GPU = DeviceId("GPU-1")
APPROVED = ApprovalRecord(key_fingerprint="key", mod_revision=1)


def record(replica: ReplicaId, state: ReplicaState = ReplicaState.READY, **changes: object) -> ReplicaRecord:
    base = ReplicaRecord(
        id=replica, state=state, revision="r1", incarnation=1, devices={CPU: 10}, endpoint="old:1", limit=4
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def view(
    *records: ReplicaRecord,
    approval: ApprovalRecord | None = APPROVED,
    most: int = 0,
    model: str | None = "r1",
    devices: Mapping[DeviceId, int] | None = None,
) -> Snapshot:
    by_model: dict[ModelName, dict[ReplicaId, ReplicaRecord]] = {}
    for each in records:
        by_model.setdefault(each.id.model, {})[each.id] = each
    spec = ModelSpec(name=M, backend="llama", source="x")
    return Snapshot(
        revision=5,
        approvals={N: approval} if approval else {},
        models={M: ModelRecord(spec=spec, revision=model, mod_revision=2)} if model else {},
        policies={M: PolicyRecord(policy=Policy(max_replicas=most), mod_revision=2)},
        replicas=by_model,
        devices={
            N: {
                d: DeviceRecord(node=N, id=d, kind="cpu", total_bytes=b, budget_bytes=b)
                for d, b in (devices or {}).items()
            }
        },
    )


def running(replica: ReplicaId, state: ReplicaState = ReplicaState.READY, **changes: object) -> RunningReplica:
    base = RunningReplica(id=replica, revision="r1", state=state, endpoint="new:1", limit=4, devices={CPU: 15})
    return replace(base, **changes)  # type: ignore[arg-type]


def plan(
    snapshot: Snapshot, *processes: RunningReplica, slots: int = 2, budget: int = 100, auto: bool = False
) -> RegistrationPlan:
    reg = Registration(
        node=N,
        key_fingerprint="key",
        endpoint="w:1",
        devices=(DeviceFacts(id=CPU, kind="cpu", total_bytes=200, budget_bytes=budget),),
        max_replicas_per_model=slots,
        running=processes,
        auto_approve=auto,
    )
    return plan_registration(reg, snapshot, incarnation=9, token="t")


def claims(decided: RegistrationPlan) -> Mapping[ReplicaId, int]:
    (device,) = decided.devices
    return device.claims


def ids(records: Iterable[ReplicaRecord]) -> list[ReplicaId]:
    return [r.id for r in records]


def test_a_running_replica_with_a_record_goes_on_under_the_new_incarnation() -> None:
    """F4."""
    decided = plan(view(record(M0)), running(M0))
    (kept,) = decided.kept
    assert (kept.incarnation, kept.state, kept.endpoint) == (9, ReplicaState.READY, "new:1")
    assert (decided.adopted, decided.stop, decided.deleted) == ((M0,), (), ())
    assert claims(decided) == {M0: 10}


def test_a_record_without_a_process_is_deleted_with_its_claim() -> None:
    decided = plan(view(record(M0), record(M1)), running(M1))
    assert decided.deleted == (M0,)
    assert claims(decided) == {M1: 10}


def test_records_of_other_nodes_are_left_alone() -> None:
    decided = plan(view(record(ReplicaId(M, OTHER, 0))))
    assert (decided.kept, decided.deleted) == ((), ())


def test_a_replica_that_was_draining_goes_on_draining() -> None:
    """F3."""
    decided = plan(view(record(M0, ReplicaState.DRAINING)), running(M0))
    assert decided.kept[0].state is ReplicaState.DRAINING
    assert decided.adopted == (M0,)


def test_a_process_of_an_unloading_replica_is_stopped_and_keeps_its_claim_until_it_has_exited() -> None:
    decided = plan(view(record(M0, ReplicaState.UNLOADING)), running(M0))
    assert (decided.adopted, decided.stop) == ((), (M0,))
    assert decided.kept[0].state is ReplicaState.UNLOADING
    assert claims(decided) == {M0: 10}


def test_what_became_ready_meanwhile_claims_what_it_uses() -> None:
    decided = plan(view(record(M0, ReplicaState.LOADING)), running(M0))
    assert claims(decided) == {M0: 15}


def test_a_process_of_another_revision_than_its_record_is_stopped() -> None:
    decided = plan(view(record(M0)), running(M0, revision="r0"))
    assert (decided.stop, decided.deleted, decided.kept) == ((M0,), (M0,), ())


def test_a_replica_of_a_deleted_model_goes_on_until_it_is_unloaded() -> None:
    assert plan(view(record(M0), model=None), running(M0)).adopted == (M0,)


def test_a_process_without_a_record_gets_one_if_there_is_room() -> None:
    """F4: the record lease ran out while the registry was away."""
    decided = plan(view(), running(M0))
    assert ids(decided.created) == [M0]
    assert decided.created[0].token == "t"
    assert (decided.adopted, decided.stop) == ((M0,), ())
    assert claims(decided) == {M0: 15}


@pytest.mark.parametrize(
    "snapshot",
    [view(model=None), view(model="r2"), view(record(ReplicaId(M, OTHER, 0)), most=1)],
    ids=["the model is deleted", "the model was edited", "the maximum is reached elsewhere"],
)
def test_a_process_without_a_record_that_is_not_wanted_is_stopped(snapshot: Snapshot) -> None:
    decided = plan(snapshot, running(M0))
    assert (decided.created, decided.adopted, decided.stop) == ((), (), (M0,))
    assert claims(decided) == {}


def test_a_process_without_a_record_is_stopped_where_slots_or_memory_are_used_up() -> None:
    assert plan(view(), running(M0), running(M1), slots=1).stop == (M1,)
    assert plan(view(), running(M0), running(M1), budget=29).stop == (M1,)
    assert plan(view(record(M0)), running(M0), running(M1), budget=24).stop == (M1,)
    assert plan(view(), running(M0, devices={GPU: 1})).stop == (M0,)
    assert plan(view(), running(M0, devices={})).stop == (M0,)


def test_the_maximum_does_not_count_records_that_are_deleted_at_the_same_time() -> None:
    decided = plan(view(record(M0), most=1), running(M1))
    assert (ids(decided.created), decided.deleted) == ([M1], (M0,))


def test_a_replica_that_is_reported_for_another_node_is_stopped() -> None:
    foreign = ReplicaId(M, OTHER, 0)
    decided = plan(view(record(foreign)), running(foreign))
    assert (decided.stop, decided.kept, decided.created) == ((foreign,), (), ())


def test_devices_that_are_gone_are_deleted() -> None:
    assert plan(view(devices={CPU: 100, GPU: 5})).gone_devices == (GPU,)


def test_an_unknown_node_is_pending_or_approved_by_the_mesh_s_setting() -> None:
    """F3."""
    with pytest.raises(NodePending):
        plan(view(approval=None))
    decided = plan(view(approval=None), auto=True)
    assert decided.approval == ApprovalRecord(key_fingerprint="key")


@pytest.mark.parametrize("auto", [True, False])
def test_a_node_that_an_operator_refused_stays_pending(auto: bool) -> None:
    """F3."""
    with pytest.raises(NodePending):
        plan(view(approval=replace(APPROVED, approved=False)), auto=auto)


@pytest.mark.parametrize("auto", [True, False])
def test_another_key_does_not_get_the_name(auto: bool) -> None:
    """F3."""
    with pytest.raises(NodeNameTaken):
        plan(view(approval=replace(APPROVED, key_fingerprint="another")), auto=auto)


def test_registering_leaves_a_cordon_and_the_operator_s_labels() -> None:
    """F3, F6."""
    assert plan(view(approval=replace(APPROVED, cordoned=True, labels={"a": "b"}))).approval is None


def test_a_cordon_from_before_the_first_registration_is_bound_to_the_key() -> None:
    early = ApprovalRecord(key_fingerprint="", cordoned=True, mod_revision=1)
    assert plan(view(approval=early), auto=True).approval == replace(early, key_fingerprint="key")
    with pytest.raises(NodePending):
        plan(view(approval=early))


def test_a_node_s_device_gets_the_operator_s_budget_at_every_registration() -> None:
    """F30: the worker's word is kept beside it, and the whole memory is what a part is taken of."""
    said = replace(APPROVED, memory_budgets={"*": "80%"})
    for _ in range(2):
        (device,) = plan(view(approval=said), budget=100).devices
        assert (device.total_bytes, device.budget_bytes, device.worker_budget_bytes) == (200, 160, 100)
    (device,) = plan(view(approval=APPROVED), budget=100).devices
    assert (device.budget_bytes, device.worker_budget_bytes) == (100, 100)


def test_what_runs_is_taken_over_within_the_operator_s_overrides() -> None:
    """F30, F32: a replica without a record is made again only where the overrides leave room."""
    fewer = replace(APPROVED, max_replicas_per_model=1)
    assert plan(view(approval=fewer), running(M0), running(M1), slots=2).stop == (M1,)
    more = replace(APPROVED, max_replicas_per_model=2)
    assert plan(view(approval=more), running(M0), running(M1), slots=1).stop == ()
    smaller = replace(APPROVED, memory_budgets={"cpu": "29"})
    assert plan(view(approval=smaller), running(M0), running(M1), budget=100).stop == (M1,)
    larger = replace(APPROVED, memory_budgets={"cpu": "100%"})
    assert plan(view(approval=larger), running(M0), running(M1), budget=29).stop == ()


def test_what_is_over_a_lowered_budget_goes_on() -> None:
    """F30: a budget stops nothing that runs and has a record."""
    smaller = replace(APPROVED, memory_budgets={"cpu": "1"})
    decided = plan(view(record(M0), approval=smaller), running(M0))
    assert (decided.adopted, decided.stop) == ((M0,), ())
    assert decided.devices[0].unclaimed_bytes < 0


def test_a_process_without_a_record_is_stopped_where_another_member_of_its_group_lives() -> None:
    """F37: invariant 4 holds for what is taken over, too."""
    other = ModelName("other")
    policies = {m: PolicyRecord(policy=Policy(groups=("large",)), mod_revision=2) for m in (M, other)}
    base = view()
    spec = ModelSpec(name=other, backend="llama", source="x")
    snapshot = replace(
        base, policies=policies, models={**base.models, other: ModelRecord(spec=spec, revision="r1", mod_revision=2)}
    )
    first, second = running(M0), running(ReplicaId(other, N, 0))
    decided = plan(snapshot, first, second)
    assert (ids(decided.created), decided.stop) == ([M0], (second.id,))
    apart = replace(snapshot, policies={**policies, other: PolicyRecord(policy=Policy(groups=("small",)))})
    assert len(plan(apart, first, second).created) == 2


def test_processes_that_are_taken_over_share_the_budget_of_a_unified_gpu_and_the_cpu() -> None:
    """F9, F27."""
    devices = (
        DeviceFacts(id=CPU, kind="cpu", total_bytes=100, budget_bytes=100),
        DeviceFacts(id=GPU, kind="gpu", total_bytes=100, budget_bytes=100, unified=True),
    )
    processes = (running(M0, devices={CPU: 60}), running(M1, devices={GPU: 60}))
    reg = Registration(
        node=N,
        key_fingerprint="key",
        endpoint="w:1",
        devices=devices,
        max_replicas_per_model=2,
        running=processes,
    )
    decided = plan_registration(reg, view(), incarnation=9, token="t")
    assert (ids(decided.created), decided.stop) == ([M0], (M1,))
    apart = replace(reg, devices=(devices[0], replace(devices[1], unified=False)))
    assert len(plan_registration(apart, view(), incarnation=9, token="t").created) == 2
