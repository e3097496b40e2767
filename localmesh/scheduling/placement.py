"""Where the next replica of a model goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType

from localmesh.core.errors import ModelNotFound, NoNodes, PlacementFailed
from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.filters import Question, Verdict, judge
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
    options = [_option(question, v.node) for v in verdicts if v.failed is None]
    if not options:
        raise _failure(question, verdicts)
    best = rank(question, options)[0]
    taken = question.indices(best.node)
    return PlacementPlan(
        replica=ReplicaId(model, best.node, next(i for i in count() if i not in taken)),
        revision=record.revision,
        devices=MappingProxyType({best.device.id: question.needed_bytes(best.node)}),
        incarnation=question.node(best.node).incarnation,
    )


def _option(question: Question, node: NodeName) -> Option:
    needed = question.needed_bytes(node)
    device, free = next((d, free) for d, free in question.devices(node) if free >= needed)
    return Option(node=node, device=device, free_bytes=free)


def _failure(question: Question, verdicts: Sequence[Verdict]) -> PlacementFailed:
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
