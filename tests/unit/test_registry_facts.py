"""What a worker sends is checked before it means anything."""

from typing import Any

import pytest

from localmesh.core.errors import InvalidRequest
from localmesh.core.ids import CPU, NodeName, ReplicaId
from localmesh.core.records import ReplicaState
from localmesh.registry.facts import fingerprint_of, measurement, registration, report, sources
from localmesh.registry.reports import Loading, Serving
from localmesh.store.registration import Registration
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import types_pb2

CPU_FACTS = pb.DeviceFacts(id="cpu", kind="cpu", total_bytes=1000)
REF = types_pb2.ReplicaRef(model="m", node="n1")


def read(**changes: Any) -> Registration:
    facts = {"endpoint": "127.0.0.1:1", "devices": [CPU_FACTS], **changes.pop("facts", {})}
    request = pb.RegisterRequest(**{"node": "n1", "facts": pb.NodeFacts(**facts), **changes})
    return registration(request, fingerprint="f", auto_approve=True, budget_part=0.9)


def test_defaults_are_filled_in() -> None:
    asked = read()
    assert (asked.max_replicas_per_model, asked.devices[0].budget_bytes) == (1, 900)


def test_a_budget_is_never_more_than_there_is() -> None:
    """F30."""
    asked = read(facts={"devices": [pb.DeviceFacts(id="cpu", kind="cpu", total_bytes=1000, budget_bytes=5000)]})
    assert asked.devices[0].budget_bytes == 1000


def test_running_replicas_are_read_and_exited_ones_left_out() -> None:
    running = [
        pb.ReplicaReport(ref=REF, revision="r", serving=pb.ReplicaServing(endpoint="h:1", limit=2)),
        pb.ReplicaReport(
            ref=types_pb2.ReplicaRef(model="m", node="n1", index=1),
            loading=pb.ReplicaLoading(state=types_pb2.REPLICA_STATE_LOADING),
        ),
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n1", index=2), exited=pb.ReplicaExited()),
    ]
    assert [(r.id.index, r.state, r.endpoint) for r in read(running=running).running] == [
        (0, ReplicaState.READY, "h:1"),
        (1, ReplicaState.LOADING, ""),
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"node": "a/b"}, "node"),
        ({"node": ""}, "node"),
        ({"facts": {"devices": []}}, "facts.devices"),
        ({"facts": {"devices": [CPU_FACTS, CPU_FACTS]}}, "facts.devices.id"),
        ({"facts": {"devices": [pb.DeviceFacts(id="a/b", kind="gpu", total_bytes=1)]}}, "facts.devices.id"),
        ({"facts": {"devices": [pb.DeviceFacts(id="cpu", kind="gpu", total_bytes=1)]}}, "facts.devices.kind"),
        ({"facts": {"devices": [pb.DeviceFacts(id="x", kind="cpu", total_bytes=1)]}}, "facts.devices.kind"),
        ({"facts": {"devices": [pb.DeviceFacts(id="cpu", kind="cpu")]}}, "facts.devices.total_bytes"),
        ({"facts": {"max_replicas_per_model": -1}}, "facts.max_replicas_per_model"),
        ({"facts": {"endpoint": ""}}, "facts.endpoint"),
        ({"facts": {"endpoint": "unix:/x"}}, "facts.endpoint"),
        ({"facts": {"endpoint": "dns:///evil:80"}}, "facts.endpoint"),
        ({"facts": {"endpoint": "h:0"}}, "facts.endpoint"),
        ({"facts": {"labels": {"": "x"}}}, "facts.labels"),
        ({"facts": {"labels": {"a": "x" * 5000}}}, "facts.labels"),
        ({"facts": {"labels": {str(i): "" for i in range(300)}}}, "facts.labels"),
        ({"facts": {"engines": [types_pb2.Engine(name="")]}}, "facts.engines"),
        ({"facts": {"version": "a\nb"}}, "facts.version"),
        ({"running": [pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n2"))]}, "replicas.ref"),
    ],
)
def test_a_registration_that_cannot_be_is_refused_by_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**changes)
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 5000])
def test_what_is_no_public_key_is_refused(key: bytes) -> None:
    with pytest.raises(InvalidRequest, match="public_key"):
        fingerprint_of(key)


def test_a_key_has_one_fingerprint() -> None:
    assert fingerprint_of(b"k" * 91) == fingerprint_of(b"k" * 91) != fingerprint_of(b"l" * 91)


def test_reports_are_read() -> None:
    progress = types_pb2.LoadProgress(phase="staging", done_bytes=-1)
    loading = pb.ReplicaLoading(state=types_pb2.REPLICA_STATE_STAGING, progress=progress)
    seen = report(pb.ReplicaReport(ref=REF, revision="r", placement=4, loading=loading), NodeName("n1"))
    assert isinstance(seen.observed, Loading)
    assert seen.observed.progress is not None
    assert seen.observed.progress.done_bytes == 0
    assert (seen.id, seen.placement) == (ReplicaId.parse("m/n1/0"), 4)
    serving = pb.ReplicaServing(endpoint="[::1]:7", limit=0, in_flight=-3, measured_bytes={"cpu": -5})
    observed = report(pb.ReplicaReport(ref=REF, serving=serving), NodeName("n1")).observed
    assert isinstance(observed, Serving)
    assert (observed.limit, observed.reported, dict(observed.measured)) == (1, 0, {CPU: 0})


@pytest.mark.parametrize(
    "message",
    [
        pb.ReplicaReport(ref=REF),
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n1", index=-1), exited=pb.ReplicaExited()),
        pb.ReplicaReport(ref=REF, loading=pb.ReplicaLoading(state=types_pb2.REPLICA_STATE_READY)),
        pb.ReplicaReport(ref=REF, loading=pb.ReplicaLoading(state=99)),  # type: ignore[arg-type]
        pb.ReplicaReport(ref=REF, serving=pb.ReplicaServing(endpoint="nowhere")),
        pb.ReplicaReport(ref=REF, serving=pb.ReplicaServing(endpoint="h:1", measured_bytes={"a/b": 1})),
    ],
)
def test_a_report_that_cannot_be_is_refused(message: pb.ReplicaReport) -> None:
    with pytest.raises(InvalidRequest):
        report(message, NodeName("n1"))


def test_strange_numbers_become_sane_ones() -> None:
    seen = measurement(pb.NodeMeasurement(free_bytes={"cpu": -1}, cpu_load=float("nan"), disk_free_bytes=-1))
    assert (seen.free_bytes[CPU], seen.cpu_load, seen.disk_free_bytes) == (0, 0.0, 0)
    assert measurement(pb.NodeMeasurement(cpu_load=float("inf"))).cpu_load == 1e6


def test_long_texts_of_a_worker_are_cut() -> None:
    [source] = sources([pb.SourceFacts(model="m", problem="x" * 10_000, memory_bytes=-1)]).values()
    assert (len(source.problem), source.memory_bytes) == (4096, 0)
