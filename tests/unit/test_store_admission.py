"""Who may register under a node's name."""

from dataclasses import replace
from typing import Any

import pytest

from localmesh.core.errors import NodeNameTaken, NodePending
from localmesh.core.ids import NodeName
from localmesh.core.records import ApprovalRecord
from localmesh.store.admission import admit, waiting

N = NodeName("n")
SAID: dict[str, Any] = {
    "cordoned": True,
    "draining": True,
    "labels": {"a": "b"},
    "max_replicas_per_model": 3,
    "memory_budgets": {"*": "10%"},
}
APPROVED = ApprovalRecord(key_fingerprint="key", mod_revision=7, **SAID)
PENDING = replace(APPROVED, approved=False)


def ask(known: ApprovalRecord | None, *, auto: bool = False, vouched: bool = False, key: str = "key") -> ApprovalRecord:
    return admit(N, key, known, auto_approve=auto, vouched=vouched)


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("vouched", [True, False])
def test_nothing_that_a_worker_says_changes_what_an_operator_said(auto: bool, vouched: bool) -> None:
    """F3: re-registration undid drains and overrides elsewhere."""
    assert ask(APPROVED, auto=auto, vouched=vouched) is APPROVED


@pytest.mark.parametrize("auto", [True, False])
def test_asking_again_and_again_approves_nobody(auto: bool) -> None:
    """F3: elsewhere a pending node became a healthy one by leaving and coming again."""
    known = None if not auto else waiting("key", None)
    for _ in range(3):
        with pytest.raises(NodePending, match="localmesh node approve n") as told:
            ask(known, auto=auto)
        assert told.value.retry_after_seconds is not None
        assert 0 < told.value.retry_after_seconds <= 2
        known = waiting("key", known)
        assert (known.approved, known.key_fingerprint) == (False, "key")


def test_a_token_approves_one_that_waits_and_keeps_the_rest() -> None:
    """F3."""
    assert ask(PENDING, vouched=True) == replace(PENDING, approved=True)
    assert ask(None, vouched=True) == ApprovalRecord(key_fingerprint="key")


@pytest.mark.parametrize("known", [APPROVED, PENDING], ids=["approved", "pending"])
@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("vouched", [True, False])
def test_another_key_never_gets_the_name(known: ApprovalRecord, auto: bool, vouched: bool) -> None:
    """F2, F3: neither by token nor automatically, and not while an operator looks at the one that waits."""
    with pytest.raises(NodeNameTaken, match="name n"):
        ask(known, auto=auto, vouched=vouched, key="another")


def test_an_approval_that_names_no_key_is_nobody_s() -> None:
    """F3."""
    keyless = replace(APPROVED, key_fingerprint="")
    assert ask(keyless, auto=True) == APPROVED
    with pytest.raises(NodePending):
        ask(keyless)
    assert waiting("key", keyless) == PENDING


def test_what_waits_already_is_not_written_again() -> None:
    """F2."""
    assert waiting("key", PENDING) == PENDING
