"""ExplainPlacement: requests and answers."""

from dataclasses import replace

import pytest

from localmesh.core.errors import InvalidRequest, InvalidSpec, ModelNotFound
from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    FailureRecord,
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
from localmesh.router.explain import explain_placement
from localmesh.rpc.convert import spec_to_proto
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import types_pb2

M, A = ModelName("tiny"), NodeName("a")
SPEC = ModelSpec(name=M, backend="llama", source="t.gguf")
MESH = Snapshot(
    models={M: ModelRecord(spec=SPEC, revision="r")},
    policies={M: PolicyRecord(policy=Policy(min_replicas=1))},
    approvals={A: ApprovalRecord(key_fingerprint="k")},
    nodes={
        A: NodeRecord(
            name=A, incarnation=1, record_lease=2, endpoint="a:1", engines=(EngineInfo(name="llama", available=True),)
        )
    },
    sources={A: {M: SourceRecord(revision="r", present=True, path="/m/t.gguf", memory_bytes=10)}},
    devices={A: {CPU: DeviceRecord(node=A, id=CPU, kind="cpu", total_bytes=50, budget_bytes=50)}},
)


def ask(snapshot: Snapshot = MESH, *, connected: bool = True, **request: object) -> pb.ExplainPlacementResponse:
    return explain_placement(snapshot, pb.ExplainPlacementRequest(**request), connected=connected)  # type: ignore[arg-type, no-any-return]


def test_a_declared_model_is_explained_as_it_is() -> None:
    """F44."""
    found = ask(model="tiny")
    assert (found.model, found.revision, found.dry_run, found.reason) == ("tiny", "r", False, "")
    assert (found.chosen.ref.node, found.chosen.ref.index, dict(found.chosen.devices)) == ("a", 0, {"cpu": 10})
    (node,) = found.nodes
    assert {f.outcome for f in node.filters} == {pb.FILTER_OUTCOME_PASSED}
    (device,) = node.devices
    assert (device.id, device.room_bytes, device.needed_bytes, device.chosen) == ("cpu", 50, 10, True)
    assert (found.replicas, found.min_replicas) == (0, 1)


def test_why_it_is_pending_is_told_with_the_failures_that_are_remembered() -> None:
    """F42, F44."""
    failure = FailureRecord(model=M, node=A, reason="LOAD_FAILED", message="bad magic", revision="r")
    found = ask(replace(MESH, failures={M: {A: failure}}), model="tiny")
    assert not found.HasField("chosen")
    assert (found.reason, [f.message for f in found.failures]) == ("NO_CAPACITY", ["bad magic"])
    assert "a failed to load it a short while ago" in found.message


def test_a_failure_of_another_revision_is_not_told() -> None:
    """F42: it holds up nothing."""
    failure = FailureRecord(model=M, node=A, reason="LOAD_FAILED", message="bad magic", revision="before")
    assert not ask(replace(MESH, failures={M: {A: failure}}), model="tiny").failures


def test_the_same_spec_is_no_dry_run_and_another_one_is() -> None:
    """F44."""
    assert not ask(spec=spec_to_proto(SPEC)).dry_run
    edited = spec_to_proto(replace(SPEC, memory_bytes=60))
    found = ask(spec=edited)
    assert found.dry_run
    assert found.revision != "r"
    assert "60 B needed" in found.message
    spread = ask(spec=spec_to_proto(SPEC), policy=types_pb2.PlacementPolicy(spread_all=True))
    assert (spread.dry_run, spread.revision, spread.min_replicas) == (True, "r", 1)


def test_a_silent_store_is_told() -> None:
    """F44."""
    assert any("etcd is silent" in note for note in ask(model="tiny", connected=False).notes)


def test_what_cannot_be_explained_is_refused() -> None:
    """F44."""
    with pytest.raises(ModelNotFound, match="did you mean 'tiny'"):
        ask(model="tini")
    with pytest.raises(InvalidRequest, match="give both"):
        ask(model="tiny", policy=types_pb2.PlacementPolicy())
    with pytest.raises(InvalidRequest, match="its spec for 'tiny'"):
        ask(model="other", spec=spec_to_proto(SPEC))
    with pytest.raises(InvalidSpec):
        ask(spec=types_pb2.ModelSpec(name="x"))


def test_what_would_be_stopped_to_make_room_is_told() -> None:
    """F36, F44."""
    other = ReplicaId(ModelName("other"), A, 0)
    record = ReplicaRecord(id=other, state=ReplicaState.READY, revision="r", incarnation=1, devices={CPU: 45})
    full = replace(MESH.devices[A][CPU], claims={other: 45})
    spec = ModelSpec(name=other.model, backend="llama", source="o.gguf")
    snapshot = replace(
        MESH,
        models={**MESH.models, other.model: ModelRecord(spec=spec, revision="r")},
        devices={A: {CPU: full}},
        replicas={other.model: {other: record}},
    )
    found = ask(snapshot, model="tiny")
    assert not found.HasField("chosen")
    assert any("would stop other/a/0, which nobody uses now, to make room on a" in note for note in found.notes)
    busy = replace(snapshot, inflight={other: {HolderId("h"): 1}})
    assert not any("would stop" in note for note in ask(busy, model="tiny").notes)
    larger = ask(snapshot, spec=spec_to_proto(replace(SPEC, memory_bytes=20)))
    assert any("would stop other/a/0" in note for note in larger.notes), "also before it is applied"
