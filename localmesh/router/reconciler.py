"""The elected reconciler: while this router leads, it brings the mesh nearer to what is wanted.

What to do is decided by localmesh.scheduling.reconcile. Here it is carried out: each action is a transaction that also
compares the leader's key, an action that fails is left to the next plan, and one that hangs holds up no other.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict, MeshError, PlacementFailed
from localmesh.core.ids import ModelName
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import Leadership
from localmesh.router.placer import Placer
from localmesh.router.reclaimer import Reclaimer
from localmesh.scheduling.guard import LiftGuard, SetGuard
from localmesh.scheduling.reconcile import (
    Action,
    Drain,
    Forget,
    Place,
    ReconcileConfig,
    ReconcileState,
    Unload,
    reconcile,
)
from localmesh.store.leader import LeaderElection
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror

logger = logging.getLogger(__name__)

_BREATH_SECONDS = 0.1
"""Between two plans at least: counts of requests change much more often than there is something to do."""
_BREATH_PER_PLAN = 4.0
"""And this many times as long as a plan has taken: requests run in the same loop."""


class Reconciler:
    """Campaigns, and reconciles while it leads.

    Args:
        store: The transactions.
        mirror: The view of the mesh.
        placer: Places replicas.
        election: Who reconciles.
        clock: The time.
        config: How to decide.
        interval_seconds: How often there is a plan even when nothing has changed.
        waiting: Returns the requests that wait at this router, by model. Those at others are not known here; that all
            replicas are busy is, since routers publish what they have in flight.
    """

    def __init__(
        self,
        *,
        store: MeshStore,
        mirror: Mirror,
        placer: Placer,
        election: LeaderElection,
        clock: Clock,
        config: ReconcileConfig,
        interval_seconds: float,
        waiting: Callable[[], Mapping[ModelName, int]],
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._placer = placer
        self._election = election
        self._clock = clock
        self._config = config
        self._interval_seconds = interval_seconds
        self._waiting = waiting
        self._reclaimer = Reclaimer(store, mirror, clock)
        self._busy: set[str] = set()
        self._unplaced: Mapping[ModelName, PlacementFailed] = MappingProxyType({})
        self._warnings: Mapping[ModelName, tuple[str, ...]] = MappingProxyType({})

    def worries(self, model: ModelName | None = None) -> list[str]:
        """Return what the last plan could not do, a sentence each; of one model only if that is asked for.

        Only the leader knows any.
        """
        found = []
        for name in sorted({*self._unplaced, *self._warnings}) if model is None else [model]:
            if (error := self._unplaced.get(name)) is not None:
                found.append(f"A replica is wanted, but {error.message}")
            found += self._warnings.get(name, ())
        return found

    async def run(self) -> None:
        """Campaign and lead, for ever."""
        await self._election.run(self._lead)

    async def _lead(self, leadership: Leadership) -> None:
        """Reconcile until cancelled, which is how leadership ends."""
        logger.info("this router is the reconciler now")
        state = ReconcileState()
        try:
            async with asyncio.TaskGroup() as actions:
                actions.create_task(self._reclaimer.run(leadership))
                while True:
                    begun, snapshot = self._clock.monotonic(), self._mirror.snapshot
                    wake_after: float | None = None
                    if self._mirror.connected:
                        plan = reconcile(
                            snapshot,
                            now=self._clock.monotonic(),
                            state=state,
                            config=self._config,
                            waiting=self._waiting(),
                        )
                        before, state, wake_after = state.guard, plan.state, plan.wake_after_seconds
                        self._unplaced, self._warnings = plan.unplaced, plan.warnings
                        if plan.guard is not None and not await self._guard(plan.guard, leadership):
                            state = replace(state, guard=before)
                        for action in plan.actions:
                            self._begin(action, snapshot, leadership, actions)
                    await self._next(snapshot.revision, wake_after, spent=self._clock.monotonic() - begun)
        finally:
            self._unplaced, self._warnings = MappingProxyType({}), MappingProxyType({})
            logger.info("this router is the reconciler no more")

    async def _guard(self, step: SetGuard | LiftGuard, leadership: Leadership) -> bool:
        """Set or lift the guard, before anything else is planned; return whether that is done."""
        try:
            match step:
                case SetGuard(nodes=nodes):
                    logger.warning("nothing is placed or stopped: lost at once: %s", ", ".join(sorted(nodes)))
                    revision = await self._store.put_guard(nodes, leader=leadership)
                    await self._seen(revision)
                case LiftGuard(why=why):
                    if await self._store.clear_guard(leader=leadership):
                        logger.warning("the guard is lifted: %s", why)
        except MeshError as error:
            logger.warning("the guard is as it was: %s", error)
            return False
        return True

    async def _seen(self, revision: int) -> None:
        """Wait until the view shows a revision, but not for ever."""
        deadline = self._clock.monotonic() + self._interval_seconds
        try:
            await self._mirror.wait_for(_newer_than(revision - 1), deadline)
        except TimeoutError:
            logger.warning("the view of the store does not catch up with revision %d", revision)

    def _begin(self, action: Action, snapshot: Snapshot, leadership: Leadership, actions: asyncio.TaskGroup) -> None:
        key = _key(action)
        if key not in self._busy:
            self._busy.add(key)
            actions.create_task(self._carry_out(action, snapshot, leadership, key))

    async def _carry_out(self, action: Action, snapshot: Snapshot, leadership: Leadership, key: str) -> None:
        try:
            await self._act(action, snapshot, leadership)
        except Conflict as conflict:
            logger.info("%s was overtaken: %s", key, conflict)
        except MeshError as error:
            logger.warning("%s failed: %s", key, error)
        except Exception:  # one action is an edge: what is wrong with it must not end the others
            logger.exception("%s failed unexpectedly", key)
        finally:
            self._busy.discard(key)

    async def _act(self, action: Action, snapshot: Snapshot, leadership: Leadership) -> None:
        match action:
            case Place(plan=plan):
                await self._placer.carry_out(plan, snapshot, leader=leadership)
            case Drain(replica=replica, why=why):
                logger.info("draining %s: %s", replica.id, why)
                await self._store.drain_replica(replica, leader=leadership)
            case Unload(replica=replica, why=why):
                if await self._store.unload_replica(replica, leader=leadership):
                    logger.info("unloading %s: %s", replica.id, why)
            case Forget(replica=replica, why=why):
                logger.info("forgetting %s: %s", replica.id, why)
                await self._store.forget_replica(replica, leader=leadership)

    async def _next(self, revision: int, wake_after: float | None, *, spent: float) -> None:
        """Return when the mesh has changed, but not at once, and when it is time anyway."""
        now = self._clock.monotonic()
        wait = self._interval_seconds if wake_after is None else min(self._interval_seconds, wake_after)
        await asyncio.sleep(min(max(_BREATH_SECONDS, _BREATH_PER_PLAN * spent), self._interval_seconds))
        try:
            await self._mirror.wait_for(_newer_than(revision), now + max(wait, _BREATH_SECONDS))
        except TimeoutError:
            return


def _newer_than(revision: int) -> Callable[[Snapshot], Snapshot | None]:
    return lambda snapshot: snapshot if snapshot.revision > revision else None


def _key(action: Action) -> str:
    if isinstance(action, Place):
        return f"placing {action.plan.replica.model}"
    return f"{type(action).__name__.lower()}ing {action.replica.id}"
