"""The reconciler's plan, example by example."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core.errors import NoCapacity
from localmesh.core.ids import NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    FailureRecord,
    ModelRecord,
    ModelSpec,
    Policy,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import without_replica
from localmesh.scheduling.reconcile import (
    ReconcileConfig,
    reconcile,
)
from tests.unit.scheduling_kit import (
    DRAINING,
    LOADING,
    NOTHING,
    READY,
    M,
    add_model,
    add_node,
    apply,
    drop_node,
    edit,
    hold,
    kinds,
    mesh,
    plan,
    serve,
    set_state,
)


def test_a_model_with_a_minimum_is_placed_before_its_first_use() -> None:
    """F33, F41."""
    assert kinds(plan(mesh(min_replicas=1))) == [("Place", "m/n0/0")]


def test_a_model_without_minimum_waits_for_a_request() -> None:
    assert plan(mesh()).actions == ()


def test_replicas_that_are_coming_count_as_present() -> None:
    state = mesh(min_replicas=2)
    first = plan(state)
    assert kinds(first) == [("Place", "m/n0/0")]
    state = apply(state, first.actions)
    second = plan(state)
    assert kinds(second) == [("Place", "m/n1/0")]
    assert plan(apply(state, second.actions)).actions == ()


def test_no_more_than_a_few_replicas_of_a_model_load_at_once() -> None:
    state = mesh(9, min_replicas=9)
    for _ in range(9):
        state = apply(state, plan(state).actions)
    assert len(state.replicas[M]) == ReconcileConfig().max_coming_per_model


def test_what_fits_nowhere_is_told_and_not_flapped() -> None:
    """F34."""
    state = serve(mesh(1, slots=4, budget=15, min_replicas=2), 1)
    result = plan(state)
    assert result.actions == ()
    assert isinstance(result.unplaced[M], NoCapacity)


def test_a_model_that_failed_everywhere_is_not_tried_again_until_the_record_expires() -> None:
    """F42."""
    failures = {
        NodeName(n): FailureRecord(model=M, node=NodeName(n), reason="LOAD_FAILED", message="", revision="r1")
        for n in ("n0", "n1")
    }
    state = mesh(min_replicas=1)
    assert plan(replace(state, failures={M: failures})).actions == ()
    assert kinds(plan(replace(state, failures={M: {NodeName("n0"): failures[NodeName("n0")]}}))) == [
        ("Place", "m/n1/0")
    ]


def test_an_absent_node_is_replaced_only_after_its_time() -> None:
    """F5."""
    state = drop_node(serve(mesh(min_replicas=1), 1), "n0")
    first = plan(state, now=100.0)
    assert first.actions == ()
    assert first.wake_after_seconds == 30.0
    second = plan(state, now=129.9, state=first.state)
    assert second.actions == ()
    third = plan(state, now=130.0, state=second.state)
    assert kinds(third) == [("Place", "m/n1/0")]
    state = apply(state, third.actions)
    assert plan(state, now=200.0, state=third.state).actions == ()


def test_a_node_that_comes_back_in_time_changes_nothing() -> None:
    """F4."""
    state = serve(mesh(min_replicas=1), 1)
    first = plan(drop_node(state, "n0"), now=0.0)
    back = plan(state, now=20.0, state=first.state)
    assert back.actions == ()
    assert back.state.absent_since == {}
    assert plan(drop_node(state, "n0"), now=40.0, state=back.state).actions == ()


def test_a_dead_replica_gives_its_place_in_the_maximum_back_first() -> None:
    state = drop_node(serve(mesh(min_replicas=1, max_replicas=1), 1), "n0")
    first = plan(state, now=0.0)
    second = plan(state, now=30.0, state=first.state)
    assert kinds(second) == [("Forget", "m/n0/0")]
    state = apply(state, second.actions)
    third = plan(state, now=30.0, state=second.state)
    assert kinds(third) == [("Place", "m/n1/0")]
    assert plan(apply(state, third.actions), now=60.0, state=third.state).actions == ()


def test_a_model_that_lost_its_last_replica_gets_one_again() -> None:
    state = drop_node(serve(mesh(), 1), "n0")
    first = plan(state, now=0.0)
    second = plan(state, now=30.0, state=first.state)
    assert kinds(second) == [("Place", "m/n1/0")]
    assert plan(apply(state, second.actions), now=60.0, state=second.state).actions == ()


def test_a_record_that_the_nodes_next_life_does_not_know_is_forgotten() -> None:
    """F43."""
    state = serve(mesh(min_replicas=1), 1)
    state = add_node(state, "n0", incarnation=99)
    first = plan(state, now=0.0)
    second = plan(state, now=30.0, state=first.state)
    assert kinds(second) == [("Forget", "m/n0/0"), ("Place", "m/n1/0")]


def test_overlap_keeps_the_old_revision_until_the_new_one_is_ready() -> None:
    """F40."""
    state = edit(serve(mesh(), 1), "r2")
    first = plan(state)
    assert kinds(first) == [("Place", "m/n1/0")]
    state = apply(state, first.actions)
    assert plan(state).actions == ()
    new = ReplicaId(M, NodeName("n1"), 0)
    state = set_state(state, new, READY)
    assert kinds(plan(state)) == [("Drain", "m/n0/0")]
    state = apply(state, plan(state).actions)
    assert kinds(plan(state)) == [("Unload", "m/n0/0")]


def test_a_new_revision_that_failed_leaves_the_old_one_serving() -> None:
    """F40, F42."""
    state = edit(serve(mesh(2), 1), "r2")
    failures = {
        NodeName(n): FailureRecord(model=M, node=NodeName(n), reason="LOAD_FAILED", message="", revision="r2")
        for n in ("n0", "n1")
    }
    assert plan(replace(state, failures={M: failures})).actions == ()


def test_immediate_drains_the_old_revision_at_once() -> None:
    """F40."""
    state = edit(serve(mesh(), 1), "r2", immediate=True)
    assert sorted(kinds(plan(state))) == [("Drain", "m/n0/0"), ("Place", "m/n1/0")]


def test_without_room_for_both_revisions_one_old_replica_makes_room() -> None:
    state = edit(serve(mesh(2, min_replicas=2), 2), "r2", min_replicas=2)
    first = plan(state)
    assert kinds(first) == [("Drain", "m/n0/0")]
    state = apply(state, first.actions)
    assert kinds(plan(state)) == [("Unload", "m/n0/0")]
    state = apply(state, plan(state).actions)
    assert plan(state).actions == ()
    state = without_replica(state, state.replicas[M][ReplicaId(M, NodeName("n0"), 0)])
    assert kinds(plan(state)) == [("Place", "m/n0/0")]


def test_an_old_replica_whose_exit_would_not_help_goes_on() -> None:
    state = edit(serve(mesh(1), 1), "r2")
    big = ModelSpec(name=M, backend="e", source="f", memory_bytes=1000)
    state = replace(state, models={M: ModelRecord(spec=big, revision="r2")})
    assert plan(state).actions == ()


def test_an_old_replica_that_still_loads_is_stopped_at_once() -> None:
    state = edit(serve(mesh(), 1, state=LOADING), "r2")
    assert ("Unload", "m/n0/0") in kinds(plan(state))


@pytest.mark.parametrize(("state_now", "action"), [(READY, "Drain"), (LOADING, "Unload")])
def test_replicas_of_a_deleted_model_are_stopped(state_now: ReplicaState, action: str) -> None:
    state = replace(serve(mesh(), 1, state=state_now), models={}, policies={})
    assert kinds(plan(state)) == [(action, "m/n0/0")]


def test_a_draining_replica_is_unloaded_once_nobody_holds_it() -> None:
    """F12: a holder's key is a presence, whatever its count."""
    state = serve(mesh(), 1, state=DRAINING)
    replica = ReplicaId(M, NodeName("n0"), 0)
    assert plan(hold(state, replica)).actions == ()
    assert plan(hold(state, replica, 0)).actions == ()
    assert kinds(plan(state)) == [("Unload", "m/n0/0")]


