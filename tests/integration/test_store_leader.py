"""The election of the reconciler against a real etcd."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from localmesh.core.errors import Conflict
from localmesh.etcd import Leadership
from localmesh.store import LeaderElection
from tests.integration.store_kit import Kit, background, eventually, mirrored, store_kit


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


class Candidate:
    """A candidate whose leading can be observed, and ended."""

    def __init__(self, kit: Kit, name: str) -> None:
        self.election = LeaderElection(kit.store, name, ttl_seconds=2)
        self.leads = asyncio.Event()
        self.ends = asyncio.Event()
        self.failure: Exception | None = None
        self.terms = 0

    async def run(self) -> None:
        await self.election.run(self._lead)

    async def _lead(self, leadership: Leadership) -> None:
        assert leadership == self.election.leadership
        self.terms += 1
        self.leads.set()
        try:
            await self.ends.wait()
            if self.failure is not None:
                raise self.failure
        finally:
            self.leads.clear()


async def test_one_of_several_leads_and_the_mirror_shows_who(kit: Kit) -> None:
    one, two = Candidate(kit, "one"), Candidate(kit, "two")
    async with mirrored(kit) as mirror:
        async with background(one.run(), two.run()):
            await eventually(lambda: one.leads.is_set() or two.leads.is_set())
            leader = "one" if one.leads.is_set() else "two"
            await kit.until(lambda s: s.leader == leader)
            assert not (one.leads.is_set() and two.leads.is_set())
        assert (await kit.until(lambda s: not s.leader)) is mirror.snapshot


@pytest.mark.parametrize("failure", [None, Conflict("deposed")])
async def test_a_leader_that_stops_leading_makes_room(kit: Kit, failure: Exception | None) -> None:
    one, two = Candidate(kit, "one"), Candidate(kit, "two")
    one.failure = failure
    async with background(one.run()):
        await asyncio.wait_for(one.leads.wait(), 20)
        async with background(two.run()):
            one.ends.set()
            await asyncio.wait_for(two.leads.wait(), 20)
            assert one.election.leadership is None
            assert two.election.leadership is not None


async def test_a_leader_whose_lease_is_gone_stops_at_once(kit: Kit) -> None:
    one = Candidate(kit, "one")
    async with background(one.run()):
        await asyncio.wait_for(one.leads.wait(), 20)
        stored = await kit.etcd.get(kit.store.keys.leader())
        assert stored is not None
        await kit.etcd.lease_revoke(stored.lease)
        await eventually(lambda: one.terms == 2 and one.leads.is_set())
        leadership = one.election.leadership
        assert leadership is not None
        assert leadership.create_revision > stored.create_revision


async def test_a_bug_in_leading_is_not_hidden(kit: Kit) -> None:
    one = Candidate(kit, "one")
    one.failure = KeyError("bug")
    one.ends.set()
    with pytest.raises(KeyError, match="bug"):
        await one.run()
