"""T3 for room: several idle replicas are told to end at once, or none. Memory that nobody came for is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localmesh.core.errors import Conflict
from localmesh.core.ids import DeviceId, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue, Leadership, RangeResult
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import Settle, guard
from localmesh.store.errors import readable
from localmesh.store.life import ReplicaAccess, StoredDevice, StoredReplica, same_life
from localmesh.store.v1 import records_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """A decision to stop idle replicas of one node, and what it was decided upon."""

    heir: ReplicaId
    """Who gets their memory."""
    victims: tuple[ReplicaRecord, ...]
    """READY replicas on the heir's node."""
    keepers: tuple[ReplicaRecord, ...]
    """Replicas that must stay as they are: what the victims' models need at least."""
    snapshot: Snapshot


class Evicting(ReplicaAccess):
    """Transactions by which memory goes from one replica to another without ever being nobody's."""

    async def evict(self, eviction: Eviction) -> bool:
        """T3 without T3a: tell the node to end replicas that nobody holds; against each T2 exactly one of both wins.

        IF every victim and every keeper has the mod-revision of the snapshot AND `inflight/<victim>/` is empty for each
        AND the victims' policies, the heir's model and the node's approval have the mod-revisions of the snapshot, AND
        the heir is not there, AND presence of the node's incarnation, THEN put each victim as UNLOADING, naming the
        heir. All or none: half of the room is none. An unknown outcome is settled by the victims' states.

        Returns:
            True if all are UNLOADING now; False if a holder's presence keeps one of them, and then none is.

        Raises:
            Conflict: What it was decided upon has changed.
            StoreUnavailable: etcd does not answer.
        """
        view, heir = eviction.snapshot, eviction.heir
        model, approval, node = view.models.get(heir.model), view.approvals.get(heir.node), view.nodes.get(heir.node)
        if model is None or approval is None or node is None or not eviction.victims:
            raise _changed(heir)
        stored = [await self._victim(victim, heir) for victim in eviction.victims]
        held = [self.keys.holders(victim.id) for victim in eviction.victims]
        policies = {victim.id.model: view.policies.get(victim.id.model) for victim in eviction.victims}
        outcome = await self.commit(
            [
                t.lease(self.keys.node(heir.node)) == node.incarnation,
                t.mod(self.keys.approval(heir.node)) == approval.mod_revision,
                t.mod(self.keys.model(heir.model)) == model.mod_revision,
                t.create(self.keys.replica(heir)) == 0,
                *(victim.unchanged() for victim in stored),
                *(t.mod(self.keys.replica(keeper.id)) == keeper.mod_revision for keeper in eviction.keepers),
                *(t.mod(self.keys.policy(m)) == (p.mod_revision if p is not None else 0) for m, p in policies.items()),
                *(t.version(holders, prefix=True) == 0 for holders in held),
            ],
            [victim.put() for victim in stored],
            [t.get(holders, prefix=True, count_only=True) for holders in held],
            settle=self._settle_all(stored),
        )
        if outcome.succeeded:
            return True
        if any(isinstance(answer, RangeResult) and answer.count for answer in outcome.responses):
            return False
        raise _changed(heir)

    async def _victim(self, victim: ReplicaRecord, heir: ReplicaId) -> StoredReplica:
        stored = await self.stored_replica(victim.id)
        if (
            stored is None
            or not same_life(victim, stored)
            or stored.record.mod_revision != victim.mod_revision
            or stored.record.state is not ReplicaState.READY
            or victim.id.node != heir.node
        ):
            raise _changed(heir)
        stored.message.state = pb.REPLICA_STATE_UNLOADING
        stored.message.memory_for = str(heir)
        return stored

    def _settle_all(self, stored: Sequence[StoredReplica]) -> Settle:
        async def settle() -> KeyValue | None:
            answers = await self.read(*(t.get(victim.key) for victim in stored))
            for victim, answer in zip(stored, answers, strict=True):
                kv = answer.kvs[0] if answer.kvs else None
                if kv is not None and kv.value == codec.encode(victim.message):
                    return kv  # one transaction put them all
            return None

        return settle

    async def take_back_claims(
        self, replica: ReplicaId, devices: Sequence[DeviceId], *, leader: Leadership | None = None
    ) -> bool:
        """Give back what a replica claims on devices that its record does not name, or without a record at all.

        That is memory that was handed over (T7) to a replica which nobody came to place: its placer died in between.
        IF replica and devices are as just read THEN put the devices without those claims. An unknown outcome is settled
        by their absence.

        Returns:
            False if there was nothing to give back.

        Raises:
            Conflict: The replica or a device was changed meanwhile.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.replica(replica)
        answers = await self.read(t.get(key), *(t.get(self.keys.device(replica.node, device)) for device in devices))
        kv = answers[0].kvs[0] if answers[0].kvs else None
        with readable(replica):
            named = {} if kv is None else codec.decode_replica(replica, kv.value, 0, 0).devices
            found = [
                StoredDevice(device, codec.fresh(pb.Device, answer.kvs[0].value), answer.kvs[0])
                for device, answer in zip(devices, answers[1:], strict=True)
                if answer.kvs and device not in named
            ]
            changed = [d for d in found if replica in codec.decode_device(replica.node, d.id, d.kv.value, 0).claims]
        if not changed:
            return False
        for device in changed:
            codec.drop_claim(device.message, replica)
        outcome = await self.commit(
            [
                t.mod(key) == (kv.mod_revision if kv is not None else 0),
                *(device.unchanged() for device in changed),
                *guard(leader),
            ],
            [device.put() for device in changed],
            settle=self.settle_by_value(changed[0].put()),
        )
        if not outcome.succeeded:
            raise _changed(replica)
        return True


def _changed(replica: ReplicaId) -> Conflict:
    return Conflict(
        f"What was decided on memory for {replica} was overtaken. Read again and decide anew.", replica=replica
    )
