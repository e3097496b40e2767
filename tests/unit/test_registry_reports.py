"""What a worker's reports mean for the store."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core.ids import CPU, DeviceId, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.registry.config import RegistryConfig
from localmesh.registry.reports import (
    Exit,
    Loading,
    Outcome,
    PutProgress,
    PutSelf,
    PutState,
    Report,
    Serving,
    TakeExit,
    known_sources,
    plan_reports,
    worth_writing,
)
from localmesh.store.keys import SELF_HOLDER

N1, M = NodeName("n1"), ModelName("m")
R = ReplicaId(M, N1, 0)
CONFIG = RegistryConfig()
SERVING = Serving(endpoint="h:1", limit=4, measured={CPU: 9})
HALF = ProgressRecord(phase="loading", done_bytes=1, total_bytes=2)


def mesh(state: ReplicaState | None = ReplicaState.PLACED, **changes: Any) -> Snapshot:
    record = ReplicaRecord(
        id=R,
        state=state or ReplicaState.PLACED,
        revision="r1",
        incarnation=7,
        devices={CPU: 5},
        create_revision=40,
        mod_revision=41,
    )
    return Snapshot(
        revision=50,
        models={M: ModelRecord(spec=ModelSpec(name=M, backend="llama", source="f"), revision="r1")},
        nodes={N1: NodeRecord(name=N1, incarnation=7, record_lease=8, endpoint="h:0")},
        replicas={M: {R: replace(record, **changes)}} if state is not None else {},
    )


def ready(**changes: Any) -> Snapshot:
    return mesh(ReplicaState.READY, **{"endpoint": "h:1", "limit": 4, **changes})


def plan(snapshot: Snapshot, observed: Loading | Serving | Exit, **changes: Any) -> Outcome:
    now, written = changes.pop("now", 0.0), changes.pop("written", {})
    report = replace(Report(id=R, revision="r1", placement=40, observed=observed), **changes)
    return plan_reports(snapshot, [report], incarnation=7, written=written, now=now, config=CONFIG)


def record(snapshot: Snapshot) -> ReplicaRecord:
    return snapshot.replicas[M][R]


@pytest.mark.parametrize("state", [ReplicaState.PLACED, ReplicaState.STAGING])
def test_loading_moves_the_record_on(state: ReplicaState) -> None:
    state_now = mesh(state)
    assert plan(state_now, Loading(state=ReplicaState.LOADING)).commands == (
        PutState(replica=record(state_now), state=ReplicaState.LOADING),
    )


@pytest.mark.parametrize("state", [ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING])
def test_loading_never_takes_a_later_state_back(state: ReplicaState) -> None:
    assert plan(mesh(state), Loading(state=ReplicaState.STAGING)) == Outcome()


def test_progress_is_published_at_most_once_a_second_and_only_when_it_changed() -> None:
    """F39."""
    state = mesh(ReplicaState.LOADING)
    loading = Loading(state=ReplicaState.LOADING, progress=HALF)
    assert plan(state, loading).commands == (PutProgress(replica=record(state), progress=HALF),)
    assert plan(state, loading, written={R: 10.0}, now=10.9).commands == ()
    assert plan(state, loading, written={R: 10.0}, now=11.0).commands != ()
    assert plan(replace(state, progress={R: HALF}), loading).commands == ()


@pytest.mark.parametrize("state", [ReplicaState.PLACED, ReplicaState.STAGING, ReplicaState.LOADING])
def test_serving_makes_a_coming_replica_ready_with_what_was_measured(state: ReplicaState) -> None:
    """F29."""
    now = mesh(state)
    assert plan(now, SERVING).commands == (
        PutState(replica=record(now), state=ReplicaState.READY, endpoint="h:1", limit=4, measured=SERVING.measured),
    )


def test_what_the_store_shows_already_is_not_written_again() -> None:
    assert plan(ready(), SERVING) == Outcome()


def test_a_new_address_of_a_ready_replica_is_written() -> None:
    assert len(plan(ready(endpoint="h:2"), SERVING).commands) == 1


@pytest.mark.parametrize("state", [ReplicaState.DRAINING, ReplicaState.UNLOADING])
def test_a_leaving_replica_stays_so_while_it_serves(state: ReplicaState) -> None:
    assert plan(mesh(state), SERVING) == Outcome()


@pytest.mark.parametrize("changes", [{"revision": "r0"}, {"placement": 39}, {"placement": 41}])
def test_a_report_of_another_life_changes_nothing(changes: dict[str, Any]) -> None:
    assert plan(mesh(), SERVING, **changes) == Outcome()
    assert plan(mesh(), Loading(state=ReplicaState.LOADING), **changes) == Outcome()


def test_a_report_under_another_incarnation_changes_nothing() -> None:
    assert plan(mesh(incarnation=6), SERVING) == Outcome()
    assert plan(mesh(incarnation=6), Exit()) == Outcome()


def test_a_worker_that_was_never_told_a_placement_is_believed_by_the_revision() -> None:
    assert len(plan(mesh(), SERVING, placement=0).commands) == 1


def test_a_load_that_failed_is_remembered() -> None:
    """F42."""
    now = mesh(ReplicaState.LOADING)
    [command] = plan(now, Exit(reason="LOAD_FAILED", message="no", while_loading=True)).commands
    assert isinstance(command, TakeExit)
    assert command.failure is not None
    assert (command.failure.reason, command.failure.revision) == ("LOAD_FAILED", "r1")


@pytest.mark.parametrize(
    ("state", "exit_"),
    [
        (ReplicaState.READY, Exit()),
        (ReplicaState.UNLOADING, Exit(reason="REPLICA_LOST")),
        (ReplicaState.UNLOADING, Exit()),
        (ReplicaState.UNLOADING, Exit(reason="LOAD_FAILED", while_loading=True)),
        (ReplicaState.LOADING, Exit(while_loading=True)),
    ],
)
def test_other_exits_are_no_failures_to_load(state: ReplicaState, exit_: Exit) -> None:
    now = mesh(state)
    assert plan(now, exit_).commands == (TakeExit(replica=record(now), failure=None),)


def test_the_death_of_a_ready_replica_is_told_apart_from_a_failed_load() -> None:
    """F42."""
    [command] = plan(ready(), Exit(reason="REPLICA_LOST", message="killed")).commands
    assert isinstance(command, TakeExit)
    assert command.died
    assert command.failure is not None
    assert (command.failure.reason, command.failure.message) == ("REPLICA_LOST", "killed")


def test_an_exit_of_what_is_gone_is_taken() -> None:
    assert plan(mesh(None), Exit()) == Outcome(taken=(R,))


def test_an_exit_is_not_taken_by_a_view_that_is_older_than_the_placement() -> None:
    assert plan(mesh(None), Exit(), placement=51) == Outcome()
    assert plan(mesh(), Exit(), placement=51) == Outcome()


def test_an_exit_of_an_earlier_placement_is_taken_and_hits_nothing() -> None:
    assert plan(ready(), Exit(), placement=39) == Outcome(taken=(R,))


def test_an_exit_without_placement_cannot_be_that_of_one_nobody_was_told_of() -> None:
    assert plan(mesh(), Exit(), placement=0) == Outcome(taken=(R,))
    assert len(plan(ready(), Exit(), placement=0).commands) == 1


@pytest.mark.parametrize(
    ("running", "published", "own", "expected"),
    [(3, 3, 0, None), (3, 0, 0, 3), (5, 3, 0, 2), (1, 3, 0, None), (1, 3, 2, 0), (3, 0, 3, None), (0, 0, 3, 0)],
)
def test_only_calls_that_no_holder_accounts_for_are_the_replicas_own(
    running: int, published: int, own: int, expected: int | None
) -> None:
    """F17."""
    holders = {HolderId("h"): published, **({SELF_HOLDER: own} if own else {})}
    now = replace(ready(), inflight={R: holders})
    commands = plan(now, replace(SERVING, in_flight=running)).commands
    assert commands == (() if expected is None else (PutSelf(replica=record(now), count=expected),))


STATES = st.sampled_from([None, *ReplicaState])
OBSERVED = st.one_of(
    st.builds(Loading, state=st.sampled_from([ReplicaState.STAGING, ReplicaState.LOADING])),
    st.just(SERVING),
    st.builds(Exit, reason=st.sampled_from(["", "LOAD_FAILED"]), while_loading=st.booleans()),
)


@given(state=STATES, observed=OBSERVED, placement=st.sampled_from([0, 39, 40, 41]), incarnation=st.sampled_from([6, 7]))
@settings(max_examples=300, deadline=None)
def test_what_was_carried_out_is_not_asked_for_again(
    state: ReplicaState | None, observed: Loading | Serving | Exit, placement: int, incarnation: int
) -> None:
    now = mesh(state, incarnation=incarnation) if state is not None else mesh(None)
    for command in plan(now, observed, placement=placement).commands:
        if isinstance(command, TakeExit):
            now = mesh(None)
        elif isinstance(command, PutState):
            done = replace(command.replica, state=command.state, endpoint=command.endpoint, limit=command.limit)
            assert not command.replica.state.leaving
            assert command.state.value >= command.replica.state.value
            now = replace(now, replicas={M: {R: done}})
    assert plan(now, observed, placement=placement).commands == ()


OLD = MeasuredRecord(free_bytes={CPU: 1000}, cpu_load=1.0, disk_free_bytes=1000)


@pytest.mark.parametrize(
    ("new", "age", "expected"),
    [
        (OLD, 1000.0, False),
        (replace(OLD, free_bytes={CPU: 960}), 1.0, False),
        (replace(OLD, free_bytes={CPU: 960}), 30.0, True),
        (replace(OLD, free_bytes={CPU: 940}), 1.0, True),
        (replace(OLD, disk_free_bytes=1100), 1.0, True),
        (replace(OLD, cpu_load=1.2), 1.0, False),
        (replace(OLD, cpu_load=1.3), 1.0, True),
        (replace(OLD, free_bytes={CPU: 1000, DeviceId("GPU-1"): 1}), 1.0, True),
    ],
)
def test_a_measurement_is_written_on_a_large_change_or_now_and_then(
    new: MeasuredRecord, age: float, expected: bool
) -> None:
    """F9."""
    assert worth_writing(new, OLD, age_seconds=age, config=CONFIG) is expected


def test_the_first_measurement_is_written() -> None:
    assert worth_writing(OLD, None, age_seconds=0.0, config=CONFIG)


def test_sources_of_models_that_are_gone_are_dropped() -> None:
    source = SourceRecord(revision="r1", present=True, path="/f")
    assert known_sources(mesh(), {M: source, ModelName("gone"): source}) == {M: source}
