"""Budgets of devices that share memory."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.memory import left_bytes, sharing, unclaimed_bytes
from localmesh.core.records import DeviceRecord, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot

N = NodeName("n")
GPU, OWN = DeviceId("GPU-1"), DeviceId("GPU-2")
A, B = ReplicaId(ModelName("a"), N, 0), ReplicaId(ModelName("b"), N, 0)


def device(name: DeviceId, budget: int, *, unified: bool = False, **claims: int) -> DeviceRecord:
    return DeviceRecord(
        node=N,
        id=name,
        kind="cpu" if name == CPU else "gpu",
        total_bytes=budget,
        budget_bytes=budget,
        unified=unified,
        claims={ReplicaId(ModelName(model), N, 0): size for model, size in claims.items()},
    )


def node(*devices: DeviceRecord) -> Mapping[DeviceId, DeviceRecord]:
    return {d.id: d for d in devices}


def test_a_gpu_with_its_own_memory_shares_nothing() -> None:
    devices = node(device(CPU, 100, a=60), device(OWN, 50, b=20))
    assert [d.id for d in sharing(devices, OWN)] == [OWN]
    assert (unclaimed_bytes(devices, CPU), unclaimed_bytes(devices, OWN)) == (40, 30)


def test_a_unified_gpu_and_the_cpu_have_one_budget() -> None:
    """F9, F27."""
    devices = node(device(CPU, 100, a=60), device(GPU, 90, unified=True, b=30), device(OWN, 50))
    assert (unclaimed_bytes(devices, CPU), unclaimed_bytes(devices, GPU)) == (10, 10)
    assert unclaimed_bytes(devices, OWN) == 50


def test_the_budget_of_the_gpu_itself_holds_besides() -> None:
    devices = node(device(CPU, 100), device(GPU, 40, unified=True, b=30))
    assert (unclaimed_bytes(devices, CPU), unclaimed_bytes(devices, GPU)) == (70, 10)


def test_parts_that_fit_alone_may_not_fit_together() -> None:
    """F28."""
    devices = node(device(CPU, 100), device(GPU, 100, unified=True), device(OWN, 100, unified=True))
    assert min(left_bytes(devices, {GPU: 60}).values()) == 40
    assert min(left_bytes(devices, {GPU: 60, OWN: 60}).values()) == -20


def test_what_was_handed_over_is_room_for_the_heir_alone() -> None:
    devices = node(device(CPU, 100, a=90), device(GPU, 100, unified=True))
    assert unclaimed_bytes(devices, GPU) == 10
    assert unclaimed_bytes(devices, GPU, claimant=A) == 100
    assert unclaimed_bytes(devices, GPU, claimant=B) == 10


def test_the_pick_sees_what_is_really_free_of_shared_memory() -> None:
    """F11."""
    replica = ReplicaRecord(id=A, state=ReplicaState.READY, revision="r", incarnation=1, devices={GPU: 5})
    devices = node(device(CPU, 100, b=80), device(GPU, 90, unified=True, a=5))
    assert Snapshot(devices={N: devices}).free_bytes(replica) == 15


SIZES = st.integers(0, 100)


@given(
    budgets=st.tuples(SIZES, SIZES, SIZES),
    steps=st.lists(st.tuples(st.sets(st.sampled_from([0, 1, 2]), min_size=1), SIZES)),
)
def test_claims_that_were_let_in_never_exceed_a_budget(
    budgets: tuple[int, int, int], steps: list[tuple[set[int], int]]
) -> None:
    """F27, F28: invariant 1, whatever the order."""
    names = (CPU, GPU, OWN)
    claims: dict[DeviceId, dict[str, int]] = {name: {} for name in names}
    for number, (places, size) in enumerate(steps):
        devices = node(*(device(d, b, unified=d == GPU, **claims[d]) for d, b in zip(names, budgets, strict=True)))
        sizes = {names[place]: size for place in places}
        if min(left_bytes(devices, sizes).values()) >= 0:
            for name in sizes:
                claims[name][f"m{number}"] = size
    total = {name: sum(found.values()) for name, found in claims.items()}
    assert all(total[name] <= budget for name, budget in zip(names, budgets, strict=True))
    assert total[CPU] + total[GPU] <= budgets[0]
