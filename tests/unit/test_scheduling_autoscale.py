"""The number of replicas follows the load."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core.ids import HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import Policy
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import without_replica
from localmesh.scheduling.autoscale import load_of
from localmesh.scheduling.reconcile import Place, Plan, ReconcileState, Unload, reconcile
from tests.unit.scheduling_kit import (
    DRAINING,
    NOTHING,
    READY,
    M,
    add_model,
    apply,
    edit,
    hold,
    kinds,
    mesh,
    plan,
    serve,
)
from tests.unit.scheduling_kit import set_state as put_state

LIMIT = 4


def load(snapshot: Snapshot, total: int) -> Snapshot:
    """Requests spread over what serves, as routers do it: up to the limits."""
    serving = sorted((r.id for r in snapshot.routable_replicas(M)), key=str)
    snapshot = replace(snapshot, inflight={})
    for place, replica in enumerate(serving):
        share = min(LIMIT, total // len(serving) + (place < total % len(serving)))
        snapshot = hold(snapshot, replica, share) if share else snapshot
    return snapshot


def pass_time(snapshot: Snapshot, seconds: int, state: ReconcileState = NOTHING, *, start: int = 0) -> Plan:
    """Look again and again for a while, carrying nothing out; return the last plan."""
    for now in (*range(start, start + seconds, 1 if seconds < 10 else 20), start + seconds):
        result = reconcile(snapshot, now=float(now), state=state)
        state = result.state
    return result


def test_a_model_whose_replicas_are_all_busy_gets_one_more_after_a_while() -> None:
    """F35."""
    state = load(serve(mesh(3), 1), LIMIT)
    assert pass_time(state, 2).actions == ()
    assert pass_time(state, 2).wake_after_seconds == 1.0
    assert [*map(type, pass_time(state, 3).actions)] == [Place]


def test_one_at_a_time_and_the_count_begins_anew_with_each() -> None:
    """F35."""
    state = load(serve(mesh(4), 1), LIMIT)
    busy = pass_time(state, 3)
    state = apply(state, busy.actions)
    assert pass_time(state, 30, busy.state, start=3).actions == (), "one is coming"
    for replica in state.replicas[M]:
        state = put_state(state, replica, READY)
    state = load(state, 2 * LIMIT)
    assert pass_time(state, 2, busy.state, start=34).actions == ()
    assert [*map(type, pass_time(state, 3, busy.state, start=34).actions)] == [Place]


@pytest.mark.parametrize("total", [0, 2 * LIMIT - 1])
def test_while_one_replica_has_room_there_is_no_other(total: int) -> None:
    assert pass_time(load(serve(mesh(3), 2), total), 100).actions == ()


def test_a_moment_with_room_begins_the_count_anew() -> None:
    state = serve(mesh(3), 1)
    busy = pass_time(load(state, LIMIT), 2)
    lull = plan(load(state, LIMIT - 1), now=3.0, state=busy.state)
    assert pass_time(load(state, LIMIT), 2, lull.state, start=4).actions == ()


def test_a_queue_is_a_load() -> None:
    """F35."""
    state, known = load(serve(mesh(2), 1), 1), NOTHING
    for now in range(4):
        result = reconcile(state, now=float(now), state=known, waiting={M: 1})
        known = result.state
    assert kinds(result) == [("Place", "m/n1/0")]


def test_never_more_than_the_maximum() -> None:
    """F33."""
    assert pass_time(load(serve(mesh(3, max_replicas=2), 2), 2 * LIMIT), 100).actions == ()


def test_capacity_bounds_the_growth_and_is_told() -> None:
    """F34."""
    result = pass_time(load(serve(mesh(1), 1), LIMIT), 4)
    assert result.actions == ()
    assert [*result.unplaced] == [M]


@pytest.mark.parametrize(("minimum", "left"), [(0, 0), (1, 1), (2, 2)])
def test_what_nobody_uses_goes_down_to_the_minimum_from_the_highest_index(minimum: int, left: int) -> None:
    """F35."""
    state = serve(mesh(1, slots=3, min_replicas=minimum), 3)
    known = pass_time(state, 299)
    assert known.actions == ()
    assert known.wake_after_seconds == 1.0
    gone, past = [], known.state
    for now in range(300, 310):
        result = plan(state, now=float(now), state=past)
        past = result.state
        for action in result.actions:
            assert isinstance(action, Unload)
            gone.append(action.replica.id.index)
            state = without_replica(state, action.replica)
    assert gone == [2, 1, 0][: 3 - left]
    assert len(state.replicas[M]) == left


def test_a_holders_presence_is_a_use_also_at_zero() -> None:
    state = serve(mesh(), 1)
    first = pass_time(state, 200)
    held = hold(state, ReplicaId(M, NodeName("n0"), 0), 0)
    used = plan(held, now=201.0, state=first.state)
    assert pass_time(state, 298, used.state, start=202).actions == ()
    assert kinds(pass_time(state, 299, used.state, start=202)) == [("Unload", "m/n0/0")]


def test_calls_that_only_the_replica_sees_are_a_use_and_are_not_counted_twice() -> None:
    replica = ReplicaId(M, NodeName("n0"), 0)
    state = replace(serve(mesh(), 1), inflight={replica: {HolderId("self"): 3, HolderId("r"): 3}})
    assert load_of(state, replica) == 3
    assert pass_time(state, 400).actions == ()
    state = replace(state, inflight={replica: {HolderId("self"): LIMIT}})
    assert kinds(pass_time(state, 3)) == [("Place", "m/n1/0")]


def test_a_replica_more_than_the_load_needs_is_drained() -> None:
    """F35: light use for ever does not keep what a peak has brought."""
    state = load(serve(mesh(3), 3), 2)
    assert pass_time(state, 299).actions == ()
    assert kinds(pass_time(state, 300)) == [("Drain", "m/n0/0")]


def test_the_last_one_in_use_stays() -> None:
    assert pass_time(load(serve(mesh(), 1), 1), 1000).actions == ()


def test_a_pinned_model_stays() -> None:
    assert pass_time(serve(mesh(pinned=True), 1), 400).actions == ()


def test_models_on_every_node_do_not_follow_the_load() -> None:
    assert pass_time(load(serve(mesh(2, spread_all=True), 2), 2 * LIMIT), 100).actions == ()
    assert pass_time(serve(mesh(2, spread_all=True), 2), 400).actions == ()


def test_nothing_follows_the_load_in_the_middle_of_a_rollout_or_a_drain() -> None:
    state = edit(serve(mesh(2), 2), "r2")
    failing = replace(state, sources={})
    assert pass_time(failing, 400).actions == ()
    leaving = put_state(serve(mesh(2), 2), ReplicaId(M, NodeName("n0"), 0), DRAINING)
    leaving = hold(leaving, ReplicaId(M, NodeName("n0"), 0), 1)
    assert pass_time(leaving, 400).actions == ()


def test_who_has_not_looked_for_a_while_knows_of_no_idleness() -> None:
    """A new leader, or one that was cut off, begins anew."""
    state = serve(mesh(), 1)
    first = pass_time(state, 290)
    assert plan(state, now=400.0, state=first.state).actions == ()
    assert plan(state, now=300.0).actions == ()


@given(nodes=st.integers(1, 6), begin=st.integers(1, 6), total=st.integers(0, 30), low=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_under_a_steady_load_the_number_goes_one_way_only(nodes: int, begin: int, total: int, low: int) -> None:
    """F35: no flapping, and neither beyond the maximum nor below the minimum."""
    high = max(low, 5)
    state = serve(mesh(nodes), min(begin, nodes, high))
    state = add_model(state, M, revision="r1", policy=Policy(min_replicas=low, max_replicas=high))
    known, steps = NOTHING, []
    for now in range(0, 1600, 20):
        state = load(state, total)
        result = plan(state, now=float(now), state=known)
        known = result.state
        steps += ["up" if isinstance(action, Place) else "down" for action in result.actions]
        state = apply(state, result.actions)
        for record in list(state.replicas_of(ModelName(M))):
            if record.state.coming:
                state = put_state(state, record.id, READY)
            elif record.state.leaving:
                state = without_replica(state, record)
        steps = [s for i, s in enumerate(steps) if i == 0 or steps[i - 1] != s]
        assert min(low, nodes) <= len(state.replicas[M]) <= high or "up" not in steps
    assert len(steps) <= 1
    assert plan(load(state, total), now=1600.0, state=known).actions == ()
