"""The reconciler's plan: example by example, and as properties of any sequence of events."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from localmesh.core.errors import NoCapacity
from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
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
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.reconcile import (
    Action,
    Drain,
    Forget,
    Place,
    Plan,
    ReconcileConfig,
    ReconcileState,
    Unload,
    reconcile,
)

M = ModelName("m")
READY, LOADING, DRAINING = ReplicaState.READY, ReplicaState.LOADING, ReplicaState.DRAINING
NOTHING = ReconcileState()


def add_model(snapshot: Snapshot, name: str, *, revision: str, policy: Policy, memory: int = 10) -> Snapshot:
    spec = ModelSpec(name=ModelName(name), backend="e", source="f", memory_bytes=memory)
    found = {n: dict(snapshot.sources.get(n, {})) for n in snapshot.nodes}
    for known in found.values():
        known[spec.name] = SourceRecord(revision=revision, present=True, path="/f")
    return replace(
        snapshot,
        models={**snapshot.models, spec.name: ModelRecord(spec=spec, revision=revision)},
        policies={**snapshot.policies, spec.name: PolicyRecord(policy=policy)},
        sources=found,
    )


def add_node(snapshot: Snapshot, name: str, *, incarnation: int, slots: int = 1, budget: int = 100) -> Snapshot:
    node = NodeName(name)
    record = NodeRecord(
        name=node,
        incarnation=incarnation,
        record_lease=0,
        endpoint="x:1",
        engines=(EngineInfo(name="e", available=True),),
        max_replicas_per_model=slots,
    )
    device = DeviceRecord(node=node, id=CPU, kind="cpu", total_bytes=budget, budget_bytes=budget)
    sources = {m: SourceRecord(revision=r.revision, present=True, path="/f") for m, r in snapshot.models.items()}
    return replace(
        snapshot,
        nodes={**snapshot.nodes, node: record},
        approvals={node: ApprovalRecord(key_fingerprint=name), **snapshot.approvals},
        devices={node: {CPU: device}, **snapshot.devices},
        sources={**snapshot.sources, node: sources},
    )


def drop_node(snapshot: Snapshot, name: str) -> Snapshot:
    return replace(snapshot, nodes={n: r for n, r in snapshot.nodes.items() if n != name})


def set_state(snapshot: Snapshot, replica: ReplicaId, state: ReplicaState) -> Snapshot:
    siblings = dict(snapshot.replicas[replica.model])
    siblings[replica] = replace(siblings[replica], state=state, limit=4)
    return replace(snapshot, replicas={**snapshot.replicas, replica.model: siblings})


def hold(snapshot: Snapshot, replica: ReplicaId, count: int = 1) -> Snapshot:
    return replace(snapshot, inflight={**snapshot.inflight, replica: {HolderId("h"): count}})


def apply(snapshot: Snapshot, actions: Iterable[Action]) -> Snapshot:
    """Do what the store's transactions do when nothing is in their way."""
    for action in actions:
        match action:
            case Place(plan=plan):
                snapshot = with_placement(snapshot, plan)
            case Drain(replica=replica):
                assert replica.state is READY
                snapshot = set_state(snapshot, replica.id, DRAINING)
            case Unload(replica=replica):
                if not snapshot.inflight.get(replica.id):
                    snapshot = set_state(snapshot, replica.id, ReplicaState.UNLOADING)
            case Forget(replica=replica):
                snapshot = without_replica(snapshot, replica)
    return snapshot


def mesh(nodes: int = 2, *, slots: int = 1, budget: int = 100, revision: str = "r1", **policy: Any) -> Snapshot:
    state = Snapshot()
    for i in range(nodes):
        state = add_node(state, f"n{i}", incarnation=10 + i, slots=slots, budget=budget)
    return add_model(state, M, revision=revision, policy=Policy(**policy))


