"""The choice of a replica."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.balancing import Chooser, Ejections, LocalLoad, Shortage
from localmesh.core.ids import CPU, HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.pick import candidates, pick_best_replica
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot

MODEL = ModelName("m")
ME = HolderId("me")
GIB = 1 << 30


def _id(node: str) -> ReplicaId:
    return ReplicaId(MODEL, NodeName(node), 0)


def _mesh(free_gib: dict[str, int], *, limit: int = 16, inflight: dict[str, dict[str, int]] | None = None) -> Snapshot:
    nodes = [NodeName(name) for name in free_gib]
    return Snapshot(
        revision=1,
        models={MODEL: ModelRecord(spec=ModelSpec(name=MODEL, backend="llama", source="s"), revision="r1")},
        approvals={name: ApprovalRecord(key_fingerprint="k") for name in nodes},
        nodes={name: NodeRecord(name=name, incarnation=1, record_lease=2, endpoint="e") for name in nodes},
        devices={
            name: {
                CPU: DeviceRecord(
                    node=name, id=CPU, kind="cpu", total_bytes=64 * GIB, budget_bytes=free_gib[name] * GIB
                )
            }
            for name in nodes
        },
        replicas={
            MODEL: {
                _id(name): ReplicaRecord(
                    id=_id(name),
                    state=ReplicaState.READY,
                    revision="r1",
                    incarnation=1,
                    devices={CPU: 0},
                    endpoint=f"{name}:1",
                    limit=limit,
                    mod_revision=1,
                )
                for name in nodes
            }
        },
        inflight={_id(name): {HolderId(h): n for h, n in counts.items()} for name, counts in (inflight or {}).items()},
    )


def _chooser(load: LocalLoad, ejections: Ejections | None = None, *, seed: int = 1, many: int = 5) -> Chooser:
    return Chooser(
        holder=ME,
        load=load,
        ejections=ejections or Ejections(),
        salt=b"salt",
        dice=random.Random(seed),
        many_holders=many,
    )


def test_ties_go_round_however_different_the_memory() -> None:
    """F13: calls that never overlap, replicas with 24, 16 and 8 GB: each gets a fair share, not the fattest all."""
    snapshot = _mesh({"a": 24, "b": 16, "c": 8})
    load = LocalLoad()
    chooser = _chooser(load)
    served: Counter[str] = Counter()
    for _ in range(9):
        chosen = chooser.choose(snapshot, MODEL, now=0.0).replica
        assert chosen is not None
        load.begin(chosen.id)
        load.end(chosen.id)
        served[chosen.id.node] += 1
    assert min(served[n] for n in "abc") >= 2


def test_the_first_pick_takes_the_replica_with_most_free_memory() -> None:
    """F11."""
    chosen = _chooser(LocalLoad()).choose(_mesh({"a": 8, "b": 24, "c": 16}), MODEL, now=0.0).replica
    assert chosen is not None
    assert chosen.id.node == "b"


def test_a_burst_spreads_evenly() -> None:
    """F12: 32 requests that arrive together on four idle replicas."""
    snapshot = _mesh({"a": 4, "b": 8, "c": 16, "d": 32})
    load = LocalLoad()
    chooser = _chooser(load)
    for _ in range(32):
        chosen = chooser.choose(snapshot, MODEL, now=0.0).replica
        assert chosen is not None
        load.begin(chosen.id)
    assert [load.in_flight(_id(n)) for n in "abcd"] == [8, 8, 8, 8]
    assert load.total == 32


def test_what_other_holders_published_counts_and_the_own_publication_does_not() -> None:
    snapshot = _mesh({"a": 8, "b": 8}, inflight={"a": {"other": 1}, "b": {"me": 9}})
    chosen = _chooser(LocalLoad()).choose(snapshot, MODEL, now=0.0).replica
    assert chosen is not None
    assert chosen.id.node == "b"


def test_a_full_replica_is_not_chosen() -> None:
    snapshot = _mesh({"a": 8}, limit=2, inflight={"a": {"other": 1}})
    load = LocalLoad()
    chooser = _chooser(load)
    load.begin(_id("a"))
    assert chooser.choose(snapshot, MODEL, now=0.0).shortage is Shortage.FULL
    load.end(_id("a"))
    assert chooser.choose(snapshot, MODEL, now=0.0).replica is not None


def test_a_request_does_not_go_back_to_who_refused_it() -> None:
    snapshot = _mesh({"a": 8, "b": 4})
    chooser = _chooser(LocalLoad())
    chosen = chooser.choose(snapshot, MODEL, now=0.0, avoid={_id("a")}).replica
    assert chosen is not None
    assert chosen.id.node == "b"
    assert chooser.choose(snapshot, MODEL, now=0.0, avoid={_id("a"), _id("b")}).shortage is Shortage.FULL


def test_an_ejected_replica_is_not_chosen_until_its_time_is_over() -> None:
    """F5."""
    snapshot = _mesh({"a": 8})
    ejections = Ejections()
    chooser = _chooser(LocalLoad(), ejections)
    ejections.eject(snapshot.replicas[MODEL][_id("a")], until=5.0)
    assert chooser.choose(snapshot, MODEL, now=4.0).shortage is Shortage.EJECTED
    assert chooser.choose(snapshot, MODEL, now=5.0).replica is not None


@pytest.mark.parametrize("change", ["cordoned", "gone", "coming", "other revision"])
def test_what_is_not_routable_is_no_replica_at_all(change: str) -> None:
    snapshot = _mesh({"a": 8})
    replica = snapshot.replicas[MODEL][_id("a")]
    match change:
        case "cordoned":
            approval = ApprovalRecord(key_fingerprint="k", cordoned=True)
            snapshot = replace(snapshot, approvals={NodeName("a"): approval})
        case "gone":
            snapshot = replace(snapshot, nodes={})
        case "coming":
            coming = replace(replica, state=ReplicaState.LOADING)
            snapshot = replace(snapshot, replicas={MODEL: {replica.id: coming}})
        case _:
            snapshot = replace(snapshot, replicas={MODEL: {replica.id: replace(replica, incarnation=99)}})
    assert _chooser(LocalLoad()).choose(snapshot, MODEL, now=0.0).shortage is Shortage.NO_REPLICA


def test_an_unknown_model_has_no_replica() -> None:
    choice = _chooser(LocalLoad()).choose(_mesh({"a": 8}), ModelName("x"), now=0.0)
    assert choice.shortage is Shortage.NO_REPLICA


def test_many_holders_sample_two_and_so_do_not_all_take_the_same_replica() -> None:
    """F12: holders that all see the same stale snapshot must not run to one replica."""
    names = [f"n{i}" for i in range(8)]
    others = {f"h{i}": 1 for i in range(6)}
    snapshot = _mesh({n: 8 + i for i, n in enumerate(names)}, inflight=dict.fromkeys(names, others))
    firsts = set()
    for seed in range(32):
        chosen = _chooser(LocalLoad(), seed=seed).choose(snapshot, MODEL, now=0.0).replica
        assert chosen is not None
        firsts.add(chosen.id)
    assert len(firsts) >= 4
    alone = {_chooser(LocalLoad(), seed=s, many=99).choose(snapshot, MODEL, now=0.0).replica.id for s in range(8)}
    assert len(alone) == 1


def test_the_count_of_the_replica_itself_is_no_holder() -> None:
    snapshot = _mesh({"a": 8, "b": 8, "c": 8}, inflight={"a": {"self": 3}})
    chooser = _chooser(LocalLoad(), many=2)
    for _ in range(16):
        chosen = chooser.choose(snapshot, MODEL, now=0.0).replica
        assert chosen is not None
        assert chosen.id.node != "a"


def test_more_ends_than_begins_are_a_fault() -> None:
    load = LocalLoad()
    load.begin(_id("a"))
    load.end(_id("a"))
    with pytest.raises(ValueError, match="never began"):
        load.end(_id("a"))


def test_replicas_that_are_gone_are_forgotten_once_they_are_idle() -> None:
    load = LocalLoad()
    for node in "ab":
        load.begin(_id(node))
    load.end(_id("a"))
    load.forget_all_but([])
    assert load.last_used(_id("a")) == 0
    assert load.last_used(_id("b")) == 2
    assert load.in_flight(_id("b")) == 1


_counts = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 5))


@given(
    free=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3), min_size=1),
    published=_counts,
    own=st.lists(st.sampled_from("abcde"), max_size=12),
    ejected=st.sets(st.sampled_from("abcde")),
    avoid=st.sets(st.sampled_from("abcde")),
    order=st.randoms(use_true_random=False),
)
def test_the_choice_is_the_pick_in_whatever_order_the_replicas_come(
    free: dict[str, int],
    published: dict[str, int],
    own: list[str],
    ejected: set[str],
    avoid: set[str],
    order: random.Random,
) -> None:
    """F11: the mirror of the one pick function."""
    snapshot = _mesh(free, limit=6, inflight={n: {"other": c} for n, c in published.items() if n in free})
    load, ejections = LocalLoad(), Ejections()
    for node in own:
        load.begin(_id(node))
    for node in ejected & free.keys():
        ejections.eject(snapshot.replicas[MODEL][_id(node)], until=5.0)
    out = {_id(n) for n in avoid}
    expected = pick_best_replica(
        candidates(
            snapshot,
            MODEL,
            holder=ME,
            own_in_flight=load.in_flight,
            last_used=load.last_used,
            ejected=lambda r: r in out or r.node in ejected,
        ),
        salt=b"salt",
    )
    chosen = _chooser(load, ejections).choose(snapshot, MODEL, now=0.0, avoid=out)
    assert chosen.replica == (expected.replica if expected else None)
    assert (chosen.replica is None) == (chosen.shortage is not None)

    shuffled = list(snapshot.replicas[MODEL].items())
    order.shuffle(shuffled)
    again = _chooser(load, ejections).choose(
        replace(snapshot, replicas={MODEL: dict(shuffled)}), MODEL, now=0.0, avoid=out
    )
    assert again == chosen


@given(st.integers(1, 6), st.integers(1, 8))
def test_a_burst_within_the_limits_is_shared_to_within_one(replicas: int, rounds: int) -> None:
    """F12."""
    snapshot = _mesh({f"n{i}": 1 + i for i in range(replicas)})
    load = LocalLoad()
    chooser = _chooser(load)
    for _ in range(rounds * replicas):
        chosen = chooser.choose(snapshot, MODEL, now=0.0).replica
        assert chosen is not None
        load.begin(chosen.id)
    assert {load.in_flight(_id(f"n{i}")) for i in range(replicas)} == {rounds}
