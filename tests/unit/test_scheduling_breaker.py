"""A model that fits nowhere is left alone for a while, unless capacity changes."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core.ids import CPU, ModelName, NodeName
from localmesh.core.records import FailureRecord, MeasuredRecord, Policy
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling import placement
from localmesh.scheduling.assume import without_replica
from localmesh.scheduling.reconcile import Plan, ReconcileState
from tests.unit.scheduling_kit import NOTHING, M, add_model, add_node, drain, hold, kinds, mesh, plan, serve

N0 = NodeName("n0")


def one_of_two() -> Snapshot:
    """The case that LocalAI's users reported: two replicas wanted, one node, room for one."""
    state = add_node(Snapshot(), "n0", incarnation=10, slots=2, budget=128)
    return serve(add_model(state, M, revision="r1", policy=Policy(min_replicas=2), memory=100), 1)


def after(snapshot: Snapshot, ticks: int, state: ReconcileState = NOTHING, *, start: int = 0) -> Plan:
    for now in range(start, start + ticks):
        result = plan(snapshot, now=float(now), state=state)
        assert result.actions == ()
        state = result.state
    return result


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that a place is looked for."""
    found: list[str] = []
    judge = placement.judge
    monkeypatch.setattr(
        placement, "judge", lambda question: (found.append(question.model.spec.name), judge(question))[1]
    )
    return found


def test_it_trips_after_three_ticks_and_nothing_flaps(searches: list[str]) -> None:
    """F34."""
    state = one_of_two()
    searches.clear()
    two = after(state, 2)
    assert not two.warnings
    three = after(state, 1, two.state, start=2)
    assert three.warnings[M] == (
        "The model m is unsatisfiable: no place is looked for in the next 300 s, unless capacity changes.",
    )
    later = after(state, 298, three.state, start=3)
    assert searches == [M] * 3
    assert "lacks memory" in later.unplaced[M].message, "it is told why all the time"
    assert later.warnings[M][0].startswith("The model m is unsatisfiable")


def test_it_is_tried_again_after_five_minutes(searches: list[str]) -> None:
    """F34."""
    state = one_of_two()
    searches.clear()
    tripped = after(state, 3)
    after(state, 300, tripped.state, start=3)
    assert len(searches) == 4


def test_plans_that_follow_one_another_quickly_are_one_tick() -> None:
    """F34: counts of requests change many times a second."""
    state, known = one_of_two(), NOTHING
    for i in range(20):
        result = plan(state, now=i / 10, state=known)
        known = result.state
    assert not result.warnings


def _with_device(state: Snapshot, budget: int) -> Snapshot:
    device = replace(state.devices[N0][CPU], budget_bytes=budget)
    return replace(state, devices={**state.devices, N0: {CPU: device}})


def _approval(state: Snapshot, **changes: object) -> Snapshot:
    return replace(state, approvals={**state.approvals, N0: replace(state.approvals[N0], **changes)})


CHANGES: dict[str, Callable[[Snapshot], Snapshot]] = {
    "a node registers": lambda s: add_node(s, "n1", incarnation=50, budget=5),
    "a node registers again": lambda s: replace(s, nodes={N0: replace(s.nodes[N0], labels={"a": "b"})}),
    "a node is uncordoned": lambda s: _approval(s, mod_revision=9),
    "an operator sets labels": lambda s: _approval(s, labels={"a": "b"}),
    "slots": lambda s: replace(s, nodes={N0: replace(s.nodes[N0], max_replicas_per_model=7)}),
    "a budget": lambda s: _with_device(s, 150),
    "a replica is gone": lambda s: without_replica(s, next(iter(s.replicas[M].values()))),
    "the policy": lambda s: add_model(s, M, revision="r1", policy=Policy(min_replicas=3), memory=100),
    "a new revision": lambda s: add_model(s, M, revision="r2", policy=Policy(min_replicas=2), memory=100),
    "a failure that is over": lambda s: replace(s, failures={}),
    "the model's file": lambda s: replace(s, sources={N0: {M: replace(s.sources[N0][M], path="/other")}}),
    "memory that was measured": lambda s: replace(s, measured={N0: MeasuredRecord(free_bytes={CPU: 90})}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_capacity_wakes_it_at_once(change: str, searches: list[str]) -> None:
    """F34."""
    failure = FailureRecord(model=M, node=NodeName("n9"), reason="LOAD_FAILED", message="", revision="r1")
    state = replace(
        one_of_two(),
        failures={M: {NodeName("n9"): failure}},
        measured={N0: MeasuredRecord(free_bytes={CPU: 20})},
    )
    tripped = after(state, 3)
    searches.clear()
    result = plan(CHANGES[change](state), now=3.0, state=tripped.state)
    assert searches[:1] == [M]
    assert not result.warnings, "the count begins anew"


def test_what_is_no_change_of_capacity_leaves_it_alone(searches: list[str]) -> None:
    """F34: requests, progress, another model's files, less memory, or the same view read anew."""
    state = one_of_two()
    tripped = after(state, 3)
    searches.clear()
    replica = next(iter(state.replicas[M].values()))
    state = hold(state, replica.id)
    state = replace(
        state,
        revision=99,
        nodes=dict(state.nodes),
        devices={n: dict(d) for n, d in state.devices.items()},
        replicas={M: {replica.id: replace(replica, endpoint="x:2", mod_revision=7)}},
        measured={N0: MeasuredRecord(free_bytes={CPU: 20})},
        sources={N0: {**state.sources[N0], ModelName("other"): state.sources[N0][M]}},
    )
    result = plan(state, now=3.0, state=tripped.state)
    assert searches == []
    assert result.warnings


def test_a_new_node_gets_the_replica_at_once() -> None:
    """F34."""
    state = one_of_two()
    tripped = after(state, 3)
    state = add_node(state, "n1", incarnation=50, budget=128)
    result = plan(state, now=3.0, state=tripped.state)
    assert kinds(result) == [("Place", "m/n1/0")]
    assert result.state.troubles == {}


def test_what_passes_by_itself_is_waited_for() -> None:
    """A node that has not looked yet whether it has the file is not a node without room."""
    state = replace(mesh(1, min_replicas=1), sources={})
    result = after(state, 10)
    assert [*result.unplaced] == [M]
    assert result.state.troubles == {}


def test_a_model_that_needs_nothing_any_more_forgets_what_it_was_refused() -> None:
    state = one_of_two()
    two = after(state, 2)
    enough = replace(state, policies={})
    assert plan(enough, now=2.0, state=two.state).state.troubles == {}


def test_a_drain_that_waits_for_a_place_is_found_one_when_a_node_comes() -> None:
    """F7, F34."""
    state = drain(serve(mesh(1), 1), "n0")
    tripped = after(state, 5)
    assert len(tripped.warnings[M]) == 2
    state = add_node(state, "n1", incarnation=50)
    assert kinds(plan(state, now=5.0, state=tripped.state)) == [("Place", "m/n1/0")]


@given(times=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_at_most_three_looks_count_before_it_trips_whatever_the_times_of_the_plans(times: list[float]) -> None:
    """F34: and the plan is the same if made again."""
    state, known, now = one_of_two(), NOTHING, 0.0
    for step in times:
        now += step
        result = plan(state, now=now, state=known)
        again = plan(state, now=now, state=known)
        assert (result.actions, result.state, result.warnings) == (again.actions, again.state, again.warnings)
        assert result.actions == ()
        known = result.state
        assert known.troubles[ModelName(M)].looks <= 3
    assert isinstance(result.warnings, MappingProxyType)
