"""Watches that go on over lost connections, without a gap and without a duplicate.

One upstream watch serves all local followers of the same range. It is resumed after the last revision that was
delivered in full; when that cannot be done without a gap, every follower is told so (WatchLost).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from localmesh.etcd.codec import event as decode_event
from localmesh.etcd.errors import (
    AuthenticationFailed,
    EtcdError,
    PermissionDenied,
    RequestRefused,
    RevisionCompactedError,
    StoreReset,
    WatchLost,
)
from localmesh.etcd.messages import Event, WatchBatch
from localmesh.etcd.tasks import TaskOwner, until_one_ends
from localmesh.etcd.transport import STATUS, WATCH, Endpoint, StreamLost, Transport, backoff_steps
from localmesh.etcd.verdict import knows_safe_progress
from localmesh.etcd.watcher import Feed, Watcher
from localmesh.thirdparty import etcd_pb2 as pb

logger = logging.getLogger(__name__)

# What a follower may leave unread before it is cut off, and what is kept for those who join later.
_MAX_BACKLOG_EVENTS = 100_000
_HISTORY_EVENTS = 4_096

_PROGRESS_PLEASE = pb.WatchRequest(progress_request=pb.WatchProgressRequest())


@dataclass(frozen=True, slots=True)
class WatchTarget:
    """What is watched. Followers of equal targets share one upstream watch."""

    key: bytes
    range_end: bytes
    prev_kv: bool


class _Upstream:
    """One watch at etcd and its followers. `next` is the first revision not delivered yet, 0 before it is known."""

    def __init__(
        self,
        transport: Transport,
        target: WatchTarget,
        start_revision: int,
        read_revision: Callable[[], Awaitable[int]],
        on_idle: Callable[[_Upstream], None],
    ) -> None:
        self.target = target
        self.task: asyncio.Task[None] | None = None
        self._transport = transport
        self._read_revision = read_revision
        self._on_idle = on_idle
        self._feeds: set[Feed] = set()
        self._next = start_revision
        self._cluster_id = transport.cluster_id if start_revision else 0
        self._confirmed = False
        self._denied = False
        self._history: deque[WatchBatch] = deque()
        self._history_events = 0
        self._history_from = start_revision  # first revision of which nothing is missing in the history
        self._heard_at = transport.clock.monotonic()

    @property
    def followers(self) -> int:
        """How many followers there are."""
        return len(self._feeds)

    def can_serve(self, start_revision: int) -> bool:
        """Return whether a follower that starts there can join without a gap."""
        if self.task is None or self.task.done():
            return False
        if start_revision == 0:
            return True
        return self._next > 0 and start_revision >= self._history_from

    def join(self, feed: Feed) -> None:
        """Add a follower and give it what it missed."""
        if feed.start_revision:
            for batch in self._history:
                if batch.revision >= feed.start_revision:
                    feed.deliver(batch)
        if self._confirmed:
            feed.confirmed.set()
            if feed.is_empty and self._next >= max(feed.start_revision, 1):
                feed.deliver(WatchBatch(self._next - 1))
        self._feeds.add(feed)

    def leave(self, feed: Feed) -> None:
        """Remove a follower; without any, the watch at etcd ends."""
        self._feeds.discard(feed)
        if not self._feeds:
            self._on_idle(self)

    def fail(self, error: EtcdError) -> None:
        """End all followers with an error."""
        for feed in list(self._feeds):
            feed.fail(error)

    async def run(self) -> None:
        """Follow until it is cancelled or cannot go on; tells the followers."""
        next_backoff = backoff_steps()
        while True:
            endpoint = self._transport.current
            self._heard_at = self._transport.clock.monotonic()
            position, confirmed = self._next, self._confirmed
            try:
                await self._follow(endpoint)
            except (WatchLost, RequestRefused, AuthenticationFailed) as error:
                self.fail(error)
                return
            except (StreamLost, EtcdError) as lost:
                logger.info("watch of %r on %s lost: %s", self.target.key, endpoint.address, lost)
            except Exception as error:
                # The edge: followers must learn that nothing comes any more.
                logger.exception("watch of %r died", self.target.key)
                self.fail(EtcdError(f"the watch died of a bug: {error!r}"))
                return
            self._transport.failed(endpoint)
            self._transport.counters.watch_resumes += 1
            endpoint.version = ""  # the next server there may be another one
            if (position, confirmed) != (self._next, self._confirmed):
                next_backoff = backoff_steps()
            await asyncio.sleep(next_backoff())

    async def _follow(self, endpoint: Endpoint) -> None:
        call = await self._transport.open_stream(endpoint, WATCH)
        create = pb.WatchCreateRequest(
            key=self.target.key,
            range_end=self.target.range_end,
            start_revision=self._next,
            prev_kv=self.target.prev_kv,
            progress_notify=True,
            fragment=True,
        )
        try:
            await call.write(pb.WatchRequest(create_request=create))
            await until_one_ends(self._receive(call, endpoint), self._stay_close(call, endpoint))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._transport.stream_lost(error) from error
        finally:
            call.cancel()

    async def _receive(self, call: Any, endpoint: Endpoint) -> None:
        fragments: list[Event] = []
        while (response := await call.read()) is not grpc.aio.EOF:
            endpoint.heard()
            self._heard_at = self._transport.clock.monotonic()
            if response.canceled or response.compact_revision:
                await self._cancelled(response)
            elif response.created:
                await self._created(response.header)
            else:
                fragments.extend(map(decode_event, response.events))
                if not response.fragment:  # never resume in the middle of a revision
                    self._advance(tuple(fragments), response.header.revision)
                    fragments.clear()
        raise StreamLost("ended by the peer")

    async def _cancelled(self, response: Any) -> None:
        reason = response.cancel_reason or "cancelled without a reason"
        if response.compact_revision:
            raise RevisionCompactedError(response.compact_revision)
        if "auth" in reason or "user name is empty" in reason:
            self._transport.forget_token()
            raise StreamLost(reason)
        if "permission denied" in reason:
            if self._denied:
                raise PermissionDenied("PERMISSION_DENIED", reason)
            # Old servers say the same of a token that has expired: believe it the second time.
            self._denied = True
            self._transport.forget_token()
            raise StreamLost(reason)
        if "no leader" in reason or "unavailable" in reason.lower():
            raise StreamLost(reason)
        raise RequestRefused("CANCELLED", reason)

    async def _created(self, header: Any) -> None:
        """Check that this is the store that was followed, and pin where the watch begins."""
        if self._cluster_id and header.cluster_id != self._cluster_id:
            raise StoreReset(f"another cluster answers: {header.cluster_id:x}, not {self._cluster_id:x}")
        if self._next and header.revision < self._next - 1:
            # A member that lags behind says so, too: ask the quorum before crying wolf.
            revision = await self._read_revision()
            if revision < self._next - 1:
                raise StoreReset(f"the store is at revision {revision}, but {self._next - 1} was seen")
        self._cluster_id = header.cluster_id
        if not self._next:
            # Pinned now, so that a loss before the first event is no gap.
            self._next = self._history_from = header.revision + 1
        self._confirmed = True
        self._denied = False
        for feed in self._feeds:
            feed.confirmed.set()
        if self._next == header.revision + 1:
            self._hand_out(WatchBatch(header.revision))

    def _advance(self, events: tuple[Event, ...], header_revision: int) -> None:
        # While a watch catches up, the header carries the store's revision, not the batch's: only an answer
        # without events proves that everything before it was delivered.
        revision = events[-1].kv.mod_revision if events else header_revision
        if not events and revision < self._next - 1:
            return
        if events and events[0].kv.mod_revision < self._next:
            events = tuple([event for event in events if event.kv.mod_revision >= self._next])
            if not events:
                return
        self._next = revision + 1
        batch = WatchBatch(revision, events)
        if events:
            self._remember(batch)
        self._hand_out(batch)

    def _hand_out(self, batch: WatchBatch) -> None:
        for feed in self._feeds:
            feed.deliver(batch)

    def _remember(self, batch: WatchBatch) -> None:
        self._history.append(batch)
        self._history_events += len(batch.events)
        while self._history_events > _HISTORY_EVENTS:
            oldest = self._history.popleft()
            self._history_events -= len(oldest.events)
            self._history_from = oldest.revision + 1

    async def _stay_close(self, call: Any, endpoint: Endpoint) -> None:
        """Notice within about two probe intervals that the peer is gone, and ask for progress while it is quiet.

        Nothing else does: a frozen peer keeps its connections, and an idle watch is silent for ever.
        """
        clock, interval = self._transport.clock, self._transport.config.probe_interval_seconds
        while True:
            quiet_until = min(self._heard_at, endpoint.heard_at) + interval
            await asyncio.sleep(max(quiet_until - clock.monotonic(), interval / 4))
            if not await self._transport.is_alive(endpoint):
                raise StreamLost("the peer does not answer")
            if not self._confirmed or clock.monotonic() - self._heard_at < interval:
                continue
            if not endpoint.version:
                await self._learn_version(endpoint)
            if knows_safe_progress(endpoint.version):
                await call.write(_PROGRESS_PLEASE)

    async def _learn_version(self, endpoint: Endpoint) -> None:
        timeout = self._transport.config.try_timeout_seconds
        try:
            status = await endpoint.unary(STATUS)(pb.StatusRequest(), timeout=timeout)
            endpoint.version = status.version
        except grpc.aio.AioRpcError as error:
            # Progress on demand is an extra: a server that does not tell its version is followed without.
            endpoint.version = f"unknown: {error.code().name}"


class WatchHub:
    """All watches of one client."""

    def __init__(self, transport: Transport, tasks: TaskOwner, read_revision: Callable[[], Awaitable[int]]) -> None:
        self._transport = transport
        self._tasks = tasks
        self._read_revision = read_revision
        self._shared: dict[WatchTarget, _Upstream] = {}
        self._all: set[_Upstream] = set()

    @property
    def streams(self) -> int:
        """How many upstream watches are open."""
        return len(self._all)

    @property
    def watchers(self) -> int:
        """How many followers there are."""
        return sum(upstream.followers for upstream in self._all)

    def follow(self, target: WatchTarget, start_revision: int, max_backlog: int = _MAX_BACKLOG_EVENTS) -> Watcher:
        """Follow a range from a revision on (0: from now on), sharing the upstream watch where that is possible."""
        feed = Feed(start_revision, max_backlog)
        shared = self._shared.get(target)
        if shared is not None and shared.can_serve(start_revision):
            shared.join(feed)
            return Watcher(feed, shared.leave)
        upstream = _Upstream(self._transport, target, start_revision, self._read_revision, self._idle)
        upstream.join(feed)
        if shared is None or shared.task is None or shared.task.done():
            self._shared[target] = upstream
        self._all.add(upstream)
        upstream.task = self._tasks.start(upstream.run(), f"etcd-watch-{target.key!r}")
        upstream.task.add_done_callback(lambda _: self._forget(upstream))
        return Watcher(feed, upstream.leave)

    def _idle(self, upstream: _Upstream) -> None:
        if upstream.task is not None:
            upstream.task.cancel()
        self._forget(upstream)

    def _forget(self, upstream: _Upstream) -> None:
        self._all.discard(upstream)
        if self._shared.get(upstream.target) is upstream:
            del self._shared[upstream.target]

    def close(self) -> None:
        """End all followers; their iterations end."""
        for upstream in list(self._all):
            upstream.fail(EtcdError("the etcd client was closed"))
