"""What a watch delivers and where it resumes, decided without any etcd."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from localmesh.etcd import Compacted, Event, EventKind, KeyValue, StoreReset, WatchBatch, WatcherTooSlow
from localmesh.etcd.watch import WatchTarget, _Upstream
from localmesh.etcd.watcher import Feed, Watcher


def event(revision: int, key: bytes = b"k") -> Event:
    return Event(EventKind.PUT, KeyValue(key, b"", revision, revision, 1, 0))


def batch(*revisions: int) -> WatchBatch:
    return WatchBatch(revisions[-1], tuple(event(revision) for revision in revisions))


def header(revision: int, cluster_id: int = 1) -> Any:
    return SimpleNamespace(revision=revision, cluster_id=cluster_id)


def upstream(start: int, *, quorum_revision: int = 0, cluster_id: int = 0) -> _Upstream:
    transport: Any = SimpleNamespace(cluster_id=cluster_id, clock=SimpleNamespace(monotonic=lambda: 0.0))

    async def read_revision() -> int:
        return quorum_revision

    made = _Upstream(transport, WatchTarget(b"k", b"l", False), start, read_revision, lambda _: None)
    made.task = SimpleNamespace(done=lambda: False)  # type: ignore[assignment]
    return made


def joined(to: _Upstream, start: int = 0) -> Feed:
    feed = Feed(start, 1000)
    to.join(feed)
    return feed


async def everything(feed: Feed) -> list[WatchBatch]:
    return [await feed.take() for _ in range(len(feed._queue))]


async def test_it_resumes_after_the_last_event_and_not_after_the_header_while_it_catches_up() -> None:
    watch = upstream(10)
    feed = joined(watch, 10)
    await watch._created(header(5_000))
    assert feed.is_empty, "the store's revision says nothing about what was delivered"
    watch._advance((event(10), event(12)), 5_000)
    assert watch._next == 13
    watch._advance((), 5_000)
    assert watch._next == 5_001
    assert await everything(feed) == [batch(10, 12), WatchBatch(5_000)]


async def test_events_that_come_again_after_a_resumption_are_dropped() -> None:
    watch = upstream(10)
    feed = joined(watch, 10)
    watch._advance((event(10), event(11)), 11)
    watch._advance((event(11), event(12)), 12)
    watch._advance((event(11), event(12)), 12)
    assert await everything(feed) == [batch(10, 11), batch(12)]


async def test_progress_never_goes_back() -> None:
    watch = upstream(10)
    feed = joined(watch, 10)
    watch._advance((event(20),), 20)
    watch._advance((), 15)
    assert watch._next == 21
    assert await everything(feed) == [batch(20)]


async def test_a_watch_from_now_on_is_pinned_by_its_confirmation() -> None:
    watch = upstream(0)
    feed = joined(watch)
    await watch._created(header(41))
    assert watch._next == 42
    assert feed.confirmed.is_set()
    assert await everything(feed) == [WatchBatch(41)]


async def test_a_member_that_lags_behind_is_no_reset_if_the_quorum_is_ahead() -> None:
    watch = upstream(100, quorum_revision=120)
    await watch._created(header(50))
    assert watch._next == 100


async def test_a_store_that_is_behind_with_its_quorum_was_reset() -> None:
    with pytest.raises(StoreReset, match="at revision 54, but 99 was seen"):
        await upstream(100, quorum_revision=54)._created(header(50))


async def test_another_cluster_is_a_reset_even_if_its_revision_fits() -> None:
    with pytest.raises(StoreReset, match="another cluster"):
        await upstream(100, cluster_id=7)._created(header(5_000, cluster_id=8))


async def test_who_joins_gets_from_the_history_exactly_what_it_asks_for() -> None:
    watch = upstream(10)
    early = joined(watch, 10)
    for revision in (10, 11, 15):
        watch._advance((event(revision),), revision)
    assert watch.can_serve(11)
    assert await everything(joined(watch, 11)) == [batch(11), batch(15)]
    assert await everything(joined(watch, 12)) == [batch(15)]
    assert not watch.can_serve(9)
    assert watch.can_serve(0)
    assert len(await everything(early)) == 3


async def test_a_joiner_in_the_middle_of_a_batch_gets_only_its_part() -> None:
    watch = upstream(10)
    joined(watch, 10)
    watch._advance((event(10), event(11), event(12)), 12)
    assert await everything(joined(watch, 11)) == [batch(11, 12)]


async def test_history_is_bounded_and_knows_from_where_it_is_complete() -> None:
    watch = upstream(1)
    joined(watch, 1)
    for revision in range(1, 6_000):
        watch._advance((event(revision),), revision)
    assert watch._history_events <= 4_096
    assert watch._history_from == 6_000 - 4_096
    assert watch.can_serve(watch._history_from)
    assert not watch.can_serve(watch._history_from - 1)


async def test_only_the_newest_progress_is_kept_for_a_slow_consumer() -> None:
    feed = Feed(0, 1000)
    for revision in range(100):
        feed.deliver(WatchBatch(revision))
    assert await everything(feed) == [WatchBatch(99)]


async def test_an_error_comes_after_what_was_delivered_before_it_and_only_once() -> None:
    feed = Feed(0, 1000)
    watcher = Watcher(feed, lambda _: None)
    feed.deliver(batch(1))
    feed.fail(Compacted(5))
    feed.deliver(batch(6))
    assert await anext(watcher) == batch(1)
    with pytest.raises(Compacted):
        await anext(watcher)
    with pytest.raises(StopAsyncIteration):
        await anext(watcher)


async def test_a_backlog_over_the_limit_ends_the_feed_and_frees_it() -> None:
    feed = Feed(0, 3)
    for revision in range(1, 6):
        feed.deliver(batch(revision))
    assert feed.is_empty
    with pytest.raises(WatcherTooSlow):
        await feed.take()


async def test_a_backlog_that_is_read_does_not_count() -> None:
    feed = Feed(0, 3)
    for revision in range(1, 20):
        feed.deliver(batch(revision))
        assert await feed.take() == batch(revision)


async def test_the_last_follower_that_leaves_ends_the_watch() -> None:
    ended: list[_Upstream] = []
    watch = upstream(1)
    watch._on_idle = ended.append
    one, two = joined(watch, 1), joined(watch, 1)
    watch.leave(one)
    assert ended == []
    Watcher(two, watch.leave).close()
    assert ended == [watch]


async def test_a_consumer_that_is_cancelled_loses_no_batch() -> None:
    feed = Feed(0, 1000)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(feed.take())
        await asyncio.sleep(0)
        feed.deliver(batch(1))
        waiting.cancel()
    assert await feed.take() == batch(1)
