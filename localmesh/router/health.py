"""What the router's health says.

"" (the router as a whole) and each service that it answers or forwards serve once the router has a view of the mesh.
They stay so while the store is away: requests go on with the last view.

Each model is a service, too, under its name. It serves if a request for it would be answered or held: a replica is
routable, or is coming, or could be placed now. A model that is not declared is unknown.
"""

import asyncio
from dataclasses import fields

from localmesh.core.clock import Clock
from localmesh.core.errors import MeshError
from localmesh.core.ids import ModelName
from localmesh.core.snapshot import Snapshot
from localmesh.router.views import coming, is_routable
from localmesh.rpc.health import HealthBook
from localmesh.scheduling.placement import plan_placement
from localmesh.store.mirror import Mirror

_PAUSE_FACTOR = 9
"""So that many models take a tenth of the router's time, not all of it."""
_OF_REQUESTS = frozenset({"revision", "inflight", "progress", "leader"})
"""What changes with every request, and says nothing of where a model could be."""
_MATTERS = tuple(field.name for field in fields(Snapshot) if field.name not in _OF_REQUESTS)


def may_differ(before: Snapshot, now: Snapshot) -> bool:
    """Whether health could be another one now. A snapshot shares each table that did not change with the one before."""
    return any(getattr(before, name) is not getattr(now, name) for name in _MATTERS)


def would_serve(snapshot: Snapshot, model: ModelName) -> bool:
    """Whether a request for the model would be answered, or held while it loads."""
    if is_routable(snapshot, model) or coming(snapshot, model):
        return True
    try:
        plan_placement(snapshot, model)
    except MeshError:
        return False
    return True


class ModelHealth:
    """Keeps a HealthBook in step with the mesh.

    Args:
        book: Of the router's server.
        mirror: The view of the mesh.
        clock: The time.
        services: Services that stand for the router as a whole.
        interval_seconds: The models are looked at this often at most.
    """

    def __init__(
        self, book: HealthBook, mirror: Mirror, clock: Clock, *, services: tuple[str, ...], interval_seconds: float
    ) -> None:
        self._book = book
        self._mirror = mirror
        self._clock = clock
        self._services = services
        self._interval_seconds = interval_seconds
        self._known: set[ModelName] = set()

    async def run(self) -> None:
        """Follow the mesh, for ever."""
        before: Snapshot | None = None
        async for snapshot in self._mirror.changes():
            began = self._clock.monotonic()
            if before is None or may_differ(before, snapshot):
                await self.apply(snapshot)
                before = snapshot
            took = self._clock.monotonic() - began
            await asyncio.sleep(max(self._interval_seconds, took * _PAUSE_FACTOR))

    async def apply(self, snapshot: Snapshot) -> None:
        """Write into the book what the snapshot means. Lets requests pass after each model: planning takes a while."""
        for service in ("", *self._services):
            self._book.set_serving(service, snapshot.revision > 0)
        models = {model for model in snapshot.models if model not in self._services}
        for gone in self._known - models:
            self._book.forget(gone)
        for model in models:
            self._book.set_serving(model, would_serve(snapshot, model))
            await asyncio.sleep(0)
        self._known = models
