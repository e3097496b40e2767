"""Which failures send a request to another replica, and what they say of the one that failed."""

from dataclasses import dataclass
from enum import Enum, unique

from localmesh.core.errors import MeshError, ReplicaDraining, ReplicaFull, ReplicaRefused


@unique
class Fate(Enum):
    """What a failed attempt says of its replica."""

    NOTHING = "nothing"
    """The failure belongs to the request, or means only "busy or unknown" (a time-out): the replica stays."""
    AVOID = "avoid"
    """This request goes elsewhere; others may still be welcome (the replica is at its limit)."""
    EJECT = "eject"
    """Nobody of this process picks it for a while."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a failed attempt."""

    retry: bool
    fate: Fate
    eject_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a request may be tried on another replica. Only ever before the first byte of a response was seen."""

    max_attempts: int = 4
    """Replicas asked for one request, the first one included, while they are lost. A refusal is no attempt: the
    replica did nothing, so asking on is bounded by the caller's patience alone."""
    ejection_seconds: float = 5.0
    """How long a replica is not picked after its connection was refused or reset."""
    stale_seconds: float = 1.0
    """How long a replica is not picked after it refused for a reason that the next snapshot will show."""

    def judge(
        self, *, lost: bool, refusal: MeshError | None, attempt: int, answered: bool, replayable: bool
    ) -> Verdict:
        """Judge an attempt that failed.

        Args:
            lost: The connection was refused or reset. A time-out is not that: it means busy or unknown.
            refusal: What the replica answered, if it refused the request before doing anything.
            attempt: How many replicas were lost with this request, this one included, from 1.
            answered: A byte of the response was seen.
            replayable: The whole request so far is still at hand.
        """
        if lost:
            return Verdict(
                retry=not answered and replayable and attempt < self.max_attempts,
                fate=Fate.EJECT,
                eject_seconds=self.ejection_seconds,
            )
        if not isinstance(refusal, ReplicaRefused) or answered:
            return Verdict(retry=False, fate=Fate.NOTHING)
        if isinstance(refusal, ReplicaFull):
            return Verdict(retry=replayable, fate=Fate.AVOID)
        if isinstance(refusal, ReplicaDraining):
            return Verdict(retry=replayable, fate=Fate.EJECT, eject_seconds=self.ejection_seconds)
        return Verdict(retry=replayable, fate=Fate.EJECT, eject_seconds=self.stale_seconds)
