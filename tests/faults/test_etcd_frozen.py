"""etcd is frozen (SIGSTOP): its connections stay open and nothing is answered. Found out within seconds."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from localmesh.core.clock import SystemClock
from localmesh.etcd import (
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdBinary,
    EtcdClient,
    EtcdConfig,
    EtcdServer,
    LeaseSession,
    UnknownOutcome,
)
from localmesh.etcd import transactions as t

SECONDS = 30.0
# Noticed by gRPC alone after 63 s: whatever is below this was noticed by us.
MUCH_SOONER_SECONDS = 15.0
CLOCK = SystemClock()


@pytest.fixture
async def etcd(etcd_binary: EtcdBinary) -> AsyncIterator[EtcdServer]:
    async with EtcdServer(etcd_binary) as server:
        yield server


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(etcd.config()) as opened:
        yield opened


def freeze(server: EtcdServer) -> None:
    """Stop every thread; the signal alone leaves some of them time for another answer."""
    server.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{server.process.pid}/task")
    deadline = CLOCK.monotonic() + SECONDS
    while any((task / "stat").read_text().rpartition(") ")[2][0] != "T" for task in tasks.iterdir()):
        assert CLOCK.monotonic() < deadline


@contextlib.contextmanager
def frozen(server: EtcdServer) -> Iterator[None]:
    freeze(server)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def surely(write: Callable[[], Awaitable[object]]) -> None:
    """Write again while the outcome is unknown: the old connection may die of its pings just after the thaw."""
    async with asyncio.timeout(SECONDS):
        while True:
            with contextlib.suppress(UnknownOutcome):
                await write()
                return


async def test_a_read_ends_at_its_deadline(etcd: EtcdServer, client: EtcdClient) -> None:
    await client.put("k", "v")
    with frozen(etcd):
        start = CLOCK.monotonic()
        with pytest.raises(ConnectionTimeoutError):
            await client.get("k", deadline=start + 1.5)
        assert CLOCK.monotonic() - start < MUCH_SOONER_SECONDS
    assert await client.get("k") is not None


async def test_a_read_is_answered_when_the_peer_thaws_before_the_deadline(etcd: EtcdServer, client: EtcdClient) -> None:
    await client.put("k", "v")
    async with asyncio.TaskGroup() as group:
        with frozen(etcd):
            reading = group.create_task(client.get("k", deadline=CLOCK.monotonic() + SECONDS))
            await until(lambda: client.statistics().retries >= 1)
    assert reading.result() is not None


async def test_a_write_that_was_sent_and_not_answered_is_an_unknown_outcome_settled_by_reading(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    await client.put("warm", "up")
    with frozen(etcd):
        start = CLOCK.monotonic()
        with pytest.raises(UnknownOutcome):
            await client.transaction([t.create("lock") == 0], [t.put("lock", "token-1")])
        assert CLOCK.monotonic() - start < MUCH_SOONER_SECONDS
        assert client.statistics().unknown_outcomes == 1
    # The write may come into force on the thaw. Whoever repeats it with the same token is safe either way.
    await surely(lambda: client.put_if_not_exists("lock", "token-1", deadline=CLOCK.monotonic() + SECONDS))
    found = await client.get("lock")
    assert found is not None
    assert (found.value, found.version) == (b"token-1", 1)


async def test_a_write_to_a_peer_that_never_speaks_was_certainly_not_made() -> None:
    """The connection is accepted by the kernel and by nobody else: no write may leave on it."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        config = EtcdConfig(endpoints=(f"127.0.0.1:{mute.getsockname()[1]}",))
        async with EtcdClient(config) as client:
            with pytest.raises(ConnectionFailedError):
                await client.put("k", "v", deadline=CLOCK.monotonic() + 1.0)
            assert client.statistics().unknown_outcomes == 0


async def test_a_transaction_that_only_reads_is_repeated_instead(etcd: EtcdServer, client: EtcdClient) -> None:
    await client.put("k", "v")
    async with asyncio.TaskGroup() as group:
        with frozen(etcd):
            reading = group.create_task(
                client.transaction(
                    [t.version("k") > 0], [t.get("k")], [t.get("other")], deadline=CLOCK.monotonic() + SECONDS
                )
            )
            await until(lambda: client.statistics().retries >= 1)
    assert reading.result().succeeded


