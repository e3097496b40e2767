"""The reconciler's plan, as properties of any sequence of events."""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from localmesh.core.ids import CPU, NodeName, ReplicaId
from localmesh.core.records import (
    Policy,
    ReplicaRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import without_replica
from localmesh.scheduling.autoscale import AutoscaleConfig
from localmesh.scheduling.guard import LiftGuard, SetGuard
from localmesh.scheduling.reconcile import (
    Drain,
    Forget,
    Place,
    Plan,
    ReconcileConfig,
    ReconcileState,
    Unload,
    reconcile,
)
from tests.unit.scheduling_kit import READY, add_model, add_node, apply, drain, drop_node, hold, kinds, set_state

MODELS = st.sampled_from(["m0", "m1", "m2"])
NODES = st.sampled_from(["n0", "n1", "n2"])
POLICIES = st.builds(
    lambda low, extra, now: Policy(min_replicas=low, max_replicas=low + extra if extra else 0, immediate=now),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
)


def guarded(snapshot: Snapshot, result: Plan) -> Snapshot:
    match result.guard:
        case SetGuard(nodes=nodes):
            return replace(snapshot, guarded=True, guarded_nodes=nodes)
        case LiftGuard():
            return replace(snapshot, guarded=False, guarded_nodes=frozenset())
    return snapshot


class Fleet(RuleBasedStateMachine):
    """Any sequence of what operators, workers, callers and misfortune do, with the reconciler between."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()
        self.state = ReconcileState()
        self.config = ReconcileConfig(max_searches=2, autoscale=AutoscaleConfig(busy_seconds=1.0, idle_seconds=30.0))
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
    @rule(data=st.data(), what=st.sampled_from(["ready", "exit", "hold", "fill", "release"]))
    def replica_event(self, data: st.DataObject, what: str) -> None:
        record = data.draw(st.sampled_from(self.replicas()))
        if what == "ready" and record.state.coming and self.snapshot.present(record):
            self.snapshot = set_state(self.snapshot, record.id, READY)
        elif what == "exit" and self.snapshot.present(record):
            self.snapshot = without_replica(self.snapshot, record)
            self.snapshot = self._release(record.id)
        elif what == "hold" and record.state is READY:
            self.snapshot = hold(self.snapshot, record.id)
        elif what == "fill" and record.state is READY:
            self.snapshot = hold(self.snapshot, record.id, record.limit)
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

    @rule(name=NODES)
    def drain(self, name: str) -> None:
        approval = self.snapshot.approvals.get(NodeName(name))
        if approval is not None:
            self.snapshot = drain(self.snapshot, name, draining=not approval.draining)

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0, 40.0, 700.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        before = self.snapshot
        result = reconcile(before, now=self.now, state=self.state, config=self.config)
        again = reconcile(before, now=self.now, state=self.state, config=self.config)
        assert (again.actions, again.state, [*again.unplaced]) == (result.actions, result.state, [*result.unplaced])
        self.check(before, result)
        self.snapshot, self.state = guarded(apply(before, result.actions), result), result.state

    @rule()
    def settle(self) -> None:
        """With nothing happening in between, plans come to an end."""
        idle = 0
        for _ in range(60):
            result = reconcile(self.snapshot, now=self.now, state=self.state, config=self.config)
            self.check(self.snapshot, result)
            self.snapshot, self.state = guarded(apply(self.snapshot, result.actions), result), result.state
            idle = 0 if result.actions else idle + 1
            if idle == 3:  # three models, two looked at in each plan: all had their turn
                return
        raise AssertionError(f"the plan never ends: {kinds(result)}")

    def check(self, before: Snapshot, result: Plan) -> None:
        assert not result.actions or not (before.guarded or result.guard), "the guard is on: nothing is done"
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
                    if replica.state is READY:
                        used = result.state.usage[replica.id.model].used_at
                        assert self.now - used >= self.config.autoscale.idle_seconds
                        left = [r for r in after.replicas_of(replica.id.model) if not r.state.leaving]
                        assert len(left) >= before.policy(replica.id.model).min_replicas
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
