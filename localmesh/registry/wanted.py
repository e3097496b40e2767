"""What a node is told: its wanted replicas, and the models whose files it shall look for. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from localmesh.core.ids import ModelName, NodeName
from localmesh.core.records import ModelRecord, ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.rpc.convert import replica_ref, spec_to_proto, state_to_proto
from localmesh.v1 import registry_service_pb2 as pb

WantedKey = tuple[tuple[ReplicaRecord, bool], ...]
"""What a wanted set says, for comparing: the records, and whether each one's spec is still the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshView:
    """A snapshot, arranged for many nodes at once."""

    snapshot: Snapshot
    by_node: Mapping[NodeName, tuple[ReplicaRecord, ...]]
    """Replicas of each node, by id."""
    catalog: pb.Catalog
    """Shared by all who send it: not to be changed."""

    def wanted_key(self, node: NodeName, incarnation: int) -> WantedKey:
        """Return what must change for a new wanted set to be sent."""
        records = (r for r in self.by_node.get(node, ()) if r.incarnation == incarnation)
        return tuple((record, self._model(record) is not None) for record in records)

    def wanted_set(self, node: NodeName, incarnation: int) -> pb.WantedSet:
        """Return all replicas that a node shall run or stop in that incarnation.

        A replica whose model was deleted or edited since has no spec: what runs, goes on; what does not, cannot start.
        """
        return pb.WantedSet(
            incarnation=incarnation,
            store_revision=self.snapshot.revision,
            replicas=[self._wanted(r) for r in self.by_node.get(node, ()) if r.incarnation == incarnation],
        )

    def _wanted(self, record: ReplicaRecord) -> pb.WantedReplica:
        model = self._model(record)
        return pb.WantedReplica(
            ref=replica_ref(record.id),
            state=state_to_proto(record.state),
            revision=record.revision,
            spec=spec_to_proto(model.spec) if model is not None else None,
            devices={str(device): size for device, size in record.devices.items()},
            placement=record.create_revision,
        )

    def _model(self, record: ReplicaRecord) -> ModelRecord | None:
        model = self.snapshot.models.get(record.id.model)
        return model if model is not None and model.revision == record.revision else None


class ViewCache:
    """Arranges each snapshot once, however many nodes look at it."""

    def __init__(self) -> None:
        self._view: MeshView | None = None
        self._revisions: Mapping[ModelName, str] = {}

    def view(self, snapshot: Snapshot) -> MeshView:
        """Return the view of a snapshot."""
        before = self._view
        if before is not None and before.snapshot is snapshot:
            return before
        by_node: dict[NodeName, list[ReplicaRecord]] = {}
        for record in sorted(snapshot.all_replicas(), key=lambda r: r.id):
            by_node.setdefault(record.id.node, []).append(record)
        revisions = {name: model.revision for name, model in snapshot.models.items()}
        same = before is not None and revisions == self._revisions
        self._revisions = revisions
        self._view = MeshView(
            snapshot=snapshot,
            by_node=MappingProxyType({node: tuple(records) for node, records in by_node.items()}),
            # The very same object as long as it says the same: streams compare it by identity.
            catalog=before.catalog if before is not None and same else catalog(snapshot),
        )
        return self._view


def catalog(snapshot: Snapshot) -> pb.Catalog:
    """Return all models with their revisions, by name."""
    entries = (
        pb.CatalogEntry(revision=model.revision, spec=spec_to_proto(model.spec))
        for _, model in sorted(snapshot.models.items())
    )
    return pb.Catalog(entries=entries)
