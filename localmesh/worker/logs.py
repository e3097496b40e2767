"""The output of one process of a replica: a file that the process writes itself, read by whoever asks.

The file is written with O_APPEND and never renamed or cut while the process lives, so no line is lost and an offset
means the same forever. When it takes more disk than it may, the oldest part is given back to the file system as a hole.

A line's number and time come from marks: whoever looks at the file now and then notes how many lines there were at
which offset and when.
"""

import ctypes
import errno
import logging
import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from localmesh.core.ids import ReplicaId

_log = logging.getLogger(__name__)
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_BLOCK = 4096
LINE_BYTES = 64 << 10
"""A longer line is handed out in pieces."""
_LOOK_BYTES = 32 << 20
"""Read at most by one look, so that one process that prints a lot does not keep the others waiting."""
_MOST_MARKS = 4096


class Mark(NamedTuple):
    """From `offset` on there are the lines from `number` on; they were seen at `time`, seconds since 1970."""

    number: int
    offset: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of output."""

    replica: ReplicaId
    life: int
    """Which process of that name."""
    number: int
    """Among the lines of the process, from 1."""
    time: float
    """When it was seen, seconds since 1970."""
    text: str
    lost_bytes: int = 0
    """Output before this line that was given up before this reader came to it."""

    @property
    def order(self) -> tuple[float, int, int]:
        """Sorts the lines of a node."""
        return self.time, self.life, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look found."""

    marks: tuple[Mark, ...]
    seen: int
    next: int
    complete: bool