def serve(snapshot: Snapshot, count: int, *, state: ReplicaState = READY) -> Snapshot:
    """The mesh with that many replicas of `m`, as the reconciler would have placed them."""
    wanted = replace(snapshot, policies={M: PolicyRecord(policy=Policy(min_replicas=count))})
    for _ in range(count):
        wanted = apply(wanted, plan(wanted).actions)
        for replica in list(wanted.replicas.get(M, {})):
            wanted = set_state(wanted, replica, state)
    assert len(wanted.replicas.get(M, {})) == count
    return replace(wanted, policies=snapshot.policies)


def edit(snapshot: Snapshot, revision: str, **policy: Any) -> Snapshot:
    return add_model(snapshot, M, revision=revision, policy=Policy(**policy))


def plan(snapshot: Snapshot, *, now: float = 0.0, state: ReconcileState = NOTHING) -> Plan:
    return reconcile(snapshot, now=now, state=state)


def kinds(plan: Plan) -> list[tuple[str, str]]:
    found = []
    for action in plan.actions:
        replica = action.plan.replica if isinstance(action, Place) else action.replica.id
        found.append((type(action).__name__, str(replica)))
    return found


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
    assert second.state == first.state


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


MODELS = st.sampled_from(["m0", "m1", "m2"])
NODES = st.sampled_from(["n0", "n1", "n2"])
POLICIES = st.builds(
    lambda low, extra, now: Policy(min_replicas=low, max_replicas=low + extra if extra else 0, immediate=now),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
)


