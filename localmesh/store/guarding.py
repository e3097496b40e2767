"""The mass-expiry guard in the store."""

from __future__ import annotations

from collections.abc import Collection

from localmesh.core.errors import Conflict
from localmesh.core.ids import NodeName
from localmesh.etcd import Leadership
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess, guard, unsettled
from localmesh.store.v1 import records_pb2 as pb


class Guarding(StoreAccess):
    """Transactions of the guard: while its key exists, nothing is placed or stopped by the reconciler."""

    async def put_guard(self, nodes: Collection[NodeName], *, leader: Leadership | None = None) -> int:
        """Set the guard for nodes that were lost together.

        IF still leader THEN put. An unknown outcome is settled by the value.

        Returns:
            The revision from which on it is set.

        Raises:
            Conflict: Somebody else leads.
            StoreUnavailable: etcd does not answer.
        """
        message = pb.Guard(since_unix_seconds=int(self.clock.time()), nodes=sorted(nodes))
        put = t.put(self.keys.guard(), codec.encode(message))
        outcome = await self.commit(guard(leader), [put], settle=self.settle_by_value(put))
        if not outcome.succeeded:
            raise Conflict("Somebody else leads now.")
        return outcome.revision

    async def clear_guard(self, *, leader: Leadership | None = None) -> bool:
        """Lift the guard. An operator may, whoever leads.

        IF it is set AND still leader THEN delete. Sent again after an unknown outcome.

        Returns:
            False if it was not set, or somebody else leads.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.guard()
        compare = [t.version(key) > 0, *guard(leader)]
        return (await self.commit(compare, [t.delete(key)], settle=unsettled)).succeeded
