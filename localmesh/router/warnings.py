"""What an operator should know of the mesh, a sentence each."""

import math
from collections.abc import Iterator

from localmesh.core.records import ReplicaState
from localmesh.core.snapshot import Snapshot

_SILENCE_SECONDS = 3.0


def warnings_of(snapshot: Snapshot, *, connected: bool, silence_seconds: float) -> list[str]:
    """Return the warnings that follow from the snapshot and the connection to the store."""
    return [
        *_store(connected=connected, silence_seconds=silence_seconds),
        *_nodes(snapshot),
        *_replicas(snapshot),
        *_failures(snapshot),
    ]


def _store(*, connected: bool, silence_seconds: float) -> Iterator[str]:
    if math.isinf(silence_seconds):
        yield "etcd has not been heard since this router started: nothing is known of the mesh."
    elif not connected or silence_seconds > _SILENCE_SECONDS:
        yield (
            f"etcd has been silent for {silence_seconds:.0f} s: requests go on with what was known then, and nothing is"
            " placed, loaded or stopped."
        )


def _nodes(snapshot: Snapshot) -> Iterator[str]:
    if not snapshot.nodes:
        yield "No worker is registered: nothing can be loaded. Start one with `localmesh worker`."
    for node, approval in sorted(snapshot.approvals.items()):
        if not approval.approved:
            yield f"The node {node} waits for approval."
        elif node not in snapshot.nodes:
            yield f"The node {node} is away."
    if snapshot.guarded:
        lost = ", ".join(sorted(snapshot.guarded_nodes))
        yield (
            f"Many nodes fell silent at once ({lost}): nothing is replaced or"
            " stopped until they are back, for 10 min at most. `localmesh guard release` ends it."
        )
    if not snapshot.leader:
        yield "No router is the reconciler: nothing is kept at its minimum or replaced."


def _replicas(snapshot: Snapshot) -> Iterator[str]:
    for name in sorted(snapshot.models):
        wanted = snapshot.min_replicas(name)
        ready = sum(1 for r in snapshot.replicas_of(name) if r.state is ReplicaState.READY and snapshot.present(r))
        if ready < wanted:
            yield f"The model {name} has {ready} of at least {wanted} replicas ready."


def _failures(snapshot: Snapshot) -> Iterator[str]:
    for model, by_node in sorted(snapshot.failures.items()):
        for node, failure in sorted(by_node.items()):
            yield f"The model {model} could not be loaded on the node {node}: {failure.message}"
