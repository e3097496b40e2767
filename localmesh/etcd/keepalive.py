"""One keep-alive stream for all leases of a client.

Requests flow out as they are asked for, acknowledgements come back in order. A stream on which an
acknowledgement is overdue is given up for one to the next endpoint, and what is unacknowledged is sent again
there: a frozen member costs its ack time-out, not the lease.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from localmesh.etcd.errors import ConnectionTimeoutError, EtcdError, LeaseExpired
from localmesh.etcd.tasks import TaskOwner, until_one_ends
from localmesh.etcd.transport import LEASE_KEEP_ALIVE, Endpoint, StreamLost, Transport, backoff_steps
from localmesh.thirdparty import etcd_pb2 as pb

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refresh:
    """An acknowledged refresh. Its holder may act until `sent_at + ttl_seconds` on the monotonic clock.

    An acknowledgement by itself is no fence: etcd may have frozen after it gave it, or before it was read.
    """

    lease_id: int
    ttl_seconds: int
    sent_at: float


@dataclass(slots=True)
class _Waiting:
    """A lease whose refresh is asked for and not acknowledged."""

    lease_id: int
    ack_timeout: float
    answer: asyncio.Future[Refresh]
    waiters: int = 0
    sent_at: float | None = field(default=None)  # on the present stream


class KeepAlive:
    """Refreshes leases; its stream is opened by the first refresh."""

    def __init__(self, transport: Transport, tasks: TaskOwner) -> None:
        self._transport = transport
        self._clock = transport.clock
        self._tasks = tasks
        self._waiting: dict[int, _Waiting] = {}
        self._changed = asyncio.Event()
        self._started = False
        self._acknowledged = False  # anything, since the last stream was lost

    @property
    def waiting(self) -> int:
        """How many leases wait for an acknowledgement."""
        return len(self._waiting)

    async def refresh(self, lease_id: int, *, ack_timeout: float, deadline: float) -> Refresh:
        """Refresh one lease; calls for the same lease share what is on its way.

        Raises LeaseExpired if etcd does not know it, ConnectionTimeoutError at the deadline.
        """
        if not self._started:
            self._started = True
            self._tasks.start(self._run(), "etcd-keep-alive")
        waiting = self._waiting.get(lease_id)
        if waiting is None:
            answer: asyncio.Future[Refresh] = asyncio.get_running_loop().create_future()
            waiting = self._waiting[lease_id] = _Waiting(lease_id, ack_timeout, answer)
        waiting.ack_timeout = min(waiting.ack_timeout, ack_timeout)
        waiting.waiters += 1
        self._changed.set()
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                refreshed = await asyncio.shield(waiting.answer)
        except TimeoutError:
            raise ConnectionTimeoutError(f"the refresh of lease {lease_id:x} was not acknowledged in time") from None
        finally:
            waiting.waiters -= 1
            if not waiting.waiters and self._waiting.get(lease_id) is waiting:
                del self._waiting[lease_id]
        if refreshed.ttl_seconds <= 0:
            raise LeaseExpired(lease_id)
        return refreshed

    async def _run(self) -> None:
        next_backoff = backoff_steps()
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            endpoint = self._transport.current
            try:
                await self._converse(endpoint)
            except (StreamLost, EtcdError) as lost:
                logger.info("keep-alive stream to %s lost: %s", endpoint.address, lost)
            self._transport.failed(endpoint)
            for waiting in self._waiting.values():
                waiting.sent_at = None
            if self._acknowledged:
                self._acknowledged, next_backoff = False, backoff_steps()
            await asyncio.sleep(next_backoff())

    async def _converse(self, endpoint: Endpoint) -> None:
        call = await self._transport.open_stream(endpoint, LEASE_KEEP_ALIVE)
        self._transport.counters.keep_alive_streams += 1
        try:
            await until_one_ends(self._send(call), self._receive(call, endpoint))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._transport.stream_lost(error) from error
        finally:
            call.cancel()

    async def _send(self, call: Any) -> None:
        while True:
            self._changed.clear()
            for waiting in list(self._waiting.values()):
                if waiting.sent_at is None:
                    waiting.sent_at = self._clock.monotonic()
                    await self._send_one(call, waiting)
            now = self._clock.monotonic()
            overdue = min(
                (w.sent_at + w.ack_timeout for w in self._waiting.values() if w.sent_at is not None), default=None
            )
            if overdue is not None and overdue <= now:
                raise StreamLost("a refresh was not acknowledged in time")
            try:
                async with asyncio.timeout(None if overdue is None else overdue - now):
                    await self._changed.wait()
            except TimeoutError:
                continue  # something may be overdue now

    async def _send_one(self, call: Any, waiting: _Waiting) -> None:
        try:
            async with asyncio.timeout(waiting.ack_timeout):
                await call.write(pb.LeaseKeepAliveRequest(ID=waiting.lease_id))
        except TimeoutError:
            raise StreamLost("a refresh could not be sent in time") from None

    async def _receive(self, call: Any, endpoint: Endpoint) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            endpoint.heard()
            self._acknowledged = True
            waiting = self._waiting.pop(response.ID, None)
            if waiting is None or waiting.sent_at is None:
                continue  # everyone who asked has given up meanwhile
            if not waiting.answer.done():
                waiting.answer.set_result(Refresh(response.ID, response.TTL, waiting.sent_at))
        raise StreamLost("ended by the peer")
