"""All output on this node: of processes that run and of those that ended lately, merged by time for who reads it."""

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from localmesh.core.clock import Clock
from localmesh.core.ids import ReplicaId
from localmesh.worker.logs import LogLine, LogReader, Look, ReplicaLog

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1
_NAME = "replica"
"""File in a replica's folder that says whose it is."""
_PREFIX, _SUFFIX = "output-", ".log"

_Heads = list[tuple[tuple[float, int, int], LogLine, LogReader, deque[LogLine]]]
"""The next line of each reader, and what was read after it: a heap by time, life and number, which no two share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp:
    """All lines that were there have been handed out."""

    positions: Mapping[int, int]
    """Number of the last line of each life, 0 where there is none."""


class LogBook:
    """The output of a node's replicas. Every process has a life number of its own, which only grows.

    Args:
        clock: Time of lines.
        limit_bytes: Disk that the output of one process may take.
        kept_lives: How many ended processes' output is kept at most.
        kept_bytes: How much of it at most; that of the last one stays in any case.
    """

    def __init__(self, *, clock: Clock, limit_bytes: int, kept_lives: int, kept_bytes: int) -> None:
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._kept_lives = kept_lives
        self._kept_bytes = kept_bytes
        self._lives: dict[int, ReplicaLog] = {}
        self._written: dict[int, ReplicaLog] = {}
        """Those that are not complete."""
        self._ended: deque[ReplicaLog] = deque()
        self._last_life = 0
        self._news = asyncio.Event()
        self._wake = asyncio.Event()
        self._looking = asyncio.Lock()

    def adopt(self, folders: Iterable[Path]) -> None:
        """Take over what processes of an earlier worker wrote in replicas' folders. Blocks; before anything else."""
        found = []
        for folder in folders:
            with suppress(OSError, ValueError):
                replica = ReplicaId.parse((folder / _NAME).read_text())
                for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
                    life = int(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX))
                    found.append(ReplicaLog(path, replica=replica, life=life, limit_bytes=self._limit_bytes))
        for log in sorted(found, key=lambda each: each.life):
            log.adopt()
            while not log.complete:
                log.take(log.look(_written_at(log.path)))
            self._lives[log.life] = log
            self._last_life = log.life
            self._keep(log)

    def begin(self, replica: ReplicaId, folder: Path) -> ReplicaLog:
        """Return the log of a process that is about to be started, in the replica's folder."""
        life = max(self._last_life + 1, int(self._clock.time() * 1000))
        self._last_life = life
        path = folder / f"{_PREFIX}{life}{_SUFFIX}"
        log = ReplicaLog(path, replica=replica, life=life, limit_bytes=self._limit_bytes)
        with suppress(OSError):  # its process will not start either, and that is told
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _NAME).write_text(str(replica))
        self._lives[life] = self._written[life] = log
        self._wake.set()
        return log

    def end(self, log: ReplicaLog) -> None:
        """Say that a process is gone."""
        log.over()
        self._wake.set()

    def latest(self, replica: ReplicaId) -> ReplicaLog | None:
        """Return the output of a replica's process, or of the last one of that name."""
        return next((log for log in reversed(self._lives.values()) if log.replica == replica), None)

    async def run(self) -> None:
        """Look at what is written until cancelled."""
        while True:
            self._wake.clear()
            await self.refresh()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS if self._written else None):
                    await self._wake.wait()

    async def refresh(self) -> None:
        """Look at what is written now."""
        async with self._looking:
            logs = list(self._written.values())
            found = await asyncio.to_thread(_look_at, logs, self._clock.time()) if logs else []
            changed = [log for log, look in zip(logs, found, strict=True) if log.take(look)]
            for log in changed:
                log.trim()
                if log.complete:
                    del self._written[log.life]
                    self._keep(log)
            if changed:
                self._news.set()
                self._news = asyncio.Event()

    async def stream(
        self,
        selected: Callable[[ReplicaLog], bool],
        *,
        follow: bool,
        tail: int = 0,
        seen: Mapping[int, int] | None = None,
    ) -> AsyncGenerator[LogLine | CaughtUp, None]:
        """Hand out lines in the order of their time: those that are there, CaughtUp, then with `follow` new ones.

        Args:
            selected: Whose.
            follow: Go on, also with lives that begin later; the caller ends it.
            tail: At most this many of the last lines of each replica.
            seen: Instead: by life the last line not to hand out; other lives are handed out whole.
        """
        await self.refresh()
        readers: dict[int, LogReader] = {}
        known: set[int] = set()
        starts = seen if seen is not None else _tails([x for x in self._lives.values() if selected(x)], tail)
        told = False
        try:
            while True:
                news = self._news  # before looking: what comes later sets it
                for life, log in self._lives.items():
                    if life not in known and selected(log):
                        known.add(life)
                        readers[life] = LogReader(log, after=starts.get(life, 0))
                async with aclosing(_merged(readers.values())) as lines:
                    async for line in lines:
                        yield line
                if not told:
                    told = True
                    yield CaughtUp(positions={life: reader.position for life, reader in readers.items()})
                if not follow:
                    return
                for life in [n for n, r in readers.items() if r.log.complete and not r.behind(r.log.seen)]:
                    readers.pop(life).close()
                await news.wait()
        finally:
            for reader in readers.values():
                reader.close()

    async def stream_life(self, log: ReplicaLog, *, follow: bool, tail: int) -> AsyncGenerator[LogLine, None]:
        """Hand out the last lines of one life, then with `follow` new ones until it has ended."""
        await self.refresh()
        reader = LogReader(log, after=max(log.first - 1, log.last - tail))
        try:
            while True:
                news, complete = self._news, log.complete
                async with aclosing(_merged([reader])) as lines:
                    async for line in lines:
                        yield line
                if complete or not follow:
                    return
                await news.wait()
        finally:
            reader.close()

    def _keep(self, log: ReplicaLog) -> None:
        """Keep the output of an ended life, and remove what is too much then."""
        self._ended.append(log)
        while len(self._ended) > 1 and (
            len(self._ended) > self._kept_lives
            or sum(each.seen - each.start for each in self._ended) > self._kept_bytes
        ):
            oldest = self._ended.popleft()
            del self._lives[oldest.life]
            try:
                oldest.path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s cannot be removed: %s", oldest.path, error)


