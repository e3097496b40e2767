"""Three members on loopback: one dies, freezes or is alone, and the client goes on with the others."""

import asyncio
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from localmesh.core.clock import SystemClock
from localmesh.etcd import (
    ConnectionFailedError,
    ConnectionTimeoutError,
    Election,
    EtcdBinary,
    EtcdClient,
    EtcdConfig,
    EtcdError,
    EtcdServer,
    Status,
    UnknownOutcome,
)

SECONDS = 40.0
CLOCK = SystemClock()


class Cluster:
    """Three members with an election time-out of 200 ms."""

    def __init__(self, servers: list[EtcdServer]) -> None:
        self.servers = servers

    async def status_of(self, server: EtcdServer) -> Status:
        async with EtcdClient(server.config()) as client:
            return await client.status(deadline=CLOCK.monotonic() + SECONDS)

    async def leader_first(self) -> list[EtcdServer]:
        """Return the members with the leader in front."""
        statuses = [await self.status_of(server) for server in self.servers]
        return [
            server
            for _, server in sorted(
                zip(statuses, self.servers, strict=True), key=lambda pair: pair[0].leader != pair[0].member_id
            )
        ]

    def config(self, order: list[EtcdServer]) -> EtcdConfig:
        return EtcdConfig(endpoints=tuple(server.endpoint for server in order))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture
