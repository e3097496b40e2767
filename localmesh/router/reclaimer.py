"""Takes back memory that was handed over to a replica which nobody came to place. The elected reconciler runs it."""

import asyncio
import logging
from collections.abc import Mapping
from types import MappingProxyType

from localmesh.core.clock import Clock
from localmesh.core.errors import MeshError
from localmesh.core.ids import ReplicaId
from localmesh.etcd import Leadership
from localmesh.scheduling.orphans import plan_take_back
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class Reclaimer:
    """Sees to it that the death of a router between T3 and T1 costs no memory.

    Args:
        store: The transactions.
        mirror: The view of the mesh.
        clock: The time.
    """

    def __init__(self, store: MeshStore, mirror: Mirror, clock: Clock) -> None:
        self._store = store
        self._mirror = mirror
        self._clock = clock

    async def run(self, leadership: Leadership) -> None:
        """Take back what nobody came for, until cancelled, which is how leadership ends."""
        since: Mapping[ReplicaId, float] = MappingProxyType({})
        while True:
            if self._mirror.connected:
                plan = plan_take_back(self._mirror.snapshot, now=self._clock.monotonic(), since=since)
                since = plan.since
                for action in plan.actions:
                    try:
                        if await self._store.take_back_claims(action.replica, action.devices, leader=leadership):
                            logger.warning(
                                "took back memory that was made free for %s: nobody placed it", action.replica
                            )
                    except MeshError as error:
                        logger.info("the memory of %s is not taken back now: %s", action.replica, error)
            await asyncio.sleep(_LOOK_SECONDS)  # nothing is urgent here: claims wait for seconds in any case
