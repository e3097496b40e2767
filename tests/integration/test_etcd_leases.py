"""Lease sessions, the shared keep-alive stream and elections against a real etcd."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from localmesh.core.clock import SystemClock
from localmesh.etcd import (
    Election,
    EtcdClient,
    EtcdConfig,
    EtcdError,
    KeyValue,
    LeaseExpired,
    LeaseSession,
)
from localmesh.etcd import transactions as t

SECONDS = 20.0
CLOCK = SystemClock()


@pytest.fixture
async def client(etcd_endpoint: str) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(EtcdConfig(endpoints=(etcd_endpoint,))) as opened:
        yield opened


@pytest.fixture
def base(mesh_name: str) -> str:
    return f"/localmesh/{mesh_name}/"


async def test_a_session_outlives_its_ttl_and_takes_its_keys_along_at_the_end(client: EtcdClient, base: str) -> None:
    async with client.session(1) as session:
        await client.put(base + "k", "x", lease=session.lease_id)
        opened_until = session.fence
        async with asyncio.timeout(SECONDS):
            while CLOCK.monotonic() < opened_until + 0.5:
                await asyncio.sleep(0.1)
                assert session.alive()
        assert await client.get(base + "k") is not None
    assert not session.alive()
    assert session.lost.is_set()
    assert await client.get(base + "k") is None


async def test_the_fence_moves_with_each_acknowledged_refresh_and_counts_from_its_sending(
    client: EtcdClient,
) -> None:
    before = CLOCK.monotonic()
    async with client.session(2) as session:
        assert before + session.ttl_seconds <= session.fence <= CLOCK.monotonic() + session.ttl_seconds
        first = session.fence
        async with asyncio.timeout(SECONDS):
            while session.fence == first:
                await asyncio.sleep(0.05)
        assert session.fence <= CLOCK.monotonic() + session.ttl_seconds
        assert session.alive(session.fence - 0.01)
        assert not session.alive(session.fence)


async def test_an_orphaned_session_leaves_its_lease_to_whoever_takes_it_over(client: EtcdClient) -> None:
    session = client.session(30)
    await session.open()
    await session.orphan()
    assert await client.keep_alive_once(session.lease_id) == 30
    assert not session.lost.is_set()
    await client.lease_revoke(session.lease_id)


async def test_a_revoked_lease_is_reported_lost_once_with_the_reason(client: EtcdClient) -> None:
    losses: list[LeaseSession] = []
    async with client.session(2, on_lost=losses.append) as session:
        await client.lease_revoke(session.lease_id)
        async with asyncio.timeout(SECONDS):
            await session.lost.wait()
        assert not session.alive()
        assert "does not know it" in session.lost_reason
    assert losses == [session]


async def test_a_session_that_ends_as_it_should_reports_no_loss(client: EtcdClient) -> None:
    losses: list[LeaseSession] = []
    async with client.session(5, on_lost=losses.append):
        pass
    assert losses == []


async def test_the_ttl_is_the_one_that_etcd_granted(client: EtcdClient) -> None:
    """etcd raises a TTL that is below 1.5 election time-outs."""
    lease = await client.lease_grant(1)
    info = await client.lease_time_to_live(lease.id)
    assert info.granted_ttl_seconds == lease.ttl_seconds
    await client.lease_revoke(lease.id)


async def test_a_refresh_of_an_unknown_lease_raises(client: EtcdClient) -> None:
    with pytest.raises(LeaseExpired) as expired:
        await client.keep_alive_once(12345)
    assert expired.value.lease_id == 12345


async def test_all_leases_share_one_keep_alive_stream(client: EtcdClient) -> None:
    leases = [await client.lease_grant(30 + i) for i in range(50)]
    for _ in range(3):
        ttls = await asyncio.gather(*(client.keep_alive_once(lease.id) for lease in leases))
        assert ttls == [lease.ttl_seconds for lease in leases]
    statistics = client.statistics()
    assert statistics.keep_alive_streams == 1
    assert statistics.leases_waiting == 0
    for lease in leases:
        await client.lease_revoke(lease.id)


async def test_calls_for_the_same_lease_share_one_refresh(client: EtcdClient) -> None:
    lease = await client.lease_grant(30)
    deadline = CLOCK.monotonic() + SECONDS
    refreshes = await asyncio.gather(*(client.refresh(lease.id, ack_timeout=1, deadline=deadline) for _ in range(10)))
    assert len({refresh.sent_at for refresh in refreshes}) == 1
    await client.lease_revoke(lease.id)


async def test_one_leader_at_a_time_and_the_next_when_it_resigns(client: EtcdClient, base: str) -> None:
    election, key = Election(client), base + "leader"
    async with client.session(5) as one, client.session(5) as two, asyncio.timeout(SECONDS):
        first = await election.campaign(key, "one", one)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(election.campaign(key, "two", two))
            guarded = await client.transaction([first.still_leader()], [t.put(base + "w", "1")])
            assert guarded.succeeded
            assert not waiting.done()
            assert await election.resign(first)
        second = waiting.result()
        assert second.create_revision > first.create_revision
        assert not (await client.transaction([first.still_leader()], [t.put(base + "w", "2")])).succeeded
        assert not await election.resign(first)
        found = await client.get(key)
        assert found is not None
        assert (found.value, found.lease, found.create_revision) == (b"two", two.lease_id, second.create_revision)


async def test_the_next_leader_follows_when_the_lease_of_the_first_is_gone(client: EtcdClient, base: str) -> None:
    election, key = Election(client), base + "leader"
    async with client.session(2) as one, client.session(5) as two, asyncio.timeout(SECONDS):
        first = await election.campaign(key, "one", one)
        await one.orphan()  # its process is dead: nobody refreshes, nobody revokes
        second = await election.campaign(key, "two", two)
        assert second.create_revision > first.create_revision
        assert not one.alive(), "the old leader knew by its fence before the new one was elected"


async def test_a_campaign_that_had_won_unseen_finds_itself_as_the_leader(client: EtcdClient, base: str) -> None:
    """An unknown outcome of the first try is settled by the lease on the key."""
    election, key = Election(client), base + "leader"
    async with client.session(5) as session, asyncio.timeout(SECONDS):
        won = await election.campaign(key, "a", session)
        again = await election.campaign(key, "b", session)
        assert again == won
        found = await client.get(key)
        assert found is not None
        assert found.value == b"b"


async def test_a_campaign_ends_when_its_session_is_lost(client: EtcdClient, base: str) -> None:
    election, key = Election(client), base + "leader"
    async with client.session(30) as leader, client.session(2) as loser, asyncio.timeout(SECONDS):
        await election.campaign(key, "leader", leader)
        await client.lease_revoke(loser.lease_id)
        with pytest.raises(LeaseExpired):
            await election.campaign(key, "loser", loser)


async def test_who_leads_can_be_observed_and_proclaimed(client: EtcdClient, base: str) -> None:
    election, key = Election(client), base + "leader"
    seen: list[bytes | None] = []

    async def observe() -> None:
        leader: KeyValue | None
        async for leader in election.observe(key):
            seen.append(leader.value if leader else None)
            if len(seen) == 4:
                return

    async with client.session(5) as session, asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        observer = group.create_task(observe())
        while not seen:
            await asyncio.sleep(0.01)
        leadership = await election.campaign(key, "a", session)
        await election.proclaim(leadership, "b")
        await election.resign(leadership)
        await observer
        with pytest.raises(EtcdError, match="led by somebody else"):
            await election.proclaim(leadership, "c")
    assert seen == [None, b"a", b"b", None]