async def test_an_idle_watch_notices_and_takes_up_again_what_it_followed(etcd: EtcdServer, client: EtcdClient) -> None:
    async with client.watch("k") as watcher:
        await watcher.established(SECONDS)
        with frozen(etcd):
            start = CLOCK.monotonic()
            await until(lambda: client.statistics().watch_resumes >= 1)
            assert CLOCK.monotonic() - start < 6, "our own probe, before gRPC's pings"
        await surely(lambda: client.put("k", "v", deadline=CLOCK.monotonic() + SECONDS))
        async with asyncio.timeout(SECONDS):
            while not (batch := await anext(watcher)).events:
                pass
    assert [event.kv.value for event in batch.events] == [b"v"]


async def test_grpcs_own_pings_notice_within_seconds_too(etcd: EtcdServer) -> None:
    """Also where nobody probes: keep-alive time-outs alone would take 63 s, on any channel of ours."""
    async with EtcdClient(replace(etcd.config(), probe_interval_seconds=1000.0)) as client:
        async with client.watch("k") as watcher:
            await watcher.established(SECONDS)
            with frozen(etcd):
                start = CLOCK.monotonic()
                await until(lambda: client.statistics().watch_resumes >= 1)
                assert CLOCK.monotonic() - start < MUCH_SOONER_SECONDS


async def test_a_session_fences_itself_when_its_ttl_has_passed_since_the_last_acknowledged_refresh(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    """Trap 3: on the thaw the lease may be alive or gone; the holder had stopped acting on it before."""
    lost_at: list[float] = []

    def note(session: LeaseSession) -> None:
        lost_at.append(CLOCK.monotonic())

    async with client.session(2, on_lost=note) as session:
        await client.put("held", "x", lease=session.lease_id)
        with frozen(etcd):
            async with asyncio.timeout(MUCH_SOONER_SECONDS):
                await session.lost.wait()
            assert not session.alive()
            assert session.lost_reason == "no refresh was acknowledged within its TTL"
            assert lost_at[0] >= session.fence
            assert client.statistics().keep_alive_streams >= 2, "it had tried another stream meanwhile"
    assert not session.alive(), "a late acknowledgement brings nothing back"
    assert len(lost_at) == 1


async def test_alive_turns_false_by_the_clock_even_if_nothing_else_runs(etcd: EtcdServer, client: EtcdClient) -> None:
    """A process that was itself frozen asks alive() before it acts, and the answer needs no event loop."""
    async with client.session(2) as session:
        await session.orphan()
        assert session.alive()
        assert not session.alive(session.fence + 0.001)
        assert not session.lost.is_set()


async def test_a_keep_alive_ends_at_its_deadline_and_the_lease_is_found_again_after_the_thaw(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    lease = await client.lease_grant(60)
    assert await client.keep_alive_once(lease.id) == 60
    with frozen(etcd):
        start = CLOCK.monotonic()
        with pytest.raises(ConnectionTimeoutError):
            await client.keep_alive_once(lease.id, ack_timeout=0.2, deadline=start + 1.0)
        assert CLOCK.monotonic() - start < MUCH_SOONER_SECONDS
        assert client.statistics().keep_alive_streams >= 3, "a stream without an acknowledgement is given up"
    assert await client.keep_alive_once(lease.id, deadline=CLOCK.monotonic() + SECONDS) == 60


async def test_closing_a_client_and_its_sessions_does_not_hang_on_a_frozen_etcd(etcd: EtcdServer) -> None:
    start = CLOCK.monotonic()
    async with EtcdClient(etcd.config()) as client:
        async with client.session(5), client.watch("k") as watcher:
            await watcher.established(SECONDS)
            freeze(etcd)
    etcd.process.send_signal(signal.SIGCONT)
    assert CLOCK.monotonic() - start < MUCH_SOONER_SECONDS