class ReplicaLog:
    """One life's output. Changed in the loop's thread only; files are read in any.

    Args:
        path: The file.
        replica: Whose.
        life: Number of the process.
        limit_bytes: Disk that it may take.
    """

    def __init__(self, path: Path, *, replica: ReplicaId, life: int, limit_bytes: int) -> None:
        self.path = path
        self.replica = replica
        self.life = life
        self.seen = 0
        """Offset up to which it was looked at: the end of a line."""
        self.complete = False
        """Nothing will be written any more, and all of it was looked at."""
        self.marks: list[Mark] = []
        self._limit = max(limit_bytes, 16 * _BLOCK)
        self._next = 1
        self._can_punch = True
        self._over = False

    @property
    def start(self) -> int:
        """Offset of the first line that is still there."""
        marks = self.marks
        return marks[0].offset if marks else self.seen

    @property
    def first(self) -> int:
        """Number of the first line that is still there."""
        marks = self.marks
        return marks[0].number if marks else self._next

    @property
    def last(self) -> int:
        """Number of the last line; 0 when there is none yet."""
        return self._next - 1

    def open(self) -> int:
        """Make the file and return a descriptor for the process; the caller closes it."""
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def adopt(self) -> None:
        """Take over a file that a process of an earlier worker wrote. Blocks."""
        self._over = True
        try:
            with self.path.open("rb") as file:
                # what was before it has been given back
                self.seen = os.lseek(file.fileno(), 0, os.SEEK_DATA)
                if self.seen:
                    self.seen += _to_line_end(file, self.seen)
        except OSError:  # empty, or gone
            self.seen = 0

    def over(self) -> None:
        """Say that nothing will be written any more."""
        self._over = True

    def look(self, now: float) -> Look:
        """Return what is new in the file; `take` makes it known. Blocks: for a thread.

        Args:
            now: Seconds since 1970.
        """
        over = self._over  # before reading: what was written before the end is read after this
        offset, number = self.seen, self._next
        marks: list[Mark] = []
        caught_up = True
        try:
            if self.path.stat().st_size > offset:
                with self.path.open("rb") as file:
                    while caught_up := offset - self.seen < _LOOK_BYTES:
                        file.seek(offset)
                        data = file.read(LINE_BYTES)
                        count, used = whole_lines(data, final=over and len(data) < LINE_BYTES)
                        if not used:
                            break
                        marks.append(Mark(number, offset, now))
                        number, offset = number + count, offset + used
        except FileNotFoundError:
            pass  # nothing is written yet, or no process ever came of it
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.path, error)
        return Look(marks=tuple(marks), seen=offset, next=number, complete=over and caught_up)

    def take(self, found: Look) -> bool:
        """Make known what a look found, and return whether it is anything."""
        if len(self.marks) > _MOST_MARKS:
            # the older half loses every second one: its times get coarser, its lines keep their numbers
            middle = len(self.marks) // 2
            self.marks = self.marks[:middle:2] + self.marks[middle:]
        self.marks = self.marks + list(found.marks) if found.marks else self.marks
        changed = found.seen > self.seen or found.complete
        self.seen, self._next, self.complete = found.seen, found.next, found.complete
        return changed

    def trim(self) -> None:
        """Give the oldest part back where the file takes more disk than it may. Cheap; call it after looks."""
        if not self._can_punch or self.seen - self.start <= self._limit:
            return
        # half of the limit stays, so that not each new line makes a hole
        at = bisect_left(self.marks, self.seen - self._limit // 2, key=lambda mark: mark.offset)
        self.marks = self.marks[min(at, len(self.marks) - 1) :]  # before the hole is made: readers look at it after
        try:
            _punch(self.path, self.start // _BLOCK * _BLOCK)
        except OSError as error:
            self._can_punch = False
            _log.warning("%s: this file system cannot give back the start of a file (%s): it grows", self.path, error)

    def mark_of(self, number: int) -> Mark | None:
        """Return the mark from which a line is found, the first one for lines before it; None without any line."""
        marks = self.marks
        return marks[max(0, bisect_right(marks, number, key=lambda mark: mark.number) - 1)] if marks else None

    def last_lines(self, limit_bytes: int) -> str:
        """Return the end of the output: whole lines, of at most so many bytes in all."""
        data = self._read_end(limit_bytes + 1)
        if len(data) > limit_bytes:
            data = data.partition(b"\n")[2] or data[1:]
        return data.decode("utf-8", "replace").strip("\n")

    def _read_end(self, count: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self.start, size - count))
                return file.read(count)
        except OSError:
            return b""


class LogReader:
    """Reads a log's lines in order, each once, as far as it was looked at.

    Args:
        log: Which.
        after: Number of the last line that is not wanted.
    """

    def __init__(self, log: ReplicaLog, *, after: int) -> None:
        self.log = log
        self.position = after
        """Number of the last line that was read."""
        self._file: BinaryIO | None = None
        mark = log.mark_of(after + 1)
        self._number, self._offset = (mark.number, mark.offset) if mark is not None else (1, log.seen)
        self._gone = False

    def behind(self, limit: int) -> bool:
        """Whether there is more to read before the offset `limit`."""
        return not self._gone and self._offset < limit

    def read(self, limit: int) -> list[LogLine]:
        """Return the next lines before the offset `limit`; none when there is no more. Blocks: for a thread."""
        lines: list[LogLine] = []
        while not lines and self.behind(limit):
            lines = self._read_some(limit)
        return lines

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_some(self, limit: int) -> list[LogLine]:
        lost = self._skip_lost()
        left = limit - self._offset
        data = self._bytes_at(self._offset, min(left, LINE_BYTES)) if left > 0 else b""
        if self._offset < self.log.start:
            return []  # given up while it was read: these bytes may be those of the hole
        count, used = whole_lines(data, final=len(data) == left)
        if not used:
            self._gone = left > 0
            return []
        found = data[:used].removesuffix(b"\n").split(b"\n") if count > 1 else [data[:used].removesuffix(b"\n")]
        first, self._number, self._offset = self._number, self._number + count, self._offset + used
        lines = []
        for number, text in enumerate(found, first):
            if number > self.position:
                lines.append(self._line(number, text, lost))
                lost = 0
        self.position = max(self.position, self._number - 1)
        return lines

    def _skip_lost(self) -> int:
        """Go on where the log begins now, if that is further; return how many bytes were lost by it."""
        mark = self.log.marks[0] if self.log.marks else None
        if mark is None or self._offset >= mark.offset:
            return 0
        lost = mark.offset - self._offset
        self._number, self._offset = mark.number, mark.offset
        return lost

    def _bytes_at(self, offset: int, count: int) -> bytes:
        try:
            if self._file is None:
                # kept open: the file may be removed meanwhile
                self._file = self.log.path.open("rb")
            self._file.seek(offset)
            return self._file.read(count)
        except OSError:
            return b""

    def _line(self, number: int, text: bytes, lost: int) -> LogLine:
        mark = self.log.mark_of(number)
        return LogLine(
            replica=self.log.replica,
            life=self.log.life,
            number=number,
            time=mark.time if mark is not None else 0.0,
            text=text.rstrip(b"\r").decode("utf-8", "replace"),
            lost_bytes=lost,
        )


def whole_lines(data: bytes, *, final: bool) -> tuple[int, int]:
    """Return how many lines data begins with that are whole, and how many bytes they take.

    A line of LINE_BYTES and more is cut in pieces of LINE_BYTES, each of which counts as a line. Where it is cut
    depends only on where the line begins.

    Args:
        data: Bytes that begin where a line begins, LINE_BYTES at most.
        final: Nothing comes after them: what has no end is a line all the same.
    """
    end = data.rfind(b"\n") + 1
    if end:
        return data.count(b"\n", 0, end), end
    if data and (final or len(data) >= LINE_BYTES):
        return 1, len(data)
    return 0, 0


def _to_line_end(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    return len(file.readline(LINE_BYTES))


def _punch(path: Path, end: int) -> None:
    """Free the disk blocks of the file before `end`; its size stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, 0, end) != 0:
            code = ctypes.get_errno() or errno.EIO
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
