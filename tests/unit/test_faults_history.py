"""The judge of histories finds what it is there to find."""

from localmesh.store.v1 import records_pb2 as pb
from tests.faults.history import Change, Key, leftovers, violations

R = "m/n/0"


def replica(state: int, size: int = 10, *, created: int = 1, incarnation: int = 7) -> Key:
    return Key(pb.Replica(state=state, devices={"cpu": size}, incarnation=incarnation).SerializeToString(), 5, created)


def device(budget: int = 100, **claims: int) -> Key:
    named = {name.replace("_", "/"): size for name, size in claims.items()}
    return Key(pb.Device(budget_bytes=budget, claims=named).SerializeToString(), 5, 1)


def node() -> Key:
    return Key(pb.Node(max_replicas_per_model=1).SerializeToString(), 7, 1)


def history(*steps: dict[str, Key | None]) -> list[Change]:
    return [Change(revision, keys) for revision, keys in enumerate(steps, start=1)]


PLACED = {f"replicas/{R}": replica(1), "devices/n/cpu": device(m_0=10)}
BEGUN: dict[str, Key | None] = {"nodes/n": node(), "devices/n/cpu": device()}


def test_an_orderly_life_breaks_nothing() -> None:
    changes = history(
        BEGUN,
        PLACED,
        {f"replicas/{R}": replica(4, 12), "devices/n/cpu": device(m_0=12)},
        {f"inflight/{R}/h": Key(b"", 9, 4)},
        {f"inflight/{R}/h": None},
        {f"replicas/{R}": replica(6, 12)},
        {f"replicas/{R}": None, "devices/n/cpu": device()},
    )
    assert violations(changes) == []
    assert leftovers(changes) == []


def test_memory_that_is_handed_over_breaks_nothing() -> None:
    """F36."""
    leaving = pb.Replica(state=6, devices={"cpu": 12}, incarnation=7, memory_for="o/n/0")
    heir = pb.Replica(state=1, devices={"cpu": 7}, incarnation=7)
    changes = history(
        BEGUN,
        {f"replicas/{R}": replica(4, 12), "devices/n/cpu": device(m_0=12)},
        {f"replicas/{R}": Key(leaving.SerializeToString(), 5, 1)},
        {f"replicas/{R}": None, "devices/n/cpu": device(o_0=12)},
        {"replicas/o/n/0": Key(heir.SerializeToString(), 5, 1), "devices/n/cpu": device(o_0=7)},
    )
    assert violations(changes) == []
    assert leftovers(changes) == []
    assert leftovers(changes[:4])  # nobody came for it


def test_a_placement_beyond_the_budget_is_found() -> None:
    """Invariant 1."""
    changes = history(BEGUN, {f"replicas/{R}": replica(1, 101), "devices/n/cpu": device(m_0=101)})
    assert any("101 of 100 bytes" in v for v in violations(changes))


def test_a_replica_that_grows_beyond_the_budget_when_it_is_ready_is_no_violation() -> None:
    changes = history(BEGUN, PLACED, {f"replicas/{R}": replica(4, 101), "devices/n/cpu": device(m_0=101)})
    assert violations(changes) == []


def test_an_unload_under_a_holder_is_found() -> None:
    """Invariant 2."""
    changes = history(BEGUN, PLACED, {f"inflight/{R}/h": Key(b"", 9, 3)}, {f"replicas/{R}": replica(6)})
    assert any("h holds it" in v for v in violations(changes))


def test_too_many_replicas_are_found() -> None:
    """Invariant 4."""
    second = {"replicas/m/n/1": replica(1), "devices/n/cpu": device(m_0=10, m_1=10)}
    assert any("one of 2 on its node" in v for v in violations(history(BEGUN, PLACED, second)))
    policy = Key(pb.Policy(max_replicas=1).SerializeToString(), 0, 1)
    elsewhere = {
        "replicas/m/o/0": replica(1),
        "devices/o/cpu": Key(pb.Device(budget_bytes=100, claims={"m/0": 10}).SerializeToString(), 5, 1),
    }
    assert any("of at most 1" in v for v in violations(history({**BEGUN, "policies/m": policy}, PLACED, elsewhere)))


def test_a_claim_without_its_replica_is_found_at_its_revision_and_at_the_end() -> None:
    """Invariant 6."""
    changes = history(BEGUN, PLACED, {f"replicas/{R}": None})
    assert any("its claim on n/cpu stays" in v for v in violations(changes))
    assert any("has no replica" in v for v in leftovers(changes))


def test_a_presence_that_is_left_and_a_record_of_an_earlier_incarnation_are_found() -> None:
    """Invariants 5 and 6."""
    left = history(BEGUN, PLACED, {f"inflight/{R}/h": Key(b"", 9, 3)})
    assert leftovers(left) == [f"inflight/{R}/h is left"]
    earlier = history(BEGUN, {f"replicas/{R}": replica(4, incarnation=6), "devices/n/cpu": device(m_0=10)})
    assert any("not of its node's" in v for v in leftovers(earlier))


def test_a_state_that_goes_back_is_found() -> None:
    changes = history(BEGUN, PLACED, {f"replicas/{R}": replica(5)}, {f"replicas/{R}": replica(4)})
    assert any("went back" in v for v in violations(changes))
