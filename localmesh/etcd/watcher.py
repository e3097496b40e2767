"""The local end of a watch: what a consumer reads from, and what an upstream watch delivers into."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from localmesh.etcd.errors import EtcdError, WatcherTooSlow, WatchTimedOut
from localmesh.etcd.messages import WatchBatch


class Feed:
    """The batches that one consumer has not read yet. Written by the upstream watch, read by its Watcher."""

    def __init__(self, start_revision: int, max_backlog_events: int) -> None:
        self.start_revision = start_revision
        self._max_backlog_events = max_backlog_events
        self._backlog_events = 0
        self._queue: deque[WatchBatch] = deque()
        self._error: EtcdError | None = None
        self._closed = False
        self._wakeup = asyncio.Event()
        self.confirmed = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """Whether everything was read."""
        return not self._queue

    def deliver(self, batch: WatchBatch) -> None:
        """Add a batch, less what is before the consumer's start."""
        if self._closed or self._error is not None:
            return
        events = batch.events
        if events and events[0].kv.mod_revision < self.start_revision:
            events = tuple([event for event in events if event.kv.mod_revision >= self.start_revision])
            batch = WatchBatch(batch.revision, events)
        if self._queue and not self._queue[-1].events and not events:
            self._queue.pop()  # only the newest progress is of interest
        self._queue.append(batch)
        self._backlog_events += len(events)
        if self._backlog_events > self._max_backlog_events:
            self._queue.clear()
            self.fail(WatcherTooSlow(f"more than {self._max_backlog_events} events were left unread"))
        self._wakeup.set()

    def fail(self, error: EtcdError) -> None:
        """End the feed: the error is raised once, after what was delivered before."""
        if self._error is None and not self._closed:
            self._error = error
        self.confirmed.set()
        self._wakeup.set()

    def close(self) -> None:
        """End the feed at once."""
        self._closed = True
        self._queue.clear()
        self._wakeup.set()

    def raise_if_failed(self) -> None:
        """Raise the error of a feed that ended, once nothing is left to read."""
        if self._error is not None and not self._queue:
            error, self._error = self._error, None
            self.close()
            raise error

    async def take(self) -> WatchBatch:
        """Return the next batch. Raises StopAsyncIteration once the feed is closed."""
        while not self._queue:
            self.raise_if_failed()
            if self._closed:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        batch = self._queue.popleft()
        self._backlog_events -= len(batch.events)
        return batch


class Watcher:
    """One follower: an async iterator of WatchBatch, and a context manager that closes it.

    Raises a WatchLost error when it cannot go on without a gap, after all that came before. One that is dropped
    without close() is closed when it is collected.
    """

    def __init__(self, feed: Feed, leave: Callable[[Feed], None]) -> None:
        self._feed = feed
        self._finalizer = weakref.finalize(self, leave, feed)
        self._finalizer.atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        return await self._feed.take()

    async def established(self, timeout: float) -> None:
        """Wait until etcd has confirmed the watch; with start_revision 0, nothing later is missed.

        Raises WatchTimedOut after `timeout` seconds, or why the watch cannot be.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._feed.confirmed.wait()
        except TimeoutError:
            raise WatchTimedOut(f"the watch was not established within {timeout} s") from None
        self._feed.raise_if_failed()

    def close(self) -> None:
        """Stop following; a consumer that waits gets the end of the iteration. May be called twice."""
        self._feed.close()
        self._finalizer()

    async def aclose(self) -> None:
        """See close()."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
