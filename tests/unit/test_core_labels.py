"""Labels of nodes, and the selectors over them."""

import pytest

from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName
from localmesh.core.labels import Operator, SelectorTerm, gpu_memory_label, selector_mismatch
from localmesh.core.records import ApprovalRecord, DeviceRecord, NodeRecord, Policy, PolicyRecord
from localmesh.core.snapshot import Snapshot

GIB = 1 << 30
N = NodeName("n")


def term(operator: str, *values: str, key: str = "zone") -> SelectorTerm:
    return SelectorTerm(key=key, operator=Operator(operator), values=values)


@pytest.mark.parametrize(
    ("labels", "wanted", "mismatch"),
    [
        ({"zone": "a"}, term("In", "a", "b"), None),
        ({"zone": "c"}, term("In", "a", "b"), "has the label zone='c' (the selector wants one of 'a', 'b')"),
        ({}, term("In", "a"), "has no label 'zone' (the selector wants 'a')"),
        ({"zone": "c"}, term("NotIn", "a", "b"), None),
        ({}, term("NotIn", "a"), None),
        ({"zone": "a"}, term("NotIn", "a"), "has the label zone='a' (the selector wants none of 'a')"),
        ({"zone": ""}, term("Exists"), None),
        ({}, term("Exists"), "has no label 'zone' (the selector wants it)"),
        ({}, term("DoesNotExist"), None),
        ({"zone": "a"}, term("DoesNotExist"), "has the label zone='a' (the selector wants nodes without it)"),
    ],
)
def test_a_term_holds_or_says_why_not(labels: dict[str, str], wanted: SelectorTerm, mismatch: str | None) -> None:
    """F26: selector first."""
    assert wanted.mismatch(labels) == mismatch


def test_all_conditions_of_a_selector_must_hold() -> None:
    """F26."""
    labels = {"zone": "a", "tier": "1"}
    assert selector_mismatch({"zone": "a"}, (term("In", "1", "2", key="tier"),), labels) is None
    assert selector_mismatch({"zone": "b"}, (), labels) is not None
    assert selector_mismatch({"zone": "a"}, (term("NotIn", "1", key="tier"),), labels) is not None


@pytest.mark.parametrize(
    ("reported", "label"),
    [
        (24 * GIB, "24GiB"),
        (23_034 << 20, "24GiB"),  # 24 GB with error correction
        (81_559 << 20, "80GiB"),
        (143_771 << 20, "141GiB"),
        (15 * GIB, "16GiB"),
        (13 * GIB, "12GiB"),
        (1 << 20, "0GiB"),
    ],
)
def test_a_gpu_is_labelled_by_the_size_that_it_is_sold_as(reported: int, label: str) -> None:
    """F6."""
    assert gpu_memory_label(reported) == label


def test_hardware_labels_are_automatic_and_the_operators_stand_above_them() -> None:
    """F6."""
    gpus = [
        DeviceRecord(node=N, id=DeviceId(f"GPU-{i}"), kind="gpu", total_bytes=size * GIB, budget_bytes=1)
        for i, size in enumerate((24, 48))
    ]
    cpu = DeviceRecord(node=N, id=CPU, kind="cpu", total_bytes=GIB, budget_bytes=GIB)
    worker = {"zone": "worker", "node.name": "a lie", "cpu.arch": "x86_64", "gpu.vendor": "nvidia"}
    snapshot = Snapshot(
        nodes={
            N: NodeRecord(name=N, incarnation=1, record_lease=1, endpoint="", labels=worker, max_replicas_per_model=3)
        },
        devices={N: {d.id: d for d in (cpu, *gpus)}},
        approvals={N: ApprovalRecord(key_fingerprint="k", labels={"zone": "operator", "gpu.count": "7"})},
    )
    assert snapshot.labels(N) == {
        "zone": "operator",
        "node.name": "n",
        "cpu.arch": "x86_64",
        "gpu.vendor": "nvidia",
        "gpu.memory": "48GiB",
        "gpu.count": "7",
        "node.replica-slots": "3",
    }


def test_replica_slots_mirror_the_operators_override() -> None:
    """F32."""
    record = NodeRecord(name=N, incarnation=1, record_lease=1, endpoint="", max_replicas_per_model=3)
    overridden = ApprovalRecord(key_fingerprint="k", max_replicas_per_model=5)
    snapshot = Snapshot(nodes={N: record}, approvals={N: overridden})
    assert snapshot.max_replicas_on(N) == 5
    assert snapshot.labels(N)["node.replica-slots"] == "5"


def test_spreading_over_all_wants_as_many_as_match_now() -> None:
    """F33."""
    names = [NodeName(n) for n in ("a", "b", "c", "d")]
    labels = {"a": {"zone": "x"}, "b": {"zone": "x"}, "c": {"zone": "y"}, "d": {"zone": "x"}}
    model = ModelName("m")
    policy = Policy(spread_all=True, selector_terms=(term("In", "x"),))
    snapshot = Snapshot(
        nodes={n: NodeRecord(name=n, incarnation=1, record_lease=1, endpoint="", labels=labels[n]) for n in names},
        approvals={n: ApprovalRecord(key_fingerprint="k", cordoned=n == "d") for n in names},
        policies={model: PolicyRecord(policy=policy)},
    )
    assert snapshot.selected_nodes(model) == ["a", "b"]
    assert snapshot.min_replicas(model) == 2


def test_members_of_a_group_are_those_who_have_one_in_common() -> None:
    """F37."""
    groups = {"a": ("x", "y"), "b": ("y",), "c": ("z",), "d": ()}
    snapshot = Snapshot(
        policies={ModelName(m): PolicyRecord(policy=Policy(groups=found)) for m, found in groups.items()}
    )
    assert {m: sorted(snapshot.group_members(ModelName(m))) for m in groups} == {
        "a": ["b"],
        "b": ["a"],
        "c": [],
        "d": [],
    }
