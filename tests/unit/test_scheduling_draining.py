"""Draining a node: what serves there is replaced before it stops."""

from dataclasses import replace

import pytest

from localmesh.core.ids import NodeName, ReplicaId
from localmesh.core.records import FailureRecord, Policy
from localmesh.core.snapshot import Snapshot
from tests.unit.scheduling_kit import (
    LOADING,
    READY,
    M,
    add_model,
    apply,
    drain,
    edit,
    hold,
    kinds,
    mesh,
    plan,
    serve,
    set_state,
)

OLD, NEW = ReplicaId(M, NodeName("n0"), 0), ReplicaId(M, NodeName("n1"), 0)


def failed_on(state: Snapshot, node: str) -> Snapshot:
    name = NodeName(node)
    failure = FailureRecord(model=M, node=name, reason="LOAD_FAILED", message="no", revision="r1")
    return replace(state, failures={M: {name: failure}})


@pytest.mark.parametrize("minimum", [0, 1])
def test_a_replica_of_a_draining_node_stops_when_its_replacement_is_ready(minimum: int) -> None:
    """F7."""
    state = drain(serve(mesh(min_replicas=minimum), 1), "n0")
    first = plan(state)
    assert kinds(first) == [("Place", "m/n1/0")]
    state = apply(state, first.actions)
    assert plan(state, now=1000.0, state=first.state).actions == (), "a load that goes on is waited for"
    state = set_state(state, NEW, READY)
    assert kinds(plan(state)) == [("Drain", "m/n0/0")]
    state = apply(state, plan(state).actions)
    assert kinds(plan(state)) == [("Unload", "m/n0/0")]
    assert plan(apply(state, plan(state).actions)).actions == ()


def test_requests_that_run_on_a_draining_node_finish() -> None:
    """F7."""
    state = hold(set_state(drain(serve(mesh(), 2), "n0"), NEW, READY), OLD)
    state = replace(state, policies={})
    state = add_model(state, M, revision="r1", policy=Policy(max_replicas=2))
    state = apply(state, plan(state).actions)
    assert state.replicas[M][OLD].state.name == "DRAINING"
    assert plan(state).actions == ()
    assert kinds(plan(replace(state, inflight={}))) == [("Unload", "m/n0/0")]


def test_a_replica_with_no_other_place_waits_and_then_stops_with_a_warning() -> None:
    """F7."""
    state = failed_on(drain(serve(mesh(), 1), "n0"), "n1")
    first = plan(state, now=100.0)
    assert first.actions == ()
    assert first.wake_after_seconds == 1.0, "another look for a place"
    assert first.warnings[M] == (
        "The node n0 drains, and the replica m/n0/0 has nowhere else to go: it stops without a replacement in 60 s.",
    )
    second = plan(state, now=159.0, state=first.state)
    assert second.actions == ()
    assert second.warnings[M][0].endswith("in 1 s.")
    third = plan(state, now=160.0, state=second.state)
    assert kinds(third) == [("Drain", "m/n0/0")]
    state = apply(state, third.actions)
    assert plan(state, now=160.0, state=third.state).state.moving_since == {}


def test_a_place_that_comes_free_while_the_node_drains_is_taken() -> None:
    """F7."""
    state = drain(serve(mesh(), 1), "n0")
    first = plan(failed_on(state, "n1"))
    assert kinds(plan(state, now=30.0, state=first.state)) == [("Place", "m/n1/0")]


def test_resume_restores_what_has_not_stopped_yet() -> None:
    """F7."""
    state = drain(serve(mesh(), 1), "n0")
    assert not state.routable(state.replicas[M][OLD])
    state = drain(failed_on(state, "n1"), "n0", draining=False)
    result = plan(state)
    assert (result.actions, result.state.moving_since) == ((), {})
    assert state.routable(state.replicas[M][OLD])


def test_a_maximum_that_allows_no_two_lets_the_old_one_stop_at_once() -> None:
    state = drain(serve(mesh(min_replicas=1, max_replicas=1), 1), "n0")
    assert kinds(plan(state)) == [("Drain", "m/n0/0")]


def test_all_replicas_of_a_node_are_replaced_and_none_twice() -> None:
    state = drain(serve(mesh(2, slots=2), 4), "n0")
    assert kinds(plan(state)) == []
    state = drain(serve(mesh(1, slots=2), 2), "n0")
    from_empty = mesh(2, slots=2)
    node = NodeName("n1")
    state = replace(
        state,
        nodes={**state.nodes, node: from_empty.nodes[node]},
        approvals={**state.approvals, node: from_empty.approvals[node]},
        devices={**state.devices, node: from_empty.devices[node]},
        sources={**state.sources, node: from_empty.sources[node]},
    )
    placed = []
    for _ in range(4):
        result = plan(state)
        placed += [r for kind, r in kinds(result) if kind == "Place"]
        state = apply(state, result.actions)
    assert placed == ["m/n1/0", "m/n1/1"]
    state = set_state(set_state(state, NEW, READY), ReplicaId(M, node, 1), READY)
    assert sorted(kinds(plan(state))) == [("Drain", "m/n0/0"), ("Drain", "m/n0/1")]


def test_what_has_not_loaded_yet_stops_at_once() -> None:
    state = drain(serve(mesh(min_replicas=1), 1, state=LOADING), "n0")
    assert sorted(kinds(plan(state))) == [("Place", "m/n1/0"), ("Unload", "m/n0/0")]


def test_a_replica_that_a_node_has_for_its_own_sake_stops_without_replacement() -> None:
    state = edit(serve(mesh(), 2), "r1", spread_all=True)
    assert kinds(plan(drain(state, "n0"))) == [("Drain", "m/n0/0")]


def test_an_old_revision_on_a_draining_node_is_replaced_by_the_new_one() -> None:
    """F7, F40."""
    state = drain(edit(serve(mesh(), 1), "r2"), "n0")
    first = plan(state)
    assert kinds(first) == [("Place", "m/n1/0")]
    state = set_state(apply(state, first.actions), NEW, READY)
    assert kinds(plan(state)) == [("Drain", "m/n0/0")]


def test_a_deleted_model_is_not_moved() -> None:
    state = replace(drain(serve(mesh(), 1), "n0"), models={}, policies={})
    assert kinds(plan(state)) == [("Drain", "m/n0/0")]
