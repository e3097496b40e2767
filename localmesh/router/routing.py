"""From a model's name to a locked replica: choose, lock, and choose again when the mesh has moved on meanwhile."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from localmesh.balancing import Shortage
from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict, MeshError, Overloaded, ReplicaLost
from localmesh.core.ids import ModelName
from localmesh.core.records import ReplicaRecord
from localmesh.router.dispatch import Attempts, Dispatcher, Slot
from localmesh.router.views import require_model, still_loading
from localmesh.store.holder import Hold, Holder
from localmesh.store.mirror import Mirror

_CATCH_UP_SECONDS = 1.0
_LOCK_SECONDS = 5.0
_LAST_WORD_SHARE = 0.05
_LAST_WORD_SECONDS = 0.25


@dataclass(slots=True)
class RouteSession:
    """One request on its way, over all replicas that it asks."""

    model: ModelName
    patient_until: float
    """Point in time until which the caller may be held."""
    attempts: Attempts = field(default_factory=Attempts)


class Routing:
    """Gives requests a replica, locked for as long as they need it.

    Args:
        mirror: The view of the mesh.
        holder: Takes and keeps the locks in the store.
        dispatcher: Chooses, and queues.
        clock: The time.
        hold_seconds: How long a caller is held at most.
        short_of: Returns what the load of a model waits for, if it waits for something.
    """

    def __init__(
        self,
        *,
        mirror: Mirror,
        holder: Holder,
        dispatcher: Dispatcher,
        clock: Clock,
        hold_seconds: float,
        short_of: Callable[[ModelName], MeshError | None] = lambda _: None,
    ) -> None:
        self._mirror = mirror
        self._holder = holder
        self._dispatcher = dispatcher
        self._clock = clock
        self._hold_seconds = hold_seconds
        self._short_of = short_of

    def session(self, model: ModelName, deadline: float | None) -> RouteSession:
        """Begin a request.

        Args:
            model: The model that it is for.
            deadline: The caller's, as a point in time; None if it has none.

        Raises:
            ModelNotFound: There is no such model.
        """
        require_model(self._mirror.snapshot, model)
        now = self._clock.monotonic()
        patience = self._hold_seconds
        if deadline is not None:
            # A caller whose own deadline ends the wait learns nothing: so it is told a little before.
            left = max(0.0, deadline - now)
            patience = min(patience, left - min(left * _LAST_WORD_SHARE, _LAST_WORD_SECONDS))
        return RouteSession(model, now + patience)

    @asynccontextmanager
    async def replica(self, session: RouteSession) -> AsyncIterator[ReplicaRecord]:
        """Yield a replica that is locked, and on which the request is counted, until the block is left.

        Raises:
            ModelLoading: None was ready before the caller's patience ended.
            Overloaded: Each was at its limit until then, or too many wait already.
            ReplicaLost: None could be reached until then.
            PlacementFailed: None can be loaded now.
            LoadFailed: One could not be loaded.
            StoreUnavailable: One would have to be loaded, and the store is away.
        """
        slot, hold = await self._locked(session)
        try:
            yield slot.replica
        finally:
            hold.release()
            slot.release()

    async def _locked(self, session: RouteSession) -> tuple[Slot, Hold]:
        while True:
            try:
                slot = await self._dispatcher.assign(session.model, session.attempts, deadline=session.patient_until)
            except TimeoutError:
                raise self._out_of_patience(session.model) from None
            try:
                return slot, await self._lock(slot)
            except Conflict:
                slot.release()
                if self._clock.monotonic() >= session.patient_until:
                    raise self._out_of_patience(session.model) from None
                await self._newer_than(slot.snapshot.revision)
            except BaseException:
                slot.release()
                raise

    async def _lock(self, slot: Slot) -> Hold:
        hold = self._holder.try_acquire(slot.replica)
        if hold is not None:
            return hold
        return await self._holder.acquire(slot.replica, slot.snapshot, self._clock.monotonic() + _LOCK_SECONDS)

    async def _newer_than(self, revision: int) -> None:
        """Wait for the view that shows why a lock was refused; if it does not come, try again all the same."""
        deadline = self._clock.monotonic() + _CATCH_UP_SECONDS
        try:
            await self._mirror.wait_for(lambda s: s if s.revision > revision else None, deadline)
        except TimeoutError:
            return

    def _out_of_patience(self, model: ModelName) -> MeshError:
        snapshot = self._mirror.snapshot
        require_model(snapshot, model)
        shortage = self._dispatcher.shortage(model)
        if shortage is Shortage.NO_REPLICA:
            return self._short_of(model) or still_loading(snapshot, model)
        if shortage is Shortage.EJECTED:
            return ReplicaLost(
                f"no replica of the model {model!r} can be reached; the router's log says why. Try again later.",
                retry_after_seconds=5.0,
                replica=model,
            )
        return Overloaded(
            f"every replica of the model {model!r} was at its limit for as long as a caller is held. Try again later,"
            " or let the model have more replicas.",
            retry_after_seconds=1.0,
            model=model,
        )
