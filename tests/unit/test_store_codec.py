"""Between records and values."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    FailureRecord,
    MeasuredRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.store import codec
from localmesh.store.v1 import records_pb2 as pb

MODEL = ModelName("m:1")
NODE = NodeName("n1")
REPLICA = ReplicaId(MODEL, NODE, 2)
SPEC = ModelSpec(
    name=MODEL,
    backend="llama",
    source="a.gguf",
    context_tokens=512,
    slots=2,
    threads=3,
    gpu_layers=0,
    cache_type="q8_0",
    embeddings=True,
    max_concurrent_requests=7,
    options={"b": "2", "a": "1"},
    memory_bytes=1 << 33,
    device_kind="gpu",
)
# A field that only a newer version knows: number 99, of 3 bytes.
UNKNOWN = b"\x9a\x06\x03new"


def test_a_model_is_read_back_as_written() -> None:
    message = pb.Model()
    revision = codec.fill_model(message, SPEC)
    record = codec.decode_model(MODEL, codec.encode(message), 5)
    assert (record.spec, record.revision, record.mod_revision) == (SPEC, revision, 5)


def test_layers_on_the_gpu_that_are_not_said_are_not_zero() -> None:
    message = pb.Model()
    codec.fill_model(message, SPEC)
    codec.fill_model(message, replace(SPEC, gpu_layers=None))
    assert codec.decode_model(MODEL, codec.encode(message), 1).spec.gpu_layers is None


def test_policy_and_approval_are_read_back_as_written() -> None:
    terms = tuple(SelectorTerm(key="k", operator=o, values=("v",) if o.takes_values else ()) for o in Operator)
    policy = Policy(
        node_selector={"zone": "a"},
        min_replicas=1,
        max_replicas=4,
        immediate=True,
        selector_terms=terms,
        groups=("g", "h"),
        spread_all=True,
        pinned=True,
    )
    policy_message = pb.Policy()
    codec.fill_policy(policy_message, policy)
    assert codec.decode_policy(codec.encode(policy_message), 3).policy == policy
    approval = ApprovalRecord(
        key_fingerprint="ab", approved=True, cordoned=True, draining=True, labels={"x": "y"}, mod_revision=9
    )
    approval_message = pb.Approval()
    codec.fill_approval(approval_message, approval)
    assert codec.decode_approval(codec.encode(approval_message), 9) == approval


def test_a_condition_that_this_version_does_not_know_is_refused() -> None:
    """F26: a guess would place replicas where they must not be."""
    message = pb.Policy(selector_terms=[pb.SelectorTerm(key="k", operator=99)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown operator of a selector: 99"):
        codec.decode_policy(codec.encode(message), 1)


def test_a_node_is_read_back_with_its_lease_as_incarnation() -> None:
    node = NodeRecord(
        name=NODE,
        incarnation=77,
        record_lease=88,
        endpoint="h:1",
        labels={"a": "b"},
        engines=(EngineInfo(name="llama", available=True, device_kinds=("cpu", "gpu"), detail="x"),),
        max_replicas_per_model=2,
        key_fingerprint="ff",
        disk_total_bytes=10,
        version="1",
        mod_revision=4,
    )
    message = pb.Node()
    codec.fill_node(message, node)
    codec.fill_node(message, node)
    assert codec.decode_node(NODE, codec.encode(message), 77, 4) == node


def test_a_node_without_a_lease_would_never_be_gone_and_is_refused() -> None:
    with pytest.raises(ValueError, match="without a presence lease"):
        codec.decode_node(NODE, b"", 0, 4)


def test_a_device_is_read_back_with_the_claims_on_it() -> None:
    device = DeviceRecord(
        node=NODE,
        id=DeviceId("GPU-1"),
        kind="gpu",
        total_bytes=100,
        budget_bytes=90,
        name="card",
        unified=True,
        claims={REPLICA: 40, ReplicaId(ModelName("b"), NODE, 0): 1},
        mod_revision=3,
    )
    message = pb.Device()
    codec.fill_device(message, device)
    assert codec.decode_device(NODE, device.id, codec.encode(message), 3) == device


@pytest.mark.parametrize("claim", ["a", "a/", "/0", "a/01", "a/-1", "a/99999", "a/b/0", "a/\u0663"])
def test_a_claim_of_nobody_is_refused(claim: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec.decode_device(NODE, CPU, pb.Device(claims={claim: 1}).SerializeToString(), 1)


def test_a_negative_claim_would_make_memory_of_nothing_and_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        codec.decode_device(NODE, CPU, pb.Device(claims={"a/0": -1}).SerializeToString(), 1)


@pytest.mark.parametrize("state", list(ReplicaState))
def test_a_replica_is_read_back_in_every_state(state: ReplicaState) -> None:
    replica = ReplicaRecord(
        id=REPLICA,
        state=state,
        revision="r",
        incarnation=7,
        devices={CPU: 5},
        endpoint="h:2",
        limit=3,
        memory_for=ReplicaId(ModelName("b"), NODE, 0),
        token="t",
        mod_revision=9,
        create_revision=8,
    )
    message = pb.Replica()
    codec.fill_replica(message, replica)
    assert codec.decode_replica(REPLICA, codec.encode(message), 9, 8) == replica


@pytest.mark.parametrize("state", [0, 7, 99])
def test_a_state_that_this_version_does_not_know_is_refused(state: int) -> None:
    with pytest.raises(ValueError, match="unknown state"):
        codec.decode_replica(REPLICA, bytes((8, state)), 1, 1)


def test_what_is_measured_found_and_done_is_read_back() -> None:
    measured = MeasuredRecord(free_bytes={CPU: 5}, cpu_load=0.5, disk_free_bytes=6)
    measured_message = pb.Measured()
    codec.fill_measured(measured_message, measured)
    assert codec.decode_measured(codec.encode(measured_message)) == measured
    sources = {
        MODEL: SourceRecord(revision="r", present=True, path="/a", weights_bytes=1, memory_bytes=2),
        ModelName("b"): SourceRecord(revision="q", present=False, path="/b", problem="missing"),
    }
    sources_message = pb.Sources()
    codec.fill_sources(sources_message, sources)
    assert codec.decode_sources(codec.encode(sources_message)) == sources
    progress = ProgressRecord(phase="loading", done_bytes=1, total_bytes=2, eta_seconds=3.5)
    assert codec.decode_progress(codec.encode_progress(progress)) == progress
    failure = FailureRecord(model=MODEL, node=NODE, reason="LOAD_FAILED", message="no", revision="r", attempts=3)
    assert codec.decode_failure(MODEL, NODE, codec.encode_failure(failure)) == failure
    assert codec.decode_inflight(codec.encode_inflight(3, "t")) == (3, "t")
    assert codec.decode_schema(codec.encode_schema()) == (codec.SCHEMA_VERSION, codec.OLDEST_COMPATIBLE)


def test_fields_of_a_newer_version_survive_a_rewrite() -> None:
    """F64."""
    message = codec.fresh(pb.Model, UNKNOWN)
    codec.fill_model(message, SPEC)
    once = codec.encode(message)
    again = codec.fresh(pb.Model, once)
    codec.fill_model(again, replace(SPEC, slots=9))
    assert UNKNOWN in codec.encode(again)
    assert codec.decode_model(MODEL, codec.encode(again), 1).spec.slots == 9


@pytest.mark.parametrize("field", [f.name for f in fields(ModelSpec) if f.name != "name"])
def test_every_field_but_the_name_changes_the_revision(field: str) -> None:
    """F40."""
    other: dict[str, object] = {"options": {"a": "1", "b": "3"}, "embeddings": False, "gpu_layers": None}
    present = getattr(SPEC, field)
    changed = other.get(field, present + ("x" if isinstance(present, str) else 1) if field not in other else None)
    assert codec.revision_of(replace(SPEC, **{field: changed})) != codec.revision_of(SPEC)


def test_the_revision_is_16_digits_that_depend_on_the_content_alone() -> None:
    revision = codec.revision_of(SPEC)
    assert len(revision) == 16
    assert int(revision, 16) >= 0
    assert codec.revision_of(replace(SPEC, name=ModelName("other"), options={"a": "1", "b": "2"})) == revision


def test_the_revision_of_a_plain_spec_is_fixed_for_good() -> None:
    """A release in which this fails loads every model of every mesh anew."""
    plain = ModelSpec(name=MODEL, backend="llama", source="a.gguf", slots=2)
    assert codec.revision_of(plain) == "6c1edfd932b45175"


@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_or_a_value_error(value: bytes) -> None:
    readers: list[Callable[[bytes], object]] = [
        lambda v: codec.decode_model(MODEL, v, 1),
        lambda v: codec.decode_policy(v, 1),
        lambda v: codec.decode_approval(v, 1),
        lambda v: codec.decode_node(NODE, v, 1, 1),
        lambda v: codec.decode_device(NODE, CPU, v, 1),
        lambda v: codec.decode_replica(REPLICA, v, 1, 1),
        codec.decode_measured,
        codec.decode_sources,
        codec.decode_progress,
        codec.decode_inflight,
        codec.decode_schema,
        lambda v: codec.decode_failure(MODEL, NODE, v),
    ]
    for read in readers:
        try:
            assert read(value) is not None
        except ValueError:
            continue
