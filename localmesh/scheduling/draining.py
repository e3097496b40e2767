"""A node that drains: what serves there is replaced elsewhere before it stops."""

from collections.abc import Sequence
from dataclasses import dataclass

from localmesh.core.records import ModelRecord, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What is to be done for a model with replicas on draining nodes."""

    stop: tuple[ReplicaRecord, ...] = ()
    """Replicas to stop now."""
    why: str = ""
    """Why they are to be stopped now."""
    wanted: int = 0
    """Replicas that the model is to have elsewhere, so that none is missed when those that are left have stopped."""
    left: tuple[ReplicaRecord, ...] = ()
    """Replicas that wait for a replacement."""


def on_draining_nodes(snapshot: Snapshot, replicas: Sequence[ReplicaRecord]) -> list[ReplicaRecord]:
    """Return those of the replicas that are to move: on a draining node that is there, and not told to stop yet."""
    return [
        r
        for r in replicas
        if not r.state.leaving
        and snapshot.present(r)
        and (approval := snapshot.approvals.get(r.id.node)) is not None
        and approval.draining
    ]


def plan_move(
    snapshot: Snapshot, model: ModelRecord, elsewhere: Sequence[ReplicaRecord], *, out_of_patience: bool
) -> Move:
    """Return which replicas on draining nodes stop now, and how many are wanted elsewhere.

    A replacement is a replica that was placed since the node drains. So whoever plans, and in whatever state of the
    move, comes to the same result; an approval that is edited while its node drains lets the move begin anew.

    Args:
        snapshot: The mesh.
        model: The model.
        elsewhere: Replicas of its present revision that serve or will, on nodes that may be used.
        out_of_patience: Stop also what has no replacement, unless one is coming.
    """
    replicas = sorted(snapshot.replicas_of(model.spec.name), key=lambda r: r.id)
    moving = on_draining_nodes(snapshot, replicas)
    policy = snapshot.policy(model.spec.name)
    serving = [r for r in moving if r.state is ReplicaState.READY]
    if policy.spread_all or not serving:
        # Its node is all that the replica was for; or it has not served yet, and will load elsewhere if it is wanted.
        return Move(stop=tuple(moving), why="its node drains")
    since = min(snapshot.approvals[r.id.node].mod_revision for r in serving)
    replacing = [r for r in elsewhere if r.create_revision > since]
    ready = sum(1 for r in replacing if r.state is ReplicaState.READY and snapshot.present(r))
    coming = any(r.state.coming and snapshot.present(r) for r in replacing)
    maximum = policy.max_replicas
    if ready >= len(serving):
        return Move(stop=tuple(moving), why="its node drains, and it is replaced")
    wanted = len(elsewhere) - len(replacing) + len(serving)
    wanted = min(wanted, maximum) if maximum else wanted
    if maximum and len(replicas) >= maximum and not coming:
        return Move(stop=tuple(moving), why="its node drains, and the maximum allows none beside it", wanted=wanted)
    if out_of_patience and not coming:
        return Move(stop=tuple(moving), why="its node drains, and there is no place for another", wanted=wanted)
    loading = tuple(r for r in moving if r.state.coming)
    return Move(stop=loading, why="its node drains", wanted=wanted, left=tuple(serving))
