"""Who gets which replica: the choice, the queue of those who wait for one, and the counts of those who have one.

Everything that decides here is synchronous. A request is counted on its replica in the step in which it is chosen; a
slot that frees goes to whoever has waited longest, in the step in which it frees.
"""

import asyncio
import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from localmesh.balancing import Choice, Chooser, Ejections, LocalLoad, Shortage
from localmesh.core.clock import Clock
from localmesh.core.errors import MeshError, Overloaded
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot

_SHORTEST_WAIT = 0.01
_FIRST_AVOIDANCE = 0.05
_LONGEST_AVOIDANCE = 1.0


@dataclass(slots=True)
class Attempts:
    """What one request has met so far. It lives as long as the request, over all replicas that it asks."""

    lost: int = 0
    """Replicas that were lost with it."""
    refusals: int = 0
    """How often it was refused because a replica was full."""
    avoid_until: dict[ReplicaId, float] = field(default_factory=dict)
    """When a replica that was full may be asked again."""

    def refused_by(self, replica: ReplicaId, now: float) -> None:
        """Stay away from a replica that is full, for longer each time."""
        pause = min(_FIRST_AVOIDANCE * 2**self.refusals, _LONGEST_AVOIDANCE)
        self.refusals += 1
        self.avoid_until[replica] = now + pause

    def avoided(self, now: float) -> frozenset[ReplicaId]:
        """Return the replicas that this request stays away from."""
        return frozenset(replica for replica, until in self.avoid_until.items() if now < until)

    def next_end(self, now: float) -> float | None:
        """Return when it may ask the next of them again."""
        return min((until for until in self.avoid_until.values() if now < until), default=None)


class Slot:
    """A request's place on a replica. Counted until `release`, which may be called more than once."""

    def __init__(self, replica: ReplicaRecord, snapshot: Snapshot, release: Callable[[ReplicaId], None]) -> None:
        self.replica = replica
        self.snapshot = snapshot
        """The view in which it was chosen."""
        self._release: Callable[[ReplicaId], None] | None = release

    def release(self) -> None:
        """Count the request out, and let the next one in."""
        release, self._release = self._release, None
        if release is not None:
            release(self.replica.id)


@dataclass(eq=False, slots=True)
class _Waiter:
    future: asyncio.Future[Slot]
    attempts: Attempts


