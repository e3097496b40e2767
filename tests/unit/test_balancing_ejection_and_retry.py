"""Ejections and the retry policy."""

import pytest

from localmesh.balancing import Ejections, Fate, RetryPolicy
from localmesh.core.errors import (
    EngineFailed,
    MeshError,
    Overloaded,
    ReplicaDraining,
    ReplicaFull,
    ReplicaStale,
)
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState


def _replica(*, mod_revision: int = 1) -> ReplicaRecord:
    return ReplicaRecord(
        id=ReplicaId(ModelName("m"), NodeName("a"), 0),
        state=ReplicaState.READY,
        revision="r",
        incarnation=1,
        devices={},
        limit=4,
        mod_revision=mod_revision,
    )


def test_an_ejection_ends_at_its_time() -> None:
    ejections = Ejections()
    ejections.eject(_replica(), until=15.0)
    assert ejections.ejected(_replica(), now=14.9)
    assert not ejections.ejected(_replica(), now=15.0)


def test_an_ejection_does_not_outlive_a_change_of_the_replica() -> None:
    ejections = Ejections()
    ejections.eject(_replica(mod_revision=7), until=15.0)
    assert not ejections.ejected(_replica(mod_revision=8), now=10.0)


def test_a_shorter_ejection_does_not_cut_a_longer_one() -> None:
    ejections = Ejections()
    ejections.eject(_replica(), until=15.0)
    ejections.eject(_replica(), until=11.0)
    assert ejections.ejected(_replica(), now=14.0)


def test_the_next_end_is_the_earliest_one_that_is_still_to_come() -> None:
    ejections = Ejections()
    assert ejections.next_end(now=0.0) is None
    ejections.eject(_replica(), until=15.0)
    assert ejections.next_end(now=10.0) == 15.0
    assert ejections.next_end(now=15.0) is None
    assert not ejections.ejected(_replica(), now=10.0)  # it was forgotten


def test_a_lost_replica_is_ejected_for_five_seconds_and_the_request_goes_elsewhere() -> None:
    """F5, F19."""
    verdict = RetryPolicy().judge(lost=True, refusal=None, attempt=1, answered=False, replayable=True)
    assert verdict.retry
    assert verdict.fate is Fate.EJECT
    assert verdict.eject_seconds == 5.0


@pytest.mark.parametrize(("attempt", "answered", "replayable"), [(4, False, True), (1, True, True), (1, False, False)])
def test_a_lost_replica_is_ejected_even_when_the_request_cannot_be_retried(
    attempt: int, answered: bool, replayable: bool
) -> None:
    """F19."""
    verdict = RetryPolicy().judge(lost=True, refusal=None, attempt=attempt, answered=answered, replayable=replayable)
    assert not verdict.retry
    assert verdict.fate is Fate.EJECT


@pytest.mark.parametrize(
    ("refusal", "fate"),
    [
        (ReplicaFull("full"), Fate.AVOID),
        (ReplicaStale("stale"), Fate.EJECT),
        (ReplicaDraining("draining"), Fate.EJECT),
    ],
)
def test_a_refusal_is_retried_however_often_it_happens(refusal: MeshError, fate: Fate) -> None:
    """F19."""
    verdict = RetryPolicy().judge(lost=False, refusal=refusal, attempt=99, answered=False, replayable=True)
    assert verdict.retry
    assert verdict.fate is fate


@pytest.mark.parametrize("error", [EngineFailed("no"), Overloaded("no"), None])
def test_other_failures_belong_to_the_request(error: MeshError | None) -> None:
    verdict = RetryPolicy().judge(lost=False, refusal=error, attempt=1, answered=False, replayable=True)
    assert not verdict.retry
    assert verdict.fate is Fate.NOTHING


def test_a_refusal_after_the_first_byte_is_not_retried() -> None:
    verdict = RetryPolicy().judge(lost=False, refusal=ReplicaFull("full"), attempt=1, answered=True, replayable=True)
    assert not verdict.retry
    assert verdict.fate is Fate.NOTHING
