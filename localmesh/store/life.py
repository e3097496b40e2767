"""Reading a replica's record again, to be sure that it is still the same life of that name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from localmesh.core.errors import Conflict
from localmesh.core.ids import DeviceId, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.etcd import KeyValue, RangeResult
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess
from localmesh.store.errors import readable
from localmesh.store.v1 import records_pb2 as pb


@dataclass(frozen=True, slots=True)
class StoredReplica:
    """A replica as it is stored: the record, and the message to change and write back."""

    record: ReplicaRecord
    message: pb.Replica
    key: bytes

    def unchanged(self) -> t.Compare:
        """Return the condition that nobody has written it since."""
        return t.mod(self.key) == self.record.mod_revision

    def put(self) -> t.Put:
        """Return the put of the message. The key keeps its lease."""
        return t.put(self.key, codec.encode(self.message), ignore_lease=True)


@dataclass(frozen=True, slots=True)
class StoredDevice:
    """A device as it is stored."""

    id: DeviceId
    message: pb.Device
    kv: KeyValue

    def unchanged(self) -> t.Compare:
        """Return the condition that nobody has written it since."""
        return t.mod(self.kv.key) == self.kv.mod_revision

    def put(self) -> t.Put:
        """Return the put of the message. The key keeps its lease."""
        return t.put(self.kv.key, codec.encode(self.message), ignore_lease=True)


class ReplicaAccess(StoreAccess):
    """Reads for the transactions that change a replica."""

    async def stored_replica(self, replica: ReplicaId) -> StoredReplica | None:
        """Read a replica, or None if there is none."""
        return (await self.stored_with_devices(replica, ()))[0]

    async def stored_with_devices(
        self, replica: ReplicaId, devices: Iterable[DeviceId]
    ) -> tuple[StoredReplica | None, list[StoredDevice]]:
        """Read a replica and those of the devices that exist, as of one revision.

        Raises:
            InternalError: They cannot be read by this version.
        """
        wanted = list(devices)
        answers = await self.read(
            t.get(self.keys.replica(replica)),
            *(t.get(self.keys.device(replica.node, device)) for device in wanted),
        )
        with readable(replica):
            return self._replica(replica, answers[0]), [
                StoredDevice(device, codec.fresh(pb.Device, kv.value), kv)
                for device, answer in zip(wanted, answers[1:], strict=True)
                for kv in answer.kvs
            ]

    def _replica(self, replica: ReplicaId, answer: RangeResult) -> StoredReplica | None:
        if not answer.kvs:
            return None
        kv = answer.kvs[0]
        record = codec.decode_replica(replica, kv.value, kv.mod_revision, kv.create_revision)
        return StoredReplica(record, codec.fresh(pb.Replica, kv.value), kv.key)


def same_life(known: ReplicaRecord, stored: StoredReplica | None) -> bool:
    """Whether the record is that of the same placement, under the same incarnation of the node."""
    return (
        stored is not None
        and stored.record.create_revision == known.create_revision
        and stored.record.incarnation == known.incarnation
    )


def conflict(replica: ReplicaId) -> Conflict:
    """Return the error for a replica that is not what the caller saw."""
    return Conflict(f"The replica {replica} has changed meanwhile. Read again and decide anew.", replica=replica)
