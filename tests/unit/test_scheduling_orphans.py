"""Memory that was handed over and that nobody came for."""

from dataclasses import replace

from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.orphans import TakeBack, plan_take_back
from tests.unit.scheduling_kit import M, mesh, serve

HEIR = ReplicaId(ModelName("heir"), NodeName("n0"), 0)
SERVED = ReplicaId(M, NodeName("n0"), 0)


def handed(snapshot: Snapshot, replica: ReplicaId = HEIR) -> Snapshot:
    device = snapshot.devices[NodeName("n0")][CPU]
    claimed = replace(device, claims={**device.claims, replica: 5})
    return replace(snapshot, devices={**snapshot.devices, NodeName("n0"): {CPU: claimed}})


def test_a_claim_without_its_replica_is_taken_back_after_a_while_and_not_before() -> None:
    """F36; invariant 6."""
    snapshot = handed(mesh(1))
    first = plan_take_back(snapshot, now=10.0)
    assert not first.actions
    assert first.wake_after_seconds == 5.0
    soon = plan_take_back(snapshot, now=14.0, since=first.since)
    assert not soon.actions
    assert soon.wake_after_seconds == 1.0
    due = plan_take_back(snapshot, now=15.0, since=soon.since)
    assert due.actions == (TakeBack(replica=HEIR, devices=(CPU,)),)
    assert due.wake_after_seconds is None


def test_a_claim_whose_replica_came_is_forgotten() -> None:
    served = serve(mesh(1), 1)
    assert plan_take_back(served, now=0.0) == plan_take_back(mesh(1), now=0.0)
    gone = plan_take_back(served, now=99.0, since={SERVED: 1.0})
    assert not gone.actions
    assert not gone.since


def test_the_time_does_not_begin_while_something_is_still_stopped_for_it() -> None:
    """F36."""
    snapshot = handed(serve(mesh(1), 1))
    victim = replace(snapshot.replicas[M][SERVED], state=ReplicaState.UNLOADING, memory_for=HEIR)
    waiting = replace(snapshot, replicas={M: {SERVED: victim}})
    assert not plan_take_back(waiting, now=99.0, since={HEIR: 0.0}).since


def test_what_a_replica_was_handed_on_a_device_that_it_does_not_use_is_taken_back() -> None:
    """F36: it was placed on another device than the one that was made free."""
    snapshot = serve(mesh(1), 1)
    record = replace(snapshot.replicas[M][SERVED], devices={DeviceId("gpu0"): 1})
    moved = replace(snapshot, replicas={M: {SERVED: record}})
    assert plan_take_back(moved, now=9.0, since={SERVED: 0.0}).actions == (TakeBack(replica=SERVED, devices=(CPU,)),)
