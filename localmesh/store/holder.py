"""T2: the presence of whoever has requests in flight, without a store write for each request."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from localmesh.core.errors import Conflict, MeshError, StoreUnavailable
from localmesh.core.ids import HolderId, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdError, LeaseSession
from localmesh.etcd import transactions as t
from localmesh.store.access import LeaseGone
from localmesh.store.keys import holder_id
from localmesh.store.mirror import Mirror
from localmesh.store.presence import Presence, PresenceKeys

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_SCAN_SECONDS = 1.0
_SESSION_PAUSE_SECONDS = 0.2
_MAX_CONCURRENT_RELEASES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderConfig:
    """Times in seconds."""

    ttl_seconds: int = 5
    """After this long without a sign of life the holder's presences vanish."""
    linger_seconds: float = 2.0
    """A presence without requests is kept for this long."""
    patience_seconds: float = 1.0
    """A request waits this long for etcd, then goes on unprotected; no other one waits until etcd is heard again."""
    count_writes_per_second: int = 50
    """Of all replicas together."""
    count_writes_per_second_per_replica: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderStatistics:
    """Present state, and counters since the start."""

    replicas: int
    """Replicas with requests in flight or a presence."""
    in_flight: int
    unprotected: int
    """Requests on replicas that could be unloaded under them."""
    locks_taken: int
    locks_released: int
    conflicts: int
    count_writes: int


class Hold:
    """One request on a replica. Release it exactly when the request has ended."""

    __slots__ = ("_holder", "_presence", "_released")

    def __init__(self, holder: Holder, presence: Presence) -> None:
        self._holder = holder
        self._presence = presence
        self._released = False

    @property
    def replica(self) -> ReplicaId:
        """The replica."""
        return self._presence.replica

    @property
    def protected(self) -> bool:
        """Whether a presence in the store keeps the replica from being unloaded at present. It may come and go."""
        return self._presence.held

    def release(self) -> None:
        """The request has ended. May be called twice."""
        if not self._released:
            self._released = True
            self._holder._ended(self._presence)  # noqa: SLF001 - a Hold is a part of its Holder


