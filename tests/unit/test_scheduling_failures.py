"""Longer pauses for what keeps failing, and a clean slate for what was edited."""

from localmesh.core.ids import ModelName, NodeName
from localmesh.core.records import FailureRecord, HistoryRecord
from localmesh.scheduling.failures import FailurePolicy, after_success, weigh

POLICY = FailurePolicy()
FAILED = FailureRecord(model=ModelName("m"), node=NodeName("n"), reason="LOAD_FAILED", message="no", revision="r1")


def pauses(times: int, *, died: bool) -> list[float]:
    found: list[float] = []
    history: HistoryRecord | None = None
    for _ in range(times):
        verdict = weigh(history, FAILED, died=died, policy=POLICY)
        assert verdict.remember_seconds > verdict.pause_seconds
        history = verdict.history
        found.append(verdict.pause_seconds)
    return found


def test_the_pause_doubles_from_ten_seconds_to_five_minutes() -> None:
    """F42."""
    assert pauses(8, died=False) == [10, 20, 40, 80, 160, 300, 300, 300]
    assert POLICY.pause_seconds(10**6) == 300


def test_the_third_death_of_what_was_ready_opens_the_circuit() -> None:
    """F42."""
    assert pauses(6, died=True) == [0, 0, 10, 20, 40, 80]
    second = weigh(HistoryRecord(revision="r1", deaths=1), FAILED, died=True, policy=POLICY)
    assert second.failure is None
    third = weigh(second.history, FAILED, died=True, policy=POLICY)
    assert third.failure is not None
    assert third.failure.attempts == 3
    assert third.failure.message == "it died 3 times soon after it was ready, the last time so: no"


def test_another_revision_begins_anew() -> None:
    """F42: an edit is tried at once."""
    old = HistoryRecord(revision="r0", failed_loads=9, deaths=9)
    verdict = weigh(old, FAILED, died=False, policy=POLICY)
    assert verdict.history == HistoryRecord(revision="r1", failed_loads=1)
    assert verdict.pause_seconds == 10


def test_success_forgets_failed_loads_and_not_deaths() -> None:
    """F42: what crashes in a loop is ready in between."""
    assert after_success(HistoryRecord(revision="r1", failed_loads=4)) is None
    assert after_success(HistoryRecord(revision="r1", failed_loads=4, deaths=2)) == HistoryRecord(
        revision="r1", deaths=2
    )


def test_each_failure_says_how_often_it_was() -> None:
    """F42."""
    verdict = weigh(HistoryRecord(revision="r1", failed_loads=2), FAILED, died=False, policy=POLICY)
    assert verdict.failure is not None
    assert verdict.failure.attempts == 3
