"""One leader at a time, on a single key.

The key exists while there is a leader and hangs on the leader's lease. Its create-revision is the fencing
token: what only a leader may write compares it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localmesh.etcd import txn
from localmesh.etcd.errors import EtcdError, LeaseExpired, UnknownOutcome, WatchLost
from localmesh.etcd.keys import Key, as_bytes
from localmesh.etcd.lease import LeaseSession
from localmesh.etcd.messages import EventKind, KeyValue, RangeResult
from localmesh.etcd.tasks import until_one_ends

if TYPE_CHECKING:
    from localmesh.etcd.client import EtcdClient


@dataclass(frozen=True, slots=True)
class Leadership:
    """Won by the holder of a session. It ends with the session; guard writes with `still_leader()`."""

    key: bytes
    create_revision: int

    def still_leader(self) -> txn.Compare:
        """Return the condition under which a transaction of this leader may write."""
        return txn.create(self.key) == self.create_revision


class Election:
    """Campaigns on keys and observes them."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def campaign(self, key: Key, value: bytes | str, session: LeaseSession) -> Leadership:
        """Wait until this session leads. Raises LeaseExpired when the session is lost before.

        Goes on over lost connections for as long as the session lives.
        """
        won: list[Leadership] = []
        name, text = as_bytes(key), as_bytes(value)

        async def win() -> None:
            won.append(await self._campaign(name, text, session))

        async def lose() -> None:
            await session.lost.wait()
            raise LeaseExpired(session.lease_id, session.lost_reason)

        await until_one_ends(win(), lose())
        return won[0]

    async def _campaign(self, key: bytes, value: bytes, session: LeaseSession) -> Leadership:
        while True:
            try:
                result = await self._client.transaction(
                    [txn.create(key) == 0],
                    [txn.put(key, value, session.lease_id)],
                    [txn.get(key)],
                    deadline=session.fence,
                )
            except UnknownOutcome:
                continue  # settled by the next round: if the key carries our lease, it was us
            if result.succeeded:
                return Leadership(key, result.revision)
            answer = result.responses[0]
            if not isinstance(answer, RangeResult) or not answer.kvs:
                continue
            holder = answer.kvs[0]
            if holder.lease == session.lease_id:
                return await self._keep(holder, value)
            await self._until_deleted(key, result.revision + 1)

    async def _keep(self, held: KeyValue, value: bytes) -> Leadership:
        leadership = Leadership(held.key, held.create_revision)
        if held.value != value:
            await self.proclaim(leadership, value)
        return leadership

    async def _until_deleted(self, key: bytes, revision: int) -> None:
        try:
            async with self._client.watch(key, prefix=False, start_revision=revision) as watcher:
                async for batch in watcher:
                    if any(event.kind is EventKind.DELETE for event in batch.events):
                        return
        except WatchLost:
            return  # the next round reads the key anew

    async def proclaim(self, leadership: Leadership, value: bytes | str) -> None:
        """Change the leader's value. Raises EtcdError if it leads no longer."""
        put = txn.put(leadership.key, value, ignore_lease=True)
        if not (await self._client.transaction([leadership.still_leader()], [put])).succeeded:
            raise EtcdError(f"{leadership.key!r} is led by somebody else")

    async def resign(self, leadership: Leadership) -> bool:
        """Step down at once; return False if it led no longer."""
        gone = txn.delete(leadership.key)
        return (await self._client.transaction([leadership.still_leader()], [gone])).succeeded

    async def observe(self, key: Key) -> AsyncIterator[KeyValue | None]:
        """Yield the present leader and every change of it; None while there is none. Never ends by itself."""
        name = as_bytes(key)
        while True:
            result = await self._client.range(name)
            yield result.kvs[0] if result.kvs else None
            try:
                async with self._client.watch(name, prefix=False, start_revision=result.revision + 1) as watcher:
                    async for batch in watcher:
                        for event in batch.events:
                            yield event.kv if event.kind is EventKind.PUT else None
            except WatchLost:
                continue