class Fleet(RuleBasedStateMachine):
    """Any sequence of what operators, workers, callers and misfortune do, with the reconciler between."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()
        self.state = ReconcileState()
        self.config = ReconcileConfig(max_searches=2)
        self.now = 0.0
        self.incarnations = 0

    def replicas(self) -> list[ReplicaRecord]:
        return sorted(self.snapshot.all_replicas(), key=lambda r: r.id)

    @rule(name=NODES, slots=st.integers(1, 3), budget=st.integers(0, 60))
    def register(self, name: str, slots: int, budget: int) -> None:
        """T0: the node's running replicas are adopted."""
        self.incarnations += 1
        node = NodeName(name)
        known = self.snapshot.devices.get(node, {}).get(CPU)
        self.snapshot = add_node(self.snapshot, name, incarnation=self.incarnations, slots=slots, budget=budget)
        if known is not None:
            for record in self.replicas():
                if record.id.node == node:
                    siblings = dict(self.snapshot.replicas[record.id.model])
                    siblings[record.id] = replace(record, incarnation=self.incarnations)
                    self.snapshot = replace(
                        self.snapshot, replicas={**self.snapshot.replicas, record.id.model: siblings}
                    )

    @rule(name=NODES)
    def lose(self, name: str) -> None:
        self.snapshot = drop_node(self.snapshot, name)

    @rule(name=MODELS, revision=st.sampled_from(["r1", "r2", "r3"]), policy=POLICIES, memory=st.integers(0, 30))
    def declare(self, name: str, revision: str, policy: Policy, memory: int) -> None:
        self.snapshot = add_model(self.snapshot, name, revision=f"{revision}-{memory}", policy=policy, memory=memory)

    @rule(name=MODELS)
    def delete(self, name: str) -> None:
        models = {n: m for n, m in self.snapshot.models.items() if n != name}
        policies = {n: p for n, p in self.snapshot.policies.items() if n != name}
        self.snapshot = replace(self.snapshot, models=models, policies=policies)

    @precondition(lambda self: self.replicas())
    @rule(data=st.data(), what=st.sampled_from(["ready", "exit", "hold", "release"]))
    def replica_event(self, data: st.DataObject, what: str) -> None:
        record = data.draw(st.sampled_from(self.replicas()))
        if what == "ready" and record.state.coming and self.snapshot.present(record):
            self.snapshot = set_state(self.snapshot, record.id, READY)
        elif what == "exit" and self.snapshot.present(record):
            self.snapshot = without_replica(self.snapshot, record)
            self.snapshot = self._release(record.id)
        elif what == "hold" and record.state is READY:
            self.snapshot = hold(self.snapshot, record.id)
        elif what == "release":
            self.snapshot = self._release(record.id)

    def _release(self, replica: ReplicaId) -> Snapshot:
        kept = {r: h for r, h in self.snapshot.inflight.items() if r != replica}
        return replace(self.snapshot, inflight=kept)

    @rule(name=NODES)
    def cordon(self, name: str) -> None:
        approval = self.snapshot.approvals.get(NodeName(name))
        if approval is not None:
            changed = replace(approval, cordoned=not approval.cordoned)
            self.snapshot = replace(self.snapshot, approvals={**self.snapshot.approvals, NodeName(name): changed})

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        before = self.snapshot
        result = reconcile(before, now=self.now, state=self.state, config=self.config)
        again = reconcile(before, now=self.now, state=self.state, config=self.config)
        assert (again.actions, again.state, [*again.unplaced]) == (result.actions, result.state, [*result.unplaced])
        self.check(before, result)
        self.snapshot, self.state = apply(before, result.actions), result.state

    @rule()
    def settle(self) -> None:
        """With nothing happening in between, plans come to an end."""
        idle = 0
        for _ in range(60):
            result = reconcile(self.snapshot, now=self.now, state=self.state, config=self.config)
            self.check(self.snapshot, result)
            self.snapshot, self.state = apply(self.snapshot, result.actions), result.state
            idle = 0 if result.actions else idle + 1
            if idle == 3:  # three models, two looked at in each plan: all had their turn
                return
        raise AssertionError(f"the plan never ends: {kinds(result)}")

    def check(self, before: Snapshot, result: Plan) -> None:
        touched = [a.replica.id for a in result.actions if not isinstance(a, Place)]
        assert len(set(touched)) == len(touched), "one action for a replica at most"
        dead = {r.id for r in before.all_replicas() if (r.id.node, r.incarnation) in self._over(result.state)}
        after = apply(before, result.actions)
        for action in result.actions:
            match action:
                case Place(plan=placed):
                    node = before.nodes[placed.replica.node]
                    assert before.usable(node.name)
                    assert before.replica(placed.replica) is None
                    same = [r for r in after.replicas_of(placed.replica.model) if r.id.node == node.name]
                    assert len(same) <= node.max_replicas_per_model
                    for device, size in placed.devices.items():
                        record = after.devices[node.name][device]
                        assert size == 0 or record.claimed_bytes <= record.budget_bytes
                    limit = before.policy(placed.replica.model).max_replicas
                    assert not limit or len([*after.replicas_of(placed.replica.model)]) <= limit
                case Unload(replica=replica):
                    assert not before.inflight.get(replica.id) or replica.state.coming
                    assert before.present(replica)
                    assert replica.state is not READY
                case Drain(replica=replica):
                    assert before.present(replica)
                case Forget(replica=replica):
                    assert replica.id in dead
                    assert not before.present(replica)

    def _over(self, state: ReconcileState) -> set[tuple[NodeName, int]]:
        return {life for life, since in state.absent_since.items() if self.now - since >= 30.0}

    @invariant()
    def old_replicas_make_room_one_at_a_time(self) -> None:
        """What is stopped to make room for a new revision is one replica, and no other one is on its way out."""
        result = reconcile(self.snapshot, now=self.now, state=self.state)
        for action in result.actions:
            if isinstance(action, Drain) and action.why.endswith("does not fit beside it"):
                model = action.replica.id.model
                drained = [a for a in result.actions if isinstance(a, Drain) and a.replica.id.model == model]
                assert drained == [action]
                assert not any(r.state.leaving and self.snapshot.present(r) for r in self.snapshot.replicas_of(model))


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


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
