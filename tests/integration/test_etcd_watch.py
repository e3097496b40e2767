"""Watches against a real etcd: what is delivered, to whom, and that nothing is lost or doubled."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Self

import pytest

from localmesh.etcd import (
    Compacted,
    EtcdClient,
    EtcdConfig,
    EtcdError,
    Event,
    EventKind,
    StoreReset,
    WatchBatch,
    Watcher,
    WatchTimedOut,
)
from localmesh.etcd import transactions as t

SECONDS = 20.0


@pytest.fixture
async def client(etcd_endpoint: str) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(EtcdConfig(endpoints=(etcd_endpoint,))) as opened:
        yield opened


@pytest.fixture
def base(mesh_name: str) -> str:
    return f"/localmesh/{mesh_name}/"


async def read_events(watcher: Watcher, count: int) -> list[Event]:
    """Read until `count` events have come; check that revisions only go up."""
    events: list[Event] = []
    async with asyncio.timeout(SECONDS):
        while len(events) < count:
            batch = await anext(watcher)
            assert all(event.kv.mod_revision <= batch.revision for event in batch.events)
            events.extend(batch.events)
    revisions = [event.kv.mod_revision for event in events]
    assert revisions == sorted(revisions)
    return events


async def read_until(watcher: Watcher, revision: int) -> list[WatchBatch]:
    batches: list[WatchBatch] = []
    async with asyncio.timeout(SECONDS):
        while not batches or batches[-1].revision < revision:
            batches.append(await anext(watcher))
    return batches


class CuttableProxy:
    """Forwards TCP to etcd and cuts every connection once, after so many bytes of answers."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.cut_after: int | None = None
        self.hold_answers = False
        self.cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, up_writer}
        with contextlib.suppress(ConnectionError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, up_writer, answers=False))
                group.create_task(self._pump(up_reader, writer, answers=True))
        self._writers -= {writer, up_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(16_384):
                if answers and self.hold_answers:
                    continue
                writer.write(data)
                await writer.drain()
                if answers and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after <= 0:
                        self.cut_after, self.cuts = None, self.cuts + 1
                        self.cut()
        writer.close()


@pytest.fixture
async def proxy(etcd_endpoint: str) -> AsyncIterator[CuttableProxy]:
    async with CuttableProxy(etcd_endpoint) as opened:
        yield opened


async def test_a_watch_from_now_on_begins_with_the_revision_it_begins_at(client: EtcdClient, base: str) -> None:
    await client.put(base + "k", "before")
    async with client.watch(base) as watcher, asyncio.timeout(SECONDS):
        first = await anext(watcher)
        assert first.events == ()
        put = await client.put(base + "k", "after")
        assert first.revision < put.revision
        events = await read_events(watcher, 1)
    assert [(event.kind, event.kv.value) for event in events] == [(EventKind.PUT, b"after")]


async def test_events_carry_what_changed_and_what_was_before(client: EtcdClient, base: str) -> None:
    put = await client.put(base + "k", "1")
    await client.put(base + "k", "2")
    await client.delete(base + "k")
    async with client.watch(base, start_revision=put.revision, prev_kv=True) as watcher:
        created, changed, deleted = await read_events(watcher, 3)
    assert created.prev_kv is None
    assert changed.prev_kv is not None
    assert (changed.prev_kv.value, changed.kv.value) == (b"1", b"2")
    assert deleted.kind is EventKind.DELETE
    assert deleted.prev_kv is not None
    assert (deleted.prev_kv.value, deleted.kv.mod_revision) == (b"2", put.revision + 2)


async def test_a_transaction_arrives_as_one_batch(client: EtcdClient, base: str) -> None:
    async with client.watch(base) as watcher:
        await watcher.established(SECONDS)
        result = await client.transaction([], [t.put(f"{base}{i}", "x") for i in range(50)])
        batches = await read_until(watcher, result.revision)
    assert [len(batch.events) for batch in batches if batch.events] == [50]


async def test_a_transaction_is_one_batch_even_if_etcd_sends_it_in_fragments(client: EtcdClient, base: str) -> None:
    """With what was before, two values of 700 kB are more than etcd sends in one message."""
    large, larger = bytes(700_000), bytes(700_001)
    for name in ("a", "b"):
        await client.put(base + name, large)
    async with client.watch(base, prev_kv=True) as watcher:
        await watcher.established(SECONDS)
        result = await client.transaction([], [t.put(base + "a", larger), t.put(base + "b", larger)])
        batches = await read_until(watcher, result.revision)
    assert [len(batch.events) for batch in batches if batch.events] == [2]


async def test_a_single_key_is_watched_without_its_longer_neighbours(client: EtcdClient, base: str) -> None:
    async with client.watch(base + "k", prefix=False) as watcher:
        await watcher.established(SECONDS)
        await client.put(base + "kk", "no")
        await client.put(base + "k", "yes")
        (event,) = await read_events(watcher, 1)
    assert event.kv.value == b"yes"


async def test_a_quiet_watch_tells_how_fresh_it_is(client: EtcdClient, base: str) -> None:
    """Changes elsewhere move the revision of a watch that sees none of them."""
    async with client.watch(base + "quiet/") as watcher:
        await watcher.established(SECONDS)
        put = await client.put(base + "elsewhere", "x")
        batches = await read_until(watcher, put.revision)
    assert not any(batch.events for batch in batches)


async def test_followers_of_the_same_prefix_share_one_upstream_watch(client: EtcdClient, base: str) -> None:
    watchers = [client.watch(base) for _ in range(20)]
    await watchers[0].established(SECONDS)
    await client.put(base + "k", "x")
    for watcher in watchers:
        assert [event.kv.value for event in await read_events(watcher, 1)] == [b"x"]
    statistics = client.statistics()
    assert (statistics.watch_streams, statistics.watchers) == (1, 20)
    for watcher in watchers:
        watcher.close()
    assert client.statistics().watch_streams == 0


async def test_one_who_joins_later_gets_all_since_its_start_revision(client: EtcdClient, base: str) -> None:
    early = client.watch(base)
    await early.established(SECONDS)
    revisions = [(await client.put(base + "k", str(i))).revision for i in range(10)]
    await read_events(early, 10)
    late = client.watch(base, start_revision=revisions[3])
    assert [event.kv.value for event in await read_events(late, 7)] == [b"3", b"4", b"5", b"6", b"7", b"8", b"9"]
    assert client.statistics().watch_streams == 1
    before = await client.get_prefix(base)
    older = client.watch(base, start_revision=revisions[0] - 1)
    assert len(await read_events(older, 10)) == 10
    assert client.statistics().watch_streams == 2, "older than the shared history: a watch of its own"
    after = await client.put(base + "k", "last")
    assert after.revision > before.revision
    for watcher in (early, late, older):
        assert [event.kv.value for event in await read_events(watcher, 1)] == [b"last"]
        watcher.close()


async def test_a_follower_that_is_dropped_without_close_is_forgotten(client: EtcdClient, base: str) -> None:
    watcher: Watcher | None = client.watch(base)
    assert watcher is not None
    await watcher.established(SECONDS)
    assert client.statistics().watchers == 1
    watcher = None
    gc.collect()
    assert client.statistics().watch_streams == 0


async def test_closing_a_watcher_ends_the_iteration_of_who_waits(client: EtcdClient, base: str) -> None:
    watcher = client.watch(base)
    await watcher.established(SECONDS)
    await anext(watcher)

    async def consume() -> int:
        return len([batch async for batch in watcher if batch.events])

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        consumer = group.create_task(consume())
        group.create_task(watcher.aclose())
    assert consumer.result() == 0


async def test_closing_the_client_ends_all_followers_with_an_error(etcd_endpoint: str, base: str) -> None:
    async with EtcdClient(EtcdConfig(endpoints=(etcd_endpoint,))) as client:
        watcher = client.watch(base)
        await watcher.established(SECONDS)
        await anext(watcher)
    with pytest.raises(EtcdError, match="closed"):
        await read_events(watcher, 1)


async def test_a_watch_from_a_compacted_revision_says_so_and_where_to_begin(client: EtcdClient, base: str) -> None:
    old = await client.put(base + "k", "1")
    new = await client.put(base + "k", "2")
    await client.compact(new.revision)
    with pytest.raises(Compacted) as compacted:
        await read_events(client.watch(base, start_revision=old.revision), 1)
    assert compacted.value.compacted_revision >= new.revision
    again = await client.get_prefix(base)
    async with client.watch(base, start_revision=again.revision + 1) as watcher:
        await client.put(base + "k", "3")
        assert [event.kv.value for event in await read_events(watcher, 1)] == [b"3"]


async def test_a_compaction_does_not_disturb_a_watch_that_is_up_to_date(
    client: EtcdClient, proxy: CuttableProxy, base: str
) -> None:
    async with EtcdClient(EtcdConfig(endpoints=(proxy.endpoint,))) as follower:
        async with follower.watch(base + "quiet/") as watcher:
            await watcher.established(SECONDS)
            for i in range(5):
                last = await client.put(base + "busy", str(i))
            await read_until(watcher, last.revision)
            await client.compact(last.revision)
            proxy.cut()
            put = await client.put(base + "quiet/k", "x")
            (event,) = await read_events(watcher, 1)
    assert event.kv.mod_revision == put.revision


async def test_a_watch_that_compaction_has_overtaken_while_it_was_cut_off_says_so(
    client: EtcdClient, proxy: CuttableProxy, base: str
) -> None:
    config = EtcdConfig(endpoints=(proxy.endpoint,), probe_interval_seconds=0.2, try_timeout_seconds=0.2)
    async with EtcdClient(config) as follower:
        watcher = follower.watch(base)
        await watcher.established(SECONDS)
        await anext(watcher)
        proxy.hold_answers = True
        for i in range(3):
            last = await client.put(base + "k", str(i))
        await client.compact(last.revision)
        proxy.hold_answers = False
        proxy.cut()
        with pytest.raises(Compacted):
            await read_events(watcher, 1)


async def test_a_watch_that_is_cut_while_it_catches_up_resumes_where_it_was(
    client: EtcdClient, proxy: CuttableProxy, base: str
) -> None:
    """While catching up the header's revision is the store's head: resuming there would skip thousands."""
    total = 5_000
    first = await client.put(base + "start", "x")
    for chunk in range(total // 100):
        async with asyncio.TaskGroup() as group:
            for i in range(100):
                group.create_task(client.put(f"{base}n/{chunk * 100 + i}", bytes(100)))
    async with EtcdClient(EtcdConfig(endpoints=(proxy.endpoint,))) as follower:
        proxy.cut_after = 300_000
        async with follower.watch(base + "n/", start_revision=first.revision) as watcher:
            events = await read_events(watcher, total)
        assert follower.statistics().watch_resumes >= 1
    assert proxy.cuts == 1
    assert len({event.kv.key for event in events}) == total
    assert len({event.kv.mod_revision for event in events}) == total


async def test_a_watch_that_is_cut_before_its_first_event_misses_nothing(
    client: EtcdClient, proxy: CuttableProxy, base: str
) -> None:
    """The start is pinned by etcd's confirmation, also where it was only 'from now on'."""
    async with EtcdClient(EtcdConfig(endpoints=(proxy.endpoint,))) as follower:
        async with follower.watch(base) as watcher:
            await watcher.established(SECONDS)
            proxy.hold_answers = True
            await client.put(base + "k", "lost on the way")
            proxy.hold_answers = False
            proxy.cut()
            events = await read_events(watcher, 1)
    assert [event.kv.value for event in events] == [b"lost on the way"]


async def test_a_watch_from_a_revision_that_the_store_has_not_reached_is_a_reset(client: EtcdClient, base: str) -> None:
    """Trap 1: etcd itself would confirm such a watch and deliver nothing until the revision comes by."""
    status = await client.status()
    with pytest.raises(StoreReset, match="is at revision"):
        await read_events(client.watch(base, start_revision=status.revision + 1_000_000), 1)


async def test_a_consumer_that_does_not_read_is_cut_off_and_harms_no_other(client: EtcdClient, base: str) -> None:
    slow, quick = client.watch(base), client.watch(base)
    await quick.established(SECONDS)
    slow._feed._max_backlog_events = 10
    for i in range(20):
        await client.put(base + "k", str(i))
    assert len(await read_events(quick, 20)) == 20
    with pytest.raises(EtcdError, match="left unread"):
        await read_events(slow, 20)
    slow.close()
    quick.close()


async def test_a_watch_without_any_etcd_times_out_for_who_asked_to_know() -> None:
    async with EtcdClient(EtcdConfig(endpoints=("127.0.0.1:1",))) as client, client.watch("k") as watcher:
        with pytest.raises(WatchTimedOut):
            await watcher.established(0.2)
