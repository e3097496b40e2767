"""Which replicas are stopped to make room for another model.

Only what is idle, least recently used first, and only on a node that lacks nothing but room: memory, or a place free of
models that never share a node with the new one. Never stopped are replicas of the model itself, of a model that is
pinned or spread over all nodes, or that its model's minimum needs; nor any that somebody holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from localmesh.core.errors import PlacementFailed
from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import without_replicas
from localmesh.scheduling.filters import FILTERS, judge
from localmesh.scheduling.placement import plan_placement
from localmesh.scheduling.question import Question

MAX_VICTIMS = 16
"""Replicas stopped at most for one: all go in one transaction."""
_MAX_KEEPERS = 64
"""Replicas that one transaction watches over at most."""
_MOST_TRIES = 400
"""Sets of victims that are looked at before a good one is taken for the best. Planning holds up the process."""
_NODES_IN_SENTENCE = 4
_REPLICAS_IN_SENTENCE = 6
_CURABLE = ("group", "memory")
"""Filters that a node may pass once replicas of other models are gone."""
_FROM_GROUP_ON = FILTERS[[f.name for f in FILTERS].index("group") :]

LastUsed = Callable[[ReplicaRecord], int]
"""When a replica was last used, on any logical clock: less is longer ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A replica to stop."""

    replica: ReplicaRecord
    keepers: tuple[ReplicaRecord, ...] = ()
    """Replicas of its model that its minimum is made of: it may only be stopped while these stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPlan:
    """Replicas to stop, and who gets their memory: what T3 writes, if nothing has changed meanwhile."""

    heir: ReplicaId
    """Who gets the memory."""
    node: NodeName
    incarnation: int
    devices: Mapping[DeviceId, int]
    """Bytes that the heir will claim on each device."""
    victims: tuple[Victim, ...]
    """At least one, the least recently used first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacles:
    """Why nothing can be evicted."""

    sentence: str
    """What is in the way, without a full stop; empty where stopping replicas would not help."""
    may_pass: bool
    """Whether there would be room once what is busy or loading has become idle."""


def by_age(replica: ReplicaRecord) -> int:
    """Return the revision of the replica's record: it was last written when it became READY, or was adopted."""
    return replica.mod_revision


def plan_eviction(
    snapshot: Snapshot,
    model: ModelName,
    *,
    last_used: LastUsed = by_age,
    protected: frozenset[ReplicaId] = frozenset(),
) -> EvictionPlan | None:
    """Return what to stop so that a replica of the model fits; the same snapshot always gives the same plan.

    The fewest replicas that are enough; among as many, the set whose most recently used one was used longest ago. None
    while there is room, or room is on its way because something is being stopped already.

    Args:
        snapshot: The mesh.
        model: Which model needs room.
        last_used: When a replica was last used. The snapshot knows of present use only.
        protected: Replicas that the caller knows to be needed, for reasons that the snapshot does not show yet.
    """
    record = snapshot.models.get(model)
    if record is None or snapshot.guarded or _room_is_coming(snapshot, model):
        return None
    search = _Search(snapshot, model, last_used, protected, hopeful=False)
    return None if search.has_room else search.best()


def obstacles(snapshot: Snapshot, model: ModelName, *, protected: frozenset[ReplicaId] = frozenset()) -> Obstacles:
    """Return what is in the way of an eviction for the model, where `plan_eviction` finds none."""
    if model not in snapshot.models:
        return Obstacles(sentence="", may_pass=False)
    if snapshot.guarded:
        return Obstacles(sentence="nothing is stopped while many nodes are away at once", may_pass=True)
    search = _Search(snapshot, model, by_age, protected, hopeful=True)
    return Obstacles(sentence=search.sentence(), may_pass=_room_is_coming(snapshot, model) or search.hopeful())


def _room_is_coming(snapshot: Snapshot, model: ModelName) -> bool:
    """Whether something is being stopped, and the model fits once that is gone."""
    leaving = [r for r in snapshot.all_replicas() if r.state.leaving and snapshot.present(r)]
    if any(r.memory_for is not None and r.memory_for.model == model for r in leaving):
        return True
    freed = [r for r in leaving if r.memory_for is None]
    if not freed:
        return False
    try:
        plan_placement(without_replicas(snapshot, freed), model)
    except PlacementFailed:
        return False
    return True


