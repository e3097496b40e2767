"""Meshes for the reconciler's tests, and what the store does with a plan when nothing is in its way."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.reconcile import Action, Drain, Forget, Place, Plan, ReconcileState, Unload, reconcile

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


def drain(snapshot: Snapshot, name: str, *, draining: bool = True) -> Snapshot:
    node = NodeName(name)
    approval = replace(snapshot.approvals[node], draining=draining, mod_revision=_next_revision(snapshot))
    return replace(snapshot, approvals={**snapshot.approvals, node: approval})


def _next_revision(snapshot: Snapshot) -> int:
    known = [r.create_revision for r in snapshot.all_replicas()] + [a.mod_revision for a in snapshot.approvals.values()]
    return 1 + max(known, default=0)


def _created_now(snapshot: Snapshot, replica: ReplicaId) -> Snapshot:
    siblings = dict(snapshot.replicas[replica.model])
    siblings[replica] = replace(siblings[replica], create_revision=_next_revision(snapshot))
    return replace(snapshot, replicas={**snapshot.replicas, replica.model: siblings})


def apply(snapshot: Snapshot, actions: Iterable[Action]) -> Snapshot:
    """Do what the store's transactions do when nothing is in their way."""
    for action in actions:
        match action:
            case Place(plan=plan):
                snapshot = _created_now(with_placement(snapshot, plan), plan.replica)
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
