"""What is stopped to make room: little, idle, long unused, and never what is protected."""

from dataclasses import replace
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core.errors import PlacementFailed
from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import Policy, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.eviction import EvictionPlan, obstacles, plan_eviction
from localmesh.scheduling.placement import plan_placement
from tests.unit.scheduling_kit import LOADING, READY, add_model, add_node, hold, serve, set_state

NEW = ModelName("new")


def nodes(count: int = 1, *, budget: int = 100, slots: int = 1) -> Snapshot:
    state = Snapshot()
    for i in range(count):
        state = add_node(state, f"n{i}", incarnation=10 + i, budget=budget, slots=slots)
    return state


def load(
    state: Snapshot, name: str, memory: int, *, used: int = 0, at: ReplicaState = READY, **policy: Any
) -> Snapshot:
    """Declare a model if need be, and give it a replica; `used` is the revision of its record."""
    if ModelName(name) not in state.models:
        state = add_model(state, name, revision="r", policy=Policy(**policy), memory=memory)
    plan = plan_placement(state, ModelName(name))
    state = set_state(with_placement(state, plan), plan.replica, at)
    siblings = dict(state.replicas[plan.replica.model])
    siblings[plan.replica] = replace(siblings[plan.replica], mod_revision=used)
    return replace(state, replicas={**state.replicas, plan.replica.model: siblings})


def want(state: Snapshot, memory: int, **policy: Any) -> Snapshot:
    return add_model(state, NEW, revision="r", policy=Policy(**policy), memory=memory)


def named(plan: EvictionPlan | None) -> list[str]:
    return [] if plan is None else [str(v.replica.id) for v in plan.victims]


def evict(state: Snapshot) -> list[str]:
    return named(plan_eviction(state, NEW))


def first(model: str, node: str = "n0", index: int = 0) -> ReplicaId:
    return ReplicaId(ModelName(model), NodeName(node), index)


def test_the_least_recently_used_goes_where_any_one_would_do() -> None:
    """F36."""
    state = want(load(load(nodes(), "a", 50, used=9), "b", 50, used=3), 40)
    plan = plan_eviction(state, NEW)
    assert plan is not None
    assert named(plan) == ["b/n0/0"]
    assert (plan.heir, plan.node, plan.incarnation) == (first("new"), "n0", 10)
    assert dict(plan.devices) == {CPU: 40}
    ages = {first("a"): 1, first("b"): 2}
    assert named(plan_eviction(state, NEW, last_used=lambda r: ages[r.id])) == ["a/n0/0"]


def test_the_smallest_set_goes_even_if_it_was_used_more_recently() -> None:
    """F36."""
    state = load(load(load(nodes(), "a", 20, used=1), "b", 20, used=2), "c", 60, used=9)
    assert evict(want(state, 50)) == ["c/n0/0"]
    assert evict(want(state, 70)) == ["a/n0/0", "c/n0/0"]


def test_among_nodes_the_one_with_fewest_to_stop_then_with_the_oldest() -> None:
    """F36."""
    state = nodes(2)
    for name, used in (("a", 1), ("b", 8)):  # one on each node
        state = load(state, name, 60, used=used)
    small = {r.id.model: r.id.node for r in state.all_replicas()}
    assert evict(want(state, 50)) == [f"a/{small[ModelName('a')]}/0"]


def test_nothing_is_stopped_while_there_is_room_or_room_is_coming() -> None:
    """F36."""
    state = load(load(nodes(), "a", 50), "b", 40)
    assert not evict(want(state, 10))
    assert evict(want(state, 50))
    assert not evict(want(set_state(state, first("a"), ReplicaState.DRAINING), 50))
    assert evict(want(set_state(state, first("a"), ReplicaState.DRAINING), 80)) == ["b/n0/0"]