class Holder:
    """The locks of one process. Start `run()` in a TaskGroup, beside that of the mirror.

    While the holder's key for a replica exists, T3 does not unload that replica. The key says that we are there, with a
    count for others to look at; it is no counter that has to be exact.

    Without etcd requests go on unprotected: while it is away nobody can unload, and if only we are cut off, the replica
    refuses, or finishes what it accepted.
    """

    def __init__(self, mirror: Mirror, name: str, config: HolderConfig | None = None) -> None:
        """Prepare a holder.

        Args:
            mirror: The mesh.
            name: Who it is, for people; the id is made unique by what is appended.
            config: Times.

        Raises:
            ValueError: The name cannot be part of a key.
        """
        self.holder_id: HolderId = holder_id(f"{name}-{secrets.token_hex(4)}")
        self._config = config or HolderConfig()
        self._mirror = mirror
        self._clock = mirror.store.clock
        self._keys = PresenceKeys(mirror.store, self.holder_id)
        self._presences: dict[ReplicaId, Presence] = {}
        self._idle: dict[ReplicaId, float] = {}  # since when, the longest first
        self._dirty: dict[ReplicaId, None] = {}  # whose count is to be written, the longest waiting first
        self._dirtied = asyncio.Event()
        self._used: dict[ReplicaId, int] = {}
        self._uses = 0
        self._session: LeaseSession | None = None
        self._session_ready = asyncio.Event()
        self._session_useless = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._away = asyncio.Event()  # etcd did not answer, and was not heard since
        self._releases = asyncio.Semaphore(_MAX_CONCURRENT_RELEASES)
        self._locks_taken = self._locks_released = self._conflicts = self._count_writes = 0

    def try_acquire(self, replica: ReplicaRecord) -> Hold | None:
        """Hold a replica that is locked already, without a store write; None means: call acquire().

        Args:
            replica: As the newest snapshot shows it, picked by it just now.
        """
        presence = self._presences.get(replica.id)
        if presence is None or replica.state.leaving:
            return None
        if not presence.held:
            return self._begun(presence) if self._away.is_set() and not presence.releasing else None
        session = self._session
        if presence.life != replica.create_revision or session is None or not session.alive():
            return None
        return self._begun(presence)

    async def acquire(self, replica: ReplicaRecord, snapshot: Snapshot, deadline: float) -> Hold:
        """T2: hold a replica, with a presence in the store where there is none yet.

        IF the replica, its model and its node's approval have the mod-revisions of the snapshot AND presence of its
        incarnation THEN put `inflight/<replica>/<holder>` under the holder's lease. Callers at the same time share one
        transaction, which goes on when they give up. An unknown outcome is settled by the key's token; a key that
        appears when nobody waits for it any more is deleted when the mirror shows it.

        Args:
            replica: As the snapshot shows it.
            snapshot: What it was picked by.
            deadline: Point on the monotonic clock. Waiting ends there, or after `patience_seconds`: unprotected.

        Raises:
            Conflict: The replica cannot be used any more: wait for a newer snapshot and pick again.
        """
        patient_until = self._clock.monotonic() + self._config.patience_seconds
        until = min(deadline, patient_until)
        while True:
            if (hold := self.try_acquire(replica)) is not None:
                return hold
            if snapshot.silent(replica):
                # Under the guard nothing is stopped, and there is no presence that a lock could compare.
                return self._begun(self._presence_of(replica.id))
            now = self._clock.monotonic()
            if now >= patient_until:
                self._away.set()
            if self._away.is_set() or now >= until:
                return self._begun(self._presence_of(replica.id))
            if self._session is None or self._tasks is None:
                await _set_within(self._session_ready, until - now)
                continue
            presence = self._presence_of(replica.id)
            task = presence.task or self._start(presence, self._take(presence, replica, snapshot))
            await asyncio.wait([task], timeout=until - now)
            if task.done() and not task.cancelled() and (conflict := task.result()) is not None:
                raise conflict

    def in_flight(self, replica: ReplicaId) -> int:
        """Return the exact number of our requests on a replica."""
        presence = self._presences.get(replica)
        return presence.count if presence is not None else 0

    def last_used(self, replica: ReplicaId) -> int:
        """Return when we last sent it a request, on a clock that counts our requests; 0 for never."""
        return self._used.get(replica, 0)

    def statistics(self) -> HolderStatistics:
        """Return state and counters."""
        presences = self._presences.values()
        return HolderStatistics(
            replicas=len(presences),
            in_flight=sum(p.count for p in presences),
            unprotected=sum(p.count for p in presences if not p.held),
            locks_taken=self._locks_taken,
            locks_released=self._locks_released,
            conflicts=self._conflicts,
            count_writes=self._count_writes,
        )

    async def ready(self) -> None:
        """Wait until the holder has its lease: before that, requests wait for it, and then go on unprotected."""
        await self._session_ready.wait()

    async def run(self) -> None:
        """Keep lease and presences until cancelled; then give the lease up, and with it all presences."""
        async with asyncio.TaskGroup() as group:
            self._tasks = group
            group.create_task(self._write_counts(), name="holder-counts")
            group.create_task(self._tend(), name="holder-tend")
            group.create_task(self._listen(), name="holder-listen")
            group.create_task(self._scan(), name="holder-scan")
            try:
                await self._keep_session()
            finally:
                self._tasks = None

    # Counting. Nothing here awaits.

    def _presence_of(self, replica: ReplicaId) -> Presence:
        return self._presences.setdefault(replica, Presence(replica))

    def _begun(self, presence: Presence) -> Hold:
        presence.count += 1
        self._uses += 1
        self._used[presence.replica] = self._uses
        self._idle.pop(presence.replica, None)
        self._count_changed(presence)
        return Hold(self, presence)

    def _ended(self, presence: Presence) -> None:
        presence.count -= 1
        self._count_changed(presence)
        if presence.count == 0 and presence.taken is not None:
            self._idle[presence.replica] = self._clock.monotonic()
        self._forget_if_unused(presence)

    def _count_changed(self, presence: Presence) -> None:
        if presence.held and presence.count != presence.published:
            self._dirty[presence.replica] = None
            self._dirtied.set()

    def _lost(self, presence: Presence) -> None:
        """Its key is not there any more, or not to be relied upon."""
        presence.taken = None
        self._idle.pop(presence.replica, None)
        self._dirty.pop(presence.replica, None)
        self._forget_if_unused(presence)

    def _forget_if_unused(self, presence: Presence) -> None:
        if presence.unused:
            self._presences.pop(presence.replica, None)

    # Taking and releasing. One task for each presence at a time.

    def _start(self, presence: Presence, work: Coroutine[Any, Any, Conflict | None]) -> asyncio.Task[Conflict | None]:
        if self._tasks is None:
            work.close()
            raise RuntimeError("the holder does not run")
        presence.task = self._tasks.create_task(work, name=f"holder-{presence.replica}")
        return presence.task

    async def _take(self, presence: Presence, replica: ReplicaRecord, snapshot: Snapshot) -> Conflict | None:
        """Take the key; return the conflict, if it is one. Whatever else goes wrong leaves requests unprotected."""
        session = self._session
        try:
            if session is None:
                return None
            taken = await self._keys.take(replica, snapshot, session.lease_id, max(1, presence.count))
            if session is self._session:
                self._took(presence, replica)
                presence.taken, presence.published = taken, taken.count
        except LeaseGone:
            if session is self._session:  # a lease that was replaced meanwhile says nothing of the new one
                self._away.set()
                self._session_useless.set()
        except Conflict as conflict:
            self._conflicts += 1
            return conflict
        except MeshError as error:
            self._away.set()
            logger.warning("requests to %s go on unprotected: %s", replica.id, error)
        finally:
            presence.task = None
            self._forget_if_unused(presence)
        if presence.count == 0 and presence.taken is not None:
            # Those who waited for it count themselves in a moment; should they have gone, _tend() sees to it.
            self._idle[presence.replica] = self._clock.monotonic()
        else:
            self._count_changed(presence)
        return None

    def _took(self, presence: Presence, replica: ReplicaRecord) -> None:
        presence.life = replica.create_revision
        self._locks_taken += 1
        self._away.clear()

    async def _release(self, presence: Presence) -> Conflict | None:
        """Delete the key. Requests that come meanwhile wait, and take it anew."""
        taken = presence.taken
        try:
            async with self._releases:
                if taken is not None:
                    await self._keys.release(presence.replica, taken)
                else:
                    await self._keys.release_unknown(presence.replica)
            self._locks_released += 1
        except MeshError as error:
            logger.info("the presence on %s was not deleted yet: %s", presence.replica, error)
        finally:
            presence.task = None
            presence.releasing = False
            self._lost(presence)
        return None

    # What goes on beside requests.

    async def _keep_session(self) -> None:
        while True:
            try:
                async with self._mirror.store.etcd.session(self._config.ttl_seconds) as session:
                    await self._use(session)
            except EtcdError as error:
                logger.info("the holder %s has no lease: %s", self.holder_id, error)
            await asyncio.sleep(_SESSION_PAUSE_SECONDS)

    async def _use(self, session: LeaseSession) -> None:
        """Work under one lease until it is lost."""
        self._session = session
        self._session_useless.clear()
        self._session_ready.set()
        self._away.clear()
        self._rescue()
        try:
            async with asyncio.TaskGroup() as group:
                lost = group.create_task(session.lost.wait())
                useless = group.create_task(self._session_useless.wait())
                await asyncio.wait([lost, useless], return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                useless.cancel()
        finally:
            self._session = None
            self._session_ready.clear()
            for presence in list(self._presences.values()):
                self._lost(presence)

    async def _listen(self) -> None:
        """Find out when etcd is back, so that no request has to. Where the lease is gone, a new one tells it."""
        store = self._mirror.store
        while True:
            await self._away.wait()
            await asyncio.sleep(self._config.patience_seconds)
            if self._session is None:
                continue
            try:
                await store.read(t.get(store.keys.schema()))
            except StoreUnavailable:
                continue
            self._away.clear()

    async def _tend(self) -> None:
        """Release what nobody has used for a while; take what is used and unprotected."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._release_idle()
            self._rescue()

    def _release_idle(self) -> None:
        due = self._clock.monotonic() - self._config.linger_seconds
        for replica, since in list(self._idle.items()):
            presence = self._presences.get(replica)
            if presence is None or presence.task is not None:
                continue
            if since > due:
                self._count_changed(presence)
                continue
            del self._idle[replica]
            if self._tasks is not None:
                presence.releasing = True
                self._start(presence, self._release(presence))

    def _rescue(self) -> None:
        """Take presences anew for requests that have none, where the replica still takes new locks."""
        if self._session is None or self._tasks is None or self._away.is_set():
            return
        snapshot = self._mirror.snapshot
        for presence in list(self._presences.values()):
            if presence.count == 0 or presence.held or presence.task is not None:
                continue
            replica = snapshot.replica(presence.replica)
            if replica is not None and snapshot.routable(replica):
                self._start(presence, self._take(presence, replica, snapshot))

    async def _scan(self) -> None:
        """Compare what we hold with what the mirror shows, both ways."""
        while True:
            await asyncio.sleep(_SCAN_SECONDS)
            snapshot = self._mirror.snapshot
            for replica, holders in snapshot.inflight.items():
                if self.holder_id in holders and replica not in self._presences and self._tasks is not None:
                    presence = self._presence_of(replica)
                    presence.releasing = True
                    self._start(presence, self._release(presence))
            for presence in list(self._presences.values()):
                taken = presence.taken
                if taken is None or presence.task is not None or taken.revision > snapshot.revision:
                    continue
                if self.holder_id not in snapshot.inflight.get(presence.replica, {}):
                    logger.warning("the presence on %s has vanished", presence.replica)
                    self._lost(presence)
            for replica in [r for r in self._used if snapshot.replica(r) is None and r not in self._presences]:
                del self._used[replica]

    async def _write_counts(self) -> None:
        """Write counts that have changed, as often as the limits allow, each as it is when its turn comes."""
        pause = 1 / self._config.count_writes_per_second
        while True:
            now = self._clock.monotonic()
            presence = next((p for p in map(self._presences.get, self._dirty) if p and p.write_due <= now), None)
            if presence is None:
                self._dirtied.clear()
                await _set_within(self._dirtied, self._next_count(now))
                continue
            del self._dirty[presence.replica]
            if presence.held and presence.count != presence.published:
                await self._write_count(presence)
                await asyncio.sleep(pause)

    def _next_count(self, now: float) -> float | None:
        """Return the seconds until a count may be written; None while there is none."""
        due = [p.write_due for p in map(self._presences.get, self._dirty) if p is not None]
        return max(0.0, min(due) - now) if due else None

    async def _write_count(self, presence: Presence) -> None:
        taken, count = presence.taken, presence.count
        if taken is None:
            return
        presence.write_due = self._clock.monotonic() + 1 / self._config.count_writes_per_second_per_replica
        try:
            written = await self._keys.write_count(presence.replica, taken, count)
        except MeshError as error:
            logger.info("the count of %s was not written: %s", presence.replica, error)
            self._away.set()
            presence.write_due = self._clock.monotonic() + self._config.patience_seconds
            self._count_changed(presence)
            return
        if presence.taken is not taken:
            return  # it was released, or taken anew, meanwhile
        if not written:
            self._lost(presence)
            return
        self._count_writes += 1
        presence.published = count
        self._count_changed(presence)


async def _set_within(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for an event, at most so long (None: for ever)."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
