"""PickBestReplica and what it may choose from."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.pick import Candidate, candidates, pick_best_replica
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot

MODEL = ModelName("m")
ME = HolderId("me")
GIB = 1 << 30


def replica(node: str, *, revision: str = "new", state: ReplicaState = ReplicaState.READY) -> ReplicaRecord:
    return ReplicaRecord(
        id=ReplicaId(MODEL, NodeName(node), 0), state=state, revision=revision, incarnation=7, devices={CPU: 1}, limit=2
    )


def mesh(*replicas: ReplicaRecord) -> Snapshot:
    names = [r.id.node for r in replicas]
    return Snapshot(
        models={MODEL: ModelRecord(spec=ModelSpec(name=MODEL, backend="llama", source="x"), revision="new")},
        nodes={n: NodeRecord(name=n, incarnation=7, record_lease=8, endpoint="") for n in names},
        approvals={n: ApprovalRecord(key_fingerprint="") for n in names},
        devices={n: {CPU: DeviceRecord(node=n, id=CPU, kind="cpu", total_bytes=GIB, budget_bytes=GIB)} for n in names},
        replicas={MODEL: {r.id: r for r in replicas}},
    )


def pickable(
    snapshot: Snapshot, own: dict[ReplicaId, int] | None = None, ejected: frozenset[ReplicaId] = frozenset()
) -> set[str]:
    found = candidates(
        snapshot,
        MODEL,
        holder=ME,
        own_in_flight=lambda r: (own or {}).get(r, 0),
        last_used=lambda r: 0,
        ejected=ejected.__contains__,
    )
    return {str(c.replica.id.node) for c in found}


def candidate(node: str, in_flight: int = 0, last_used: int = 0, free: int = 0) -> Candidate:
    return Candidate(replica=replica(node), in_flight=in_flight, last_used=last_used, free_bytes=free)


def picked(*found: Candidate) -> str:
    best = pick_best_replica(found, salt=b"s")
    assert best is not None
    return str(best.replica.id.node)


def test_fewest_in_flight_comes_before_all_else() -> None:
    """F11."""
    assert picked(candidate("a", 1, 0, GIB), candidate("b", 0, 9, 0)) == "b"


def test_longest_unused_comes_before_memory() -> None:
    """F11."""
    assert picked(candidate("a", 0, 5, GIB), candidate("b", 0, 4, 0)) == "b"


def test_most_free_memory_breaks_the_tie() -> None:
    """F11."""
    assert picked(candidate("a", 0, 0, 1), candidate("b", 0, 0, 2)) == "b"


def test_nothing_to_pick_is_none() -> None:
    assert pick_best_replica([], salt=b"s") is None


def test_holders_break_full_ties_differently() -> None:
    """F12: independent holders with the same view do not all choose the same replica."""
    tied = [candidate(n) for n in "abcdefgh"]
    best = [pick_best_replica(tied, salt=bytes([i])) for i in range(32)]
    assert len({c.replica.id for c in best if c}) >= 4


@given(st.permutations([("a", 0, 1, 2), ("b", 0, 1, 2), ("c", 0, 0, 0), ("d", 1, 0, 9), ("e", 0, 0, 0)]))
def test_order_of_candidates_does_not_matter(order: list[tuple[str, int, int, int]]) -> None:
    first = picked(candidate("a", 0, 1, 2), candidate("c"), candidate("e"), candidate("b", 0, 1, 2))
    assert picked(*(candidate(*c) for c in order)) == first


def test_only_ready_replicas_on_present_usable_nodes_are_picked() -> None:
    ready, loading, gone, cordoned = (replica(n) for n in ("ready", "loading", "gone", "cordoned"))
    loading = replace(loading, state=ReplicaState.LOADING)
    gone = replace(gone, incarnation=6)
    snapshot = mesh(ready, loading, gone, cordoned)
    snapshot = replace(
        snapshot,
        approvals={**snapshot.approvals, cordoned.id.node: ApprovalRecord(key_fingerprint="", cordoned=True)},
    )
    assert pickable(snapshot) == {"ready"}


def test_full_and_ejected_replicas_are_not_picked() -> None:
    a, b, c = (replica(n) for n in "abc")
    assert pickable(mesh(a, b, c), own={a.id: 2}, ejected=frozenset({b.id})) == {"c"}


def test_others_count_and_my_published_count_does_not_count_twice() -> None:
    a = replica("a")
    snapshot = replace(mesh(a), inflight={a.id: {ME: 1, HolderId("other"): 1}})
    (found,) = candidates(
        snapshot, MODEL, holder=ME, own_in_flight=lambda r: 0, last_used=lambda r: 0, ejected=lambda r: False
    )
    assert found.in_flight == 1


def test_old_revision_serves_until_the_new_one_does() -> None:
    """F40, overlap."""
    old, new = replica("old", revision="old"), replica("new")
    assert pickable(mesh(old, replace(new, state=ReplicaState.LOADING))) == {"old"}
    assert pickable(mesh(old, new)) == {"new"}


def test_immediate_rollout_takes_the_old_revision_out_at_once() -> None:
    """F40, immediate."""
    snapshot = replace(
        mesh(replica("old", revision="old")), policies={MODEL: PolicyRecord(policy=Policy(immediate=True))}
    )
    assert pickable(snapshot) == set()


def test_replicas_of_a_deleted_model_are_not_picked() -> None:
    assert pickable(replace(mesh(replica("a")), models={})) == set()
