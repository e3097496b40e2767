"""What every transaction is made of: consistent reads, and commits that end in knowledge."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict
from localmesh.etcd import (
    EtcdClient,
    KeyValue,
    Leadership,
    LeaseExpired,
    RangeResult,
    TxnResult,
    UnknownOutcome,
)
from localmesh.etcd import transactions as t
from localmesh.store.errors import translated, unavailable
from localmesh.store.keys import Keys

MAX_OPERATIONS = 128
"""Compares, or operations, that etcd takes in one transaction."""

_TRIES = 3

Settle = Callable[[], Awaitable[KeyValue | None]]


async def unsettled() -> KeyValue | None:
    """Settle nothing: for transactions that may just be sent again."""
    return None


class LeaseGone(Conflict):
    """The conflict of a transaction that puts under a lease that has expired."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The known end of a transaction."""

    succeeded: bool
    revision: int
    """Revision of the store that it made; of the key that settled it where the answer was lost."""
    responses: tuple[object, ...] = ()
    """Answers of the branch that ran; none where it was settled by reading."""
    settled_by: KeyValue | None = None
    """What was read instead of an answer. Somebody may have changed it since the transaction."""


def guard(leader: Leadership | None) -> list[t.Compare]:
    """Return what a transaction of the reconciler compares in addition; of anybody else: nothing."""
    return [] if leader is None else [leader.still_leader()]


def new_token() -> str:
    """Return what a transaction writes to recognise its own work."""
    return secrets.token_hex(12)


class StoreAccess:
    """The mesh's keys in one etcd."""

    def __init__(self, etcd: EtcdClient, mesh: str, clock: Clock) -> None:
        """Check the mesh's name.

        Raises:
            ValueError: See Keys.
        """
        self.etcd = etcd
        self.clock = clock
        self.keys = Keys(mesh)

    async def read(self, *gets: t.Get) -> tuple[RangeResult, ...]:
        """Read several keys or ranges as of one revision.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        with translated():
            result = await self.etcd.transaction([], list(gets), [])
        return ranges(result)

    async def read_key(self, key: bytes) -> KeyValue | None:
        """Read one key.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        (found,) = await self.read(t.get(key))
        return found.kvs[0] if found.kvs else None

    async def commit(
        self,
        compare: Sequence[t.Compare],
        success: Sequence[t.Op],
        failure: Sequence[t.Op] = (),
        *,
        settle: Settle,
    ) -> Outcome:
        """Run a transaction until it is known what became of it.

        Where the answer is lost, `settle` reads: it returns the key by which the transaction is recognised if that was
        applied, or None. Then the same is sent again: what is compared lets it be applied at most once, or being
        applied twice is the same as once. A try that etcd may still apply after all of this is possible only where
        StoreUnavailable is raised.

        Raises:
            LeaseGone: A lease that it puts under has expired.
            StoreUnavailable: etcd does not answer. The transaction may have been applied, or may yet be.
        """
        in_doubt = False
        for _ in range(_TRIES):
            try:
                with translated():
                    result = await self.etcd.transaction(list(compare), list(success), list(failure))
            except UnknownOutcome:
                in_doubt = True
                result = None
            except LeaseExpired as error:
                if in_doubt and (found := await settle()) is not None:
                    return Outcome(True, found.mod_revision, settled_by=found)
                raise LeaseGone("A lease has expired meanwhile. Read again and decide anew.") from error
            if result is not None and (result.succeeded or not in_doubt):
                return Outcome(result.succeeded, result.revision, result.responses)
            if (found := await settle()) is not None:
                return Outcome(True, found.mod_revision, settled_by=found)
            if result is not None:
                return Outcome(False, result.revision, result.responses)
        raise unavailable("etcd did not say whether it took a transaction. It will be seen when it answers again.")

    def settle_by_value(self, put: t.Put) -> Settle:
        """Return a Settle that recognises the transaction by the value that it puts."""

        async def settle() -> KeyValue | None:
            kv = await self.read_key(put.key)
            return kv if kv is not None and kv.value == put.value else None

        return settle

    async def grant(self, ttl_seconds: int) -> int:
        """Grant a lease; return its id.

        Raises:
            StoreUnavailable: etcd does not answer. A lease that was granted unseen expires.
        """
        try:
            with translated():
                return (await self.etcd.lease_grant(ttl_seconds)).id
        except UnknownOutcome as error:
            raise unavailable("etcd did not say whether it granted a lease.") from error

    async def revoke(self, lease_id: int) -> None:
        """Give a lease up with all its keys. One that is gone already is fine.

        Raises:
            StoreUnavailable: etcd does not answer; the lease expires by itself unless somebody renews it.
        """
        try:
            with translated():
                await self.etcd.lease_revoke(lease_id)
        except LeaseExpired:
            return
        except UnknownOutcome as error:
            raise unavailable("etcd did not say whether it revoked a lease.") from error


def ranges(result: TxnResult) -> tuple[RangeResult, ...]:
    """Return the answers of a transaction that only reads."""
    return tuple(r for r in result.responses if isinstance(r, RangeResult))
