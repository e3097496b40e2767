"""How long a model is kept away from a node where it went wrong: longer each time."""

from dataclasses import dataclass, replace

from localmesh.core.records import FailureRecord, HistoryRecord

_MOST_DOUBLINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """When a model that fails on a node is tried there again. Times are seconds."""

    first_seconds: float = 10.0
    """Pause after the first failure. It doubles with each further one."""
    longest_seconds: float = 300.0
    deaths: int = 3
    """So many deaths of replicas that were ready open the circuit: the model pauses as after a failed load."""
    remembered_seconds: float = 600.0
    """Without another failure for so long, beyond the pause, all is forgotten. Deaths further apart do not add up."""

    def pause_seconds(self, times: int) -> float:
        """Return the pause after the failure of that number, from 1."""
        return min(self.first_seconds * 2.0 ** min(times - 1, _MOST_DOUBLINGS), self.longest_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a failure leads to."""

    history: HistoryRecord
    failure: FailureRecord | None
    """What keeps the model away from the node; None while a death is not yet one too many."""
    pause_seconds: float = 0.0
    """For how long."""
    remember_seconds: float = 0.0
    """How long the history is kept."""


def weigh(history: HistoryRecord | None, failure: FailureRecord, *, died: bool, policy: FailurePolicy) -> Verdict:
    """Return what a failure leads to. An edit begins with a clean slate: only the same revision adds up.

    Args:
        history: What is remembered of the model on that node.
        failure: What went wrong now.
        died: It was ready before it went wrong: not a load that failed, but a replica that died.
        policy: How patient to be.
    """
    known = history if history is not None and history.revision == failure.revision else None
    known = known or HistoryRecord(revision=failure.revision)
    if not died:
        known = replace(known, failed_loads=known.failed_loads + 1)
        pause = policy.pause_seconds(known.failed_loads + max(0, known.deaths - policy.deaths + 1))
        noted: FailureRecord | None = replace(failure, attempts=known.failed_loads)
    else:
        known = replace(known, deaths=known.deaths + 1)
        circuit = known.deaths - policy.deaths + 1
        pause = policy.pause_seconds(circuit) if circuit > 0 else 0.0
        words = f"it died {known.deaths} times soon after it was ready, the last time so: {failure.message}"
        noted = replace(failure, attempts=known.deaths, message=words) if circuit > 0 else None
    return Verdict(
        history=known, failure=noted, pause_seconds=pause, remember_seconds=pause + policy.remembered_seconds
    )


def after_success(history: HistoryRecord) -> HistoryRecord | None:
    """Return what is still remembered once a replica has become ready; None if nothing.

    Failed loads are over then. Deaths are not: a replica that crashes in a loop is ready in between.
    """
    return replace(history, failed_loads=0) if history.deaths else None