def test_surplus_over_the_maximum_goes_from_the_highest_index() -> None:
    """F35."""
    state = edit(serve(mesh(1, slots=3), 3), "r1", max_replicas=1)
    assert kinds(plan(state)) == [("Drain", "m/n0/2"), ("Drain", "m/n0/1")]


def test_a_replica_on_a_cordoned_node_does_not_keep_the_minimum() -> None:
    state = serve(mesh(min_replicas=1), 1)
    cordoned = ApprovalRecord(key_fingerprint="n0", cordoned=True)
    state = replace(state, approvals={**state.approvals, NodeName("n0"): cordoned})
    assert kinds(plan(state)) == [("Place", "m/n1/0")]


def test_nothing_is_done_under_the_guard_and_time_goes_on() -> None:
    """F10."""
    state = replace(drop_node(serve(mesh(min_replicas=1), 1), "n0"), guarded=True)
    first = plan(state, now=0.0)
    second = plan(state, now=60.0, state=first.state)
    assert second.actions == ()
    assert second.state.absent_since == first.state.absent_since


def test_models_that_want_the_same_node_take_turns() -> None:
    state = add_model(mesh(1, min_replicas=1), "n", revision="r1", policy=Policy(min_replicas=1))
    first = plan(state)
    assert kinds(first) == [("Place", "m/n0/0")]
    assert kinds(plan(apply(state, first.actions))) == [("Place", "n/n0/0")]


