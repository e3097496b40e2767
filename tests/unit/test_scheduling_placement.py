"""Placement: which node, which device, which index, and what is said when there is none."""

from dataclasses import replace
from typing import Any

import pytest

from localmesh.core.errors import EngineUnavailable, ModelNotFound, NoCapacity, NoNodes, PlacementFailed, SourceMissing
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    FailureRecord,
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement
from localmesh.scheduling.filters import FILTERS, human_bytes
from localmesh.scheduling.placement import plan_placement
from localmesh.scheduling.scorers import SCORERS

GIB = 1 << 30
M = ModelName("m")
GPU = DeviceId("GPU-1")


def device(node: str, name: str = CPU, *, budget: int = 8 * GIB, claims: dict[ReplicaId, int] | None = None) -> Any:
    return DeviceRecord(
        node=NodeName(node),
        id=DeviceId(name),
        kind="cpu" if name == CPU else "gpu",
        total_bytes=budget,
        budget_bytes=budget,
        claims=claims or {},
    )


def mesh(
    *nodes: str,
    spec: ModelSpec | None = None,
    policy: Policy | None = None,
    kinds: tuple[str, ...] = ("cpu",),
    slots: int = 1,
) -> Snapshot:
    """A mesh of equal nodes that all have the engine and the file of the model `m`."""
    spec = spec or ModelSpec(name=M, backend="llama", source="m.gguf", memory_bytes=GIB)
    names = [NodeName(n) for n in nodes]
    return Snapshot(
        revision=10,
        models={spec.name: ModelRecord(spec=spec, revision="r1")},
        policies={spec.name: PolicyRecord(policy=policy or Policy())},
        approvals={n: ApprovalRecord(key_fingerprint=n) for n in names},
        nodes={
            n: NodeRecord(
                name=n,
                incarnation=100 + i,
                record_lease=200 + i,
                endpoint=f"{n}:1",
                engines=(EngineInfo(name="llama", available=True, device_kinds=kinds, detail="xllamacpp 1"),),
                max_replicas_per_model=slots,
            )
            for i, n in enumerate(names)
        },
        sources={n: {spec.name: SourceRecord(revision="r1", present=True, path="/models/m.gguf")} for n in names},
        devices={n: {CPU: device(n)} for n in names},
    )


def change_node(snapshot: Snapshot, node: str, **changes: Any) -> Snapshot:
    name = NodeName(node)
    return replace(snapshot, nodes={**snapshot.nodes, name: replace(snapshot.nodes[name], **changes)})


def with_device(snapshot: Snapshot, *devices: DeviceRecord) -> Snapshot:
    found = {n: dict(d) for n, d in snapshot.devices.items()}
    for one in devices:
        found[one.node][one.id] = one
    return replace(snapshot, devices=found)


def with_source(snapshot: Snapshot, node: str, source: SourceRecord | None) -> Snapshot:
    known = {n: dict(s) for n, s in snapshot.sources.items()}
    if source is None:
        del known[NodeName(node)][M]
    else:
        known[NodeName(node)][M] = source
    return replace(snapshot, sources=known)


def test_the_node_with_most_unclaimed_memory_is_taken() -> None:
    """F26."""
    state = with_device(mesh("a", "b", "c"), device("b", budget=9 * GIB))
    assert plan_placement(state, M).replica == ReplicaId(M, NodeName("b"), 0)


def test_equal_nodes_stand_in_an_order_of_each_model_so_that_many_models_do_not_herd() -> None:
    """F26."""
    nodes = ("a", "b", "c", "d")

    def first(name: str, *order: str) -> str:
        spec = ModelSpec(name=ModelName(name), backend="llama", source="m.gguf", memory_bytes=GIB)
        return plan_placement(mesh(*order, spec=spec), spec.name).replica.node

    firsts = [first(f"m{i}", *nodes) for i in range(40)]
    assert firsts == [first(f"m{i}", *reversed(nodes)) for i in range(40)], "the same state, the same plan"
    assert all(firsts.count(node) >= 3 for node in nodes)