def test_what_is_stopped_for_somebody_else_is_no_room() -> None:
    """F36."""
    state = set_state(load(load(nodes(), "a", 50, used=1), "b", 50, used=2), first("a"), ReplicaState.UNLOADING)
    siblings = {first("a"): replace(state.replicas[ModelName("a")][first("a")], memory_for=first("other"))}
    state = replace(state, replicas={**state.replicas, ModelName("a"): siblings})
    assert evict(want(state, 50)) == ["b/n0/0"]


def test_what_is_made_free_for_others_is_worth_waiting_for() -> None:
    """F36: who gets it now can be stopped later. Also between exit and placement, when only a claim is there."""
    state = set_state(load(nodes(), "a", 100), first("a"), ReplicaState.UNLOADING)
    heir = add_model(want(state, 50), "other", revision="r", policy=Policy(), memory=100)
    leaving = {first("a"): replace(heir.replicas[ModelName("a")][first("a")], memory_for=first("other"))}
    stopping = replace(heir, replicas={ModelName("a"): leaving})
    assert not evict(stopping)
    assert obstacles(stopping, NEW).may_pass
    device = replace(stopping.devices[NodeName("n0")][CPU], claims={first("other"): 100})
    handed = replace(stopping, replicas={}, devices={NodeName("n0"): {CPU: device}})
    assert not evict(handed)
    assert obstacles(handed, NEW).may_pass


def test_a_minimum_of_two_on_one_node_is_not_worth_waiting_for() -> None:
    """F36."""
    state = nodes(slots=2)
    for used in (1, 2):
        state = load(state, "a", 50, used=used, min_replicas=1)
    assert not obstacles(want(state, 60), NEW).may_pass
    assert obstacles(want(hold(state, first("a")), 50), NEW).may_pass


@pytest.mark.parametrize("count", [0, 1])
def test_a_held_replica_stays_even_when_the_count_is_zero(count: int) -> None:
    """F36: a presence is a lock, whatever the number in it."""
    state = want(hold(load(nodes(), "a", 100), first("a"), count), 50)
    assert not evict(state)
    assert obstacles(state, NEW).may_pass
    word = "has requests in flight" if count else "was in use a moment ago"
    assert obstacles(state, NEW).sentence == f"on n0 'a' {word}"


def test_what_the_caller_protects_stays() -> None:
    state = want(load(nodes(), "a", 100), 50)
    assert plan_eviction(state, NEW, protected=frozenset({first("a")})) is None
    assert obstacles(state, NEW, protected=frozenset({first("a")})).may_pass


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ({"pinned": True}, "is pinned"),
        ({"spread_all": True}, "is to be on every node (spread_all)"),
        ({"min_replicas": 1}, "is kept by its minimum of 1"),
    ],
)
def test_pinned_spread_and_minimum_are_protected_for_good(policy: dict[str, Any], word: str) -> None:
    """F36."""
    state = want(load(nodes(), "a", 100, **policy), 50)
    assert not evict(state)
    assert obstacles(state, NEW).sentence == f"on n0 'a' {word}"
    assert not obstacles(state, NEW).may_pass


def test_what_is_above_the_minimum_may_go_and_names_who_must_stay() -> None:
    """F36."""
    state = load(load(nodes(2), "a", 100, min_replicas=1, used=5), "a", 100, used=2)
    plan = plan_eviction(want(state, 50), NEW)
    assert plan is not None
    (victim,) = plan.victims
    assert victim.replica.mod_revision == 2
    assert [k.mod_revision for k in victim.keepers] == [5]


def test_no_two_of_a_set_break_the_minimum_together() -> None:
    """F36."""
    state = nodes(slots=2)
    for used in (1, 2):
        state = load(state, "a", 40, used=used, min_replicas=1)
    state = load(state, "b", 20, used=9)
    assert evict(want(state, 80)) == []
    assert evict(want(state, 60)) == ["a/n0/0", "b/n0/0"]