def test_models_that_fit_nowhere_do_not_starve_others() -> None:
    """F34."""
    state = mesh(1)
    for i in range(7):
        state = add_model(state, f"big{i}", revision="r1", policy=Policy(min_replicas=1), memory=1000)
    state = add_model(state, "small", revision="r1", policy=Policy(min_replicas=1))
    config = ReconcileConfig(max_searches=3)
    first = reconcile(state, now=0.0, state=NOTHING, config=config)
    assert (first.actions, len(first.unplaced), first.wake_after_seconds) == ((), 3, 1.0)
    second = reconcile(state, now=1.0, state=first.state, config=config)
    third = reconcile(state, now=2.0, state=second.state, config=config)
    assert kinds(third) == [("Place", "small/n0/0")]


@given(order=st.permutations(range(4)))
@settings(max_examples=24, deadline=None)
def test_the_order_in_which_the_mesh_became_known_does_not_show_in_the_plan(order: list[int]) -> None:
    def build(sequence: Iterable[int]) -> Snapshot:
        state = Snapshot()
        for i in sequence:
            state = add_node(state, f"n{i}", incarnation=10 + i, slots=2)
        for i in sequence:
            state = add_model(state, f"m{i}", revision="r1", policy=Policy(min_replicas=2))
        return state

    assert kinds(plan(build(order))) == kinds(plan(build(range(4))))


def settle(state: Snapshot) -> Snapshot:
    """The mesh once the reconciler is through and all that was placed is READY."""
    while actions := plan(state).actions:
        state = apply(state, actions)
        for record in list(state.all_replicas()):
            if record.state.coming:
                state = set_state(state, record.id, READY)
            elif record.state is ReplicaState.UNLOADING:
                state = without_replica(state, record)
    return state


def homes(state: Snapshot) -> list[str]:
    return sorted(r.node for r in state.replicas.get(M, {}))


def test_spreading_over_all_gives_every_node_one_also_one_that_appears_later() -> None:
    """F33."""
    state = settle(mesh(3, slots=2, spread_all=True))
    assert homes(state) == ["n0", "n1", "n2"]
    assert homes(settle(add_node(state, "n3", incarnation=99, slots=2))) == ["n0", "n1", "n2", "n3"]


def test_spreading_over_all_leaves_nodes_that_match_no_more() -> None:
    """F33."""
    state = settle(mesh(2, spread_all=True))
    chosen = Policy(spread_all=True, node_selector={"node.name": "n1"})
    state = settle(add_model(state, M, revision="r1", policy=chosen))
    assert homes(state) == ["n1"]


def test_spreading_over_all_takes_in_what_a_minimum_left_behind() -> None:
    """F33: two replicas of a node become one, the highest index goes."""
    state = settle(mesh(1, slots=3, min_replicas=3))
    state = settle(edit(state, "r1", spread_all=True))
    assert [str(r) for r in state.replicas[M]] == ["m/n0/0"]


def test_a_new_revision_reaches_every_node_that_is_spread_over() -> None:
    """F33, F40."""
    state = settle(edit(settle(mesh(3, spread_all=True)), "r2", spread_all=True))
    assert homes(state) == ["n0", "n1", "n2"]
    assert {r.revision for r in state.replicas[M].values()} == {"r2"}


def test_fewer_slots_drain_the_surplus_from_the_highest_index() -> None:
    """F32."""
    state = serve(mesh(1, slots=3), 3)
    node = NodeName("n0")
    fewer = replace(state, nodes={node: replace(state.nodes[node], max_replicas_per_model=1)})
    assert kinds(plan(fewer)) == [("Drain", "m/n0/1"), ("Drain", "m/n0/2")]


def test_an_operators_override_of_the_slots_counts_instead_of_the_workers_word() -> None:
    """F32."""
    state = serve(mesh(1, slots=3), 3)
    overridden = ApprovalRecord(key_fingerprint="n0", max_replicas_per_model=2)
    assert kinds(plan(replace(state, approvals={NodeName("n0"): overridden}))) == [("Drain", "m/n0/2")]