class _Search:
    """Looks for the best set of victims. Lives for one call.

    Args:
        snapshot: The mesh.
        model: Which model needs room.
        last_used: When a replica was last used.
        protected: Replicas that are needed.
        hopeful: Take what is busy or loading for idle.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        model: ModelName,
        last_used: LastUsed,
        protected: frozenset[ReplicaId],
        *,
        hopeful: bool,
    ) -> None:
        self._snapshot = snapshot
        self._model = snapshot.models[model]
        self._name = model
        self._last_used = last_used
        self._protected = protected
        self._takes_busy = hopeful
        self._tries = _MOST_TRIES
        self._members = snapshot.group_members(model)
        self._loaded = _loaded(snapshot)
        self._asked = self._question(snapshot)
        verdicts = judge(self._asked)
        self.has_room = any(v.failed is None for v in verdicts)
        self._nodes = [v.node for v in verdicts if v.failed is not None and v.failed.name in _CURABLE]
        self._by_node: dict[NodeName, list[ReplicaRecord]] = {node: [] for node in self._nodes}
        for replica in snapshot.all_replicas():
            if replica.id.node in self._by_node:
                self._by_node[replica.id.node].append(replica)

    def best(self) -> EvictionPlan | None:
        """Return the best plan: the fewest victims, then those used longest ago, then the first node by name."""
        best: tuple[tuple[int, list[int]], NodeName, list[ReplicaRecord]] | None = None
        for bound, node in sorted((bound, n) for n in self._nodes if (bound := self._bound(n)) is not None):
            if best is not None and (best[0][0], best[0][1][0]) < bound:
                break  # no set of this or of any later node can be better
            if self._tries <= (0 if best is not None else -_MOST_TRIES):
                break
            victims = self._victims(node, MAX_VICTIMS if best is None else best[0][0])
            if victims is not None:
                key = (len(victims), sorted((self._last_used(v) for v in victims), reverse=True))
                if best is None or (key, node) < best[:2]:
                    best = (key, node, victims)
        return None if best is None else self._plan(best[1], best[2])

    def _bound(self, node: NodeName) -> tuple[int, int] | None:
        """Return how many must go at least, and how young one of so many is at least; None if hopeless."""
        candidates = self._candidates(node)
        if not candidates:
            return None
        members = [r for r in candidates if r.id.model in self._members]
        freed = [sum(r.devices.values()) for r in (*self._going(node), *members)]
        rooms = [room for _, room in self._asked.devices(node)]
        short = self._asked.needed_bytes(node) - max(rooms, default=0) - sum(freed)
        fewest = len(members)
        for size in sorted((sum(r.devices.values()) for r in candidates if r not in members), reverse=True):
            if short <= 0 and fewest:
                break
            short, fewest = short - size, fewest + 1
        if short > 0 or fewest > MAX_VICTIMS:
            return None
        return fewest, self._last_used(candidates[fewest - 1])

    def _going(self, node: NodeName) -> list[ReplicaRecord]:
        """Return what is being stopped on a node, and for nobody."""
        present = self._snapshot.present
        return [r for r in self._by_node[node] if r.state.leaving and present(r) and r.memory_for is None]

    def hopeful(self) -> bool:
        """Return whether there would be room once all that may ever be stopped is idle, and stopped."""
        return any(self._fits(self._hoped(node), node, self._spared(node)) for node in self._nodes)

    def _hoped(self, node: NodeName) -> Snapshot:
        """Return the mesh with one node, without what is being stopped there, and what was handed over is used up.

        Whoever gets memory now can be stopped later, like everybody else.
        """
        local = self._local(node)
        local = without_replicas(local, [r for r in self._by_node[node] if r.state.leaving])
        here = {r.id for r in self._by_node[node] if not r.state.leaving}
        devices = {
            key: replace(device, claims={r: n for r, n in device.claims.items() if r in here or r.model == self._name})
            for key, device in local.devices[node].items()
        }
        return replace(local, devices={node: devices})

    def _spared(self, node: NodeName) -> list[ReplicaRecord]:
        """Return what may be stopped on a node, and all of it together, the least recently used first."""
        found: list[ReplicaRecord] = []
        for replica in self._candidates(node):
            if self._keeps_minimum([*found, replica]):
                found.append(replica)
        return found

    def sentence(self) -> str:
        """Say for each node that lacks only room what keeps it from being made."""
        nodes = [f"on {n} {text}" for n in self._nodes[:_NODES_IN_SENTENCE] if (text := self._kept(n))]
        left = len(self._nodes) - _NODES_IN_SENTENCE
        return "; ".join(nodes) + (f"; and {left} more nodes" if nodes and left > 0 else "")

    def _kept(self, node: NodeName) -> str:
        kept = [(r, why) for r in sorted(self._by_node[node], key=lambda r: r.id) if (why := self._why_not(r))]
        more = f" and {len(kept) - _REPLICAS_IN_SENTENCE} more" if len(kept) > _REPLICAS_IN_SENTENCE else ""
        return ", ".join(f"{r.id.model!r} {why}" for r, why in kept[:_REPLICAS_IN_SENTENCE]) + more

    def _why_not(self, replica: ReplicaRecord) -> str | None:
        """Return why a replica is not stopped, as the rest of a sentence, whether or not that passes."""
        return self._never(replica) or self._not_now(replica)

    def _never(self, replica: ReplicaRecord) -> str | None:
        name = replica.id.model
        policy = self._snapshot.policy(name)
        if name == self._name:
            return "is the model itself"
        if policy.pinned:
            return "is pinned"
        if policy.spread_all:
            return "is to be on every node (spread_all)"
        if name in self._snapshot.models and policy.min_replicas and self._spare(replica) <= 0:
            return f"is kept by its minimum of {policy.min_replicas}"
        if not self._snapshot.present(replica):
            return "belongs to an earlier life of the node"
        return None

    def _not_now(self, replica: ReplicaRecord) -> str | None:
        if replica.state.leaving:
            return "is being stopped"
        if replica.state is not ReplicaState.READY:
            return "is loading"
        held = self._snapshot.inflight.get(replica.id)
        if not held and replica.id not in self._protected:
            return None
        return "has requests in flight" if self._snapshot.in_flight(replica.id) else "was in use a moment ago"

    def _spare(self, replica: ReplicaRecord) -> int:
        """Return how many of a model's replicas may go, with this one among them."""
        keepers = [r for r in self._loaded.get(replica.id.model, ()) if r.id != replica.id]
        minimum = self._snapshot.policy(replica.id.model).min_replicas
        return 0 if minimum > _MAX_KEEPERS else len(keepers) + 1 - minimum

    def _candidates(self, node: NodeName) -> list[ReplicaRecord]:
        """Return what may be stopped on a node, the least recently used first."""
        found = [
            r
            for r in self._by_node[node]
            if not r.state.leaving and not self._never(r) and (self._takes_busy or not self._not_now(r))
        ]
        return sorted(found, key=lambda r: (self._last_used(r), r.id))

    def _victims(self, node: NodeName, most: int) -> list[ReplicaRecord] | None:
        """Return the best set on a node, if there is one of that size."""
        local = self._local(node)
        candidates = self._candidates(node)
        bound = self._bound(node)
        if bound is None or not self._fits(local, node, candidates):
            return None
        # Members of the model's groups must go in any case; one that must stay keeps the node from passing.
        members = [r for r in candidates if r.id.model in self._members]
        others = [r for r in candidates if r.id.model not in self._members]
        fewest = max(0, bound[0] - len(members))
        for extra in range(fewest, min(most - len(members), len(others)) + 1):
            for chosen in _oldest_first(others, extra):
                victims = [*members, *chosen]
                if self._tries <= 0:
                    return self._good_enough(local, node, members, others, most)
                self._tries -= 1
                if victims and self._keeps_minimum(victims) and self._fits(local, node, victims):
                    return victims
        return None

    def _good_enough(
        self,
        local: Snapshot,
        node: NodeName,
        members: Sequence[ReplicaRecord],
        others: Sequence[ReplicaRecord],
        most: int,
    ) -> list[ReplicaRecord] | None:
        """Return a set without a replica too many, where there are too many sets to look at all."""
        self._tries -= len(others)
        victims = list(members)
        for replica in sorted(others, key=lambda r: -sum(r.devices.values())):  # stable: the older before the younger
            if self._fits(local, node, victims):
                break
            if self._keeps_minimum([*victims, replica]):
                victims.append(replica)
        for replica in [v for v in victims if v not in members]:
            fewer = [v for v in victims if v.id != replica.id]
            if self._fits(local, node, fewer):
                victims = fewer
        fits = bool(victims) and len(victims) <= most and self._fits(local, node, victims)
        return victims if fits and self._keeps_minimum(victims) else None

    def _keeps_minimum(self, victims: Sequence[ReplicaRecord]) -> bool:
        gone, keepers = {v.id for v in victims}, 0
        for name in {v.id.model for v in victims}:
            minimum = self._snapshot.policy(name).min_replicas if name in self._snapshot.models else 0
            keepers += minimum
            if minimum and sum(1 for r in self._loaded.get(name, ()) if r.id not in gone) < minimum:
                return False
        return keepers <= _MAX_KEEPERS

    def _fits(self, local: Snapshot, node: NodeName, victims: Sequence[ReplicaRecord]) -> bool:
        question = self._question(without_replicas(local, victims))
        return all(f.check(question, node) is None for f in _FROM_GROUP_ON)

    def _local(self, node: NodeName) -> Snapshot:
        """Return the mesh with what is on one node only: many sets are tried on it.

        What is being stopped is gone from it, except where its memory goes to somebody else. The filters that a node
        has passed before it lacked room do not change with what is stopped.
        """
        snapshot, here = self._snapshot, self._by_node[node]
        replicas: dict[ModelName, dict[ReplicaId, ReplicaRecord]] = {}
        for replica in here:
            replicas.setdefault(replica.id.model, {})[replica.id] = replica
        local = replace(
            snapshot,
            replicas=replicas,
            devices={node: snapshot.devices.get(node, {})},
            measured={n: m for n, m in snapshot.measured.items() if n == node},
        )
        return without_replicas(local, self._going(node))

    def _plan(self, node: NodeName, victims: Sequence[ReplicaRecord]) -> EvictionPlan:
        local = without_replicas(self._local(node), victims)
        gone = {v.id for v in victims}
        return EvictionPlan(
            heir=self._asked.replica(node),
            node=node,
            incarnation=self._snapshot.nodes[node].incarnation,
            devices=MappingProxyType(self._question(local).choice(node) or {}),
            victims=tuple(Victim(replica=v, keepers=self._keepers(v, gone)) for v in victims),
        )

    def _keepers(self, victim: ReplicaRecord, gone: set[ReplicaId]) -> tuple[ReplicaRecord, ...]:
        if victim.id.model not in self._snapshot.models:
            return ()
        minimum = self._snapshot.policy(victim.id.model).min_replicas
        return tuple(r for r in self._loaded.get(victim.id.model, ()) if r.id not in gone)[:minimum]

    def _question(self, snapshot: Snapshot) -> Question:
        return Question(snapshot=snapshot, model=self._model, policy=snapshot.policy(self._name))


def _loaded(snapshot: Snapshot) -> Mapping[ModelName, tuple[ReplicaRecord, ...]]:
    """Return the replicas that count towards a minimum, for the models that have one, in order."""
    return {
        name: tuple(sorted(snapshot.routable_replicas(name), key=lambda r: r.id))
        for name, record in snapshot.policies.items()
        if record.policy.min_replicas
    }


def _oldest_first(replicas: Sequence[ReplicaRecord], size: int) -> Iterator[tuple[ReplicaRecord, ...]]:
    """Yield every set of a size: first those whose youngest is oldest, among these by the next youngest, and so on."""
    if not size:
        yield ()
        return
    for last in range(size - 1, len(replicas)):
        for rest in _oldest_first(replicas[:last], size - 1):
            yield (*rest, replicas[last])