def test_siblings_are_never_stopped() -> None:
    """F36: one replica only, never its siblings."""
    state = want(nodes(slots=2), 60)
    state = load(state, NEW, 60)
    assert not evict(state)
    assert not obstacles(state, NEW).may_pass


def test_a_replica_that_loads_is_waited_for() -> None:
    """F36."""
    state = want(load(nodes(), "a", 100, at=LOADING), 50)
    assert not evict(state)
    assert obstacles(state, NEW).may_pass
    assert obstacles(state, NEW).sentence == "on n0 'a' is loading"


def test_a_node_that_fails_another_filter_is_left_alone() -> None:
    """F36."""
    state = load(nodes(), "a", 100)
    assert not evict(want(state, 50, node_selector={"zone": "x"}))
    assert not evict(want(state, 101))
    record = replace(state.approvals[NodeName("n0")], cordoned=True)
    cordoned = replace(state, approvals={NodeName("n0"): record})
    assert not evict(want(cordoned, 50))
    assert not obstacles(want(cordoned, 50), NEW).may_pass


def test_nothing_is_stopped_while_the_guard_is_on() -> None:
    state = want(load(nodes(), "a", 100), 50)
    assert evict(state)
    assert not evict(replace(state, guarded=True))


def test_the_members_of_a_group_go_and_nobody_else() -> None:
    """F37."""
    state = load(load(nodes(), "a", 10, used=9, groups=("g",)), "b", 10, used=1)
    assert evict(want(state, 10, groups=("g",))) == ["a/n0/0"]
    assert evict(want(state, 85, groups=("g",))) == ["a/n0/0"]
    assert evict(want(state, 95, groups=("g",))) == ["a/n0/0", "b/n0/0"]


def test_a_busy_or_pinned_member_keeps_its_node() -> None:
    """F37."""
    state = load(nodes(), "a", 10, groups=("g",))
    busy = want(hold(state, first("a")), 10, groups=("g",))
    assert not evict(busy)
    assert obstacles(busy, NEW).may_pass
    pinned = want(load(nodes(), "a", 10, groups=("g",), pinned=True), 10, groups=("g",))
    assert not evict(pinned)
    assert obstacles(pinned, NEW).sentence == "on n0 'a' is pinned"
    assert not obstacles(pinned, NEW).may_pass


def test_memory_that_was_handed_over_is_the_heirs_and_nobody_elses() -> None:
    """F36: T7 hands the claim of the victim to the heir, and T1 takes it."""
    state = want(nodes(), 60)
    device = replace(state.devices[NodeName("n0")][CPU], claims={first("new", index=3): 100})
    state = replace(state, devices={NodeName("n0"): {CPU: device}})
    assert plan_placement(state, NEW).replica == first("new", index=3)
    other = add_model(state, "other", revision="r", policy=Policy(), memory=10)
    with pytest.raises(PlacementFailed):
        plan_placement(other, ModelName("other"))


def test_many_small_ones_are_stopped_without_looking_at_every_set() -> None:
    """F36: an answer comes in time, and nothing is stopped in vain."""
    state = nodes(budget=400)
    for i in range(40):
        state = load(state, f"m{i}", 10, used=i)
    gone = plan_eviction(want(state, 100), NEW)
    assert gone is not None
    assert len(gone.victims) == 10
    assert not evict(want(state, 400))  # more than go in one transaction


MODELS = ["a", "b", "c", "d"]