async def cluster(etcd_binary: EtcdBinary) -> AsyncIterator[Cluster]:
    peers = [f"http://127.0.0.1:{port}" for port in free_ports(3)]
    everyone = ",".join(f"m{i}={peer}" for i, peer in enumerate(peers))
    token = secrets.token_hex(8)
    servers = [
        EtcdServer(
            etcd_binary,
            stop_seconds=1.0,
            extra_args=(
                *("--name", f"m{i}", "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", everyone, "--initial-cluster-token", token),
                *("--heartbeat-interval", "20", "--election-timeout", "200"),
            ),
        )
        for i, peer in enumerate(peers)
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.start())
        yield Cluster(servers)
    finally:
        for server in servers:
            if server._process is not None and server.process.returncode is None:
                server.process.send_signal(signal.SIGCONT)
        await asyncio.gather(*(server.stop() for server in servers))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def put_surely(client: EtcdClient, key: str, value: str) -> None:
    """Put until it is certain that it is there."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                await client.put_if_not_exists(key, value)
                return
            except UnknownOutcome:
                if await client.get(key) is not None:
                    return
            except (ConnectionFailedError, ConnectionTimeoutError):
                continue


async def write_numbers(client: EtcdClient, count: int, after: dict[int, Callable[[], None]]) -> list[bytes]:
    """Write `count` numbers; run what stands in `after` when that number is written."""
    keys = []
    for number in range(count):
        await put_surely(client, f"w/{number:04}", str(number))
        keys.append(f"w/{number:04}".encode())
        if number in after:
            after[number]()
    return keys


async def test_a_frozen_leader_costs_neither_the_lease_nor_the_watch(cluster: Cluster) -> None:
    """The gray failure: connections to the leader stay open. All streams begin on it, the worst case."""
    order = await cluster.leader_first()
    async with EtcdClient(cluster.config(order)) as client, client.session(5) as session:
        await client.put("held", "x", lease=session.lease_id)
        async with client.watch("w/") as watcher:
            await watcher.established(SECONDS)
            frozen_at = CLOCK.monotonic()
            order[0].process.send_signal(signal.SIGSTOP)
            keys = await write_numbers(client, 20, {})
            seen: list[bytes] = []
            async with asyncio.timeout(SECONDS):
                while len(seen) < len(keys):
                    seen += [event.kv.key for event in (await anext(watcher)).events]
            assert seen == keys
            assert CLOCK.monotonic() - frozen_at < 15
            first_fence = session.fence
            await until(lambda: CLOCK.monotonic() > frozen_at + 1.5 * session.ttl_seconds)
            assert session.alive()
            assert session.fence > first_fence
        # Asked while it is frozen still: a leader of yesterday may revoke leases in its first moment awake.
        found = await client.get("held", deadline=CLOCK.monotonic() + SECONDS)
        assert found is not None
        assert found.lease == session.lease_id
        assert not session.lost.is_set()
        assert client.statistics().endpoint != order[0].endpoint


async def test_a_killed_leader_loses_no_acknowledged_write_and_no_event(cluster: Cluster) -> None:
    order = await cluster.leader_first()
    losses: list[object] = []
    async with EtcdClient(cluster.config(order)) as client:
        async with client.session(3, on_lost=losses.append) as session, client.watch("w/") as watcher:
            await client.put("held", "x", lease=session.lease_id)
            await watcher.established(SECONDS)
            keys = await write_numbers(client, 60, {30: order[0].process.kill})
            seen: list[bytes] = []
            async with asyncio.timeout(SECONDS):
                while len(seen) < len(keys):
                    seen += [event.kv.key for event in (await anext(watcher)).events]
            assert seen == keys
            assert [kv.key for kv in (await client.get_prefix("w/")).kvs] == keys
            fence = session.fence
            await until(lambda: session.fence > fence)
    assert losses == []


async def test_a_killed_follower_costs_one_try(cluster: Cluster) -> None:
    leader, follower, other = await cluster.leader_first()
    async with EtcdClient(cluster.config([follower, other, leader])) as client:
        await client.put("k", "1")
        follower.process.kill()
        await follower.process.wait()
        start = CLOCK.monotonic()
        await put_surely(client, "k2", "2")
        assert CLOCK.monotonic() - start < 5
        assert client.statistics().endpoint == other.endpoint


async def test_a_member_without_a_quorum_is_left_and_writes_to_it_are_refused_not_forgotten(
    cluster: Cluster,
) -> None:
    """Two of three are frozen: the third answers, knows no leader, and says so instead of staying silent."""
    leader, second, third = await cluster.leader_first()
    async with EtcdClient(third.config()) as client, client.watch("k") as watcher:
        await watcher.established(SECONDS)
        for server in (leader, second):
            server.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(SECONDS):
            while True:  # until it has noticed, a write may be an unknown outcome
                with pytest.raises(EtcdError) as failed:
                    await client.put("k", "x", deadline=CLOCK.monotonic() + 1)
                if not isinstance(failed.value, UnknownOutcome):
                    break
        assert isinstance(failed.value, ConnectionFailedError), "definitely not written"
        stale = await client.get("nothing", serializable=True, deadline=CLOCK.monotonic() + SECONDS)
        assert stale is None, "a serializable read needs no quorum"
        await until(lambda: client.statistics().watch_resumes >= 1)
        for server in (leader, second):
            server.process.send_signal(signal.SIGCONT)
        await put_surely(client, "k/back", "back")
        async with asyncio.timeout(SECONDS):
            while not any(event.kv.value == b"back" for event in (await anext(watcher)).events):
                pass


async def test_the_leadership_passes_on_when_the_leading_process_and_the_etcd_leader_die_together(
    cluster: Cluster,
) -> None:
    order = await cluster.leader_first()
    config = cluster.config(order)
    async with EtcdClient(replace(config, endpoints=config.endpoints[::-1])) as heir_client:
        async with EtcdClient(config) as first_client, first_client.session(2) as first:
            leadership = await Election(first_client).campaign("leader", "first", first)
            async with heir_client.session(2) as heir, asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
                waiting = group.create_task(Election(heir_client).campaign("leader", "heir", heir))
                await first.orphan()
                order[0].process.kill()
                await waiting
                assert waiting.result().create_revision > leadership.create_revision
                assert not first.alive()


async def test_a_client_of_several_members_is_not_hurt_by_one_that_was_never_there(cluster: Cluster) -> None:
    (nobody,) = free_ports(1)
    config = EtcdConfig(endpoints=(f"127.0.0.1:{nobody}", cluster.servers[0].endpoint))
    async with EtcdClient(config) as client, client.session(5) as session, client.watch("k") as watcher:
        await watcher.established(SECONDS)
        await client.put("k", "v", lease=session.lease_id)
        async with asyncio.timeout(SECONDS):
            while not (await anext(watcher)).events:
                pass
        assert client.statistics().rotations == 1


async def test_with_every_member_frozen_calls_end_at_their_deadline(cluster: Cluster) -> None:
    async with EtcdClient(cluster.config(cluster.servers)) as client:
        await client.put("k", "v")
        for server in cluster.servers:
            server.process.send_signal(signal.SIGSTOP)
        start = CLOCK.monotonic()
        with pytest.raises(EtcdError):
            await client.get("k", deadline=start + 2)
        assert CLOCK.monotonic() - start < 10
