"""Loading a model because somebody asks for it: once for all who ask, and to the end even when they leave."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from localmesh.core.clock import Clock
from localmesh.core.errors import (
    ComponentUnreachable,
    InternalError,
    LoadFailed,
    MeshError,
    NoCapacity,
    PlacementFailed,
)
from localmesh.core.ids import ModelName
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.router.placer import Placer
from localmesh.router.room import Room, RoomMaker
from localmesh.router.views import FAILURE_RETRY_SECONDS, coming, failure_of, is_routable, require_model
from localmesh.scheduling.placement import PlacementPlan, plan_placement
from localmesh.store.mirror import Mirror

logger = logging.getLogger(__name__)

_MOST_PLACEMENTS = 5
_LOOK_SECONDS = 1.0
_BUSY_RETRY_SECONDS = 5.0
_BREATH_SECONDS = 0.05
"""Between two looks for room at least: counts of requests change much more often than there is room."""

Load = asyncio.Future[None]
"""Done when a load has ended: without an error once a replica is routable. Not to be cancelled by those who wait."""


class ColdLoader:
    """Loads models on demand, one load at a time for each model.

    A load is placed in the store, so it is nobody's: what this object owns is only the watching of it, and placing it
    elsewhere when it fails. When this router dies, the load goes on, and another router finds it coming.

    Args:
        mirror: The view of the mesh.
        placer: Places replicas.
        room: Stops what is idle where there is no room.
        clock: The time.
        spawn: Runs a coroutine in the router's task group: a load outlives the request that began it.
        patience_seconds: How long a load waits for room that is about to come free before it is given up.
        return_seconds: How long it waits for a node that has just fallen silent with a replica that served. After etcd
            or the registry was away for a moment the node is back at once, and a second copy would be for nothing.
        lost: Whether a replica was seen lost, so that there is nothing to wait for.
        failed: Told when a load has failed, with the reason.
    """

    def __init__(
        self,
        *,
        mirror: Mirror,
        placer: Placer,
        room: RoomMaker,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        patience_seconds: float,
        return_seconds: float,
        lost: Callable[[ReplicaRecord], bool],
        failed: Callable[[ModelName, MeshError], None],
    ) -> None:
        self._mirror = mirror
        self._placer = placer
        self._room = room
        self._clock = clock
        self._spawn = spawn
        self._patience_seconds = patience_seconds
        self._return_seconds = return_seconds
        self._lost = lost
        self._failed = failed
        self._loads: dict[ModelName, Load] = {}
        self._short_of: dict[ModelName, PlacementFailed] = {}

    def short_of(self, model: ModelName) -> PlacementFailed | None:
        """Return what a load waits for, as the error that it ends with if that does not come; None if for nothing."""
        return self._short_of.get(model)

    def want(self, model: ModelName) -> Load:
        """Begin to load the model unless that is under way, and return the load."""
        load = self._loads.get(model)
        if load is None:
            load = asyncio.get_running_loop().create_future()
            self._spawn(self._load(model, load), f"load {model}")
            self._loads[model] = load
        return load

    async def _load(self, model: ModelName, load: Load) -> None:
        error: MeshError | None = ComponentUnreachable("this router is stopping: ask another one", endpoint="")
        try:
            await self._until_routable(model)
            error = None
        except MeshError as failure:
            error = failure
            logger.warning("loading %s: %s", model, failure)
        except Exception:  # a load is an edge: its failure is its callers', and must not end the router
            error = InternalError(f"loading {model!r} failed inside the router; its log says why")
            logger.exception("loading %s", model)
        finally:
            del self._loads[model]
            self._short_of.pop(model, None)
            if load.done():
                pass
            elif error is None:
                load.set_result(None)
            else:
                load.set_exception(error)
                load.exception()  # nobody has to look: those who wait for a slot are told by `failed`
        if error is not None:
            self._failed(model, error)

    async def _until_routable(self, model: ModelName) -> None:
        began = self._clock.monotonic()
        give_up = began + self._patience_seconds
        placed = 0
        while True:
            snapshot = self._mirror.snapshot
            require_model(snapshot, model)
            if is_routable(snapshot, model):
                return
            if coming(snapshot, model):
                await self._change(lambda s: is_routable(s, model) or not coming(s, model))
                continue
            if self._may_return(snapshot, model) and self._clock.monotonic() < began + self._return_seconds:
                await self._change(lambda s: is_routable(s, model) or not self._may_return(s, model))
                continue
            if placed == _MOST_PLACEMENTS:
                raise failure_of(snapshot, model) or LoadFailed(
                    f"the model {model!r} was placed {placed} times, and each replica was gone before it was ready."
                    " The workers' logs say more.",
                    retry_after_seconds=FAILURE_RETRY_SECONDS,
                    model=model,
                )
            try:
                if await self._placer.place(lambda s: _plan(s, model)) is not None:
                    placed += 1
                self._short_of.pop(model, None)
            except PlacementFailed as error:
                room = await self._room_for(model, error)
                self._short_of[model] = reason = _with_reason(error, room)
                may_come = room.may_come or _room_may_come(snapshot, model, error)
                if self._clock.monotonic() >= give_up or not may_come:
                    raise failure_of(self._mirror.snapshot, model) or reason from None
                await asyncio.sleep(_BREATH_SECONDS)
                await self._change(_newer_than(snapshot.revision))

    def _may_return(self, snapshot: Snapshot, model: ModelName) -> bool:
        return any(
            replica.state is ReplicaState.READY and not snapshot.present(replica) and not self._lost(replica)
            for replica in snapshot.replicas_of(model)
        )

    async def _room_for(self, model: ModelName, error: PlacementFailed) -> Room:
        if not isinstance(error, NoCapacity) or failure_of(self._mirror.snapshot, model) is not None:
            return Room(may_come=False)
        return await self._room.make_room(model)

    async def _change(self, condition: Callable[[Snapshot], bool]) -> None:
        """Wait until the condition holds, or for a moment: what depends on time is looked at again, too."""
        deadline = self._clock.monotonic() + _LOOK_SECONDS
        try:
            await self._mirror.wait_for(lambda s: s if condition(s) else None, deadline)
        except TimeoutError:
            return


def _newer_than(revision: int) -> Callable[[Snapshot], bool]:
    return lambda snapshot: snapshot.revision > revision


def _plan(snapshot: Snapshot, model: ModelName) -> PlacementPlan | None:
    if is_routable(snapshot, model) or coming(snapshot, model):
        return None
    return plan_placement(snapshot, model)


def _with_reason(error: PlacementFailed, room: Room) -> PlacementFailed:
    """Return the error with what keeps room from being made."""
    if not room.in_the_way:
        return error
    return type(error)(
        f"{error.message}. Nothing can be stopped to make room: {room.in_the_way}.",
        retry_after_seconds=error.retry_after_seconds or (_BUSY_RETRY_SECONDS if room.may_come else None),
        **error.metadata,
    )


def _room_may_come(snapshot: Snapshot, model: ModelName, error: PlacementFailed) -> bool:
    """Whether waiting helps: the reason passes by itself, or something is being stopped or may come back."""
    if failure_of(snapshot, model) is not None:
        return False
    if error.retry_after_seconds is not None:
        return True
    return any(
        # Being stopped, or about to be: its model is gone or edited. Its memory and slot come free.
        (r.state.leaving or r.id.model not in snapshot.models or _superseded(snapshot, r)) and snapshot.present(r)
        for r in snapshot.all_replicas()
    ) or any(not snapshot.present(r) for r in snapshot.replicas_of(model))


def _superseded(snapshot: Snapshot, replica: ReplicaRecord) -> bool:
    return replica.revision != snapshot.models[replica.id.model].revision
