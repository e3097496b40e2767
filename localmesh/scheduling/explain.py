"""Why the next replica of a model would go where it would go: every filter's word on every node, and every scorer's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, unique
from types import MappingProxyType

from localmesh.core.errors import PlacementFailed
from localmesh.core.ids import NodeName
from localmesh.core.records import DeviceRecord, ModelRecord, Policy, PolicyRecord, SourceRecord
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.filters import FILTERS, human_bytes, judge
from localmesh.scheduling.placement import PlacementPlan, failure, feasible, plan_of
from localmesh.scheduling.question import Question
from localmesh.scheduling.scorers import SCORERS, Option, rank, scores

_NODES_IN_NOTE = 8


@unique
class Outcome(Enum):
    """What a filter says."""

    PASSED = 1
    FAILED = 2
    SKIPPED = 3
    """Another filter failed, without which this one has nothing to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterVerdict:
    """One filter on one node."""

    name: str
    outcome: Outcome
    reason: str = ""
    """Why it failed, a sentence without a full stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceVerdict:
    """One device of one node."""

    device: DeviceRecord
    room_bytes: int
    """What can be claimed on it now."""
    needed_bytes: int
    chosen: bool = False
    reason: str = ""
    """Why it cannot be taken, a sentence without a full stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeVerdict:
    """All that is said of one node."""

    node: NodeName
    filters: tuple[FilterVerdict, ...]
    devices: tuple[DeviceVerdict, ...]
    scores: Mapping[str, int]
    """By scorer, in their order; empty when a filter failed."""
    rank: int = 0
    """Place among the feasible nodes, from 1; 0 when a filter failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a placement would do, and why."""

    nodes: tuple[NodeVerdict, ...]
    """The feasible ones first, the best first; then the others by name."""
    plan: PlacementPlan | None
    failure: PlacementFailed | None
    """Why there is no plan."""
    notes: tuple[str, ...]
    """What else is to be known, a sentence each."""


def explain(snapshot: Snapshot, model: ModelRecord, policy: Policy, *, hypothetical: bool = False) -> Explanation:
    """Return what `plan_placement` would do, with every reason.

    Args:
        snapshot: The mesh.
        model: What would be placed; the declared one, or one that is not applied.
        policy: Its policy.
        hypothetical: It is not applied. What nodes have found for the same engine and source counts for it.
    """
    notes: list[str] = []
    if snapshot.guarded:
        notes.append("Many nodes went away at once: nothing is placed by the reconciler until they are back.")
    if hypothetical:
        snapshot = supposing(snapshot, model, policy)
    question = Question(snapshot=snapshot, model=model, policy=policy, hypothetical=hypothetical)
    verdicts = judge(question)
    ranked = rank(question, feasible(question, verdicts))
    order = [option.node for option in ranked] + [v.node for v in verdicts if v.failed is not None]
    options = {option.node: (place, option) for place, option in enumerate(ranked, start=1)}
    notes += _unknown(question)
    return Explanation(
        nodes=tuple(_explain_node(question, node, *options.get(node, (0, None))) for node in order),
        plan=plan_of(question, ranked[0]) if ranked else None,
        failure=None if ranked else failure(question, verdicts),
        notes=tuple(notes),
    )


def supposing(snapshot: Snapshot, model: ModelRecord, policy: Policy) -> Snapshot:
    """Return the snapshot as if a model were declared, with what is known of its files from models that share them."""
    spec = model.spec
    alike = [m for m in snapshot.models.values() if (m.spec.backend, m.spec.source) == (spec.backend, spec.source)]
    sources = {}
    for node, known in snapshot.sources.items():
        found = (known.get(m.spec.name) for m in alike if _is_about(known.get(m.spec.name), m))
        source = next((s for s in found if s is not None), None)
        others = {name: record for name, record in known.items() if name != spec.name}
        if source is not None:
            others[spec.name] = replace(source, revision=model.revision)
        sources[node] = MappingProxyType(others)
    record = snapshot.policies.get(spec.name)
    mod_revision = record.mod_revision if record is not None else 0
    return replace(
        snapshot,
        models=MappingProxyType({**snapshot.models, spec.name: model}),
        policies=MappingProxyType(
            {**snapshot.policies, spec.name: PolicyRecord(policy=policy, mod_revision=mod_revision)}
        ),
        sources=MappingProxyType(sources),
    )


def _is_about(source: SourceRecord | None, model: ModelRecord) -> bool:
    return source is not None and source.revision == model.revision


def _unknown(question: Question) -> list[str]:
    """Return a note on the nodes that nobody can tell of whether they have the model's files."""
    if not question.hypothetical:
        return []
    nodes = [node for node in sorted(question.snapshot.nodes) if question.source(node) is None]
    if not nodes:
        return []
    shown = ", ".join(nodes[:_NODES_IN_NOTE])
    more = f" and {len(nodes) - _NODES_IN_NOTE} more" if len(nodes) > _NODES_IN_NOTE else ""
    source = question.model.spec.source
    note = f"Whether there is a {source!r} on {shown}{more}, and what it takes, is known once the model is applied."
    return [note]


def _explain_node(question: Question, node: NodeName, place: int, option: Option | None) -> NodeVerdict:
    found = scores(question, option) if option is not None else ()
    return NodeVerdict(
        node=node,
        filters=_filters(question, node),
        devices=tuple(_devices(question, node, option)),
        scores=MappingProxyType({s.name: score for s, score in zip(SCORERS, found, strict=False)}),
        rank=place,
    )


def _filters(question: Question, node: NodeName) -> tuple[FilterVerdict, ...]:
    verdicts: dict[str, FilterVerdict] = {}
    for one in FILTERS:
        if any(verdicts[name].outcome is not Outcome.PASSED for name in one.after):
            verdicts[one.name] = FilterVerdict(name=one.name, outcome=Outcome.SKIPPED)
            continue
        reason = one.check(question, node)
        outcome = Outcome.PASSED if reason is None else Outcome.FAILED
        sentence = "" if reason is None else f"{node} {reason}"
        verdicts[one.name] = FilterVerdict(name=one.name, outcome=outcome, reason=sentence)
    return tuple(verdicts.values())


def _devices(question: Question, node: NodeName, option: Option | None) -> list[DeviceVerdict]:
    kinds, needed = question.kinds(node), question.needed_bytes(node)
    chosen = option.devices if option is not None else {}
    found = []
    for device in sorted(question.all_devices(node).values(), key=lambda d: (d.kind, d.id)):
        room, reason = question.room_bytes(device), ""
        if device.kind not in kinds:
            reason = _not_allowed(question, device)
        elif room < needed:
            reason = f"{human_bytes(needed)} needed, {human_bytes(max(0, room))} free"
        found.append(
            DeviceVerdict(
                device=device, room_bytes=room, needed_bytes=needed, chosen=device.id in chosen, reason=reason
            )
        )
    return found


def _not_allowed(question: Question, device: DeviceRecord) -> str:
    engine = question.engine(device.node)
    if engine is None or device.kind not in engine.device_kinds:
        return f"the engine {question.model.spec.backend!r} does not compute on the {device.kind} here"
    return "the spec wants a GPU" if device.kind == "cpu" else "the spec wants the CPU"
