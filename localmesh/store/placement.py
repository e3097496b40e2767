"""T1: a replica's record and the claims on its devices, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from localmesh.core.errors import Conflict
from localmesh.core.ids import DeviceId, ReplicaId
from localmesh.core.memory import left_bytes, sharing
from localmesh.core.records import NodeRecord, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue, Leadership
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess, guard, new_token
from localmesh.store.errors import readable
from localmesh.store.keys import Table
from localmesh.store.v1 import records_pb2 as pb

_MAX_MEMBERS = 64
"""Members of a model's groups that are compared one by one, so that the transaction stays within etcd's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A decision to load a replica, and what it was decided upon."""

    replica: ReplicaId
    revision: str
    devices: Mapping[DeviceId, int]
    """Bytes to claim on each device; at least one device."""
    incarnation: int
    snapshot: Snapshot


class Placing(StoreAccess):
    """The transaction of placers: any router, or the reconciler."""

    async def place(self, placement: Placement, *, leader: Leadership | None = None) -> ReplicaRecord:
        """T1: reserve memory and slot for a replica, and make its record: its worker then loads it.

        IF presence of the incarnation AND approval, policy, model and every claimed device have the mod-revisions of
        the snapshot, as have devices that share memory with those, AND the replica's key does not exist AND no replica
        of the model was created since the snapshot
        THEN put the replica (PLACED) under the node's record lease, and the devices with the claim, which keep theirs.
        A claim that was handed over to this replica (T7) is replaced by the one of the placement.
        For a model with groups also IF no policy was changed since the snapshot, since policies say who the members
        are, AND no replica of a member was created on the node since.

        An unknown outcome is settled by the record's token.

        Raises:
            Conflict: The plan does not fit what it was decided upon, or that has changed: read and plan again.
            StoreUnavailable: etcd does not answer. A record that appears later is loaded like any other.
        """
        node = check_placement(placement)
        keys, replica, view = self.keys, placement.replica, placement.snapshot
        model = view.models[replica.model]
        policy = view.policies.get(replica.model)
        token = new_token()
        record = ReplicaRecord(
            id=replica,
            state=ReplicaState.PLACED,
            revision=placement.revision,
            incarnation=placement.incarnation,
            devices=placement.devices,
            token=token,
        )
        message = pb.Replica()
        codec.fill_replica(message, record)
        key = keys.replica(replica)
        compare = [
            t.lease(keys.node(replica.node)) == placement.incarnation,
            t.mod(keys.approval(replica.node)) == view.approvals[replica.node].mod_revision,
            t.mod(keys.model(replica.model)) == model.mod_revision,
            t.mod(keys.policy(replica.model)) == (policy.mod_revision if policy is not None else 0),
            *(
                t.mod(keys.device(replica.node, device)) == view.devices[replica.node][device].mod_revision
                for device in placement.devices
            ),
            t.create(key) == 0,
            t.create(keys.replicas(replica.model), prefix=True) < view.revision + 1,
            *self._neighbours(placement),
            *self._no_member_came(placement),
            *guard(leader),
        ]
        claims = await self._claims(placement)

        async def settle() -> KeyValue | None:
            kv = await self.read_key(key)
            with readable(replica):
                return kv if kv is not None and codec.fresh(pb.Replica, kv.value).token == token else None

        outcome = await self.commit(
            compare, [t.put(key, codec.encode(message), node.record_lease), *claims], settle=settle
        )
        if not outcome.succeeded:
            raise _changed(replica)
        if (kv := outcome.settled_by) is not None:
            with readable(replica):
                return codec.decode_replica(replica, kv.value, kv.mod_revision, kv.create_revision)
        return replace(record, mod_revision=outcome.revision, create_revision=outcome.revision)

    def _neighbours(self, placement: Placement) -> list[t.Compare]:
        """Return that devices are as seen which are not claimed, but whose claims come from the same memory."""
        node, devices = placement.replica.node, placement.snapshot.devices[placement.replica.node]
        found = {other.id: other for device in placement.devices for other in sharing(devices, device)}
        unclaimed = [other for name, other in found.items() if name not in placement.devices]
        return [t.mod(self.keys.device(node, other.id)) == other.mod_revision for other in unclaimed]

    def _no_member_came(self, placement: Placement) -> list[t.Compare]:
        """Return that the groups are as seen, and that no member has come to the node since."""
        keys, replica, view = self.keys, placement.replica, placement.snapshot
        if not view.policy(replica.model).groups:
            return []
        members = sorted(view.group_members(replica.model))
        if len(members) > _MAX_MEMBERS:
            ranges = [keys.table(Table.REPLICAS)]
        else:
            ranges = [keys.replicas_on(member, replica.node) for member in members]
        since = view.revision + 1
        return [
            t.mod(keys.table(Table.POLICIES), prefix=True) < since,
            *(t.create(found, prefix=True) < since for found in ranges),
        ]

    async def _claims(self, placement: Placement) -> list[t.Op]:
        """Return the puts that add the claims to the devices as they are stored."""
        keys, node = self.keys, placement.replica.node
        known = placement.snapshot.devices[node]
        answers = await self.read(*(t.get(keys.device(node, device)) for device in placement.devices))
        puts: list[t.Op] = []
        for (device, size), answer in zip(placement.devices.items(), answers, strict=True):
            kv = answer.kvs[0] if answer.kvs else None
            if kv is None or kv.mod_revision != known[device].mod_revision:
                raise _changed(placement.replica)
            with readable(f"the device {device}"):
                message = codec.fresh(pb.Device, kv.value)
            codec.set_claim(message, placement.replica, size)
            puts.append(t.put(kv.key, codec.encode(message), ignore_lease=True))
        return puts


def check_placement(placement: Placement) -> NodeRecord:
    """Check a plan against the snapshot that it was made upon; return the node.

    The limits are the planner's to keep. They are checked again here, because this is the last place before they are
    broken for good.

    Raises:
        Conflict: It does not fit.
    """
    view, replica = placement.snapshot, placement.replica
    node = view.nodes.get(replica.node)
    model = view.models.get(replica.model)
    if node is None or node.incarnation != placement.incarnation or not view.usable(replica.node):
        raise _refused(replica, f"the node {replica.node} takes no new replica")
    if model is None or model.revision != placement.revision:
        raise _refused(replica, "the model was changed or deleted")
    present = [record.id for record in view.replicas_of(replica.model)]
    if replica in present:
        raise _refused(replica, "it exists")
    most = view.policy(replica.model).max_replicas
    if most and len(present) >= most:
        raise _refused(replica, f"the model has the {most} replicas that it may have")
    here = sum(1 for other in present if other.node == replica.node)
    slots = view.max_replicas_on(replica.node)
    if here >= slots:
        raise _refused(replica, f"the node takes {slots} of a model")
    spread = view.policy(replica.model).spread_all
    if spread and any(
        r.id.node == replica.node and r.revision == model.revision for r in view.replicas_of(replica.model)
    ):
        raise _refused(replica, "each node gets one replica of it")
    for member in sorted(view.group_members(replica.model)):
        if any(other.id.node == replica.node for other in view.replicas_of(member)):
            raise _refused(replica, f"the node holds the model {member}, which never shares a node with it")
    _check_memory(placement)
    return node


def _check_memory(placement: Placement) -> None:
    replica, sizes = placement.replica, placement.devices
    if not sizes:
        raise _refused(replica, "it claims no device")
    devices = placement.snapshot.devices.get(replica.node, {})
    for device, size in sizes.items():
        if device not in devices or size < 0:
            raise _refused(replica, f"there is no room on the device {device}")
    for device, left in left_bytes(devices, sizes, claimant=replica).items():
        if left < 0:
            raise _refused(replica, f"there is no room on the device {device}")


def _refused(replica: ReplicaId, reason: str) -> Conflict:
    return Conflict(f"{replica} cannot be placed: {reason}. Plan again.", replica=replica)


def _changed(replica: ReplicaId) -> Conflict:
    return Conflict(f"What the placement of {replica} was decided upon has changed. Plan again.", replica=replica)
