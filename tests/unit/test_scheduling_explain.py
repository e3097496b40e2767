"""Explanations: the same answer as the placement, with every reason."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.errors import PlacementFailed
from localmesh.core.ids import CPU, ModelName, NodeName
from localmesh.core.records import (
    ApprovalRecord,
    EngineInfo,
    FailureRecord,
    ModelRecord,
    ModelSpec,
    Policy,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.explain import Explanation, NodeVerdict, Outcome, explain
from localmesh.scheduling.filters import FILTERS
from localmesh.scheduling.placement import PlacementPlan, plan_placement
from localmesh.scheduling.scorers import SCORERS
from tests.unit.scheduling_kit import M, add_model, add_node, apply, mesh, plan, serve


def explained(snapshot: Snapshot) -> Explanation:
    return explain(snapshot, snapshot.models[M], snapshot.policy(M))


def of(explanation: Explanation, node: str) -> NodeVerdict:
    return next(n for n in explanation.nodes if n.node == node)


def failed(verdict: NodeVerdict) -> dict[str, str]:
    return {f.name: f.reason for f in verdict.filters if f.outcome is Outcome.FAILED}


def test_every_filter_and_every_scorer_is_named_for_every_node() -> None:
    """F44."""
    found = explained(mesh(2))
    assert [n.rank for n in found.nodes] == [1, 2]
    for node in found.nodes:
        assert [f.name for f in node.filters] == [f.name for f in FILTERS]
        assert all(f.outcome is Outcome.PASSED for f in node.filters)
        assert [*node.scores] == [s.name for s in SCORERS]


def test_the_chosen_devices_are_marked_on_the_node_that_is_first() -> None:
    """F44."""
    found = explained(mesh(2))
    assert found.plan is not None
    assert found.nodes[0].node == found.plan.replica.node
    (device,) = found.nodes[0].devices
    assert (device.device.id, device.needed_bytes, device.room_bytes, device.chosen) == (CPU, 10, 100, True)


def test_all_reasons_are_told_not_only_the_first() -> None:
    """F44."""
    state = serve(mesh(1, budget=15), 1)
    state = replace(state, approvals={NodeName("n0"): ApprovalRecord(key_fingerprint="k", cordoned=True)})
    failure = FailureRecord(model=M, node=NodeName("n0"), reason="LOAD_FAILED", message="bad magic", revision="r1")
    found = explained(replace(state, failures={M: {NodeName("n0"): failure}}))
    assert failed(of(found, "n0")) == {
        "usable": "n0 is cordoned",
        "slot": "n0 holds 1 of at most 1 replicas of the model (max-replicas-per-model)",
        "failure": "n0 failed to load it a short while ago (LOAD_FAILED: bad magic)",
        "memory": "n0 lacks memory: 10 B needed, cpu has 5 B free of 15 B",
    }
    assert found.plan is None
    assert found.failure is not None


def test_a_filter_that_has_nothing_to_look_at_is_not_asked() -> None:
    """F44: a node without the engine is not said to lack memory."""
    state = mesh(1)
    node = replace(state.nodes[NodeName("n0")], engines=())
    found = of(explained(replace(state, nodes={node.name: node})), "n0")
    assert {f.name for f in found.filters if f.outcome is Outcome.SKIPPED} == {"device", "memory"}
    assert [*failed(found)] == ["engine"]
    assert found.devices[0].reason == "the engine 'e' does not compute on the cpu here"


def test_a_device_that_the_spec_does_not_want_is_said_to_be_so() -> None:
    """F44."""
    state = mesh(1)
    node = replace(
        state.nodes[NodeName("n0")], engines=(EngineInfo(name="e", available=True, device_kinds=("cpu", "gpu")),)
    )
    wanted = replace(state.models[M], spec=replace(state.models[M].spec, device_kind="gpu"))
    found = explained(replace(state, nodes={node.name: node}, models={M: wanted}))
    assert found.nodes[0].devices[0].reason == "the spec wants a GPU"
    assert failed(found.nodes[0]) == {"device": "n0 has no gpu device"}


def test_the_guard_is_told() -> None:
    """F10, F44."""
    assert any("nothing is placed" in note for note in explained(replace(mesh(1), guarded=True)).notes)


def test_a_model_that_is_not_applied_is_explained_with_what_is_known_of_the_same_file() -> None:
    """F44: dry run."""
    state = mesh(2)
    known = SourceRecord(revision="r1", present=True, path="/f", memory_bytes=70)
    state = replace(state, sources={**state.sources, NodeName("n0"): {M: known}, NodeName("n1"): {}})
    wanted = ModelSpec(name=ModelName("new"), backend="e", source="f")
    found = explain(state, ModelRecord(spec=wanted, revision="x"), Policy(), hypothetical=True)
    assert of(found, "n0").devices[0].needed_bytes == 70
    assert of(found, "n1").devices[0].needed_bytes == 0
    assert of(found, "n1").rank > 0, "that nobody has looked yet is nothing against a node"
    assert len(found.notes) == 1
    assert "'f' on n1" in found.notes[0]
    assert "new" not in state.models


def test_an_edit_that_is_not_applied_counts_the_replicas_that_there_are() -> None:
    """F44: dry run."""
    state = serve(mesh(1), 1)
    edited = replace(state.models[M].spec, memory_bytes=95)
    found = explain(state, ModelRecord(spec=edited, revision="x"), Policy(), hypothetical=True)
    assert set(failed(of(found, "n0"))) == {"slot", "memory"}


def placed(state: Snapshot) -> tuple[PlacementPlan | None, str | None]:
    """What the placement itself says."""
    try:
        return plan_placement(state, M), None
    except PlacementFailed as error:
        return None, error.message


@given(
    budgets=st.lists(st.integers(0, 60), max_size=4),
    slots=st.integers(1, 2),
    present=st.integers(0, 3),
    cordoned=st.sets(st.integers(0, 3)),
    engineless=st.sets(st.integers(0, 3)),
    spread=st.booleans(),
)
def test_the_explanation_and_the_placement_say_the_same(
    budgets: list[int], slots: int, present: int, cordoned: set[int], engineless: set[int], spread: bool
) -> None:
    """F44: for any mesh."""
    state = Snapshot()
    for i, budget in enumerate(budgets):
        state = add_node(state, f"n{i}", incarnation=i + 1, slots=slots, budget=budget)
    state = add_model(state, M, revision="r1", policy=Policy(spread_all=spread, min_replicas=0 if spread else present))
    for _ in range(present):
        state = apply(state, plan(state).actions)
    for i in cordoned & set(range(len(budgets))):
        approval = ApprovalRecord(key_fingerprint=f"n{i}", cordoned=True)
        state = replace(state, approvals={**state.approvals, NodeName(f"n{i}"): approval})
    for i in engineless & set(range(len(budgets))):
        node = NodeName(f"n{i}")
        absent = replace(state.nodes[node], engines=(EngineInfo(name="e", available=False),))
        state = replace(state, nodes={**state.nodes, node: absent})
    found = explained(state)
    assert Counter(n.node for n in found.nodes) == Counter([*state.nodes])
    for node in found.nodes:
        assert (node.rank == 0) == bool(failed(node))
    assert (found.plan, found.failure and found.failure.message) == placed(state)
    if found.plan is not None:
        assert {d.device.id for d in found.nodes[0].devices if d.chosen} == set(found.plan.devices)


def test_a_model_that_nobody_declared_can_be_explained_on_an_empty_mesh() -> None:
    spec = ModelSpec(name=M, backend="e", source="f")
    found = explain(Snapshot(), ModelRecord(spec=spec, revision="x"), Policy(), hypothetical=True)
    assert found.nodes == ()
    with pytest.raises(PlacementFailed, match="no worker is registered"):
        raise found.failure or AssertionError("no failure")
