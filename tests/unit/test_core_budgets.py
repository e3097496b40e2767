"""What of a device may be claimed: the worker's word, and the operator's in its place."""

from dataclasses import replace

import pytest

from localmesh.core.budgets import budget_bytes, with_budget
from localmesh.core.ids import CPU, NodeName, ReplicaId
from localmesh.core.records import DeviceRecord

GIB = 1 << 30
N = NodeName("n")
DEVICE = DeviceRecord(
    node=N, id=CPU, kind="cpu", total_bytes=10 * GIB, budget_bytes=9 * GIB, worker_budget_bytes=9 * GIB
)


def test_a_part_is_taken_of_the_whole_however_often_it_is_resolved() -> None:
    """F30: "80 %" was applied twice elsewhere, by the worker and by the registry."""
    once = with_budget(DEVICE, {"cpu": "80%"})
    assert once.budget_bytes == 8 * GIB
    assert with_budget(once, {"cpu": "80%"}) == once
    again = with_budget(replace(once, worker_budget_bytes=8 * GIB), {"*": "80%"})
    assert again.budget_bytes == 8 * GIB


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        ({}, 9 * GIB),
        ({"cpu": "4GiB"}, 4 * GIB),
        ({"*": "50%"}, 5 * GIB),
        ({"*": "50%", "cpu": "30%"}, 3 * GIB),
        ({"GPU-1": "1GiB"}, 9 * GIB),
        ({"cpu": "99GiB"}, 10 * GIB),
        ({"cpu": "0"}, 0),
        ({"cpu": str(7 * GIB)}, 7 * GIB),
        ({"cpu": "nonsense of a later version"}, 9 * GIB),
    ],
)
def test_the_operator_s_budget_wins_over_the_worker_s(overrides: dict[str, str], budget: int) -> None:
    """F30."""
    found = with_budget(DEVICE, overrides)
    assert found.budget_bytes == budget
    assert (found.total_bytes, found.worker_budget_bytes) == (10 * GIB, 9 * GIB)


def test_reset_gives_back_the_worker_s_budget_and_keeps_claims() -> None:
    """F30: also for a record of a version that kept only one budget."""
    claims = {ReplicaId.parse("m/n/0"): GIB}
    old = replace(DEVICE, worker_budget_bytes=0, claims=claims)
    lowered = with_budget(old, {"*": "10%"})
    assert (lowered.budget_bytes, lowered.worker_budget_bytes, lowered.unclaimed_bytes) == (GIB, 9 * GIB, 0)
    assert with_budget(lowered, {}) == replace(DEVICE, claims=claims)


@pytest.mark.parametrize("text", ["", "80", "much", "101%", "-1GiB", "1e9", "12 parsecs", "%", "80%%", "9" * 40])
def test_what_is_no_budget_is_refused_or_taken_as_bytes(text: str) -> None:
    """F30."""
    if text == "80":
        assert budget_bytes(text, total_bytes=GIB) == 80
        return
    with pytest.raises(ValueError, match="not a memory budget"):
        budget_bytes(text, total_bytes=GIB)
