"""Where the next replica of a model goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from localmesh.core.errors import ModelNotFound, NoNodes, PlacementFailed
from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.filters import Verdict, judge
from localmesh.scheduling.question import Question
from localmesh.scheduling.scorers import Option, rank

_NODES_IN_MESSAGE = 8
_SOON_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """A replica that may be placed: what T1 writes, if nothing has changed meanwhile."""

    replica: ReplicaId
    revision: str
    """Revision of the model."""
    devices: Mapping[DeviceId, int]
    """Bytes to claim on each device."""
    incarnation: int
    """Incarnation of the node that was looked at."""


def plan_placement(
    snapshot: Snapshot, model: ModelName, *, exclude_nodes: frozenset[NodeName] = frozenset()
) -> PlacementPlan:
    """Return where the next replica of a model goes. The same snapshot always gives the same plan.

    Args:
        snapshot: The mesh.
        model: Which model.
        exclude_nodes: Nodes not to consider, because they have just been tried.

    Raises:
        ModelNotFound: It is not declared.
        NoNodes: There is no node that may take replicas.
        EngineUnavailable: No node has the engine; the message says what to install.
        SourceMissing: No node that has the engine has the model's file; the message names the path on each.
        NoCapacity: Anything else; the message says for every node what it lacks. With `retry_after_seconds` the
            reason may pass by itself: a node has not yet looked whether it has the file.
    """
    record = snapshot.models.get(model)
    if record is None:
        raise ModelNotFound(f"there is no model {model!r}", model=model)
    question = Question(snapshot=snapshot, model=record, policy=snapshot.policy(model), excluded=exclude_nodes)
    verdicts = judge(question)
    options = feasible(question, verdicts)
    if not options:
        raise failure(question, verdicts)
    return plan_of(question, rank(question, options)[0])


def feasible(question: Question, verdicts: Sequence[Verdict]) -> list[Option]:
    """Return an option for each node that passed all filters."""
    found = []
    for verdict in verdicts:
        devices = question.choice(verdict.node) if verdict.failed is None else None
        if devices is not None:
            room = min(room for device, room in question.devices(verdict.node) if device.id in devices)
            found.append(Option(node=verdict.node, devices=MappingProxyType(devices), room_bytes=room))
    return found


def plan_of(question: Question, option: Option) -> PlacementPlan:
    """Return what T1 would write for an option."""
    return PlacementPlan(
        replica=question.replica(option.node),
        revision=question.model.revision,
        devices=option.devices,
        incarnation=question.node(option.node).incarnation,
    )


def failure(question: Question, verdicts: Sequence[Verdict]) -> PlacementFailed:
    """Return why there is no place, where no node passed all filters."""
    spec = question.model.spec
    if not verdicts:
        return NoNodes(f"the model {spec.name!r} cannot be placed: no worker is registered", model=spec.name)
    furthest = max(verdicts, key=lambda v: v.stage).failed
    assert furthest is not None  # noqa: S101 - a feasible node would have been an option
    shown = sorted(verdicts, key=lambda v: (-v.stage, v.node))[:_NODES_IN_MESSAGE]
    more = f"; and {len(verdicts) - len(shown)} more nodes" if len(verdicts) > len(shown) else ""
    return furthest.error(
        f"the model {spec.name!r} cannot be placed: {'; '.join(map(str, shown))}{more}",
        retry_after_seconds=_SOON_SECONDS if any(v.failed and v.failed.passes_by_itself for v in verdicts) else None,
        model=spec.name,
        engine=spec.backend,
        source=spec.source,
    )
