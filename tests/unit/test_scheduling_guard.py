"""Many nodes that fall silent at once are not taken for dead."""

from dataclasses import replace

import pytest

from localmesh.core.ids import NodeName
from localmesh.core.records import ApprovalRecord, Policy
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.guard import LiftGuard, SetGuard
from localmesh.scheduling.reconcile import Plan, ReconcileState
from tests.unit.scheduling_kit import M, add_model, add_node, drop_node, kinds, mesh, plan, serve


def lose(snapshot: Snapshot, *numbers: int) -> Snapshot:
    for number in numbers:
        snapshot = drop_node(snapshot, f"n{number}")
    return snapshot


def after(snapshot: Snapshot, before: Snapshot, *, now: float = 1.0) -> Plan:
    return plan(snapshot, now=now, state=plan(before, now=0.0).state)


def guarded(snapshot: Snapshot, *nodes: str) -> Snapshot:
    return replace(snapshot, guarded=True, guarded_nodes=frozenset(map(NodeName, nodes)))


@pytest.mark.parametrize(
    ("nodes", "lost", "trips"),
    [
        (10, 4, True),
        (10, 3, False),
        (9, 3, True),
        (4, 3, True),
        (4, 2, False),
        (2, 2, True),
        (2, 1, False),
        (1, 1, True),
    ],
)
def test_more_than_three_tenths_and_at_least_three_or_all_set_the_guard(nodes: int, lost: int, trips: bool) -> None:
    """F10."""
    before = mesh(nodes)
    result = after(lose(before, *range(lost)), before)
    assert result.guard == (SetGuard(nodes=frozenset(NodeName(f"n{i}") for i in range(lost))) if trips else None)


def test_nothing_else_is_planned_with_it() -> None:
    """F10."""
    before = mesh(4)
    now = add_model(lose(before, 0, 1, 2), M, revision="r1", policy=Policy(min_replicas=1))
    assert kinds(plan(now)) == [("Place", "m/n3/0")]
    assert after(now, before).actions == ()


def test_losses_add_up_within_a_ttl_and_not_beyond() -> None:
    """F10."""
    state = mesh(6)
    first = after(lose(state, 0), state, now=1.0)
    second = plan(lose(state, 0, 1), now=3.0, state=first.state)
    assert second.guard is None
    assert isinstance(plan(lose(state, 0, 1, 2), now=6.0, state=second.state).guard, SetGuard)
    assert plan(lose(state, 0, 1, 2), now=6.1, state=second.state).guard is None


def test_nodes_that_say_goodbye_or_are_removed_are_not_missed() -> None:
    """F10: a node that deregisters takes its devices along."""
    state = mesh(4)
    gone = lose(state, 0, 1, 2)
    assert after(replace(gone, devices={}), state).guard is None
    assert after(replace(gone, approvals={}), state).guard is None
    waiting = {n: ApprovalRecord(key_fingerprint=n, approved=False) for n in gone.approvals}
    assert after(replace(gone, approvals=waiting), state).guard is None


def test_a_new_leader_misses_nobody() -> None:
    assert plan(lose(mesh(4), 0, 1, 2)).guard is None


def test_it_is_lifted_when_those_that_are_away_are_few_again() -> None:
    """F10."""
    state = mesh(10)
    known = after(lose(state, 0, 1, 2, 3), state).state
    names = [f"n{i}" for i in range(4)]
    away = plan(guarded(lose(state, 0, 1, 2, 3), *names), now=2.0, state=known)
    assert (away.guard, away.actions) == (None, ())
    back = plan(guarded(lose(state, 3), *names), now=60.0, state=away.state)
    assert back.guard == LiftGuard(why="the nodes are back")
    assert plan(lose(state, 3), now=60.1, state=back.state).guard is None


def test_after_ten_minutes_who_is_away_is_dead() -> None:
    """F10."""
    state = serve(mesh(4, min_replicas=1), 1)
    gone = lose(state, 0, 1, 2)
    under = guarded(gone, "n0", "n1", "n2")
    known: ReconcileState = after(gone, state).state
    for now in (2.0, 601.9):
        result = plan(under, now=now, state=known)
        assert (result.guard, result.actions) == (None, ())
        known = result.state
    last = plan(under, now=602.0, state=known)
    assert last.guard == LiftGuard(why="the nodes stay away")
    assert kinds(plan(gone, now=602.1, state=last.state)) == [("Place", "m/n3/0")]


def test_what_an_operator_released_is_not_set_again_for_the_same_nodes() -> None:
    """F10."""
    state = mesh(4)
    gone = lose(state, 0, 1, 2)
    known = after(gone, state).state
    seen = plan(guarded(gone, "n0", "n1", "n2"), now=2.0, state=known).state
    assert plan(gone, now=3.0, state=seen).guard is None


def test_under_the_guard_the_last_replicas_of_silent_nodes_can_be_routed_to() -> None:
    """F10."""
    state = serve(mesh(2), 2)
    gone = lose(state, 0, 1)
    assert gone.routable_replicas(M) == []
    assert {r.id.node for r in guarded(gone, "n0", "n1").routable_replicas(M)} == {"n0", "n1"}
    assert {r.id.node for r in guarded(gone, "n0").routable_replicas(M)} == {"n0"}
    cordoned = {**gone.approvals, NodeName("n0"): ApprovalRecord(key_fingerprint="n0", cordoned=True)}
    under = guarded(replace(gone, approvals=cordoned), "n0", "n1")
    assert {r.id.node for r in under.routable_replicas(M)} == {"n1"}
    another_life = guarded(add_node(gone, "n0", incarnation=99), "n0", "n1")
    assert {r.id.node for r in another_life.routable_replicas(M)} == {"n1"}
