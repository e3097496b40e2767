"""A lease that is kept alive, and that its holder stops trusting in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from localmesh.core.clock import Clock
from localmesh.etcd.errors import ConnectionTimeoutError, EtcdError, LeaseExpired
from localmesh.etcd.keepalive import Refresh
from localmesh.etcd.messages import Lease
from localmesh.etcd.tasks import TaskOwner

logger = logging.getLogger(__name__)

# A fifth of the TTL: four refreshes in a row may go unacknowledged, each on another endpoint.
_REFRESHES_PER_TTL = 5
_REVOKE_SECONDS = 1.0


class LeaseService(Protocol):
    """What a session needs of the client."""

    async def lease_grant(self, ttl_seconds: int, *, deadline: float | None = None) -> Lease:
        """See EtcdClient."""
        ...

    async def lease_revoke(self, lease_id: int, *, deadline: float | None = None) -> bool:
        """See EtcdClient."""
        ...

    async def refresh(self, lease_id: int, *, ack_timeout: float, deadline: float) -> Refresh:
        """See KeepAlive."""
        ...


class LeaseSession:
    """Holds one lease from `async with` on: granted, refreshed every fifth of its TTL, revoked at the end.

    It is lost when etcd says so, or when TTL seconds have passed since the last acknowledged refresh was sent:
    by then somebody else may hold what the lease guards. `lost` is set, and `on_lost(session)` is called once,
    from the event loop. A lost session stays lost; open another.
    """

    def __init__(
        self,
        service: LeaseService,
        tasks: TaskOwner,
        clock: Clock,
        ttl_seconds: int,
        on_lost: Callable[[LeaseSession], None] | None = None,
    ) -> None:
        if ttl_seconds < 1:
            raise ValueError("the TTL of a lease is at least 1 second")
        self._service = service
        self._tasks = tasks
        self._clock = clock
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self._fence = 0.0
        self.ttl_seconds = ttl_seconds  # what etcd granted, once it has
        self.lease_id = 0
        self.lost = asyncio.Event()
        self.lost_reason = ""

    async def open(self, *, deadline: float | None = None) -> None:
        """Grant the lease and begin to keep it alive. Raises EtcdError."""
        sent_at = self._clock.monotonic()
        lease = await self._service.lease_grant(self.ttl_seconds, deadline=deadline)
        self.lease_id, self.ttl_seconds = lease.id, lease.ttl_seconds
        self._fence = sent_at + lease.ttl_seconds
        self._task = self._tasks.start(self._keep(), f"etcd-lease-{lease.id:x}")

    @property
    def fence(self) -> float:
        """The point on the monotonic clock from which the lease must not be acted upon."""
        return self._fence

    def alive(self, now: float | None = None) -> bool:
        """Return whether the holder may act on the lease at `now` (monotonic seconds; None: this moment)."""
        if now is None:
            now = self._clock.monotonic()
        return self.lease_id != 0 and not self.lost.is_set() and now < self._fence

    async def close(self) -> None:
        """Stop, and give the lease up at once, with all its keys. Never raises EtcdError: it would expire anyway."""
        await self.orphan()
        if not self.lease_id or (self.lost.is_set() and self.lost_reason != _FENCED):
            return
        try:
            await self._service.lease_revoke(
                self.lease_id, deadline=self._clock.monotonic() + min(_REVOKE_SECONDS, self.ttl_seconds)
            )
        except EtcdError as error:
            logger.info("lease %x was not revoked, it expires by itself: %s", self.lease_id, error)
        self._lose("it was revoked", notify=False)

    async def orphan(self) -> None:
        """Stop keeping the lease alive and leave it to expire, or to somebody else who refreshes it."""
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            await self._tasks.stop(task)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _keep(self) -> None:
        interval = self.ttl_seconds / _REFRESHES_PER_TTL
        due = self._fence - self.ttl_seconds + interval
        while True:
            await asyncio.sleep(max(0.0, min(due, self._fence) - self._clock.monotonic()))
            if self._clock.monotonic() >= self._fence:
                self._lose(_FENCED)
                return
            try:
                refresh = await self._service.refresh(self.lease_id, ack_timeout=interval, deadline=self._fence)
            except LeaseExpired as expired:
                self._lose(expired.reason)
                return
            except ConnectionTimeoutError:
                continue  # the fence has come, which the loop's head sees
            self.ttl_seconds = refresh.ttl_seconds
            self._fence = max(self._fence, refresh.sent_at + refresh.ttl_seconds)
            due = refresh.sent_at + interval

    def _lose(self, reason: str, *, notify: bool = True) -> None:
        if self.lost.is_set():
            return
        self.lost_reason = reason
        self.lost.set()
        if not notify:
            return
        logger.warning("lease %x is lost: %s", self.lease_id, reason)
        if self._on_lost is not None:
            self._on_lost(self)


_FENCED = "no refresh was acknowledged within its TTL"