def test_the_plan_names_revision_claim_and_incarnation() -> None:
    plan = plan_placement(mesh("a"), M)
    assert (plan.revision, dict(plan.devices), plan.incarnation) == ("r1", {CPU: GIB}, 100)


def test_less_measured_memory_than_unclaimed_counts() -> None:
    """F9."""
    state = replace(mesh("a", "b"), measured={NodeName("a"): MeasuredRecord(free_bytes={CPU: 2 * GIB})})
    assert plan_placement(state, M).replica.node == "b"


def test_a_device_without_measurement_is_not_full() -> None:
    """F9: unknown is not full."""
    state = replace(mesh("a"), measured={NodeName("a"): MeasuredRecord(free_bytes={})})
    assert plan_placement(state, M).replica.node == "a"


def test_what_loading_replicas_will_take_comes_off_the_measurement() -> None:
    other = ReplicaId(ModelName("other"), NodeName("a"), 0)
    record = ReplicaRecord(id=other, state=ReplicaState.LOADING, revision="x", incarnation=100, devices={CPU: 3 * GIB})
    state = replace(
        with_device(mesh("a"), device("a", claims={other: 3 * GIB})),
        measured={NodeName("a"): MeasuredRecord(free_bytes={CPU: 3 * GIB + 100})},
        replicas={other.model: {other: record}},
    )
    with pytest.raises(NoCapacity, match="lacks memory"):
        plan_placement(state, M)
    ready = {other.model: {other: replace(record, state=ReplicaState.READY)}}
    assert plan_placement(replace(state, replicas=ready), M).replica.node == "a"


def test_the_nodes_estimate_is_claimed_where_the_spec_names_no_size() -> None:
    """F29."""
    state = mesh("a", spec=ModelSpec(name=M, backend="llama", source="m.gguf"))
    state = with_source(state, "a", SourceRecord(revision="r1", present=True, path="/m", memory_bytes=12345))
    assert dict(plan_placement(state, M).devices) == {CPU: 12345}


def test_the_lowest_free_index_is_used() -> None:
    """F18."""
    state = mesh("a", slots=4)
    for index in (0, 1, 2):
        plan = plan_placement(state, M)
        assert plan.replica.index == index
        state = with_placement(state, plan)
    kept = {r: v for r, v in state.replicas[M].items() if r.index != 1}
    assert plan_placement(replace(state, replicas={M: kept}), M).replica.index == 1


def test_replicas_of_a_model_spread_over_nodes_before_they_share_one() -> None:
    state = with_device(mesh("a", "b", slots=2), device("a", budget=64 * GIB))
    state = with_placement(state, plan_placement(state, M))
    assert plan_placement(state, M).replica.node == "b"


def test_a_gpu_comes_before_the_cpu_where_the_engine_computes_on_both() -> None:
    state = mesh("a", "b", kinds=("cpu", "gpu"))
    state = with_device(state, device("b", GPU, budget=2 * GIB), device("a", budget=512 * GIB))
    plan = plan_placement(state, M)
    assert (plan.replica.node, dict(plan.devices)) == ("b", {GPU: GIB})


def test_an_engine_for_the_cpu_is_never_placed_on_a_gpu() -> None:
    state = with_device(mesh("a", kinds=("cpu",)), device("a", GPU, budget=64 * GIB))
    assert dict(plan_placement(state, M).devices) == {CPU: GIB}


