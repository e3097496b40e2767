"""Filters of the placement: each looks at one node and says why a model cannot go there, or nothing.

The order of `FILTERS` matters. A node is judged by the first filter that it fails, and the placement as a whole by the
filter that the nodes came furthest to: where one node lacks the engine and another one only the memory, memory is what
is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from localmesh.core.errors import EngineUnavailable, NoCapacity, NoNodes, PlacementFailed, SourceMissing
from localmesh.core.ids import NodeName, ReplicaId
from localmesh.core.records import DeviceRecord, EngineInfo, ModelRecord, NodeRecord, Policy, SourceRecord
from localmesh.core.snapshot import Snapshot

_NO_INDICES: frozenset[int] = frozenset()
_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)  # no slots: what several filters ask for is worked out once
class Question:
    """What is to be placed, and on what."""

    snapshot: Snapshot
    model: ModelRecord
    policy: Policy
    excluded: frozenset[NodeName] = frozenset()
    """Nodes that the caller does not want."""

    def node(self, name: NodeName) -> NodeRecord:
        """Return a node that is known to be present."""
        return self.snapshot.nodes[name]

    def engine(self, name: NodeName) -> EngineInfo | None:
        """Return the model's engine on a node."""
        return self.node(name).engine(self.model.spec.backend)

    def source(self, name: NodeName) -> SourceRecord | None:
        """Return what a node knows of the model's files, if that is about the present revision."""
        found = self.snapshot.sources.get(name, {}).get(self.model.spec.name)
        return found if found is not None and found.revision == self.model.revision else None

    def needed_bytes(self, name: NodeName) -> int:
        """Return the memory that a replica takes on a node; 0 where nobody can tell."""
        if self.model.spec.memory_bytes:
            return self.model.spec.memory_bytes
        source = self.source(name)
        return source.memory_bytes if source is not None else 0

    @cached_property
    def replica_count(self) -> int:
        """Number of the model's replicas, in whatever state they are."""
        return sum(1 for _ in self.snapshot.replicas_of(self.model.spec.name))

    def indices(self, name: NodeName) -> frozenset[int]:
        """Return the indices that the model's replicas occupy on a node, in whatever state they are."""
        return self._indices.get(name, _NO_INDICES)

    @cached_property
    def _indices(self) -> Mapping[NodeName, frozenset[int]]:
        found: dict[NodeName, set[int]] = {}
        for replica in self.snapshot.replicas_of(self.model.spec.name):
            found.setdefault(replica.id.node, set()).add(replica.id.index)
        return {node: frozenset(indices) for node, indices in found.items()}

    def kinds(self, name: NodeName) -> tuple[str, ...]:
        """Return the kinds of device that both the engine and the spec allow on a node, the better ones first."""
        engine = self.engine(name)
        allowed = engine.device_kinds if engine is not None else ()
        wanted = self.model.spec.device_kind
        return tuple(kind for kind in ("gpu", "cpu") if kind in allowed and wanted in ("", kind))

    def devices(self, name: NodeName) -> list[tuple[DeviceRecord, int]]:
        """Return the node's devices of those kinds with what is free, the better kinds first, then the more free."""
        if name not in self._devices:
            kinds = self.kinds(name)
            found = ((d, self._free_bytes(d)) for d in self.snapshot.devices.get(name, {}).values() if d.kind in kinds)
            self._devices[name] = sorted(found, key=lambda df: (kinds.index(df[0].kind), -df[1], df[0].id))
        return self._devices[name]

    @cached_property
    def _devices(self) -> dict[NodeName, list[tuple[DeviceRecord, int]]]:
        return {}

    def _free_bytes(self, device: DeviceRecord) -> int:
        """Return what can be claimed on a device.

        That is what is unclaimed of its budget, or what was measured to be free if that is less. The measurement does
        not show yet what replicas that are still loading will take: their claims come off. A device without a
        measurement is not a full one.
        """
        measured = self.snapshot.measured.get(device.node)
        if measured is None or device.id not in measured.free_bytes:
            return device.unclaimed_bytes
        loading = sum(n for replica, n in device.claims.items() if self._coming(replica))
        return min(device.unclaimed_bytes, measured.free_bytes[device.id] - loading)

    def _coming(self, replica: ReplicaId) -> bool:
        record = self.snapshot.replica(replica)
        return record is not None and record.state.coming


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One reason for which a node may be no place for a model."""

    name: str
    error: type[PlacementFailed]
    """What a placement fails with when no node gets further than this."""
    check: Callable[[Question, NodeName], str | None]
    """Return why the node is out, as the rest of a sentence that begins with its name, or None."""
    passes_by_itself: bool = False
    """Whether it is over within a second or so without anybody doing anything."""


def _usable(question: Question, node: NodeName) -> str | None:
    if node in question.excluded:
        return "is not considered"
    if question.snapshot.usable(node):
        return None
    approval = question.snapshot.approvals.get(node)
    if approval is None or not approval.approved:
        return "waits for approval"
    return "is draining" if approval.draining else "is cordoned"


def _selector(question: Question, node: NodeName) -> str | None:
    if not question.policy.node_selector:
        return None
    labels = effective_labels(question.snapshot, node)
    for key, value in sorted(question.policy.node_selector.items()):
        if key not in labels:
            return f"has no label {key!r} (the selector wants {value!r})"
        if labels[key] != value:
            return f"has the label {key}={labels[key]!r} (the selector wants {value!r})"
    return None


def _engine(question: Question, node: NodeName) -> str | None:
    name = question.model.spec.backend
    engine = question.engine(node)
    if engine is None:
        return f"does not know the engine {name!r}"
    if not engine.available:
        return f"cannot run the engine {name!r}: {engine.detail or 'it is not installed'}"
    if not question.kinds(node):
        hint = f" ({engine.detail})" if engine.detail else ""
        wanted, able = question.model.spec.device_kind, ", ".join(engine.device_kinds) or "no device"
        return f"runs the engine {name!r} on {able} only, not on {wanted!r}{hint}"
    return None


def _device(question: Question, node: NodeName) -> str | None:
    if question.devices(node):
        return None
    return f"has no {' or '.join(question.kinds(node))} device"


def _source(question: Question, node: NodeName) -> str | None:
    source = question.source(node)
    if source is None or source.present:
        return None
    return f"has no {source.path or question.model.spec.source}" + (f" ({source.problem})" if source.problem else "")


def _source_known(question: Question, node: NodeName) -> str | None:
    if question.source(node) is not None:
        return None
    return f"has not said yet whether it has {question.model.spec.source!r}"


def _maximum(question: Question, node: NodeName) -> str | None:  # noqa: ARG001 - the same for every node
    limit = question.policy.max_replicas
    if limit and question.replica_count >= limit:
        return f"is not asked: the model has {question.replica_count} of at most {limit} replicas"
    return None


def _slot(question: Question, node: NodeName) -> str | None:
    held, limit = len(question.indices(node)), question.node(node).max_replicas_per_model
    if held >= limit:
        return f"holds {held} of at most {limit} replicas of the model (max-replicas-per-model)"
    return None


def _failure(question: Question, node: NodeName) -> str | None:
    failure = question.snapshot.failures.get(question.model.spec.name, {}).get(node)
    if failure is None or failure.revision not in ("", question.model.revision):
        return None
    return f"failed to load it a short while ago ({failure.reason}: {failure.message})"


def _memory(question: Question, node: NodeName) -> str | None:
    needed = question.needed_bytes(node)
    devices = question.devices(node)
    if any(free >= needed for _, free in devices):
        return None
    free = ", ".join(f"{d.id} has {human_bytes(max(0, n))} free of {human_bytes(d.budget_bytes)}" for d, n in devices)
    return f"lacks memory: {human_bytes(needed)} needed, {free}"


FILTERS: tuple[Filter, ...] = (
    Filter(name="usable", error=NoNodes, check=_usable),
    Filter(name="selector", error=NoCapacity, check=_selector),
    Filter(name="engine", error=EngineUnavailable, check=_engine),
    Filter(name="device", error=NoCapacity, check=_device),
    Filter(name="source", error=SourceMissing, check=_source),
    Filter(name="source-known", error=NoCapacity, check=_source_known, passes_by_itself=True),
    Filter(name="maximum", error=NoCapacity, check=_maximum),
    Filter(name="slot", error=NoCapacity, check=_slot),
    Filter(name="failure", error=NoCapacity, check=_failure),
    Filter(name="memory", error=NoCapacity, check=_memory),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the filters say of one node."""

    node: NodeName
    stage: int
    """Number of filters passed; all of them when the node is feasible."""
    failed: Filter | None = None
    reason: str = ""
    """Why not, as the rest of a sentence that begins with the node's name."""

    def __str__(self) -> str:
        """Return the whole sentence, without a full stop."""
        return f"{self.node} {self.reason or 'can take it'}"


def judge(question: Question) -> list[Verdict]:
    """Return a verdict on every present node, by name."""
    return [_judge(question, node) for node in sorted(question.snapshot.nodes)]


def _judge(question: Question, node: NodeName) -> Verdict:
    for stage, one in enumerate(FILTERS):
        reason = one.check(question, node)
        if reason is not None:
            return Verdict(node=node, stage=stage, failed=one, reason=reason)
    return Verdict(node=node, stage=len(FILTERS))


def effective_labels(snapshot: Snapshot, node: NodeName) -> Mapping[str, str]:
    """Return a node's labels, the operator's over the worker's."""
    record, approval = snapshot.nodes.get(node), snapshot.approvals.get(node)
    return {**(record.labels if record else {}), **(approval.labels if approval else {})}


def human_bytes(count: int) -> str:
    """Return a number of bytes for people: "1.5 GiB", "300 MiB", "17 B"."""
    if count >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    return f"{count / _MIB:.0f} MiB" if count >= _MIB else f"{count} B"
