"""What the elected reconciler does next: the mesh in, a plan out.

Level-triggered: the plan follows from the snapshot and from since when nodes are missing, from nothing else. Whoever
carries it out may stop in the middle, meet a conflict, or die: the next plan begins from what is there then. Replicas
that are on their way count as if they were there, so that waiting for one never places another.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from types import MappingProxyType

from localmesh.core.errors import NoCapacity, PlacementFailed
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelRecord, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.autoscale import AutoscaleConfig, Trend, Usage, next_change, observe, trend
from localmesh.scheduling.breaker import BreakerConfig, Trouble, failed_again, remaining
from localmesh.scheduling.draining import Move, on_draining_nodes, plan_move
from localmesh.scheduling.guard import GuardConfig, GuardState, LiftGuard, SetGuard, watch
from localmesh.scheduling.placement import PlacementPlan, plan_placement

_MORE_SECONDS = 1.0

Life = tuple[NodeName, int]
"""One life of a node: its name and incarnation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileConfig:
    """How the reconciler decides."""

    dead_after_seconds: float = 30.0
    """A node that has been away for this long is replaced."""
    drain_patience_seconds: float = 60.0
    """A replica on a draining node waits this long for a place elsewhere. Then it stops without one."""
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    """When the number of replicas follows the load."""
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    """When a model that fits nowhere is left alone."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When many nodes that are lost at once are not believed to be dead."""
    max_coming_per_model: int = 4
    """Replicas of one model that may be loading at once on the reconciler's account."""
    max_searches: int = 32
    """Models that one plan looks for a place for. The others' turn comes with the next: planning holds up the process
    that it runs in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileState:
    """What the reconciler remembers from one plan to the next. A new leader begins with an empty one."""

    absent_since: Mapping[Life, float] = field(default_factory=lambda: MappingProxyType({}))
    """When a life of a node that replicas belong to was first seen to be over, on the caller's clock."""
    moving_since: Mapping[ModelName, float] = field(default_factory=lambda: MappingProxyType({}))
    """Since when a model has replicas on draining nodes, on the caller's clock."""
    usage: Mapping[ModelName, Usage] = field(default_factory=lambda: MappingProxyType({}))
    """How much models were used, as seen from plan to plan."""
    seen_at: float = -inf
    """When the last plan was made, on the caller's clock."""
    troubles: Mapping[ModelName, Trouble] = field(default_factory=lambda: MappingProxyType({}))
    """Models that were found no place for."""
    seen: Snapshot | None = None
    """What the last plan was made of: a change of capacity is seen by it."""
    guard: GuardState = field(default_factory=GuardState)
    """Which nodes were lost of late."""
    resume_after: str = ""
    """Model at which the last plan stopped looking for places; empty when it got through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Place a replica (T1)."""

    plan: PlacementPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Let a replica take no new lock (T3a)."""

    replica: ReplicaRecord
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Let the node stop a replica, if nobody holds it (T3)."""

    replica: ReplicaRecord
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Remove the record and claims of a replica whose node has been away for too long in that life."""

    replica: ReplicaRecord
    why: str


Action = Place | Drain | Unload | Forget


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now. The actions do not conflict with one another: no two place the same model or on the same node."""

    actions: tuple[Action, ...]
    state: ReconcileState
    """To be given to the next plan."""
    unplaced: Mapping[ModelName, PlacementFailed] = field(default_factory=lambda: MappingProxyType({}))
    """Models that need a replica which fits nowhere, and why."""
    guard: SetGuard | LiftGuard | None = None
    """What becomes of the mass-expiry guard."""
    warnings: Mapping[ModelName, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """What else an operator should know of a model, a sentence each."""
    wake_after_seconds: float | None = None
    """When a plan of the same snapshot may differ; None for never."""


def reconcile(
    snapshot: Snapshot,
    *,
    now: float,
    state: ReconcileState,
    config: ReconcileConfig | None = None,
    waiting: Mapping[ModelName, int] = MappingProxyType({}),
) -> Plan:
    """Return what brings the mesh nearer to what is wanted.

    Args:
        snapshot: The mesh.
        now: Seconds on a monotonic clock.
        state: That of the plan before.
        config: How to decide.
        waiting: Requests that wait for a slot, by model, as far as the caller knows.
    """
    config = config or ReconcileConfig()
    absent = _absent_since(snapshot, now=now, before=state.absent_since)
    usage = _usage(snapshot, now=now, before=state, waiting=waiting, config=config.autoscale)
    guard, guard_step = watch(snapshot, now=now, before=state.guard, config=config.guard)
    if snapshot.guarded or guard_step is not None:
        state = replace(state, absent_since=absent, usage=usage, seen_at=now, guard=guard)
        return Plan(actions=(), state=state, guard=guard_step)
    over = {life for life, since in absent.items() if now - since >= config.dead_after_seconds}
    waits = [since + config.dead_after_seconds - now for life, since in absent.items() if life not in over]
    moving = _moving_since(snapshot, now=now, before=state.moving_since)
    patience = {name: since + config.drain_patience_seconds - now for name, since in moving.items()}
    waits += [left for left in patience.values() if left > 0]
    if (change := next_change(usage, now=now, config=config.autoscale)) is not None:
        waits.append(change)
    trends = {name: trend(used, now=now, config=config.autoscale) for name, used in usage.items()}
    troubles = remaining(state.troubles, state.seen, snapshot, now=now, config=config.breaker)
    planner = _Planner(snapshot, now=now, over=over, patience=patience, trends=trends, troubles=troubles, config=config)
    resume_after = planner.run(state.resume_after)
    waits += planner.next_looks()
    if resume_after:
        waits.append(_MORE_SECONDS)
    return Plan(
        actions=tuple(planner.actions),
        state=ReconcileState(
            absent_since=absent,
            moving_since=moving,
            usage=usage,
            seen_at=now,
            troubles=MappingProxyType(planner.troubles),
            seen=snapshot,
            guard=guard,
            resume_after=resume_after,
        ),
        unplaced=MappingProxyType(planner.unplaced),
        warnings=MappingProxyType(planner.warnings()),
        wake_after_seconds=min(waits, default=None),
    )


def _absent_since(snapshot: Snapshot, *, now: float, before: Mapping[Life, float]) -> Mapping[Life, float]:
    lives = {(r.id.node, r.incarnation) for r in snapshot.all_replicas() if not snapshot.present(r)}
    return MappingProxyType({life: before.get(life, now) for life in sorted(lives)})


def _usage(
    snapshot: Snapshot,
    *,
    now: float,
    before: ReconcileState,
    waiting: Mapping[ModelName, int],
    config: AutoscaleConfig,
) -> Mapping[ModelName, Usage]:
    # Nobody looked for a while, so nobody knows what was used meanwhile: every count begins anew.
    known = before.usage if now - before.seen_at <= config.blind_seconds else {}
    return observe(snapshot, now=now, before=known, waiting=waiting, config=config)


def _moving_since(snapshot: Snapshot, *, now: float, before: Mapping[ModelName, float]) -> Mapping[ModelName, float]:
    if not any(approval.draining for approval in snapshot.approvals.values()):
        return MappingProxyType({})
    models = {r.id.model for r in on_draining_nodes(snapshot, list(snapshot.all_replicas()))}
    return MappingProxyType({model: before.get(model, now) for model in sorted(models)})


class _Planner:
    """Collects the actions of one plan. Lives for one call of `reconcile`."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        now: float,
        over: set[Life],
        patience: Mapping[ModelName, float],
        trends: Mapping[ModelName, Trend],
        troubles: Mapping[ModelName, Trouble],
        config: ReconcileConfig,
    ) -> None:
        self.actions: list[Action] = []
        self.unplaced: dict[ModelName, PlacementFailed] = {}
        self._actual = snapshot
        self._assumed = snapshot
        self.troubles: dict[ModelName, Trouble] = {}
        self._now = now
        self._known_troubles = troubles
        self._config = config
        self._patience = patience
        self._trends = trends
        self._moves: dict[ModelName, Move] = {}
        self._used_nodes: set[NodeName] = set()
        self._dead = frozenset(
            r.id for r in snapshot.all_replicas() if not snapshot.present(r) and (r.id.node, r.incarnation) in over
        )

    def run(self, resume_after: str) -> str:
        """Plan; return the model to resume after, empty when nothing is left to look for."""
        names = sorted({*self._actual.models, *self._actual.replicas})
        wanting = [name for name in names if self._end_what_is_not_wanted(name)]
        hopeless = {name: t for name, t in self._known_troubles.items() if t.open(self._config.breaker)}
        self.troubles.update(hopeless)
        self.unplaced.update({name: hopeless[name].error for name in wanting if name in hopeless})
        # From where the last plan stopped, and round: no model waits behind others that fit nowhere.
        wanting = [name for name in wanting if name not in hopeless]
        begin = bisect_right(wanting, resume_after)
        turn = [*wanting[begin:], *wanting[:begin]]
        for name in turn[: self._config.max_searches]:
            self._get_one(name)
        later = turn[self._config.max_searches :]
        self.troubles.update({name: self._known_troubles[name] for name in later if name in self._known_troubles})
        return turn[self._config.max_searches - 1] if later else ""

    def next_looks(self) -> list[float]:
        """Return in how many seconds models that fit nowhere are looked at again."""
        breaker = self._config.breaker
        return [
            max(0.0, (t.ends_at(breaker) if t.open(breaker) else t.counted_at + breaker.tick_seconds) - self._now)
            for t in self.troubles.values()
        ]

    def _end_what_is_not_wanted(self, name: ModelName) -> bool:
        """Plan what ends replicas of a model; return whether it wants another one."""
        replicas = self._replicas(name)
        unknown = [r for r in replicas if r.id in self._dead and r.id.node in self._actual.nodes]
        self._forget(unknown, why="its node has registered again without it")
        self._finish_draining(replicas)
        model = self._actual.models.get(name)
        if model is None:
            self._stop([r for r in replicas if self._stoppable(r)], why="its model was deleted")
            return False
        old, new = self._live(model)
        self._move(model, new)
        self._stop(list(self._superseded(model, old, new)), why=f"revision {model.revision} replaces it")
        self._stop(list(self._beyond_node(model, old, new)), why="its node is to hold fewer of the model")
        self._stop(self._surplus(model, old, new), why="the model has more replicas than its maximum")
        self._follow_use_down(model, old, new)
        lost = not old and not new and any(r.id in self._dead for r in replicas)
        coming = sum(1 for r in new if r.state.coming)
        return self._too_few(model, old, new, lost=lost) and coming < self._config.max_coming_per_model

    def _too_few(
        self, model: ModelRecord, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord], *, lost: bool
    ) -> bool:
        name = model.spec.name
        if self._actual.policy(name).spread_all:
            covered = {r.id.node for r in new}
            return any(node not in covered for node in self._actual.selected_nodes(name))
        moved = self._moves[name].wanted if name in self._moves else 0
        wanted = max(self._actual.policy(name).min_replicas, len(old), 1 if lost else 0, moved)
        return len(new) < wanted or self._use_wants_more(name, old, new)

    def _use_wants_more(self, name: ModelName, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord]) -> bool:
        """Whether the model gets one more for its load: one at a time, and not in the middle of other changes."""
        if self._trends.get(name) is not Trend.MORE or old or any(r.state.coming for r in new):
            return False
        most = self._actual.policy(name).max_replicas
        return not most or len(self._replicas(name)) < most

    def _follow_use_down(self, model: ModelRecord, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord]) -> None:
        """Stop one replica that the load does not need, unless something else is being changed."""
        way, policy = self._trends.get(model.spec.name, Trend.STAY), self._actual.policy(model.spec.name)
        if way not in (Trend.FEWER, Trend.NONE) or policy.spread_all or policy.pinned:
            return
        replicas = self._replicas(model.spec.name)
        if old or any(r not in new or r.state.coming or r.id in self._stopped() for r in replicas):
            return
        if len(new) > max(policy.min_replicas, 1 if way is Trend.FEWER else 0):
            replica = min(new, key=lambda r: (-r.id.index, r.id))
            if way is Trend.FEWER:
                self._stop([replica], why="the load needs one fewer")
            elif self._stoppable(replica) and not self._held(replica):
                # T3 alone, without draining first: whoever locks it in this moment keeps it.
                self.actions.append(Unload(replica=replica, why="nobody has used the model for a while"))

    def _get_one(self, name: ModelName) -> None:
        """Plan another replica of a model."""
        replicas, most = self._replicas(name), self._actual.policy(name).max_replicas
        dead = [r for r in replicas if r.id in self._dead]
        if dead and most and len(replicas) >= most:
            # Never more records than the maximum: the dead one's place is taken from it before it is given away.
            self._forget(dead[-1:], why="it is replaced")
        else:
            self._place(self._actual.models[name])

    def _replicas(self, name: ModelName) -> list[ReplicaRecord]:
        return sorted(self._actual.replicas_of(name), key=lambda r: r.id)

    def _live(self, model: ModelRecord) -> tuple[list[ReplicaRecord], list[ReplicaRecord]]:
        """Return the replicas that serve or will, of old revisions and of the present one."""
        live = [r for r in self._replicas(model.spec.name) if self._counts(r)]
        old = [r for r in live if r.revision != model.revision]
        return old, [r for r in live if r.revision == model.revision]

    def _place(self, model: ModelRecord) -> None:
        name = model.spec.name
        try:
            plan = plan_placement(self._assumed, name)
        except PlacementFailed as error:
            self.unplaced[name] = error
            old, new = self._live(model)
            room_comes = isinstance(error, NoCapacity) and not new and self._make_room(model, old)
            if not room_comes and error.retry_after_seconds is None:
                self.troubles[name] = failed_again(
                    self._known_troubles.get(name), error, now=self._now, config=self._config.breaker
                )
            return
        # A second claim on a device conflicts with the first: the node's turn comes again with the next snapshot.
        if plan.replica.node not in self._used_nodes:
            self._used_nodes.add(plan.replica.node)
            self.actions.append(Place(plan=plan))
        self._assumed = with_placement(self._assumed, plan)

    def _make_room(self, model: ModelRecord, old: Sequence[ReplicaRecord]) -> bool:
        """Replace a replica of the old revision in place, where the two do not fit side by side.

        Returns:
            Whether room is on its way.
        """
        stopped, replicas = self._stopped(), self._replicas(model.spec.name)
        if any((r.state.leaving and r.id not in self._dead) or r.id in stopped for r in replicas):
            return True
        for replica in sorted((r for r in old if self._stoppable(r)), key=lambda r: (-r.id.index, r.id)):
            try:
                plan_placement(without_replica(self._assumed, replica), model.spec.name)
            except PlacementFailed:
                continue
            self._stop([replica], why=f"revision {model.revision} does not fit beside it")
            return True
        return False

    def _move(self, model: ModelRecord, new: Sequence[ReplicaRecord]) -> None:
        """Plan what becomes of a model's replicas on draining nodes."""
        patience = self._patience.get(model.spec.name)
        if patience is not None:
            move = plan_move(self._actual, model, new, out_of_patience=patience <= 0)
            self._stop(move.stop, why=move.why)
            self._moves[model.spec.name] = move

    def warnings(self) -> dict[ModelName, tuple[str, ...]]:
        """Return what an operator should know beside what has no place."""
        return {name: told for name in sorted(self.unplaced) if (told := (*self._left_alone(name), *self._stuck(name)))}

    def _left_alone(self, name: ModelName) -> Iterator[str]:
        trouble = self.troubles.get(name)
        if trouble is not None and trouble.open(self._config.breaker):
            yield (
                f"The model {name} is unsatisfiable: no place is looked for in the next"
                f" {trouble.ends_at(self._config.breaker) - self._now:.0f} s, unless capacity changes."
            )

    def _stuck(self, name: ModelName) -> Iterator[str]:
        for replica in self._moves[name].left if name in self._moves else ():
            yield (
                f"The node {replica.id.node} drains, and the replica {replica.id} has nowhere else to go: it"
                f" stops without a replacement in {max(0.0, self._patience[name]):.0f} s."
            )

    def _superseded(
        self, model: ModelRecord, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord]
    ) -> Iterator[ReplicaRecord]:
        immediate = self._actual.policy(model.spec.name).immediate
        serving = any(r.state is ReplicaState.READY and self._actual.present(r) for r in new)
        for replica in old:
            # What has not finished loading is never wanted again: the node is not even told its spec any more.
            if self._stoppable(replica) and (immediate or serving or replica.state.coming):
                yield replica

    def _beyond_node(
        self, model: ModelRecord, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord]
    ) -> Iterator[ReplicaRecord]:
        """Yield what nodes hold beyond their slots; the lowest indices stay.

        With `spread_all` also what a node holds beyond one of a revision, and all on nodes that match no more.
        """
        policy, stopped = self._actual.policy(model.spec.name), self._stopped()
        live = [r for r in (*old, *new) if r.id not in stopped and self._stoppable(r)]
        for node in sorted({r.id.node for r in live}):
            here = sorted((r for r in live if r.id.node == node), key=lambda r: (r.state.coming, r.id))
            if policy.spread_all and self._actual.selector_mismatch(policy, node) is not None:
                yield from here
                continue
            slots, seen = self._actual.max_replicas_on(node), set[str]()
            for place, replica in enumerate(here):
                if place >= slots or (policy.spread_all and replica.revision in seen):
                    yield replica
                seen.add(replica.revision)

    def _surplus(
        self, model: ModelRecord, old: Sequence[ReplicaRecord], new: Sequence[ReplicaRecord]
    ) -> list[ReplicaRecord]:
        policy = self._actual.policy(model.spec.name)
        limit = 0 if policy.spread_all else policy.max_replicas
        stopped = self._stopped()
        live = [r for r in (*old, *new) if r.id not in stopped]
        if not limit or len(live) <= limit:
            return []
        order = sorted((r for r in live if self._stoppable(r)), key=lambda r: (not r.state.coming, -r.id.index, r.id))
        return order[: len(live) - limit]

    def _forget(self, replicas: Sequence[ReplicaRecord], *, why: str) -> None:
        forgotten = {a.replica.id for a in self.actions if isinstance(a, Forget)}
        self.actions.extend(Forget(replica=r, why=why) for r in replicas if r.id not in forgotten)

    def _finish_draining(self, replicas: Sequence[ReplicaRecord]) -> None:
        for replica in replicas:
            if replica.state is ReplicaState.DRAINING and self._actual.present(replica) and not self._held(replica):
                self.actions.append(Unload(replica=replica, why="it has drained"))

    def _stop(self, replicas: Sequence[ReplicaRecord], *, why: str) -> None:
        for replica in replicas:
            if replica.state is ReplicaState.READY:
                self.actions.append(Drain(replica=replica, why=why))
            else:
                self.actions.append(Unload(replica=replica, why=why))

    def _stopped(self) -> set[ReplicaId]:
        return {a.replica.id for a in self.actions if isinstance(a, Drain | Unload)}

    def _counts(self, replica: ReplicaRecord) -> bool:
        """Whether a replica serves or will: not leaving, and on a node that is not lost or out of use."""
        if replica.state.leaving or replica.id in self._dead:
            return False
        return not self._actual.present(replica) or self._actual.usable(replica.id.node)

    def _stoppable(self, replica: ReplicaRecord) -> bool:
        """Whether there is a node to stop it, and it was not told to yet."""
        return self._actual.present(replica) and not replica.state.leaving

    def _held(self, replica: ReplicaRecord) -> bool:
        return bool(self._actual.inflight.get(replica.id))
