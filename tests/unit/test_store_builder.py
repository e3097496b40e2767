"""From keys and values to snapshots."""

import logging

import pytest

from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue
from localmesh.store import codec
from localmesh.store.builder import Complaints, SnapshotBuilder
from localmesh.store.keys import Keys
from localmesh.store.v1 import records_pb2 as pb

KEYS = Keys("m")
A, B = ModelName("a"), ModelName("b")
N = NodeName("n")
A0, B0 = ReplicaId(A, N, 0), ReplicaId(B, N, 0)


def kv(key: bytes, value: bytes = b"", *, mod: int = 2, create: int = 1, lease: int = 0) -> KeyValue:
    return KeyValue(key, value, create, mod, 1, lease)


def model(name: ModelName) -> KeyValue:
    message = pb.Model()
    codec.fill_model(message, ModelSpec(name=name, backend="llama", source="x"))
    return kv(KEYS.model(name), codec.encode(message))


def replica(replica_id: ReplicaId, state: int = pb.REPLICA_STATE_READY) -> KeyValue:
    return kv(KEYS.replica(replica_id), bytes((8, state)))


def built(*changes: KeyValue | bytes, base: Snapshot | None = None, complaints: Complaints | None = None) -> Snapshot:
    builder = SnapshotBuilder(base or Snapshot(), KEYS, complaints or Complaints())
    for change in changes:
        if isinstance(change, bytes):
            builder.delete(change)
        else:
            builder.put(change)
    return builder.build(9)


def full() -> Snapshot:
    return built(
        model(A),
        model(B),
        kv(KEYS.policy(A)),
        kv(KEYS.approval(N)),
        kv(KEYS.node(N), lease=5),
        kv(KEYS.measured(N)),
        kv(KEYS.sources(N)),
        kv(KEYS.device(N, CPU)),
        replica(A0),
        replica(B0),
        kv(KEYS.progress(A0)),
        kv(KEYS.inflight(A0, HolderId("h")), codec.encode_inflight(3, "")),
        kv(KEYS.inflight(A0, HolderId("i"))),
        kv(KEYS.failure(A, N)),
        kv(KEYS.guard()),
        kv(KEYS.leader(), b"router-1"),
        kv(KEYS.schema(), codec.encode_schema()),
    )


def test_every_table_is_filled() -> None:
    snapshot = full()
    assert snapshot.revision == 9
    assert set(snapshot.models) == {A, B}
    assert A in snapshot.policies
    assert snapshot.nodes[N].incarnation == 5
    assert N in snapshot.approvals
    assert N in snapshot.measured
    assert N in snapshot.sources
    assert CPU in snapshot.devices[N]
    assert snapshot.replica(A0) is not None
    assert A0 in snapshot.progress
    assert snapshot.inflight[A0] == {HolderId("h"): 3, HolderId("i"): 0}
    assert N in snapshot.failures[A]
    assert snapshot.guarded
    assert snapshot.leader == "router-1"


def test_deletes_empty_every_table_and_leave_no_empty_rows() -> None:
    keys = [
        KEYS.model(A),
        KEYS.model(B),
        KEYS.policy(A),
        KEYS.approval(N),
        KEYS.node(N),
        KEYS.measured(N),
        KEYS.sources(N),
        KEYS.device(N, CPU),
        KEYS.replica(A0),
        KEYS.replica(B0),
        KEYS.progress(A0),
        KEYS.inflight(A0, HolderId("h")),
        KEYS.inflight(A0, HolderId("i")),
        KEYS.failure(A, N),
        KEYS.guard(),
        KEYS.leader(),
        KEYS.schema(),
        KEYS.prefix + b"garbage",
    ]
    assert built(*keys, base=full()) == Snapshot(revision=9)


def test_what_a_change_does_not_touch_is_shared_with_the_snapshot_before() -> None:
    before = full()
    after = built(replica(A0, pb.REPLICA_STATE_DRAINING), base=before)
    changed = after.replica(A0)
    assert changed is not None
    assert changed.state is ReplicaState.DRAINING
    assert after.replicas[B] is before.replicas[B]
    assert after.models is before.models
    assert after.inflight is before.inflight
    unchanged = before.replica(A0)
    assert unchanged is not None
    assert unchanged.state is ReplicaState.READY


def test_the_last_change_of_a_key_in_a_batch_counts() -> None:
    assert built(replica(A0), KEYS.replica(A0)).replica(A0) is None
    assert built(KEYS.replica(A0), replica(A0), base=full()).replica(A0) is not None


def test_what_cannot_be_read_is_not_in_the_snapshot_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    with caplog.at_level(logging.WARNING):
        snapshot = built(replica(A0, 42), kv(KEYS.prefix + b"x/y"), base=full(), complaints=complaints)
        built(replica(A0, 42), kv(KEYS.prefix + b"x/y"), base=full(), complaints=complaints)
    assert snapshot.replica(A0) is None  # its old state is no longer true, either
    assert snapshot.replica(B0) is not None
    assert len(caplog.records) == 2


def test_a_key_that_becomes_readable_is_complained_of_again_when_it_breaks_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    complaints = Complaints()
    with caplog.at_level(logging.WARNING):
        built(replica(A0, 42), replica(A0), replica(A0, 42), complaints=complaints)
    assert len(caplog.records) == 2
