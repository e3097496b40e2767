"""The mass-expiry guard: many nodes that fall silent at once are more likely not heard than dead.

A node that deregisters takes its records along and is not missed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from localmesh.core.ids import NodeName
from localmesh.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """When silence is taken for somebody else's failure. Times are seconds."""

    window_seconds: float = 5.0
    """Nodes that are lost within this time are lost together: a presence TTL."""
    part: float = 0.3
    """More than this part of the nodes must be lost."""
    least: int = 3
    """And at least this many, or all where there are fewer."""
    limit_seconds: float = 600.0
    """After this time those that stay away are taken for dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """What is remembered from one look to the next. Points in time are the caller's."""

    known: frozenset[NodeName] = frozenset()
    """Nodes that were there at the last look."""
    lost_at: Mapping[NodeName, float] = field(default_factory=lambda: MappingProxyType({}))
    """When nodes were lost, of late."""
    since: float | None = None
    """Since when the guard is seen to be on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetGuard:
    """Let nothing be placed or stopped."""

    nodes: frozenset[NodeName]
    """Nodes that were lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftGuard:
    """Go on."""

    why: str


def watch(
    snapshot: Snapshot, *, now: float, before: GuardState, config: GuardConfig
) -> tuple[GuardState, SetGuard | LiftGuard | None]:
    """Return what to remember, and whether the guard is to be set or lifted.

    What is to be remembered holds where that is done; where it fails, `before` goes on to hold: a guard that was set
    is not set once more for the same nodes, however soon an operator releases it.
    """
    known = frozenset(snapshot.nodes)
    if snapshot.guarded:
        since = now if before.since is None else before.since
        state = GuardState(known=known, since=since)
        away = frozenset(n for n in snapshot.guarded_nodes if _missed(snapshot, n))
        if not _too_many(away, known, config):
            return state, LiftGuard(why="the nodes are back")
        if now - since >= config.limit_seconds:
            return state, LiftGuard(why="the nodes stay away")
        return state, None
    if before.since is not None:  # lifted: what was lost before is not lost once more
        return GuardState(known=known), None
    lost = {n: now for n in sorted(before.known) if _missed(snapshot, n)}
    lost.update(
        (n, at) for n, at in before.lost_at.items() if now - at <= config.window_seconds and _missed(snapshot, n)
    )
    if _too_many(frozenset(lost), known, config):
        return GuardState(known=known), SetGuard(nodes=frozenset(lost))
    return GuardState(known=known, lost_at=MappingProxyType(lost)), None


def _missed(snapshot: Snapshot, node: NodeName) -> bool:
    """Whether a node is away that did not say goodbye and is still wanted."""
    approval = snapshot.approvals.get(node)
    return node not in snapshot.nodes and node in snapshot.devices and approval is not None and approval.approved


def _too_many(lost: frozenset[NodeName], there: frozenset[NodeName], config: GuardConfig) -> bool:
    everybody = len(lost | there)
    return bool(lost) and len(lost) > config.part * everybody and len(lost) >= min(config.least, everybody)
