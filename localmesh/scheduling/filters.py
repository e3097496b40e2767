"""Filters of the placement: each looks at one node and says why a model cannot go there, or nothing.

The order of `FILTERS` matters. A node is judged by the first filter that it fails, and the placement as a whole by the
filter that the nodes came furthest to: where one node lacks the engine and another one only the memory, memory is what
is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from localmesh.core.errors import EngineUnavailable, NoCapacity, NoNodes, PlacementFailed, SourceMissing
from localmesh.core.ids import NodeName
from localmesh.core.records import ReplicaState
from localmesh.scheduling.question import GANG_OVERHEAD_BYTES, Question

_GIB = 1 << 30
_MIB = 1 << 20
_DISK_PART = 20
"""A twentieth of the disk is left alone, and at least a GiB."""
_CONVERTING = ("minilm",)
"""Engines whose files a node converts into its cache before the first load."""


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
    after: tuple[str, ...] = ()
    """Names of filters without which this one has nothing to look at: where one of them failed, it is not asked."""


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
    return question.snapshot.selector_mismatch(question.policy, node)


def _engine(question: Question, node: NodeName) -> str | None:
    name = question.model.spec.backend
    engine = question.engine(node)
    if engine is None:
        return f"does not know the engine {name!r}"
    if not engine.available:
        return f"cannot run the engine {name!r}: {engine.detail or 'it is not installed'}"
    if not question.kinds(node):
        hint = f" ({engine.detail})" if engine.detail else ""
        wanted, able = question.model.spec.device_kind or "gpu", ", ".join(engine.device_kinds) or "no device"
        return f"runs the engine {name!r} on {able} only, not on {wanted!r}{hint}"
    return None


def _device(question: Question, node: NodeName) -> str | None:
    devices, count = question.devices(node), question.device_count
    if not devices:
        return f"has no {' or '.join(question.kinds(node))} device"
    if len(devices) < count:
        return f"has {len(devices)} of the {count} GPUs that a replica takes"
    return None


def _source(question: Question, node: NodeName) -> str | None:
    source = question.source(node)
    if source is None or source.present:
        return None
    return f"has no {source.path or question.model.spec.source}" + (f" ({source.problem})" if source.problem else "")


def _source_known(question: Question, node: NodeName) -> str | None:
    if question.hypothetical or question.source(node) is not None:
        return None
    return f"has not said yet whether it has {question.model.spec.source!r}"


def _maximum(question: Question, node: NodeName) -> str | None:  # noqa: ARG001 - the same for every node
    limit = question.policy.max_replicas
    if limit and question.replica_count >= limit:
        return f"is not asked: the model has {question.replica_count} of at most {limit} replicas"
    return None


def _spread(question: Question, node: NodeName) -> str | None:
    if question.policy.spread_all and node in question.current_nodes:
        return "has the one replica that each node gets (spread_all)"
    return None


def _slot(question: Question, node: NodeName) -> str | None:
    held, limit = len(question.indices(node)), question.snapshot.max_replicas_on(node)
    if held >= limit:
        return f"holds {held} of at most {limit} replicas of the model (max-replicas-per-model)"
    return None


def _group(question: Question, node: NodeName) -> str | None:
    member = question.members_by_node.get(node)
    if member is None:
        return None
    common = sorted({*question.policy.groups} & {*question.snapshot.policy(member).groups})
    return f"holds {member!r}, which never shares a node with it (group {', '.join(common)})"


def _failure(question: Question, node: NodeName) -> str | None:
    failure = question.snapshot.failures.get(question.model.spec.name, {}).get(node)
    if failure is None or failure.revision not in ("", question.model.revision):
        return None
    if failure.reason == "REPLICA_LOST":
        return f"loses it again and again ({failure.message})"
    often = f"{failure.attempts} times in a row" if failure.attempts > 1 else "a short while ago"
    return f"failed to load it {often} ({failure.reason}: {failure.message})"


def _disk(question: Question, node: NodeName) -> str | None:
    """The node must have room for what it writes before it can load, and some of its disk left afterwards."""
    source, measured = question.source(node), question.snapshot.measured.get(node)
    total = question.node(node).disk_total_bytes
    if question.model.spec.backend not in _CONVERTING or source is None or measured is None or not total:
        return None  # nothing is written, or nobody knows: unknown is not full
    replicas = question.snapshot.replicas_of(question.model.spec.name)
    if any(r.id.node == node and r.state is ReplicaState.READY for r in replicas):
        return None  # it was converted for that one
    reserve = max(total // _DISK_PART, _GIB)
    short = source.weights_bytes + reserve - measured.disk_free_bytes
    if short <= 0:
        return None
    return (
        f"lacks {human_bytes(short)} of disk: {human_bytes(source.weights_bytes)} to convert the model and"
        f" {human_bytes(reserve)} to be left free, {human_bytes(measured.disk_free_bytes)} free"
    )


def _memory(question: Question, node: NodeName) -> str | None:
    if question.choice(node) is not None:
        return None
    needed, count = human_bytes(question.needed_bytes(node)), question.device_count
    parts = (
        f"{device.id} has {human_bytes(max(0, room))} free of {human_bytes(device.budget_bytes)}"
        for device, room in question.devices(node)
    )
    if count > 1:
        needed = f"{needed} on each of {count} GPUs ({human_bytes(GANG_OVERHEAD_BYTES)} of it by itself)"
    shared = ", in memory that they share" if any(device.unified for device, _ in question.devices(node)) else ""
    return f"lacks memory: {needed} needed, {', '.join(parts)}{shared}"


FILTERS: tuple[Filter, ...] = (
    Filter(name="usable", error=NoNodes, check=_usable),
    Filter(name="selector", error=NoCapacity, check=_selector),
    Filter(name="engine", error=EngineUnavailable, check=_engine),
    Filter(name="device", error=NoCapacity, check=_device, after=("engine",)),
    Filter(name="source", error=SourceMissing, check=_source),
    Filter(name="source-known", error=NoCapacity, check=_source_known, passes_by_itself=True, after=("source",)),
    Filter(name="maximum", error=NoCapacity, check=_maximum),
    Filter(name="spread", error=NoCapacity, check=_spread),
    Filter(name="slot", error=NoCapacity, check=_slot),
    Filter(name="group", error=NoCapacity, check=_group),
    Filter(name="failure", error=NoCapacity, check=_failure),
    Filter(name="disk", error=NoCapacity, check=_disk, after=("source", "source-known")),
    Filter(name="memory", error=NoCapacity, check=_memory, after=("engine", "device", "source", "source-known")),
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


def human_bytes(count: int) -> str:
    """Return a number of bytes for people: "1.5 GiB", "300 MiB", "17 B"."""
    if count >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    return f"{count / _MIB:.0f} MiB" if count >= _MIB else f"{count} B"
