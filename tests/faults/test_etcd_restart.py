"""etcd is killed and comes back: with its data, without them, or not at all."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from localmesh.core.clock import SystemClock
from localmesh.etcd import (
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdBinary,
    EtcdClient,
    EtcdConfig,
    EtcdError,
    EtcdServer,
    StoreReset,
    UnknownOutcome,
    Watcher,
)

SECONDS = 30.0
CLOCK = SystemClock()


class Restartable:
    """One etcd on one port, which can be killed and started again on the same or on an empty folder."""

    def __init__(self, binary: EtcdBinary, folder: Path, extra_args: tuple[str, ...] = ()) -> None:
        self._binary = binary
        self._folder = folder
        self._extra_args = extra_args
        self._port = 0
        self._lives = 0
        self.server: EtcdServer | None = None

    @property
    def config(self) -> EtcdConfig:
        return EtcdConfig(endpoints=(f"127.0.0.1:{self._port}",))

    async def start(self, *, wiped: bool = False) -> None:
        self._lives += wiped
        data = self._folder / f"data{self._lives}"
        self.server = EtcdServer(
            self._binary,
            data_dir=data if self._binary.durable else None,
            port=self._port,
            extra_args=self._extra_args,
        )
        await self.server.start()
        self._port = self.server.port

    async def kill(self) -> None:
        assert self.server is not None
        self.server.process.send_signal(signal.SIGKILL)
        await self.server.process.wait()
        await self.server.stop()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop()


@pytest.fixture
async def etcd(etcd_binary: EtcdBinary, tmp_path: Path) -> AsyncIterator[Restartable]:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    restartable = Restartable(etcd_binary, tmp_path)
    await restartable.start()
    try:
        yield restartable
    finally:
        await restartable.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def write_numbers(client: EtcdClient, stop: asyncio.Event, acknowledged: list[int]) -> None:
    """Put 0, 1, 2, ... under w/, each until it is certain; an unknown outcome is settled by reading."""
    number = 0
    while not stop.is_set():
        key = f"w/{number:06}"
        try:
            await client.put_if_not_exists(key, str(number))
        except UnknownOutcome:
            if await client.get(key) is None:
                continue
        except (ConnectionFailedError, ConnectionTimeoutError):
            continue
        acknowledged.append(number)
        number += 1
        await asyncio.sleep(0.001)


async def collect(watcher: Watcher, seen: list[bytes]) -> None:
    async for batch in watcher:
        seen.extend(event.kv.key for event in batch.events)


async def test_a_watch_goes_on_over_kill_nine_and_restart_without_gap_or_duplicate(etcd: Restartable) -> None:
    async with EtcdClient(etcd.config) as writer, EtcdClient(etcd.config) as reader:
        watcher = reader.watch("w/")
        await watcher.established(SECONDS)
        seen: list[bytes] = []
        acknowledged: list[int] = []
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(collect(watcher, seen))
            writing = group.create_task(write_numbers(writer, stop, acknowledged))
            for _ in range(3):
                before = len(acknowledged)
                await until(lambda wanted=before + 50: len(acknowledged) >= wanted)  # type: ignore[misc]
                await etcd.kill()
                await etcd.start()
            before = len(acknowledged)
            await until(lambda: len(acknowledged) >= before + 50)
            stop.set()
            await writing
            await until(lambda: len(seen) >= len(acknowledged))
            watcher.close()
        assert reader.statistics().watch_resumes >= 3
    assert seen == [f"w/{number:06}".encode() for number in acknowledged]


async def test_a_lease_session_survives_a_restart_of_etcd(etcd: Restartable) -> None:
    """Trap 2: every lease gets its whole TTL again; the session's fence still counts only what was acknowledged."""
    async with EtcdClient(etcd.config) as client, client.session(4) as session:
        await client.put("held", "x", lease=session.lease_id)
        await etcd.kill()
        await etcd.start()
        fence = session.fence
        await until(lambda: session.fence > fence)
        assert session.alive()
        found = await client.get("held")
        assert found is not None
        assert found.lease == session.lease_id


async def test_a_wiped_store_is_told_by_its_cluster_id(etcd: Restartable) -> None:
    """Trap 1, as our launcher makes stores: each has a token of its own."""
    await expect_reset(etcd, "another cluster")


async def test_a_wiped_store_with_the_same_ids_is_told_by_its_revision(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    """Trap 1, as anybody else makes them: same name, same token, so the same ids; a watch would be silent."""
    etcd = Restartable(etcd_binary, tmp_path, ("--initial-cluster-token", "always-the-same"))
    await etcd.start()
    try:
        await expect_reset(etcd, "the store is at revision")
    finally:
        await etcd.stop()


async def expect_reset(etcd: Restartable, words: str) -> None:
    async with EtcdClient(etcd.config) as client, client.watch("k") as watcher:
        for i in range(20):
            last = await client.put("k", str(i))
        async with asyncio.timeout(SECONDS):
            while (await anext(watcher)).revision < last.revision:
                pass
        await etcd.kill()
        await etcd.start(wiped=True)
        with pytest.raises(StoreReset, match=words):
            await collect(watcher, [])
        listed = await client.get_prefix("k")
        assert listed.kvs == ()
        async with client.watch("k", start_revision=listed.revision + 1) as again, asyncio.timeout(SECONDS):
            await client.put("k", "new store")
            while not (batch := await anext(again)).events:
                pass
            assert batch.events[0].kv.value == b"new store"


async def test_calls_wait_out_a_restart_within_their_deadline(etcd: Restartable) -> None:
    async with EtcdClient(etcd.config) as client:
        await client.put("k", "v")
        await etcd.kill()
        deadline = CLOCK.monotonic() + SECONDS
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(client.get("k", deadline=deadline))
            writing = group.create_task(client.put("k2", "w", deadline=deadline))
            granting = group.create_task(client.lease_grant(30, deadline=deadline))
            await etcd.start()
        found = reading.result()
        assert found is not None
        assert found.value == b"v"
        assert writing.result().revision > found.mod_revision
        assert granting.result().ttl_seconds == 30
        assert client.statistics().retries > 0


async def test_without_etcd_every_call_ends_at_its_deadline_and_a_write_is_known_not_to_be_done(
    etcd: Restartable,
) -> None:
    async with EtcdClient(etcd.config) as client:
        await client.put("k", "v")
        await etcd.kill()
        start = CLOCK.monotonic()
        for call in (client.get, client.delete, client.lease_time_to_live):
            with pytest.raises(EtcdError) as failed:
                await call(1 if call == client.lease_time_to_live else "k", deadline=start + 1.0)  # type: ignore[operator]
            assert isinstance(failed.value, ConnectionFailedError | ConnectionTimeoutError)
        assert CLOCK.monotonic() - start < 5.0


async def test_a_client_may_be_older_than_its_etcd(etcd: Restartable) -> None:
    await etcd.kill()
    async with EtcdClient(etcd.config) as client, client.watch("k") as watcher:
        with pytest.raises(ConnectionFailedError):
            await client.put("k", "too early", deadline=CLOCK.monotonic() + 0.3)
        await etcd.start()
        await watcher.established(SECONDS)
        await client.put("k", "v")
        async with asyncio.timeout(SECONDS):
            while not (batch := await anext(watcher)).events:
                pass
        assert batch.events[0].kv.value == b"v"