async def _merged(readers: Iterable[LogReader]) -> AsyncGenerator[LogLine, None]:
    """Hand out in the order of their time what the readers have now, and nothing that comes later."""
    limits = {reader: reader.log.seen for reader in readers}
    heads: _Heads = []
    for reader, limit in limits.items():
        if reader.behind(limit):
            _push(heads, reader, deque(await asyncio.to_thread(reader.read, limit)))
    while heads:
        _, line, reader, rest = heapq.heappop(heads)
        if not rest and reader.behind(limits[reader]):
            rest = deque(await asyncio.to_thread(reader.read, limits[reader]))
        _push(heads, reader, rest)
        yield line


def _push(heads: _Heads, reader: LogReader, lines: deque[LogLine]) -> None:
    if lines:
        line = lines.popleft()
        heapq.heappush(heads, (line.order, line, reader, lines))


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _look_at(logs: Iterable[ReplicaLog], now: float) -> list[Look]:
    return [log.look(now) for log in logs]


def _tails(logs: list[ReplicaLog], tail: int) -> dict[int, int]:
    """Return by life after which line to begin, so that each replica's last lines are handed out."""
    left: dict[ReplicaId, int] = {}
    starts = {}
    for log in sorted(logs, key=lambda each: -each.life):
        wanted = left.get(log.replica, tail)
        starts[log.life] = max(log.first - 1, log.last - wanted)
        left[log.replica] = wanted - (log.last - starts[log.life])
    return starts
