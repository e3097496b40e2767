"""RouterService.ExplainPlacement: from a request and a snapshot to the answer."""

from typing import Any

from localmesh.core.errors import InvalidRequest, NoCapacity
from localmesh.core.ids import ModelName
from localmesh.core.records import ModelRecord, Policy, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.router.views import require_model
from localmesh.rpc.convert import (
    failure_to_proto,
    model_name_of,
    policy_from_proto,
    replica_to_proto,
    spec_from_proto,
)
from localmesh.scheduling.eviction import plan_eviction
from localmesh.scheduling.explain import DeviceVerdict, Explanation, NodeVerdict, Outcome, explain, supposing
from localmesh.store.codec import revision_of
from localmesh.v1 import router_service_pb2 as pb

_OUTCOMES = {
    Outcome.PASSED: pb.FILTER_OUTCOME_PASSED,
    Outcome.FAILED: pb.FILTER_OUTCOME_FAILED,
    Outcome.SKIPPED: pb.FILTER_OUTCOME_SKIPPED,
}


def explain_placement(snapshot: Snapshot, request: Any, *, connected: bool) -> Any:
    """Return the answer to an ExplainPlacementRequest.

    Args:
        snapshot: The mesh.
        request: What was asked.
        connected: Whether the snapshot is kept up to date.

    Raises:
        ModelNotFound: It is not declared, and no spec is given.
        InvalidRequest, InvalidSpec: A field is not acceptable.
    """
    model, policy, dry_run = _asked(snapshot, request)
    name = model.spec.name
    found = explain(snapshot, model, policy, hypothetical=dry_run)
    notes = [*found.notes, *_eviction(supposing(snapshot, model, policy) if dry_run else snapshot, found, name)]
    if not connected:
        notes.append("etcd is silent: this is how the mesh was when it was heard last.")
    failures = [f for _, f in sorted(snapshot.failures.get(name, {}).items()) if f.revision in ("", model.revision)]
    matching = [n.node for n in found.nodes if _passed(n, "usable", "selector")]
    return pb.ExplainPlacementResponse(
        model=name,
        revision=model.revision,
        dry_run=dry_run,
        nodes=[_node(verdict) for verdict in found.nodes],
        chosen=_chosen(snapshot, found),
        reason=found.failure.reason if found.failure is not None else "",
        message=found.failure.message if found.failure is not None else "",
        replicas=sum(1 for _ in snapshot.replicas_of(name)),
        min_replicas=len(matching) if policy.spread_all else policy.min_replicas,
        failures=[failure_to_proto(failure) for failure in failures],
        notes=notes,
    )


def _asked(snapshot: Snapshot, request: Any) -> tuple[ModelRecord, Policy, bool]:
    """Return the model, its policy, and whether they are not those that are applied."""
    if not request.HasField("spec"):
        if request.HasField("policy"):
            raise InvalidRequest("a policy is explained together with its spec: give both", field="policy")
        name = model_name_of(request.model)
        require_model(snapshot, name)
        return snapshot.models[name], snapshot.policy(name), False
    spec = spec_from_proto(request.spec)
    if request.model and request.model != spec.name:
        raise InvalidRequest(f"the request is for {request.model!r}, its spec for {spec.name!r}", field="model")
    policy = _policy(snapshot, request, spec.name)
    declared = snapshot.models.get(spec.name)
    same = declared is not None and declared.spec == spec
    if declared is not None and same and policy == snapshot.policy(spec.name):
        return declared, policy, False
    revision = declared.revision if declared is not None and same else revision_of(spec)
    return ModelRecord(spec=spec, revision=revision), policy, True


def _policy(snapshot: Snapshot, request: Any, model: ModelName) -> Policy:
    return policy_from_proto(request.policy, model=model) if request.HasField("policy") else snapshot.policy(model)


def _eviction(snapshot: Snapshot, found: Explanation, model: ModelName) -> list[str]:
    """Return a note on what a request for the model would stop to make room."""
    plan = plan_eviction(snapshot, model) if isinstance(found.failure, NoCapacity) else None
    if plan is None:
        return []
    victims = ", ".join(str(victim.replica.id) for victim in plan.victims)
    return [f"A request for it would stop {victims}, which nobody uses now, to make room on {plan.node}."]


def _passed(verdict: NodeVerdict, *filters: str) -> bool:
    return all(f.outcome is Outcome.PASSED for f in verdict.filters if f.name in filters)


def _chosen(snapshot: Snapshot, found: Explanation) -> Any:
    if found.plan is None:
        return None
    record = ReplicaRecord(
        id=found.plan.replica,
        state=ReplicaState.PLACED,
        revision=found.plan.revision,
        incarnation=found.plan.incarnation,
        devices=found.plan.devices,
    )
    return replica_to_proto(snapshot, record)


def _node(verdict: NodeVerdict) -> Any:
    return pb.NodeVerdict(
        node=verdict.node,
        filters=[
            pb.FilterVerdict(filter=f.name, outcome=_OUTCOMES[f.outcome], reason=f.reason) for f in verdict.filters
        ],
        devices=[_device(device) for device in verdict.devices],
        scores=[pb.ScorerVerdict(scorer=name, score=score) for name, score in verdict.scores.items()],
        rank=verdict.rank,
    )


def _device(verdict: DeviceVerdict) -> Any:
    device = verdict.device
    return pb.DeviceVerdict(
        id=device.id,
        kind=device.kind,
        budget_bytes=device.budget_bytes,
        claimed_bytes=device.claimed_bytes,
        room_bytes=verdict.room_bytes,
        needed_bytes=verdict.needed_bytes,
        chosen=verdict.chosen,
        reason=verdict.reason,
    )
