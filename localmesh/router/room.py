"""Making room for a model by stopping what is idle: T3 for all victims at once, for T7 to hand their memory on."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict
from localmesh.core.ids import ModelName
from localmesh.core.snapshot import Snapshot
from localmesh.router.usage import UsageLog
from localmesh.scheduling.eviction import EvictionPlan, obstacles, plan_eviction
from localmesh.store.eviction import Eviction
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_CATCH_UP_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What became of an attempt to make room."""

    may_come: bool
    """Whether it is worth waiting for: something is being stopped, or what is in the way may become idle."""
    in_the_way: str = ""
    """What is in the way, without a full stop."""


class RoomMaker:
    """Evicts for the cold loads of one router.

    Args:
        store: The transactions.
        mirror: The view of the mesh.
        usage: Who was used when.
        clock: The time.
    """

    def __init__(self, store: MeshStore, mirror: Mirror, usage: UsageLog, clock: Clock) -> None:
        self._store = store
        self._mirror = mirror
        self._usage = usage
        self._clock = clock
        # Two plans made on one view would stop the same replicas for two heirs.
        self._one_at_a_time = asyncio.Lock()

    async def make_room(self, model: ModelName) -> Room:
        """Stop what is idle so that a replica of the model fits. Does not wait until it has stopped.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        async with self._one_at_a_time:
            for _ in range(_ATTEMPTS):
                snapshot = self._mirror.snapshot
                if snapshot.guarded:
                    return Room(may_come=True, in_the_way="nothing is stopped while many nodes are silent (guard)")
                needed = self._usage.needed(snapshot)
                plan = plan_eviction(snapshot, model, last_used=self._usage.last_used, protected=needed)
                if plan is None:
                    found = obstacles(snapshot, model, protected=needed)
                    return Room(may_come=found.may_pass, in_the_way=found.sentence)
                try:
                    evicted = await self._store.evict(_eviction(plan, snapshot))
                except Conflict as conflict:
                    logger.info("making room for %s again: %s", model, conflict)
                    evicted = False
                if evicted:
                    logger.info("unloading %s to make room for %s", _names(plan), plan.heir)
                    await self._until(partial(_shown, plan))  # or the next plan would stop others, too
                    return Room(may_come=True)
                await self._until(partial(_newer, snapshot.revision))
        return Room(may_come=True, in_the_way="others come first each time")

    async def _until(self, condition: Callable[[Snapshot], bool]) -> None:
        """Wait for the view to show it, but not for ever: the next transaction finds out by itself."""
        try:
            await self._mirror.wait_for(
                lambda s: s if condition(s) else None, self._clock.monotonic() + _CATCH_UP_SECONDS
            )
        except TimeoutError:
            logger.warning("the view of the store does not catch up with what was evicted")


def _eviction(plan: EvictionPlan, snapshot: Snapshot) -> Eviction:
    keepers = {keeper.id: keeper for victim in plan.victims for keeper in victim.keepers}
    return Eviction(
        heir=plan.heir,
        victims=tuple(victim.replica for victim in plan.victims),
        keepers=tuple(keepers.values()),
        snapshot=snapshot,
    )


def _newer(revision: int, snapshot: Snapshot) -> bool:
    return snapshot.revision > revision


def _shown(plan: EvictionPlan, snapshot: Snapshot) -> bool:
    now = [(snapshot.replica(victim.replica.id), victim.replica) for victim in plan.victims]
    return all(record is None or record.mod_revision != before.mod_revision for record, before in now)


def _names(plan: EvictionPlan) -> str:
    return ", ".join(str(victim.replica.id) for victim in plan.victims)
