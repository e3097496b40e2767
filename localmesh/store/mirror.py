"""The watched snapshot: the whole mesh in memory, at most a moment old."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TypeVar

from localmesh.core.errors import StoreUnavailable
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdError, EventKind, WatchBatch, WatchLost
from localmesh.etcd import transactions as t
from localmesh.store.builder import Complaints, SnapshotBuilder
from localmesh.store.mesh import MeshStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_SECONDS = 0.5
_PROBE_SECONDS = 1.5
_CONNECTED_SECONDS = 4.0


class Mirror:
    """Follows a mesh in etcd. Start `run()` in a TaskGroup; then `snapshot` is swapped whole with every batch.

    A revision is never seen in part. Over lost connections it goes on where it was; where that would leave a gap
    (compaction, a store that was reset) it reads everything anew. While etcd is away the last snapshot stays.
    """

    def __init__(self, store: MeshStore) -> None:
        self._store = store
        self._complaints = Complaints()
        self._snapshot = Snapshot()
        self._generation = 0  # counts changes of content; a newer revision alone is none
        self._pulse = asyncio.Event()  # set, and replaced, with every batch
        self._loaded = asyncio.Event()
        self._heard_at: float | None = None

    @property
    def store(self) -> MeshStore:
        """The store that is followed."""
        return self._store

    @property
    def snapshot(self) -> Snapshot:
        """The newest view; empty, at revision 0, before the first was loaded."""
        return self._snapshot

    @property
    def connected(self) -> bool:
        """Whether etcd was heard within the last 4 seconds."""
        return self.silence(self._store.clock.monotonic()) < _CONNECTED_SECONDS

    def silence(self, now: float) -> float:
        """Return the seconds since etcd was last heard, by the watch or by a probe; infinity if it never was."""
        return max(0.0, now - self._heard_at) if self._heard_at is not None else float("inf")

    async def loaded(self) -> Snapshot:
        """Wait for the first snapshot."""
        await self._loaded.wait()
        return self._snapshot

    async def wait_for(self, predicate: Callable[[Snapshot], T | None], deadline: float) -> T:
        """Wait until the predicate returns something else than None or False, and return that.

        It is asked now and after each batch, from the event loop.

        Args:
            predicate: Quick, and without side effects.
            deadline: Point on the monotonic clock.

        Raises:
            TimeoutError: The deadline has come.
        """
        async with asyncio.timeout(max(0.0, deadline - self._store.clock.monotonic())):
            while True:
                pulse = self._pulse
                if (found := predicate(self._snapshot)) is not None and found is not False:
                    return found
                await pulse.wait()

    async def changes(self) -> AsyncGenerator[Snapshot, None]:
        """Yield the first snapshot, and the newest one whenever its content has changed since the last one yielded.

        Changes that come while the consumer is busy are seen as one. Never ends by itself.
        """
        await self._loaded.wait()
        seen = -1
        while True:
            pulse = self._pulse
            if self._generation == seen:
                await pulse.wait()
                continue
            seen = self._generation
            yield self._snapshot

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._probe(), name="mirror-probe")
            group.create_task(self._follow_for_ever(), name="mirror-follow")

    async def _follow_for_ever(self) -> None:
        while True:
            try:
                self._publish(await self._store.load_with(self._complaints), changed=True)
                self._loaded.set()
                await self._follow()
                logger.info("the watch of the mesh %s has ended", self._store.keys.mesh)
            except WatchLost as lost:
                logger.warning("the mesh %s is read anew: %s", self._store.keys.mesh, lost)
                continue
            except (StoreUnavailable, EtcdError) as error:
                logger.warning("the mesh %s cannot be followed at present: %s", self._store.keys.mesh, error)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self) -> None:
        start = self._snapshot.revision + 1
        async with self._store.etcd.watch(self._store.keys.prefix, start_revision=start) as watcher:
            async for batch in watcher:
                self._apply(batch)

    def _apply(self, batch: WatchBatch) -> None:
        if not batch.events:
            if batch.revision > self._snapshot.revision:
                self._publish(replace(self._snapshot, revision=batch.revision), changed=False)
            self._heard()
            return
        builder = SnapshotBuilder(self._snapshot, self._store.keys, self._complaints)
        for event in batch.events:
            if event.kind is EventKind.PUT:
                builder.put(event.kv)
            else:
                builder.delete(event.kv.key)
        self._publish(builder.build(batch.revision), changed=True)

    def _publish(self, snapshot: Snapshot, *, changed: bool) -> None:
        self._snapshot = snapshot
        self._generation += changed
        self._heard()
        pulse, self._pulse = self._pulse, asyncio.Event()
        pulse.set()

    def _heard(self) -> None:
        self._heard_at = self._store.clock.monotonic()

    async def _probe(self) -> None:
        """Ask etcd for a sign of life while the watch is quiet: not every version reports progress when asked.

        That the watch itself still lives is seen to by the etcd client.
        """
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            if self.silence(self._store.clock.monotonic()) < _PROBE_SECONDS or not self._loaded.is_set():
                continue
            try:
                await self._store.read(t.get(self._store.keys.schema(), keys_only=True))
            except StoreUnavailable:
                continue
            self._heard()
