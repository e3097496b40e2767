"""The mass-expiry guard in a real etcd."""

from collections.abc import AsyncIterator

import pytest

from localmesh.core.errors import Conflict
from localmesh.core.ids import NodeName
from localmesh.etcd import Leadership
from tests.integration.store_kit import Kit, store_kit

LOST = frozenset({NodeName("a"), NodeName("b")})


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as made:
        yield made


async def test_the_guard_is_set_seen_and_lifted(kit: Kit) -> None:
    """F10."""
    revision = await kit.store.put_guard(LOST)
    snapshot = await kit.load()
    assert (snapshot.guarded, snapshot.guarded_nodes, snapshot.revision) == (True, LOST, revision)
    assert await kit.store.clear_guard()
    snapshot = await kit.load()
    assert (snapshot.guarded, snapshot.guarded_nodes) == (False, frozenset())
    assert not await kit.store.clear_guard()


async def test_a_deposed_leader_neither_sets_nor_lifts_it(kit: Kit) -> None:
    """F10."""
    deposed = Leadership(kit.store.keys.leader(), 1)
    with pytest.raises(Conflict):
        await kit.store.put_guard(LOST, leader=deposed)
    assert not (await kit.load()).guarded
    await kit.store.put_guard(LOST)
    assert not await kit.store.clear_guard(leader=deposed)
    assert (await kit.load()).guarded


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_lost_answers_are_settled(kit: Kit, losses: list[str | None]) -> None:
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    await kit.store.put_guard(LOST)
    assert (await kit.load()).guarded_nodes == LOST


@pytest.mark.parametrize("value", [b"\xff", b"\x12\x02A/"])
async def test_a_guard_that_cannot_be_read_is_a_guard(kit: Kit, value: bytes) -> None:
    await kit.etcd.put(kit.store.keys.guard(), value)
    snapshot = await kit.load()
    assert (snapshot.guarded, snapshot.guarded_nodes) == (True, frozenset())
