"""The mesh at one revision of the store: an immutable view that is swapped whole."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from localmesh.core.ids import DeviceId, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.labels import automatic_labels, selector_mismatch
from localmesh.core.memory import unclaimed_bytes
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    FailureRecord,
    MeasuredRecord,
    ModelRecord,
    NodeRecord,
    Policy,
    PolicyRecord,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)

_EMPTY: Mapping[Any, Any] = MappingProxyType({})


def _empty() -> Mapping[Any, Any]:
    # A factory, because Python 3.11 takes an unhashable default for a mutable one.
    return _EMPTY


_DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that is known of the mesh at `revision`. Maps are never changed after the snapshot was made."""

    revision: int = 0
    """Revision of the store up to which every change is in it."""
    models: Mapping[ModelName, ModelRecord] = field(default_factory=_empty)
    policies: Mapping[ModelName, PolicyRecord] = field(default_factory=_empty)
    approvals: Mapping[NodeName, ApprovalRecord] = field(default_factory=_empty)
    nodes: Mapping[NodeName, NodeRecord] = field(default_factory=_empty)
    """Present nodes only."""
    measured: Mapping[NodeName, MeasuredRecord] = field(default_factory=_empty)
    sources: Mapping[NodeName, Mapping[ModelName, SourceRecord]] = field(default_factory=_empty)
    devices: Mapping[NodeName, Mapping[DeviceId, DeviceRecord]] = field(default_factory=_empty)
    replicas: Mapping[ModelName, Mapping[ReplicaId, ReplicaRecord]] = field(default_factory=_empty)
    progress: Mapping[ReplicaId, ProgressRecord] = field(default_factory=_empty)
    inflight: Mapping[ReplicaId, Mapping[HolderId, int]] = field(default_factory=_empty)
    """Requests in flight by holder. A count of 0 is still a presence: see T2."""
    failures: Mapping[ModelName, Mapping[NodeName, FailureRecord]] = field(default_factory=_empty)
    guarded: bool = False
    """The mass-expiry guard is on."""
    guarded_nodes: frozenset[NodeName] = frozenset()
    """The nodes that it was set for."""
    leader: str = ""
    """Name of the elected reconciler."""

    def policy(self, model: ModelName) -> Policy:
        """Return the model's policy, or the default one."""
        record = self.policies.get(model)
        return record.policy if record is not None else _DEFAULT_POLICY

    def replicas_of(self, model: ModelName) -> Iterable[ReplicaRecord]:
        """Return the model's replicas, in any state."""
        return self.replicas.get(model, _EMPTY).values()

    def all_replicas(self) -> Iterator[ReplicaRecord]:
        """Return every replica."""
        for by_id in self.replicas.values():
            yield from by_id.values()

    def replica(self, replica_id: ReplicaId) -> ReplicaRecord | None:
        """Return one replica."""
        found: ReplicaRecord | None = self.replicas.get(replica_id.model, _EMPTY).get(replica_id)
        return found

    def present(self, replica: ReplicaRecord) -> bool:
        """Whether the replica's node is there, in the incarnation that the replica belongs to."""
        node = self.nodes.get(replica.id.node)
        return node is not None and node.incarnation == replica.incarnation

    def usable(self, node: NodeName) -> bool:
        """Whether new work may go to the node: present, approved, not cordoned or draining."""
        return node in self.nodes and self._in_use(node)

    def _in_use(self, node: NodeName) -> bool:
        approval = self.approvals.get(node)
        return approval is not None and approval.approved and not approval.cordoned and not approval.draining

    def silent(self, replica: ReplicaRecord) -> bool:
        """Whether the replica's node is only not heard, by what the guard says: it may well answer."""
        node = replica.id.node
        return self.guarded and node in self.guarded_nodes and node not in self.nodes and self._in_use(node)

    def max_replicas_on(self, node: NodeName) -> int:
        """Return how many replicas of one model a node may hold: the operator's override, else its worker's word.

        0 for a node that is not there and has no override.
        """
        record, approval = self.nodes.get(node), self.approvals.get(node)
        if approval is not None and approval.max_replicas_per_model:
            return approval.max_replicas_per_model
        return record.max_replicas_per_model if record is not None else 0

    def labels(self, node: NodeName) -> Mapping[str, str]:
        """Return a node's effective labels: the operator's over the automatic ones over the worker's."""
        record, approval = self.nodes.get(node), self.approvals.get(node)
        operators = approval.labels if approval is not None else _EMPTY
        if record is None:
            return dict(operators)
        gpus = (d.total_bytes for d in self.devices.get(node, _EMPTY).values() if d.kind == "gpu")
        automatic = automatic_labels(node, gpu_bytes=gpus, replica_slots=self.max_replicas_on(node))
        return {**record.labels, **automatic, **operators}

    def selector_mismatch(self, policy: Policy, node: NodeName) -> str | None:
        """Return why a present node is not one that a policy selects; None if it is."""
        if not policy.node_selector and not policy.selector_terms:
            return None
        return selector_mismatch(policy.node_selector, policy.selector_terms, self.labels(node))

    def selected_nodes(self, model: ModelName) -> list[NodeName]:
        """Return the usable nodes that the model's policy selects, by name."""
        policy = self.policy(model)
        return [n for n in sorted(self.nodes) if self.usable(n) and self.selector_mismatch(policy, n) is None]

    def min_replicas(self, model: ModelName) -> int:
        """Return how many replicas of the model are to be kept: for `spread_all`, as many as nodes match now."""
        policy = self.policy(model)
        return len(self.selected_nodes(model)) if policy.spread_all else policy.min_replicas

    def group_members(self, model: ModelName) -> frozenset[ModelName]:
        """Return the other models that never share a node with the model."""
        groups = frozenset(self.policy(model).groups)
        if not groups:
            return frozenset()
        return frozenset(m for m, r in self.policies.items() if m != model and not groups.isdisjoint(r.policy.groups))

    def routable_replicas(self, model: ModelName) -> list[ReplicaRecord]:
        """Return the replicas that requests may be sent to: READY, present, on a usable node, of a routable revision.

        Under the guard also those that were last known on nodes that are only not heard.

        T4 says which revisions are routable. The current one always is; older ones are until a replica of the current
        one can be picked, unless the rollout is immediate.
        """
        record = self.models.get(model)
        if record is None:
            return []
        ready = [
            r
            for r in self.replicas_of(model)
            if r.state is ReplicaState.READY and ((self.present(r) and self.usable(r.id.node)) or self.silent(r))
        ]
        current = [r for r in ready if r.revision == record.revision]
        return current if current or self.policy(model).immediate else ready

    def routable(self, replica: ReplicaRecord) -> bool:
        """Whether requests may be sent to this replica: see `routable_replicas`."""
        return replica in self.routable_replicas(replica.id.model)

    def in_flight(self, replica: ReplicaId, *, without: HolderId | None = None) -> int:
        """Return the published number of requests in flight, without those of one holder."""
        return sum(n for holder, n in self.inflight.get(replica, _EMPTY).items() if holder != without)

    def free_bytes(self, replica: ReplicaRecord) -> int:
        """Return the least unclaimed memory of the replica's devices; 0 if it has none."""
        devices = self.devices.get(replica.id.node, _EMPTY)
        known = [unclaimed_bytes(devices, d) for d in replica.devices if d in devices]
        return min(known, default=0)
