"""The mesh at one revision of the store: an immutable view that is swapped whole."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from localmesh.core.ids import DeviceId, HolderId, ModelName, NodeName, ReplicaId
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
_DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that is known of the mesh at `revision`. Maps are never changed after the snapshot was made."""

    revision: int = 0
    """Revision of the store up to which every change is in it."""
    models: Mapping[ModelName, ModelRecord] = _EMPTY
    policies: Mapping[ModelName, PolicyRecord] = _EMPTY
    approvals: Mapping[NodeName, ApprovalRecord] = _EMPTY
    nodes: Mapping[NodeName, NodeRecord] = _EMPTY
    """Present nodes only."""
    measured: Mapping[NodeName, MeasuredRecord] = _EMPTY
    sources: Mapping[NodeName, Mapping[ModelName, SourceRecord]] = _EMPTY
    devices: Mapping[NodeName, Mapping[DeviceId, DeviceRecord]] = _EMPTY
    replicas: Mapping[ModelName, Mapping[ReplicaId, ReplicaRecord]] = _EMPTY
    progress: Mapping[ReplicaId, ProgressRecord] = _EMPTY
    inflight: Mapping[ReplicaId, Mapping[HolderId, int]] = _EMPTY
    """Requests in flight by holder. A count of 0 is still a presence: see T2."""
    failures: Mapping[ModelName, Mapping[NodeName, FailureRecord]] = _EMPTY
    guarded: bool = False
    """The mass-expiry guard is on."""
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
        approval = self.approvals.get(node)
        return (
            node in self.nodes
            and approval is not None
            and approval.approved
            and not approval.cordoned
            and not approval.draining
        )

    def routable_replicas(self, model: ModelName) -> list[ReplicaRecord]:
        """Return the replicas that requests may be sent to: READY, present, on a usable node, of a routable revision.

        T4 says which revisions are routable. The current one always is; older ones are until a replica of the current
        one can be picked, unless the rollout is immediate.
        """
        record = self.models.get(model)
        if record is None:
            return []
        ready = [
            r
            for r in self.replicas_of(model)
            if r.state is ReplicaState.READY and self.present(r) and self.usable(r.id.node)
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
        known = [devices[d].unclaimed_bytes for d in replica.devices if d in devices]
        return min(known, default=0)
