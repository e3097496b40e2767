"""What a snapshot says of a model: to callers, to operators, to health checks."""

import asyncio
from dataclasses import replace

import pytest

from localmesh.core.errors import LoadFailed, ModelNotFound, SourceMissing
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
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
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.router.health import ModelHealth, may_differ, would_serve
from localmesh.router.views import coming, failure_of, require_model, still_loading
from localmesh.router.warnings import warnings_of
from localmesh.rpc.health import HealthBook

M = ModelName("tiny-chat")
A = NodeName("a")
R = ReplicaId(M, A, 0)


def _mesh(
    *, state: ReplicaState | None = None, revision: str = "r", budget: int = 1000, source: bool = True
) -> Snapshot:
    replicas = {}
    if state is not None:
        record = ReplicaRecord(id=R, state=state, revision=revision, incarnation=1, devices={CPU: 10}, limit=4)
        replicas = {M: {R: record}}
    return Snapshot(
        revision=5,
        models={M: ModelRecord(spec=ModelSpec(name=M, backend="llama", source="t.gguf"), revision="r")},
        approvals={A: ApprovalRecord(key_fingerprint="k")},
        nodes={
            A: NodeRecord(
                name=A,
                incarnation=1,
                record_lease=2,
                endpoint="a:1",
                engines=(EngineInfo(name="llama", available=True),),
            )
        },
        sources={A: {M: SourceRecord(revision="r", present=source, path="/m/t.gguf", memory_bytes=10)}},
        devices={A: {CPU: DeviceRecord(node=A, id=CPU, kind="cpu", total_bytes=budget, budget_bytes=budget)}},
        replicas=replicas,
        leader="router-1",
    )


def _failing(revision: str = "r", reason: str = "LOAD_FAILED") -> Snapshot:
    failure = FailureRecord(model=M, node=A, reason=reason, message="bad magic", revision=revision)
    return replace(_mesh(), failures={M: {A: failure}})


def test_an_unknown_model_is_answered_with_names_that_are_close() -> None:
    with pytest.raises(ModelNotFound, match="did you mean 'tiny-chat'"):
        require_model(_mesh(), ModelName("tiny-chta"))
    with pytest.raises(ModelNotFound, match="localmesh models"):
        require_model(_mesh(), ModelName("zzz"))
    require_model(_mesh(), M)


def test_only_replicas_of_the_present_revision_on_present_nodes_are_coming() -> None:
    assert [r.id for r in coming(_mesh(state=ReplicaState.LOADING), M)] == [R]
    assert coming(_mesh(state=ReplicaState.LOADING, revision="old"), M) == []
    assert coming(replace(_mesh(state=ReplicaState.LOADING), nodes={}), M) == []
    assert coming(_mesh(state=ReplicaState.READY), M) == []
    assert coming(_mesh(state=ReplicaState.UNLOADING), M) == []


def test_a_failure_is_told_in_the_words_of_the_engine() -> None:
    error = failure_of(_failing(), M)
    assert isinstance(error, LoadFailed)
    assert "bad magic" in str(error)
    assert error.metadata["node"] == "a"
    assert error.retry_after_seconds == 10
    missing = failure_of(_failing(reason="SOURCE_MISSING"), M)
    assert isinstance(missing, SourceMissing)
    assert missing.metadata["source"]


def test_the_failure_of_an_older_revision_says_nothing_of_this_one() -> None:
    assert failure_of(_failing(revision="old"), M) is None
    assert failure_of(_mesh(), M) is None
    assert failure_of(_failing(), ModelName("other")) is None


def test_a_caller_who_was_held_long_enough_is_told_how_far_the_load_is() -> None:
    """F24."""
    snapshot = replace(
        _mesh(state=ReplicaState.LOADING),
        progress={R: ProgressRecord(phase="loading", done_bytes=30, total_bytes=120, eta_seconds=42.0)},
    )
    error = still_loading(snapshot, M)
    assert error.retry_after_seconds == 42.0
    assert error.metadata == {
        "model": "tiny-chat",
        "state": "LOADING",
        "phase": "loading",
        "done_bytes": "30",
        "total_bytes": "120",
    }
    assert "25 %" in str(error)
    assert still_loading(_mesh(), M).retry_after_seconds == 5.0


@pytest.mark.parametrize(
    ("snapshot", "serves"),
    [
        (_mesh(state=ReplicaState.READY), True),
        (_mesh(state=ReplicaState.LOADING), True),
        (_mesh(), True),
        (_mesh(budget=5), False),
        (_mesh(source=False), False),
        (_failing(), False),
    ],
)
def test_a_model_serves_if_a_request_would_be_answered_or_held(snapshot: Snapshot, serves: bool) -> None:
    assert would_serve(snapshot, M) is serves


async def test_health_knows_the_models_that_are_declared() -> None:
    book = HealthBook()
    health = ModelHealth(book, None, None, services=("x.Y",), interval_seconds=1.0)
    await health.apply(Snapshot())
    assert dict(book.serving) == {"": False, "x.Y": False}
    await health.apply(_mesh())
    assert dict(book.serving) == {"": True, "x.Y": True, M: True}
    await health.apply(replace(_mesh(), models={}))
    assert dict(book.serving) == {"": True, "x.Y": True}


async def test_looking_at_many_models_lets_requests_pass_in_between() -> None:
    names = [ModelName(f"m{number}") for number in range(20)]
    snapshot = replace(_mesh(), models={name: _mesh().models[M] for name in names})
    health = ModelHealth(HealthBook(), None, None, services=(), interval_seconds=1.0)
    passed = 0

    async def requests() -> None:
        nonlocal passed
        while True:
            passed += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        others = group.create_task(requests())
        await health.apply(snapshot)
        others.cancel()
    assert passed >= len(names)


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        ({"revision": 99, "inflight": {}, "progress": {}, "leader": "other"}, False),
        ({"replicas": {}}, True),
        ({"failures": {}}, True),
        ({"guarded": True}, True),
    ],
)
def test_health_looks_at_the_models_again_only_for_what_says_something_of_them(change, matters: bool) -> None:
    snapshot = _mesh()
    assert may_differ(snapshot, replace(snapshot, **change)) is matters


def test_a_healthy_mesh_gives_no_warning() -> None:
    assert warnings_of(_mesh(state=ReplicaState.READY), connected=True, silence_seconds=0.5) == []


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (replace(_mesh(), nodes={}), "The node a is away"),
        (replace(_mesh(), nodes={}), "No worker is registered"),
        (replace(_mesh(), leader=""), "No router is the reconciler"),
        (replace(_mesh(), guarded=True), "Many nodes fell silent at once"),
        (replace(_mesh(), approvals={A: ApprovalRecord(key_fingerprint="k", approved=False)}), "waits for approval"),
        (replace(_mesh(), policies={M: PolicyRecord(policy=Policy(min_replicas=2))}), "has 0 of at least 2"),
        (_failing(), "could not be loaded on the node a: bad magic"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(snapshot: Snapshot, said: str) -> None:
    warnings = warnings_of(snapshot, connected=True, silence_seconds=0.0)
    assert any(said in warning for warning in warnings)


def test_the_silence_of_the_store_is_said() -> None:
    assert "silent for 7 s" in warnings_of(_mesh(), connected=False, silence_seconds=7.2)[0]
