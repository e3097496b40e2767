"""T5 and forgetting a node against a real etcd, and both against T0, T1 and T2."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from localmesh.core.errors import Conflict, InternalError, NodeInUse, NodeNotFound, NodePending
from localmesh.core.ids import CPU, HolderId, ReplicaId
from localmesh.core.records import ApprovalRecord
from localmesh.store.presence import PresenceKeys
from tests.integration.store_kit import GIB, M0, Kit, M, N, store_kit

Edit = Callable[[ApprovalRecord | None], ApprovalRecord]


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


def also(**changes: object) -> Edit:
    """An edit of what is there."""

    def edit(known: ApprovalRecord | None) -> ApprovalRecord:
        assert known is not None
        return replace(known, **changes)  # type: ignore[arg-type]

    return edit


def labelled(name: str) -> Edit:
    def edit(known: ApprovalRecord | None) -> ApprovalRecord:
        assert known is not None
        return replace(known, labels={**known.labels, name: "x"})

    return edit


async def test_editors_at_the_same_time_lose_nothing_of_one_another(kit: Kit) -> None:
    """F6."""
    await kit.node()
    names = [f"label-{number}" for number in range(6)]
    await asyncio.gather(*(kit.store.edit_approval(N, labelled(name)) for name in names))
    assert sorted((await kit.load()).approvals[N].labels) == names


async def test_from_the_revision_of_a_drain_on_there_is_no_new_lock_and_no_placement(kit: Kit) -> None:
    """F2, F7; invariant 3."""
    ready = await kit.mesh_with_a_ready_replica()
    stale = await kit.load()
    await kit.store.edit_approval(N, also(draining=True))
    lease = (await kit.etcd.lease_grant(60)).id
    with pytest.raises(Conflict):
        await PresenceKeys(kit.store, HolderId("h")).take(ready, stale, lease, 1)
    with pytest.raises(Conflict):
        await kit.place(ReplicaId(M, N, 1), snapshot=stale)
    await kit.store.edit_approval(N, also(draining=False))
    fresh = await kit.load()
    await PresenceKeys(kit.store, HolderId("h")).take(ready, fresh, lease, 1)
    await kit.etcd.lease_revoke(lease)


async def test_a_placement_planned_before_an_override_does_not_get_past_it(kit: Kit) -> None:
    """F30, F32; invariants 1 and 4."""
    await kit.mesh_with_a_ready_replica()
    stale = await kit.load()
    await kit.store.edit_approval(N, also(max_replicas_per_model=1))
    with pytest.raises(Conflict):
        await kit.place(ReplicaId(M, N, 1), snapshot=stale)
    with pytest.raises(Conflict, match="takes 1"):
        await kit.place(ReplicaId(M, N, 1))
    await kit.store.edit_approval(N, also(max_replicas_per_model=0, memory_budgets={"*": "50%"}))
    await kit.place(ReplicaId(M, N, 1))
    with pytest.raises(Conflict, match="room"):
        await kit.place(ReplicaId(M, N, 2))


async def test_a_budget_and_a_registration_at_the_same_time_agree_in_the_end(kit: Kit) -> None:
    """F30: whoever comes second has seen the other."""
    await kit.node(gib=8)
    for part in (10, 20, 30, 40):
        budgets = {"*": f"{part}%"}
        await asyncio.gather(
            kit.node(gib=8),
            kit.store.edit_approval(N, also(memory_budgets=budgets)),
            kit.node(gib=8),
            return_exceptions=True,
        )
        snapshot = await kit.load()
        assert dict(snapshot.approvals[N].memory_budgets) == budgets
        assert snapshot.devices[N][CPU].budget_bytes == 8 * GIB * part // 100
        assert snapshot.devices[N][CPU].worker_budget_bytes == 8 * GIB


async def test_devices_keep_claims_and_leases_when_their_budget_changes(kit: Kit) -> None:
    """F30."""
    await kit.mesh_with_a_ready_replica()
    key = kit.store.keys.device(N, CPU)
    before = await kit.etcd.get(key)
    await kit.store.edit_approval(N, also(memory_budgets={"cpu": "1GiB"}))
    after = await kit.etcd.get(key)
    assert before is not None
    assert after is not None
    assert (after.lease, after.version) == (before.lease, before.version + 1)
    assert (await kit.load()).devices[N][CPU].claims == {M0: GIB}


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_an_answer_that_was_lost_is_settled(kit: Kit, losses: list[str | None]) -> None:
    await kit.node()
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    approval = await kit.store.edit_approval(N, also(cordoned=True))
    assert (await kit.load()).approvals[N] == approval
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    gone = await kit.store.forget_node(N)
    snapshot = await kit.load()
    assert gone.revision <= snapshot.revision
    assert (dict(snapshot.approvals), dict(snapshot.nodes), dict(snapshot.devices)) == ({}, {}, {})


async def test_a_node_with_replicas_is_forgotten_by_force_only_and_with_all_of_its_keys(kit: Kit) -> None:
    """F8: no claim, lock or lease is left behind."""
    await kit.mesh_with_a_ready_replica()
    with pytest.raises(NodeInUse) as told:
        await kit.store.forget_node(N)
    assert told.value.metadata["replicas"] == "1"
    assert (await kit.store.forget_node(N, force=True)).replicas == (M0,)
    left = (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs
    assert {kv.key for kv in left} == {kit.store.keys.model(M), kit.store.keys.policy(M)}
    with pytest.raises(NodeNotFound):
        await kit.store.forget_node(N)


async def test_a_node_is_forgotten_or_placed_on_never_both(kit: Kit) -> None:
    """F8: the removal of an idle node races a placement."""
    await kit.model()
    for number in range(12):
        await kit.node()
        view = await kit.load()

        async def place_a_bit_later(steps: int = number % 4, view=view) -> bool:
            for _ in range(steps):
                await kit.etcd.get(kit.store.keys.schema())
            try:
                await kit.place(snapshot=view)
            except Conflict:
                return False
            return True

        async def forget() -> bool:
            try:
                await kit.store.forget_node(N)
            except NodeInUse:
                return False
            return True

        placed, forgotten = await asyncio.gather(place_a_bit_later(), forget())
        snapshot = await kit.load()
        assert placed != forgotten
        assert (N in snapshot.approvals, M0 in snapshot.replicas.get(M, {})) == (placed, placed)
        await kit.store.forget_node(N, force=True) if placed else None


async def test_a_node_is_forgotten_or_registers_as_a_new_one(kit: Kit) -> None:
    """F3, F8: what operators said never comes back with a registration that was on its way."""
    for _ in range(8):
        await kit.node()
        await kit.store.edit_approval(N, also(cordoned=True))
        outcomes = await asyncio.gather(kit.node(auto_approve=False), kit.store.forget_node(N), return_exceptions=True)
        assert isinstance(outcomes[0], NodePending | Conflict) or not isinstance(outcomes[0], BaseException)
        snapshot = await kit.load()
        approval = snapshot.approvals.get(N)
        assert not snapshot.usable(N)
        assert approval is None or approval.cordoned or not approval.approved
        await kit.store.forget_node(N, force=True) if approval is not None else None


async def test_what_cannot_be_read_is_not_written_over_but_can_be_forgotten(kit: Kit) -> None:
    await kit.etcd.put(kit.store.keys.approval(N), b"\xff")
    with pytest.raises(InternalError, match="cannot be read"):
        await kit.store.edit_approval(N, also(cordoned=True))
    with pytest.raises(InternalError, match="cannot be read"):
        await kit.store.read_approval(N)
    await kit.store.forget_node(N)
    assert await kit.store.read_approval(N) is None