@st.composite
def meshes(draw: st.DrawFn) -> Snapshot:
    state = nodes(draw(st.integers(1, 3)), budget=draw(st.integers(30, 120)), slots=draw(st.integers(1, 2)))
    for name in MODELS:
        policy = {
            "pinned": draw(st.booleans()),
            "min_replicas": draw(st.integers(0, 2)),
            "groups": tuple(draw(st.sets(st.sampled_from(["g", "h"]), max_size=1))),
        }
        memory = draw(st.integers(5, 60))
        state = add_model(state, name, revision="r", policy=Policy(**policy), memory=memory)
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.sampled_from([READY, READY, READY, LOADING, ReplicaState.DRAINING, ReplicaState.UNLOADING]))
            try:
                state = load(state, name, memory, used=draw(st.integers(0, 9)), at=at)
            except PlacementFailed:
                break
    held = draw(st.sets(st.sampled_from(sorted(r.id for r in state.all_replicas()) or [first("none")])))
    state = replace(state, inflight={r: {HolderId("h"): draw(st.integers(0, 2))} for r in held})
    return want(state, draw(st.integers(5, 120)), groups=tuple(draw(st.sets(st.sampled_from(["g", "h"]), max_size=1))))


@settings(max_examples=150, deadline=None)
@given(meshes())
def test_an_eviction_makes_room_and_breaks_nothing(state: Snapshot) -> None:
    """F36, F37: what holds of every plan; invariants 1, 2 and 4 of the design."""
    plan = plan_eviction(state, NEW)
    assert plan == plan_eviction(state, NEW)
    if plan is None:
        return
    with pytest.raises(PlacementFailed):
        plan_placement(state, NEW)  # nothing is stopped while there is room
    gone = {v.replica.id for v in plan.victims}
    after = state
    for victim in plan.victims:
        assert victim.replica.state is READY
        assert not state.inflight.get(victim.replica.id)
        assert victim.replica.id.model != NEW
        policy = state.policy(victim.replica.id.model)
        assert not policy.pinned
        assert len(victim.keepers) == policy.min_replicas
        assert not gone & {k.id for k in victim.keepers}
        after = without_replica(after, victim.replica)
    for replica in state.all_replicas():
        if replica.state.leaving and replica.id.node == plan.node:
            after = without_replica(after, replica)
    placed = plan_placement(after, NEW)
    assert placed.replica.node == plan.node
    after = with_placement(after, placed)
    for device in after.devices[plan.node].values():
        assert device.claimed_bytes <= device.budget_bytes
    members = after.group_members(NEW)
    assert not any(r.id.node == plan.node and r.id.model in members for r in after.all_replicas())
    for model in {r.model for r in gone}:
        left = after.routable_replicas(model)
        assert len(left) >= state.policy(model).min_replicas
    for spared in gone:  # no victim too many
        fewer = state
        for victim in plan.victims:
            if victim.replica.id != spared:
                fewer = without_replica(fewer, victim.replica)
        for replica in state.all_replicas():
            if replica.state.leaving and replica.id.node == plan.node:
                fewer = without_replica(fewer, replica)
        with pytest.raises(PlacementFailed):
            plan_placement(fewer, NEW, exclude_nodes=frozenset(state.nodes) - {plan.node})


def test_a_served_mesh_of_the_kit_has_something_to_stop() -> None:
    state = add_model(nodes(), "m", revision="r", policy=Policy(), memory=60)
    assert evict(want(serve(state, 1), 50)) == ["m/n0/0"]


def test_a_plan_for_a_large_fleet_holds_nothing_up() -> None:
    """F36: planning runs in the router's event loop. The number of sets looked at is bounded, whatever the fleet."""
    state = nodes(40)
    for i in range(40):
        for size in (3, 5, 7, 11, 13, 17, 19):
            plan = ReplicaId(ModelName(f"m{size}"), NodeName(f"n{i}"), 0)
            if plan.model not in state.models:
                state = add_model(state, plan.model, revision="r", policy=Policy(), memory=size)
            chosen = plan_placement(state, plan.model, exclude_nodes=frozenset(state.nodes) - {plan.node})
            state = set_state(with_placement(state, chosen), chosen.replica, READY)
    wanted = want(state, 99)
    began = process_time()
    plan_eviction(wanted, NEW)
    obstacles(wanted, NEW)
    assert process_time() - began < 1.0
