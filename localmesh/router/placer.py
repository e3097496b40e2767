"""T1 from this process: one placement at a time, each planned on a view that shows the one before."""

import asyncio
import logging
from collections.abc import Callable

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import Leadership
from localmesh.scheduling.placement import PlacementPlan
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.store.placement import Placement

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_CATCH_UP_SECONDS = 2.0


class Placer:
    """Places replicas for the cold loads and for the reconciler of one router."""

    def __init__(self, store: MeshStore, mirror: Mirror, clock: Clock) -> None:
        self._store = store
        self._mirror = mirror
        self._clock = clock
        # Two plans made on one view would claim the same memory: the second would conflict and be made again anyway.
        self._one_at_a_time = asyncio.Lock()

    async def place(self, plan: Callable[[Snapshot], PlacementPlan | None]) -> ReplicaRecord | None:
        """Plan on the newest view and place; after a conflict, once more on a newer one.

        Args:
            plan: Returns where the replica goes, or None when none is needed any more.

        Returns:
            The record, or None where no replica was needed.

        Raises:
            Conflict: Others were quicker each time.
            PlacementFailed: From `plan`.
            StoreUnavailable: The store does not answer.
        """
        async with self._one_at_a_time:
            for attempt in range(1, _ATTEMPTS + 1):
                snapshot = self._mirror.snapshot
                chosen = plan(snapshot)
                if chosen is None:
                    return None
                try:
                    return await self._carry_out(chosen, snapshot, leader=None)
                except Conflict as conflict:
                    if attempt == _ATTEMPTS:
                        raise
                    logger.info("placing %s again: %s", chosen.replica, conflict)
                    await self._newer_than(snapshot.revision)
        raise AssertionError("unreachable")

    async def carry_out(self, plan: PlacementPlan, snapshot: Snapshot, *, leader: Leadership) -> ReplicaRecord:
        """Place what the elected reconciler planned on a snapshot.

        Raises:
            Conflict: The snapshot is no longer true, or this router leads no more.
            StoreUnavailable: The store does not answer.
        """
        async with self._one_at_a_time:
            return await self._carry_out(plan, snapshot, leader=leader)

    async def _carry_out(self, plan: PlacementPlan, snapshot: Snapshot, *, leader: Leadership | None) -> ReplicaRecord:
        record = await self._store.place(
            Placement(
                replica=plan.replica,
                revision=plan.revision,
                devices=plan.devices,
                incarnation=plan.incarnation,
                snapshot=snapshot,
            ),
            leader=leader,
        )
        logger.info("placed %s (revision %s)", record.id, record.revision)
        await self._newer_than(record.mod_revision - 1)
        return record

    async def _newer_than(self, revision: int) -> None:
        """Wait until the view is newer, but not for ever: the next transaction finds out by itself."""
        deadline = self._clock.monotonic() + _CATCH_UP_SECONDS
        try:
            await self._mirror.wait_for(lambda s: s if s.revision > revision else None, deadline)
        except TimeoutError:
            logger.warning("the view of the store does not catch up with revision %d", revision + 1)