class Dispatcher:
    """Gives replicas to requests, first come, first served for each model.

    Args:
        snapshot: Returns the newest view of the mesh.
        chooser: Chooses among replicas; it reads `load` and `ejections`.
        load: Own requests in flight; changed here only.
        ejections: Replicas that were seen lost.
        clock: The time.
        need: Told, any number of times, of a model that requests wait for and that has no replica to route to.
        max_waiting: Requests that may wait for one model.
    """

    def __init__(
        self,
        *,
        snapshot: Callable[[], Snapshot],
        chooser: Chooser,
        load: LocalLoad,
        ejections: Ejections,
        clock: Clock,
        need: Callable[[ModelName], None],
        max_waiting: int,
    ) -> None:
        self._snapshot = snapshot
        self._chooser = chooser
        self._load = load
        self._ejections = ejections
        self._clock = clock
        self._need = need
        self._max_waiting = max_waiting
        self._queues: dict[ModelName, deque[_Waiter]] = {}
        self._timers: dict[ModelName, asyncio.TimerHandle] = {}

    @property
    def in_flight(self) -> int:
        """Requests that have a replica."""
        return self._load.total

    def waiting(self, model: ModelName) -> int:
        """Return how many requests wait for the model."""
        return len(self._queues.get(model, ()))

    def queues(self) -> Mapping[ModelName, int]:
        """Return how many requests wait, by model; only models for which any do."""
        return {model: len(queue) for model, queue in self._queues.items()}

    def shortage(self, model: ModelName) -> Shortage | None:
        """Return why a new request would have to wait; None if it would not."""
        return self._choose(self._snapshot(), model, Attempts()).shortage

    async def assign(self, model: ModelName, attempts: Attempts, *, deadline: float) -> Slot:
        """Return a slot on the best replica, as soon as there is one.

        Raises:
            TimeoutError: There was none before the deadline.
            Overloaded: Too many wait already.
            MeshError: What `fail` was called with meanwhile.
        """
        if not self.waiting(model):
            snapshot = self._snapshot()
            choice = self._choose(snapshot, model, attempts)
            if choice.replica is not None:
                return self._take(choice.replica, snapshot)
        elif self.waiting(model) >= self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} requests wait for the model {model!r} already. Try again later, or let it have"
                " more replicas.",
                retry_after_seconds=1.0,
                model=model,
            )
        return await self._wait(model, attempts, deadline)

    async def _wait(self, model: ModelName, attempts: Attempts, deadline: float) -> Slot:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), attempts)
        self._queues.setdefault(model, deque()).append(waiter)
        slot: Slot | None = None
        try:
            self.pump(model)
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                slot = await waiter.future
        finally:
            self._leave(model, waiter)
            future = waiter.future
            if slot is None and future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()  # it was given a slot in the very moment in which it gave up
        return slot

    def _leave(self, model: ModelName, waiter: _Waiter) -> None:
        queue = self._queues.get(model)
        if queue is None:
            return
        if waiter in queue:
            queue.remove(waiter)
        if not queue:
            del self._queues[model]
            if (timer := self._timers.pop(model, None)) is not None:
                timer.cancel()

    def eject(self, replica: ReplicaRecord, *, seconds: float) -> None:
        """Do not pick the replica for a while, unless its record changes."""
        self._ejections.eject(replica, until=self._clock.monotonic() + seconds)

    def ejected(self, replica: ReplicaRecord) -> bool:
        """Whether the replica is not picked at present, because it was seen lost."""
        return self._ejections.ejected(replica, now=self._clock.monotonic())

    def fail(self, model: ModelName, error: MeshError) -> None:
        """End the wait of all who wait for the model."""
        for waiter in list(self._queues.get(model, ())):
            if not waiter.future.done():
                waiter.future.set_exception(copy.copy(error))  # each has a traceback of its own

    def pump_all(self) -> None:
        """Give what there is to those who wait: the mesh has changed."""
        for model in list(self._queues):
            self.pump(model)

    def pump(self, model: ModelName) -> None:
        """Give what there is to those who wait for the model, in the order in which they came."""
        queue = self._queues.get(model)
        if not queue:
            return
        snapshot = self._snapshot()
        shortage: Shortage | None = None
        for waiter in list(queue):
            if waiter.future.done():
                continue
            choice = self._choose(snapshot, model, waiter.attempts)
            if choice.replica is not None:
                waiter.future.set_result(self._take(choice.replica, snapshot))
                queue.remove(waiter)
                continue
            shortage = choice.shortage
            if not waiter.attempts.avoided(self._clock.monotonic()):
                break  # what does not suit this one, suits nobody behind it
        if shortage is Shortage.NO_REPLICA:
            self._need(model)
        elif shortage is not None:
            self._wake_later(model, queue)

    def _wake_later(self, model: ModelName, queue: deque[_Waiter]) -> None:
        now = self._clock.monotonic()
        ends = [waiter.attempts.next_end(now) for waiter in queue] + [self._ejections.next_end(now=now)]
        next_end = min((end for end in ends if end is not None), default=None)
        if (timer := self._timers.pop(model, None)) is not None:
            timer.cancel()
        if next_end is not None:
            delay = max(_SHORTEST_WAIT, next_end - now)
            self._timers[model] = asyncio.get_running_loop().call_later(delay, self.pump, model)

    def _choose(self, snapshot: Snapshot, model: ModelName, attempts: Attempts) -> Choice:
        now = self._clock.monotonic()
        return self._chooser.choose(snapshot, model, now=now, avoid=attempts.avoided(now))

    def _take(self, replica: ReplicaRecord, snapshot: Snapshot) -> Slot:
        self._load.begin(replica.id)
        return Slot(replica, snapshot, self._end)

    def _end(self, replica: ReplicaId) -> None:
        self._load.end(replica)
        self.pump(replica.model)

    def forget_gone(self) -> None:
        """Forget the last use of replicas that are no more."""
        self._load.forget_all_but({replica.id for replica in self._snapshot().all_replicas()})

    def close(self) -> None:
        """Stop the timers. Requests that still wait are ended by their own deadlines or cancellation."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
