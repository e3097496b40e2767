"""The last check of a plan before T1."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.store.placement import Placement, check_placement

M, N = ModelName("m"), NodeName("n")
M0, M1 = ReplicaId(M, N, 0), ReplicaId(M, N, 1)
GONE = ReplicaId(ModelName("gone"), N, 0)

SNAPSHOT = Snapshot(
    revision=9,
    models={M: ModelRecord(spec=ModelSpec(name=M, backend="llama", source="x"), revision="r", mod_revision=1)},
    policies={M: PolicyRecord(policy=Policy(max_replicas=2), mod_revision=1)},
    approvals={N: ApprovalRecord(key_fingerprint="k", mod_revision=1)},
    nodes={N: NodeRecord(name=N, incarnation=7, record_lease=8, endpoint="h:1", max_replicas_per_model=2)},
    devices={N: {CPU: DeviceRecord(node=N, id=CPU, kind="cpu", total_bytes=100, budget_bytes=90, claims={GONE: 40})}},
)
PLACEMENT = Placement(replica=M0, revision="r", devices={CPU: 50}, incarnation=7, snapshot=SNAPSHOT)


def with_replicas(*replicas: ReplicaId) -> Snapshot:
    records = {
        r: ReplicaRecord(id=r, state=ReplicaState.UNLOADING, revision="r", incarnation=7, devices={CPU: 0})
        for r in replicas
    }
    return replace(SNAPSHOT, replicas={M: records})


def test_a_plan_that_fits_to_the_byte_is_taken() -> None:
    """F27."""
    assert check_placement(PLACEMENT).name == N


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: replace(p, devices={CPU: 51}), "no room on the device cpu"),
        (lambda p: replace(p, devices={CPU: -1}), "no room on the device cpu"),
        (lambda p: replace(p, devices={DeviceId("GPU-1"): 1}), "no room on the device GPU-1"),
        (lambda p: replace(p, devices={}), "claims no device"),
        (lambda p: replace(p, incarnation=6), "takes no new replica"),
        (lambda p: replace(p, revision="q"), "changed or deleted"),
        (lambda p: replace(p, snapshot=replace(SNAPSHOT, models={})), "changed or deleted"),
        (lambda p: replace(p, snapshot=replace(SNAPSHOT, nodes={})), "takes no new replica"),
        (
            lambda p: replace(
                p, snapshot=replace(SNAPSHOT, approvals={N: ApprovalRecord(key_fingerprint="k", cordoned=True)})
            ),
            "takes no new replica",
        ),
        (lambda p: replace(p, snapshot=with_replicas(M0)), "it exists"),
        (
            lambda p: replace(
                p, snapshot=with_replicas(ReplicaId(M, NodeName("a"), 0), ReplicaId(M, NodeName("b"), 0))
            ),
            "has the 2 replicas",
        ),
        (lambda p: replace(p, snapshot=replace(with_replicas(M1, ReplicaId(M, N, 2)), policies={})), "takes 2 of"),
    ],
)
def test_a_plan_that_does_not_fit_what_it_was_made_upon_is_refused(
    change: Callable[[Placement], Placement], reason: str
) -> None:
    """F27."""
    with pytest.raises(Conflict, match=reason):
        check_placement(change(PLACEMENT))


def test_memory_that_was_handed_over_is_room_for_its_heir_alone() -> None:
    heir = replace(PLACEMENT, replica=M1, devices={CPU: 90})
    devices = {CPU: replace(SNAPSHOT.devices[N][CPU], claims={M1: 90})}
    snapshot = replace(SNAPSHOT, devices={N: devices})
    assert check_placement(replace(heir, snapshot=snapshot))
    with pytest.raises(Conflict, match="no room"):
        check_placement(replace(PLACEMENT, snapshot=snapshot))


OTHER = ModelName("other")


def grouped(*nodes: str, group: str = "g") -> Snapshot:
    """The mesh with another member of the model's group on some nodes."""
    replicas = {
        r: ReplicaRecord(id=r, state=ReplicaState.DRAINING, revision="q", incarnation=1, devices={CPU: 0})
        for r in (ReplicaId(OTHER, NodeName(n), 0) for n in nodes)
    }
    policies = {M: PolicyRecord(policy=Policy(groups=("g",))), OTHER: PolicyRecord(policy=Policy(groups=(group,)))}
    return replace(SNAPSHOT, policies=policies, replicas={OTHER: replicas})


def test_a_plan_that_puts_members_of_a_group_on_one_node_is_refused() -> None:
    """F37."""
    with pytest.raises(Conflict, match="holds the model other, which never shares a node with it"):
        check_placement(replace(PLACEMENT, snapshot=grouped(N)))
    assert check_placement(replace(PLACEMENT, snapshot=grouped("elsewhere")))
    assert check_placement(replace(PLACEMENT, snapshot=grouped(N, group="h")))


def test_a_plan_for_a_second_replica_of_a_spread_model_on_a_node_is_refused() -> None:
    """F33."""
    snapshot = replace(with_replicas(M1), policies={M: PolicyRecord(policy=Policy(spread_all=True))})
    with pytest.raises(Conflict, match="each node gets one replica"):
        check_placement(replace(PLACEMENT, snapshot=snapshot))
    older = {M: {M1: replace(snapshot.replicas[M][M1], revision="before")}}
    assert check_placement(replace(PLACEMENT, snapshot=replace(snapshot, replicas=older)))


def test_a_plan_that_counts_shared_memory_twice_is_refused() -> None:
    """F9, F27."""
    gpu = DeviceId("GPU-1")
    record = DeviceRecord(node=N, id=gpu, kind="gpu", total_bytes=100, budget_bytes=90, unified=True)
    shared = replace(PLACEMENT, snapshot=replace(SNAPSHOT, devices={N: {**SNAPSHOT.devices[N], gpu: record}}))
    assert check_placement(replace(shared, devices={gpu: 50}))
    with pytest.raises(Conflict, match="no room on the device GPU-1"):
        check_placement(replace(shared, devices={gpu: 51}))
    with pytest.raises(Conflict, match="no room on the device"):
        check_placement(replace(shared, devices={CPU: 30, gpu: 30}))
