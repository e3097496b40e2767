"""The client: one object per process and cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from localmesh.core.clock import Clock, SystemClock
from localmesh.etcd import codec, txn
from localmesh.etcd.config import EtcdConfig
from localmesh.etcd.errors import LeaseExpired
from localmesh.etcd.keepalive import KeepAlive, Refresh
from localmesh.etcd.keys import Key, as_bytes, range_of
from localmesh.etcd.lease import LeaseSession
from localmesh.etcd.lock import Lock
from localmesh.etcd.messages import (
    DeleteResult,
    KeyValue,
    Lease,
    LeaseInfo,
    Member,
    PutResult,
    RangeResult,
    Statistics,
    Status,
    TxnResult,
)
from localmesh.etcd.tasks import TaskOwner
from localmesh.etcd.transport import (
    COMPACT,
    DELETE_RANGE,
    LEASE_GRANT,
    LEASE_LEASES,
    LEASE_REVOKE,
    LEASE_TIME_TO_LIVE,
    MEMBER_LIST,
    PUT,
    RANGE,
    STATUS,
    TXN,
    Transport,
)
from localmesh.etcd.watch import WatchHub, WatchTarget
from localmesh.etcd.watcher import Watcher
from localmesh.thirdparty import etcd_pb2 as pb


class EtcdClient:
    """An asyncio client of etcd v3, opened by `async with`.

    Every method takes `deadline`, a point on clock.monotonic(); without it the config's deadline_seconds count
    from now. Reads and what may be repeated go from endpoint to endpoint until then. A write is repeated only
    while it certainly was not carried out; if its answer does not come, UnknownOutcome is raised. Every other
    error of a write means that nothing was changed.
    """

    def __init__(self, config: EtcdConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock: Clock = clock or SystemClock()
        self._open: _Open | None = None

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError("the etcd client is already open")
        self._open = _Open(self._config, self._clock, self._read_revision)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            await self._open.close()

    @property
    def clock(self) -> Clock:
        """The clock that deadlines are points on."""
        return self._clock

    @property
    def _parts(self) -> _Open:
        if self._open is None:
            raise RuntimeError("the etcd client is not open: use `async with`")
        return self._open

    async def _call(self, method: Any, request: Any, **how: Any) -> Any:
        return await self._parts.transport.call(method, request, **how)

    # Keys.

    async def get(
        self, key: Key, *, revision: int = 0, serializable: bool = False, deadline: float | None = None
    ) -> KeyValue | None:
        """Return one key, as of `revision` (0: now). `serializable`: perhaps stale, from any member."""
        result = await self.range(key, revision=revision, serializable=serializable, deadline=deadline)
        return result.kvs[0] if result.kvs else None

    async def get_prefix(
        self,
        prefix: Key,
        *,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
        limit: int = 0,
        deadline: float | None = None,
    ) -> RangeResult:
        """Return all keys that start with `prefix`, in order, as of one revision."""
        return await self.range(
            prefix,
            prefix=True,
            revision=revision,
            serializable=serializable,
            keys_only=keys_only,
            count_only=count_only,
            limit=limit,
            deadline=deadline,
        )

    async def range(
        self,
        key: Key,
        range_end: Key | None = None,
        *,
        prefix: bool = False,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
        limit: int = 0,
        min_mod_revision: int = 0,
        max_mod_revision: int = 0,
        min_create_revision: int = 0,
        max_create_revision: int = 0,
        deadline: float | None = None,
    ) -> RangeResult:
        """Read one key, or the keys from `key` up to before `range_end`, or a prefix.

        Raises RevisionCompactedError if `revision` is no longer stored.
        """
        start, end = range_of(key, prefix=prefix, range_end=range_end)
        request = pb.RangeRequest(
            key=start,
            range_end=end,
            revision=revision,
            serializable=serializable,
            keys_only=keys_only,
            count_only=count_only,
            limit=limit,
            min_mod_revision=min_mod_revision,
            max_mod_revision=max_mod_revision,
            min_create_revision=min_create_revision,
            max_create_revision=max_create_revision,
        )
        answer = await self._call(RANGE, request, may_repeat=True, deadline=deadline, needs_leader=not serializable)
        return codec.range_result(answer)

    async def put(
        self,
        key: Key,
        value: bytes | str,
        *,
        lease: int = 0,
        ignore_lease: bool = False,
        prev_kv: bool = False,
        deadline: float | None = None,
    ) -> PutResult:
        """Put a key. Without `lease` a leased key loses its lease and lives for ever: `ignore_lease` keeps it.

        Raises LeaseExpired if the lease is gone, RequestRefused if there is no key whose lease could be kept.
        """
        request = codec.put_request(txn.put(key, value, lease, prev_kv=prev_kv, ignore_lease=ignore_lease))
        answer = await self._call(PUT, request, may_repeat=False, deadline=deadline, lease_id=lease)
        return codec.put_result(answer)

    async def put_if_not_exists(
        self, key: Key, value: bytes | str, *, lease: int = 0, deadline: float | None = None
    ) -> bool:
        """Create a key; return False if it exists. Raises LeaseExpired if the lease is gone."""
        result = await self.transaction([txn.create(key) == 0], [txn.put(key, value, lease)], deadline=deadline)
        return result.succeeded

    async def replace(self, key: Key, initial: bytes | str, new: bytes | str, *, deadline: float | None = None) -> bool:
        """Put `new` if the value is `initial`, keeping the key's lease; return whether it was."""
        result = await self.transaction(
            [txn.value(key) == initial], [txn.put(key, new, ignore_lease=True)], deadline=deadline
        )
        return result.succeeded

    async def delete(self, key: Key, *, deadline: float | None = None) -> bool:
        """Delete a key; return whether it existed."""
        return (await self.delete_range(key, deadline=deadline)).deleted > 0

    async def delete_prefix(self, prefix: Key, *, deadline: float | None = None) -> int:
        """Delete all keys that start with `prefix`; return how many."""
        return (await self.delete_range(prefix, prefix=True, deadline=deadline)).deleted

    async def delete_range(
        self,
        key: Key,
        range_end: Key | None = None,
        *,
        prefix: bool = False,
        prev_kv: bool = False,
        deadline: float | None = None,
    ) -> DeleteResult:
        """Delete one key, a range or a prefix."""
        start, end = range_of(key, prefix=prefix, range_end=range_end)
        request = pb.DeleteRangeRequest(key=start, range_end=end, prev_kv=prev_kv)
        return codec.delete_result(await self._call(DELETE_RANGE, request, may_repeat=False, deadline=deadline))

    async def transaction(
        self,
        compare: Sequence[txn.Compare],
        success: Sequence[txn.Op] = (),
        failure: Sequence[txn.Op] = (),
        *,
        deadline: float | None = None,
    ) -> TxnResult:
        """Run one branch or the other, atomically.

        Raises UnknownOutcome if the answer never came, unless both branches only read: those are repeated.
        RequestRefused says what etcd refuses at once: more than 128 operations, a key that is put twice.
        """
        may_repeat = txn.changes_nothing(success) and txn.changes_nothing(failure)
        request = codec.txn_request(compare, success, failure)
        return codec.txn_result(await self._call(TXN, request, may_repeat=may_repeat, deadline=deadline))

    async def compact(self, revision: int, *, deadline: float | None = None) -> None:
        """Forget what was overwritten before `revision`. Raises RevisionCompactedError if that was done already."""
        await self._call(COMPACT, pb.CompactionRequest(revision=revision), may_repeat=True, deadline=deadline)

    # Leases.

    async def lease_grant(self, ttl_seconds: int, *, lease_id: int = 0, deadline: float | None = None) -> Lease:
        """Grant a lease, with an id of etcd's choosing or `lease_id`.

        Raises PreconditionFailedError if that id is in use. etcd raises a TTL that is too small for it.
        """
        # Without an id a repeated grant leaves a lease that nobody uses, until it expires: no harm.
        answer = await self._call(
            LEASE_GRANT,
            pb.LeaseGrantRequest(TTL=ttl_seconds, ID=lease_id),
            may_repeat=lease_id == 0,
            deadline=deadline,
        )
        return Lease(answer.ID, answer.TTL)

    async def lease_revoke(self, lease_id: int, *, deadline: float | None = None) -> bool:
        """Give up a lease and its keys; return False if it was gone already."""
        try:
            await self._call(
                LEASE_REVOKE,
                pb.LeaseRevokeRequest(ID=lease_id),
                may_repeat=True,
                deadline=deadline,
                lease_id=lease_id,
            )
        except LeaseExpired:
            return False
        return True

    async def lease_time_to_live(
        self, lease_id: int, *, keys: bool = False, deadline: float | None = None
    ) -> LeaseInfo:
        """Return what is left of a lease, and its keys if asked for. Raises LeaseExpired."""
        answer = await self._call(
            LEASE_TIME_TO_LIVE,
            pb.LeaseTimeToLiveRequest(ID=lease_id, keys=keys),
            may_repeat=True,
            deadline=deadline,
            lease_id=lease_id,
        )
        if answer.TTL < 0:  # 0 is less than a second left
            raise LeaseExpired(lease_id)
        return LeaseInfo(answer.ID, answer.TTL, answer.grantedTTL, tuple(answer.keys))

    async def leases(self, *, deadline: float | None = None) -> tuple[int, ...]:
        """Return the ids of all leases."""
        answer = await self._call(LEASE_LEASES, pb.LeaseLeasesRequest(), may_repeat=True, deadline=deadline)
        return tuple(lease.ID for lease in answer.leases)

    async def keep_alive_once(
        self, lease_id: int, *, ack_timeout: float | None = None, deadline: float | None = None
    ) -> int:
        """Refresh a lease on the client's one keep-alive stream; return its TTL in seconds.

        After `ack_timeout` (default: the config's try_timeout_seconds) without an acknowledgement the stream
        is opened anew on the next endpoint. Raises LeaseExpired, or ConnectionTimeoutError at the deadline.
        """
        if deadline is None:
            deadline = self._clock.monotonic() + self._config.deadline_seconds
        timeout = ack_timeout or self._config.try_timeout_seconds
        return (await self.refresh(lease_id, ack_timeout=timeout, deadline=deadline)).ttl_seconds

    async def refresh(self, lease_id: int, *, ack_timeout: float, deadline: float) -> Refresh:
        """Do as keep_alive_once() and also tell when the refresh was sent: the base of any fence."""
        return await self._parts.keep_alive.refresh(lease_id, ack_timeout=ack_timeout, deadline=deadline)

    def session(self, ttl_seconds: int, *, on_lost: Callable[[LeaseSession], None] | None = None) -> LeaseSession:
        """Return a lease that is granted, kept alive and revoked by `async with`."""
        return LeaseSession(self, self._parts.tasks, self._clock, ttl_seconds, on_lost)

    # Watches.

    def watch(self, key: Key, *, prefix: bool = True, start_revision: int = 0, prev_kv: bool = False) -> Watcher:
        """Follow a prefix, or one key, from `start_revision` on (0: from now on).

        An async iterator of WatchBatch. It goes on over lost connections and restarts of etcd; it raises
        RevisionCompactedError, StoreReset or WatcherTooSlow (all WatchLost) when there would be a gap.
        Batches without events tell how fresh the follower is; the first one comes when etcd has confirmed the
        watch, if it has nothing to catch up with. Use it as a context manager, or close() it.
        """
        start, end = range_of(key, prefix=prefix)
        return self._parts.watches.follow(WatchTarget(start, end, prev_kv), start_revision)

    # The cluster.

    async def status(self, *, deadline: float | None = None) -> Status:
        """Return the state of the member that is asked at present."""
        transport = self._parts.transport
        answer = await self._call(STATUS, pb.StatusRequest(), may_repeat=True, deadline=deadline, needs_leader=False)
        return Status(
            endpoint=transport.current.address,
            cluster_id=answer.header.cluster_id,
            member_id=answer.header.member_id,
            revision=answer.header.revision,
            raft_term=answer.raftTerm,
            version=answer.version,
            leader=answer.leader,
            db_size_bytes=answer.dbSize,
            db_in_use_bytes=answer.dbSizeInUse,
            errors=tuple(answer.errors),
            is_learner=answer.isLearner,
        )

    async def members(self, *, deadline: float | None = None) -> tuple[Member, ...]:
        """Return the members of the cluster."""
        answer = await self._call(MEMBER_LIST, pb.MemberListRequest(), may_repeat=True, deadline=deadline)
        return tuple(
            Member(member.ID, member.name, tuple(member.peerURLs), tuple(member.clientURLs), member.isLearner)
            for member in answer.members
        )

    async def _read_revision(self) -> int:
        """Return the store's revision as the quorum knows it."""
        answer = await self._call(RANGE, pb.RangeRequest(key=b"\0", count_only=True), may_repeat=True)
        return int(answer.header.revision)

    # Above the protocol.

    def lock(self, name: str, ttl: int = 60) -> Lock:
        """Return a lock on the key /locks/<name>, as etcd3's; it is held by a lease of `ttl` seconds."""
        return Lock(self, as_bytes(f"/locks/{name}"), ttl)

    def statistics(self) -> Statistics:
        """Return the counters of this client."""
        parts = self._parts
        counters = parts.transport.counters
        return Statistics(
            endpoint=parts.transport.current.address,
            calls=counters.calls,
            retries=counters.retries,
            rotations=counters.rotations,
            unknown_outcomes=counters.unknown_outcomes,
            authentications=counters.authentications,
            watch_streams=parts.watches.streams,
            watchers=parts.watches.watchers,
            watch_resumes=counters.watch_resumes,
            keep_alive_streams=counters.keep_alive_streams,
            leases_waiting=parts.keep_alive.waiting,
        )


class _Open:
    """What exists while a client is open, built and taken down together."""

    def __init__(self, config: EtcdConfig, clock: Clock, read_revision: Callable[[], Any]) -> None:
        self.tasks = TaskOwner()
        self.transport = Transport(config, clock)
        self.keep_alive = KeepAlive(self.transport, self.tasks)
        self.watches = WatchHub(self.transport, self.tasks, read_revision)

    async def close(self) -> None:
        self.watches.close()
        await self.tasks.close()
        await self.transport.close()
