"""What a snapshot says of one model: whether it can be called, is coming, or has failed to load."""

import difflib

from localmesh.core.errors import EngineUnavailable, LoadFailed, MeshError, ModelLoading, ModelNotFound, SourceMissing
from localmesh.core.ids import ModelName
from localmesh.core.records import FailureRecord, ModelSpec, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.failures import FailurePolicy

FAILURE_RETRY_SECONDS = 15.0
"""When a model whose replicas were gone before they were ready is worth another try."""


def require_model(snapshot: Snapshot, model: ModelName) -> None:
    """Raise ModelNotFound, with names that are nearly the same, unless the model is declared."""
    if model not in snapshot.models:
        raise ModelNotFound(f"there is no model {model!r}{_did_you_mean(snapshot, model)}", model=model)


def _did_you_mean(snapshot: Snapshot, model: ModelName) -> str:
    close = difflib.get_close_matches(model, list(snapshot.models), n=3)
    return (
        f"; did you mean {' or '.join(map(repr, close))}?" if close else ". `localmesh models` lists those there are."
    )


def is_routable(snapshot: Snapshot, model: ModelName) -> bool:
    """Whether a request can be routed to a replica of the model, were it not for limits."""
    return any(snapshot.routable(replica) for replica in snapshot.replicas_of(model))


def coming(snapshot: Snapshot, model: ModelName) -> list[ReplicaRecord]:
    """Return the replicas that will be READY if nothing goes wrong, on nodes that are there; the furthest first."""
    record = snapshot.models.get(model)
    found = [
        replica
        for replica in snapshot.replicas_of(model)
        if record is not None
        and replica.state.coming
        and replica.revision == record.revision
        and snapshot.present(replica)
    ]
    return sorted(found, key=lambda replica: (-replica.state.value, replica.id))


def failure_of(snapshot: Snapshot, model: ModelName) -> MeshError | None:
    """Return why the present revision of the model could not be loaded a short while ago, if that is so."""
    record = snapshot.models.get(model)
    if record is None:
        return None
    failures = [f for f in snapshot.failures.get(model, {}).values() if f.revision in ("", record.revision)]
    return _as_error(failures[0], record.spec) if failures else None


def _as_error(failure: FailureRecord, spec: ModelSpec) -> MeshError:
    kinds: dict[str, type[MeshError]] = {kind.reason: kind for kind in (SourceMissing, EngineUnavailable)}
    kind = kinds.get(failure.reason, LoadFailed)
    return kind(
        f"the model {failure.model!r} could not be loaded on node {failure.node!r}: {failure.message}",
        # What is left of the pause is not in the record: this is the whole of it.
        retry_after_seconds=FailurePolicy().pause_seconds(failure.attempts),
        model=failure.model,
        node=failure.node,
        source=spec.source,
        engine=spec.backend,
    )


def still_loading(snapshot: Snapshot, model: ModelName) -> ModelLoading:
    """Return what a caller is told who was held as long as may be: how far the load is, and when to come back."""
    nearest = next(iter(coming(snapshot, model)), None)
    progress = snapshot.progress.get(nearest.id) if nearest is not None else None
    state = nearest.state if nearest is not None else None
    eta = progress.eta_seconds if progress is not None else 0.0
    done = progress.done_bytes if progress is not None else 0
    total = progress.total_bytes if progress is not None else 0
    how_far = f", {100 * done // total} % of {total} bytes" if total else ""
    where = f" on node {nearest.id.node!r}" if nearest is not None else ""
    return ModelLoading(
        f"the model {model!r} is still loading{where}"
        f" ({(state or ReplicaState.PLACED).name}{how_far}). The load goes on: try again.",
        retry_after_seconds=min(max(eta, 5.0), 300.0),
        model=model,
        state=(state or ReplicaState.PLACED).name,
        phase=progress.phase if progress is not None else "",
        done_bytes=done,
        total_bytes=total,
    )
