"""What went wrong with a model on a node, and for how long it stays away: `failures` and `history`, each with a lease.

The lease of a failure is the pause: when it is gone, the model may be placed there again. The history beside it lives
longer, so that the next pause is longer, too. No clock of any machine takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from localmesh.core.ids import ModelName, NodeName
from localmesh.core.records import FailureRecord, HistoryRecord, ReplicaRecord
from localmesh.etcd import transactions as t
from localmesh.scheduling.failures import FailurePolicy, after_success, weigh
from localmesh.store import codec
from localmesh.store.errors import readable
from localmesh.store.life import ReplicaAccess
from localmesh.store.v1 import records_pb2 as pb


@dataclass(frozen=True, slots=True)
class Note:
    """What a transaction writes about what went wrong or well, and what it compares for that."""

    compare: tuple[t.Compare, ...] = ()
    operations: tuple[t.Op, ...] = ()
    leases: tuple[int, ...] = ()
    """To be revoked if the transaction does not come about."""


class Remembering(ReplicaAccess):
    """Notes that go into the transactions T6 and T7."""

    async def note_failure(self, failure: FailureRecord, *, died: bool, policy: FailurePolicy) -> Note:
        """Return what notes a failed load, or the death of a replica that was ready.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        history, revision = await self._history(failure.model, failure.node)
        verdict = weigh(history, failure, died=died, policy=policy)
        key = self.keys.history(failure.model, failure.node)
        lease = await self.grant(max(1, math.ceil(verdict.remember_seconds)))
        operations, leases = [t.put(key, _encode(verdict.history), lease)], [lease]
        if verdict.failure is not None:
            lease = await self.grant(max(1, math.ceil(verdict.pause_seconds)))
            leases.append(lease)
            stored = codec.encode_failure(verdict.failure)
            operations.append(t.put(self.keys.failure(failure.model, failure.node), stored, lease))
        return Note((t.mod(key) == revision,), tuple(operations), tuple(leases))

    async def note_success(self, replica: ReplicaRecord) -> Note:
        """Return what forgets failed loads once a replica of the same revision is READY.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        name, node = replica.id.model, replica.id.node
        history, revision = await self._history(name, node)
        if history is None or history.revision != replica.revision or not history.failed_loads:
            return Note()
        key, left = self.keys.history(name, node), after_success(history)
        unchanged = (t.mod(key) == revision,)
        if left is not None:  # replicas of it have died: what keeps it away is not over
            return Note(unchanged, (t.put(key, _encode(left), ignore_lease=True),))
        return Note(unchanged, (t.delete(key), t.delete(self.keys.failure(name, node))))

    async def withdraw(self, note: Note) -> None:
        """Give the leases of a note up that was not written.

        Raises:
            StoreUnavailable: etcd does not answer; they expire by themselves.
        """
        for lease in note.leases:
            await self.revoke(lease)

    async def _history(self, model: ModelName, node: NodeName) -> tuple[HistoryRecord | None, int]:
        kv = await self.read_key(self.keys.history(model, node))
        if kv is None:
            return None, 0
        with readable(f"the history of {model} on {node}"):
            message = codec.fresh(pb.History, kv.value)
        return (
            HistoryRecord(revision=message.revision, failed_loads=message.failed_loads, deaths=message.deaths),
            kv.mod_revision,
        )


def _encode(history: HistoryRecord) -> bytes:
    return codec.encode(pb.History(revision=history.revision, failed_loads=history.failed_loads, deaths=history.deaths))