def test_a_full_gpu_leaves_the_cpu_unless_the_spec_wants_a_gpu() -> None:
    state = with_device(mesh("a", kinds=("cpu", "gpu")), device("a", GPU, budget=GIB // 2))
    assert dict(plan_placement(state, M).devices) == {CPU: GIB}
    spec = ModelSpec(name=M, backend="llama", source="m.gguf", memory_bytes=GIB, device_kind="gpu")
    state = replace(state, models={M: ModelRecord(spec=spec, revision="r1")})
    with pytest.raises(NoCapacity, match=r"1\.0 GiB needed, GPU-1 has 512 MiB free"):
        plan_placement(state, M)


def test_a_model_for_gpus_needs_an_engine_that_computes_on_them() -> None:
    spec = ModelSpec(name=M, backend="llama", source="m.gguf", device_kind="gpu")
    with pytest.raises(EngineUnavailable, match=r"on cpu only, not on 'gpu' \(xllamacpp 1\)"):
        plan_placement(mesh("a", spec=spec), M)


def test_a_node_without_a_gpu_lacks_the_device_not_the_engine() -> None:
    spec = ModelSpec(name=M, backend="llama", source="m.gguf", device_kind="gpu")
    with pytest.raises(NoCapacity, match="a has no gpu device"):
        plan_placement(mesh("a", spec=spec, kinds=("cpu", "gpu")), M)


def test_without_nodes_the_placement_says_so() -> None:
    with pytest.raises(NoNodes, match="no worker is registered"):
        plan_placement(mesh(), M)


@pytest.mark.parametrize(
    ("approval", "words"),
    [
        (None, "waits for approval"),
        (ApprovalRecord(key_fingerprint="a", approved=False), "waits for approval"),
        (ApprovalRecord(key_fingerprint="a", cordoned=True), "is cordoned"),
        (ApprovalRecord(key_fingerprint="a", draining=True), "is draining"),
    ],
)
def test_a_node_that_may_not_take_replicas_is_named_with_its_reason(approval: Any, words: str) -> None:
    state = replace(mesh("a"), approvals={NodeName("a"): approval} if approval else {})
    with pytest.raises(NoNodes, match=f"a {words}"):
        plan_placement(state, M)


def test_an_unknown_model_is_not_a_lack_of_room() -> None:
    with pytest.raises(ModelNotFound):
        plan_placement(mesh("a"), ModelName("other"))


def test_excluded_nodes_are_not_taken() -> None:
    state = mesh("a", "b")
    assert plan_placement(state, M, exclude_nodes=frozenset({NodeName("a")})).replica.node == "b"


def test_the_selector_looks_at_the_operators_labels_over_the_workers() -> None:
    """F26: selector first."""
    state = mesh("a", "b", policy=Policy(node_selector={"zone": "x"}))
    state = change_node(change_node(state, "a", labels={"zone": "x"}), "b", labels={"zone": "y"})
    assert plan_placement(state, M).replica.node == "a"
    operator = ApprovalRecord(key_fingerprint="a", labels={"zone": "z"})
    state = replace(state, approvals={**state.approvals, NodeName("a"): operator})
    assert state.labels(NodeName("a"))["zone"] == "z"
    with pytest.raises(NoCapacity, match=r"a has the label zone='z' \(the selector wants 'x'\)"):
        plan_placement(state, M)


def test_a_missing_label_is_named() -> None:
    with pytest.raises(NoCapacity, match="a has no label 'zone'"):
        plan_placement(mesh("a", policy=Policy(node_selector={"zone": "x"})), M)


def test_a_missing_file_is_named_with_its_path_on_each_node() -> None:
    state = mesh("a", "b")
    for node in ("a", "b"):
        missing = SourceRecord(revision="r1", present=False, path=f"/{node}/m.gguf", problem="no such file")
        state = with_source(state, node, missing)
    with pytest.raises(SourceMissing) as caught:
        plan_placement(state, M)
    assert "a has no /a/m.gguf (no such file); b has no /b/m.gguf (no such file)" in caught.value.message
    assert caught.value.metadata["source"] == "m.gguf"


def test_a_missing_engine_says_what_to_install() -> None:
    engine = EngineInfo(name="llama", available=False, detail="pip install 'localmesh[engines]'")
    state = change_node(mesh("a"), "a", engines=(engine,))
    with pytest.raises(EngineUnavailable, match=r"cannot run the engine 'llama': pip install") as caught:
        plan_placement(state, M)
    assert caught.value.metadata["engine"] == "llama"
    with pytest.raises(EngineUnavailable, match="does not know the engine"):
        plan_placement(change_node(state, "a", engines=()), M)


def test_the_error_is_that_of_the_node_that_came_furthest() -> None:
    state = change_node(mesh("a", "b"), "a", engines=())
    state = with_source(state, "b", SourceRecord(revision="r1", present=False, path="/x"))
    with pytest.raises(SourceMissing, match=r"b has no /x.*; a does not know"):
        plan_placement(state, M)


@pytest.mark.parametrize("stale", [True, False])
def test_a_node_that_has_not_looked_for_the_file_yet_is_worth_another_try_soon(stale: bool) -> None:
    source = SourceRecord(revision="r0", present=True, path="/m") if stale else None
    with pytest.raises(NoCapacity, match="has not said yet") as caught:
        plan_placement(with_source(mesh("a"), "a", source), M)
    assert caught.value.retry_after_seconds == 1.0


def test_it_is_worth_another_try_also_when_another_node_came_further() -> None:
    state = with_device(with_source(mesh("a", "b"), "a", None), device("b", budget=1))
    with pytest.raises(NoCapacity, match="b lacks memory") as caught:
        plan_placement(state, M)
    assert caught.value.retry_after_seconds == 1.0


def test_a_full_slot_is_not_taken_twice() -> None:
    """F18, F32."""
    state = mesh("a")
    state = with_placement(state, plan_placement(state, M))
    with pytest.raises(NoCapacity, match="holds 1 of at most 1 replicas") as caught:
        plan_placement(state, M)
    assert caught.value.retry_after_seconds is None


def test_the_models_maximum_holds_over_all_nodes() -> None:
    """F33."""
    state = mesh("a", "b", policy=Policy(max_replicas=1))
    state = with_placement(state, plan_placement(state, M))
    with pytest.raises(NoCapacity, match="1 of at most 1 replicas"):
        plan_placement(state, M)


def test_a_node_that_failed_is_left_alone_until_the_model_changes() -> None:
    """F42."""
    failure = FailureRecord(model=M, node=NodeName("a"), reason="LOAD_FAILED", message="bad magic", revision="r1")
    state = replace(mesh("a"), failures={M: {NodeName("a"): failure}})
    with pytest.raises(NoCapacity, match="LOAD_FAILED: bad magic"):
        plan_placement(state, M)
    state = replace(state, failures={M: {NodeName("a"): replace(failure, revision="r0")}})
    assert plan_placement(state, M).replica.node == "a"


def test_memory_that_lacks_is_said_in_numbers() -> None:
    """F27."""
    state = with_device(mesh("a"), device("a", budget=GIB - 1))
    with pytest.raises(NoCapacity, match=r"a lacks memory: 1\.0 GiB needed, cpu has 1024 MiB free of 1024 MiB"):
        plan_placement(state, M)


def test_a_lowered_budget_stops_new_placements() -> None:
    """F30."""
    other = ReplicaId(ModelName("other"), NodeName("a"), 0)
    state = with_device(mesh("a"), device("a", budget=GIB, claims={other: 2 * GIB}))
    with pytest.raises(NoCapacity, match="0 B free"):
        plan_placement(state, M)


def test_many_nodes_make_no_endless_message() -> None:
    state = mesh(*(f"n{i:03}" for i in range(200)), policy=Policy(node_selector={"zone": "x"}))
    with pytest.raises(PlacementFailed) as caught:
        plan_placement(state, M)
    assert caught.value.message.endswith("and 192 more nodes")


def test_filters_and_scorers_have_names_of_their_own() -> None:
    """F44."""
    names = [f.name for f in FILTERS] + [s.name for s in SCORERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("count", "text"), [(17, "17 B"), (300 << 20, "300 MiB"), (3 << 29, "1.5 GiB")])
def test_bytes_read_well(count: int, text: str) -> None:
    assert human_bytes(count) == text
