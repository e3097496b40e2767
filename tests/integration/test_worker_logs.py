"""What replicas print: kept, numbered, timed, trimmed, merged, followed. Real files, real writers."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.worker.logbook import CaughtUp, LogBook
from localmesh.worker.logs import LINE_BYTES, LogLine, ReplicaLog


def replica(index: int = 0, model: str = "m") -> ReplicaId:
    return ReplicaId(ModelName(model), NodeName("n1"), index)


def book(*, limit_bytes: int = 1 << 20, kept_lives: int = 16, kept_bytes: int = 10 << 20) -> LogBook:
    return LogBook(clock=SystemClock(), limit_bytes=limit_bytes, kept_lives=kept_lives, kept_bytes=kept_bytes)


@contextlib.asynccontextmanager
async def looking(logs: LogBook) -> AsyncIterator[None]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        task = group.create_task(logs.run())
        yield
        task.cancel()


class Writer:
    """A process, as far as its output goes."""

    def __init__(self, logs: LogBook, folder: Path, index: int = 0, model: str = "m") -> None:
        self._logs = logs
        name = replica(index, model)
        self.log = logs.begin(name, folder / str(name).replace("/", "-"))
        self._fd = self.log.open()

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def end(self) -> None:
        os.close(self._fd)
        self._logs.end(self.log)


async def history(logs: LogBook, *, tail: int = 100_000, model: str = "m") -> list[LogLine]:
    stream = logs.stream(lambda log: log.replica.model == model, follow=False, tail=tail)
    return [line async for line in stream if isinstance(line, LogLine)]


@pytest.mark.parametrize(
    ("data", "tail", "expected"),
    [
        (b"", 5, []),
        (b"a\nb\nc\n", 2, ["b", "c"]),
        (b"a\nb\nc", 2, ["b", "c"]),
        (b"a\nb\n", 5, ["a", "b"]),
        (b"\n\n\n", 2, ["", ""]),
        (b"a\r\nb\xff\n", 2, ["a", "b\ufffd"]),
        (b"x" * 100_000 + b"\nlast\n", 1, ["last"]),
        (b"x" * LINE_BYTES + b"yy\nlast", 3, ["x" * LINE_BYTES, "yy", "last"]),
    ],
)
async def test_the_last_lines_of_an_output(tmp_path: Path, data: bytes, tail: int, expected: list[str]) -> None:
    """F50."""
    logs = book()
    writer = Writer(logs, tmp_path)
    writer.write(data)
    writer.end()
    assert [line.text for line in await history(logs, tail=tail)] == expected


async def test_a_line_is_shown_when_it_is_whole_and_numbered_from_one(tmp_path: Path) -> None:
    """F50."""
    logs = book()
    writer = Writer(logs, tmp_path)
    writer.write(b"first\nsec")
    assert [(line.number, line.text) for line in await history(logs)] == [(1, "first")]
    writer.write(b"ond\nlast")
    assert [(line.number, line.text) for line in await history(logs)] == [(1, "first"), (2, "second")]
    writer.end()
    assert [(line.number, line.text) for line in await history(logs)][2:] == [(3, "last")]


def test_last_words_are_whole_lines_within_a_limit(tmp_path: Path) -> None:
    """F46."""

    def filled(name: str, data: bytes) -> ReplicaLog:
        (tmp_path / name).write_bytes(data)
        return ReplicaLog(tmp_path / name, replica=replica(), life=1, limit_bytes=1 << 20)

    log = filled("log", b"first\nsecond\nthird\n")
    assert log.last_lines(4096) == "first\nsecond\nthird"
    assert log.last_lines(13) == "second\nthird"
    assert log.last_lines(10) == "third"
    assert filled("one", b"x" * 50).last_lines(10) == "x" * 10
    assert ReplicaLog(tmp_path / "none", replica=replica(), life=1, limit_bytes=1).last_lines(10) == ""


async def test_an_output_takes_no_more_disk_than_it_may_and_loses_only_its_oldest_part(tmp_path: Path) -> None:
    """F50."""
    logs = book(limit_bytes=256 << 10)
    writer = Writer(logs, tmp_path)
    for start in range(0, 100_000, 5000):
        writer.write(b"".join(b"line %06d\n" % n for n in range(start, start + 5000)))
        await logs.refresh()
    found = await history(logs)
    writer.end()
    used = writer.log.path.stat().st_blocks * 512
    if used > 1 << 20:
        pytest.skip("this file system cannot give back the start of a file")
    assert used <= (256 << 10) + 2 * LINE_BYTES
    assert [line.text for line in found] == [f"line {line.number - 1:06}" for line in found]
    assert found[-1].text == "line 099999"
    assert len(found) > 5000


async def test_a_reader_slower_than_the_log_is_long_is_told_what_it_lost(tmp_path: Path) -> None:
    """F50."""
    logs = book(limit_bytes=256 << 10)
    async with looking(logs):
        writer = Writer(logs, tmp_path)
        writer.write(b"the first\n")
        stream = logs.stream(lambda _: True, follow=True, tail=10)
        first = await anext(stream)
        assert isinstance(first, LogLine)
        assert isinstance(await anext(stream), CaughtUp)
        for start in range(0, 100_000, 5000):
            writer.write(b"".join(b"line %06d\n" % n for n in range(start, start + 5000)))
            await logs.refresh()
        if writer.log.start == 0:
            pytest.skip("this file system cannot give back the start of a file")
        late = await anext(stream)
        assert isinstance(late, LogLine)
        assert late.text == f"line {late.number - 2:06}"
        assert late.lost_bytes == 12 * (late.number - 2)
        after = await anext(stream)
        assert isinstance(after, LogLine)
        assert (after.number, after.lost_bytes) == (late.number + 1, 0)
        await stream.aclose()
        writer.end()


async def test_nothing_is_lost_or_told_twice_between_history_and_follow(tmp_path: Path) -> None:
    """F50: a writer that does not pause, and readers that come at any moment of it."""
    logs = book(limit_bytes=64 << 20)
    count = 60_000
    async with looking(logs):
        writer = Writer(logs, tmp_path)
        written = asyncio.Event()

        def write_all() -> None:
            for start in range(0, count, 100):
                writer.write(b"".join(b"%d of many\n" % n for n in range(start, start + 100)))

        async def read(after: int) -> list[str]:
            while writer.log.last < after:
                await asyncio.sleep(0)
            found = []
            stream = logs.stream(lambda log: log.replica.model == "m", follow=True, tail=10_000_000)
            async with contextlib.aclosing(stream) as lines:
                async for line in lines:
                    if isinstance(line, LogLine):
                        found.append(line.text)
                        if len(found) == count:
                            break
            return found

        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(after)) for after in (0, 100, count // 2)]
            await asyncio.to_thread(write_all)
            written.set()
        writer.end()
    expected = [f"{n} of many" for n in range(count)]
    assert all(reader.result() == expected for reader in readers)


async def test_replicas_are_merged_by_time_and_late_ones_and_restarts_joined(tmp_path: Path) -> None:
    """F50."""
    logs = book()
    async with looking(logs):
        a, b = Writer(logs, tmp_path, 0), Writer(logs, tmp_path, 1)
        Writer(logs, tmp_path, 0, "other").write(b"not asked for\n")
        for number, writer in enumerate((a, b, a, b)):
            writer.write(b"line %d\n" % number)
            await logs.refresh()
        stream = logs.stream(lambda log: log.replica.model == "m", follow=True, tail=100)
        told = [await anext(stream) for _ in range(5)]
        assert [x.text for x in told if isinstance(x, LogLine)] == ["line 0", "line 1", "line 2", "line 3"]
        times = [x.time for x in told if isinstance(x, LogLine)]
        assert times == sorted(times)
        mark = told[-1]
        assert isinstance(mark, CaughtUp)
        assert mark.positions == {a.log.life: 2, b.log.life: 2}
        a.write(b"its last words")
        a.end()
        line = await anext(stream)
        again, late = Writer(logs, tmp_path, 0), Writer(logs, tmp_path, 7)
        again.write(b"born again\n")
        second = await anext(stream)
        late.write(b"late\n")
        third = await anext(stream)
        await stream.aclose()
    found = [(x.replica.index, x.life, x.number, x.text) for x in (line, second, third) if isinstance(x, LogLine)]
    assert found == [
        (0, a.log.life, 3, "its last words"),
        (0, again.log.life, 1, "born again"),
        (7, late.log.life, 1, "late"),
    ]
    assert again.log.life > a.log.life


async def test_a_broken_stream_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    """F50."""
    logs = book()
    a, silent = Writer(logs, tmp_path, 0), Writer(logs, tmp_path, 1)
    a.write(b"1\n2\n3\n")
    told = [x async for x in logs.stream(lambda _: True, follow=False, tail=2)]
    mark = told[-1]
    assert isinstance(mark, CaughtUp)
    a.write(b"4\n")
    silent.write(b"first\n")
    late = Writer(logs, tmp_path, 2)
    late.write(b"late\n")
    again = [x async for x in logs.stream(lambda _: True, follow=False, seen=mark.positions)]
    assert sorted(x.text for x in again if isinstance(x, LogLine)) == ["4", "first", "late"]


async def test_the_last_lines_of_a_replica_go_back_over_its_lives(tmp_path: Path) -> None:
    """F50."""
    logs = book()
    for life in range(3):
        writer = Writer(logs, tmp_path)
        writer.write(b"life %d begins\nlife %d ends\n" % (life, life))
        writer.end()
        await logs.refresh()
    found = [line.text for line in await history(logs, tail=3)]
    assert found == ["life 1 ends", "life 2 begins", "life 2 ends"]


async def test_the_output_of_ended_processes_is_kept_for_a_while(tmp_path: Path) -> None:
    """F50."""
    logs = book(kept_lives=3)
    for life in range(6):
        writer = Writer(logs, tmp_path, index=life)
        writer.write(b"life %d\n" % life)
        writer.end()
        await logs.refresh()
    assert [line.text for line in await history(logs)] == ["life 3", "life 4", "life 5"]
    assert len(list(tmp_path.rglob("*.log"))) == 3
    big = book(kept_bytes=1000)
    for life in range(3):
        writer = Writer(big, tmp_path / "big", index=life)
        writer.write(b"x" * 900 + b"%d\n" % life)
        writer.end()
        await big.refresh()
    assert [line.text[-1] for line in await history(big)] == ["2"]


async def test_output_that_an_earlier_worker_left_is_readable_still(tmp_path: Path) -> None:
    """F50."""
    before = book()
    first, second = Writer(before, tmp_path, 0), Writer(before, tmp_path, 1)
    first.write(b"a\nb\n")
    second.write(b"c\nd")
    (tmp_path / "no-replica").mkdir()
    after = book()
    after.adopt(p for p in tmp_path.iterdir())
    found = [(line.replica.index, line.number, line.text) for line in await history(after)]
    assert sorted(found) == [(0, 1, "a"), (0, 2, "b"), (1, 1, "c"), (1, 2, "d")]
    latest = after.latest(replica(1))
    assert latest is not None
    assert latest.life == second.log.life
    assert after.begin(replica(1), tmp_path / "m-n1-1").life > second.log.life
