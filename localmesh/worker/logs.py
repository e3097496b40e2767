"""The output of a replica: a file that the process writes itself, read by whoever asks.

The file is written with O_APPEND and never renamed or cut while the process lives, so no line is lost and an offset
means the same forever. When it takes more disk than it may, the oldest part is given back to the file system as a hole.
"""

import asyncio
import ctypes
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_BLOCK = 4096
_CHUNK = 64 << 10
_LINE_BYTES = 64 << 10
"""A longer line is handed out in pieces."""
_POLL_SECONDS = 0.2


class ReplicaLog:
    """One life's output.

    Args:
        path: The file.
        limit_bytes: Disk that it may take.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self._limit = max(limit_bytes, 16 * _BLOCK)
        self._start = 0
        self._can_punch = True
        self._complete = asyncio.Event()

    def open(self) -> int:
        """Make the file anew and return a descriptor for the process; the caller closes it."""
        self.path.unlink(missing_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def complete(self) -> None:
        """Say that nothing will be written any more: readers that follow come to an end."""
        self._complete.set()

    def trim(self) -> None:
        """Give the oldest part back where the file takes more disk than it may. Cheap; call it now and then."""
        size = self._size()
        if not self._can_punch or size - self._start <= self._limit:
            return
        # half of the limit stays, so that not each new line makes a hole
        start = (size - self._limit // 2) // _BLOCK * _BLOCK
        try:
            _punch(self.path, start)
        except OSError as error:
            self._can_punch = False
            _log.warning("%s: this file system cannot give back the start of a file (%s): it grows", self.path, error)
            return
        self._start = start

    def last_lines(self, limit_bytes: int) -> str:
        """Return the end of the output: whole lines, of at most so many bytes in all."""
        data = self._read_end(limit_bytes + 1)
        if len(data) > limit_bytes:
            data = data.partition(b"\n")[2] or data[1:]
        return data.decode("utf-8", "replace").strip("\n")

    async def lines(self, *, tail: int, follow: bool) -> AsyncIterator[str]:
        """Return the last lines, oldest first, then with `follow` new ones until the process is gone."""
        file: BinaryIO | None = None
        offset, rest = 0, b""
        try:
            while True:
                # looked at before reading: what was written before the end is read after this
                ended = self._complete.is_set() or not follow
                if file is None:
                    # kept open, so that a later life's file of the same name is not mistaken for this one
                    file, offset = await asyncio.to_thread(self._open_at, tail)
                begin, data = await asyncio.to_thread(self._read, file, offset)
                end = begin + len(data)
                if begin > offset:
                    # trimmed while this reader was behind: go on at the next whole line
                    rest, data = b"", data.partition(b"\n")[2]
                offset = end
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    yield _decode(line)
                if len(rest) > _LINE_BYTES:
                    yield _decode(rest)
                    rest = b""
                if data:
                    continue
                if ended:
                    break
                await self._more()
            if rest:
                yield _decode(rest)
        finally:
            if file is not None:
                file.close()

    async def _more(self) -> None:
        """Return when it is worth looking for more."""
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await self._complete.wait()
        except TimeoutError:
            return

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def _open_at(self, tail: int) -> tuple[BinaryIO | None, int]:
        """Open the file and return it with where its last `tail` lines begin; None while there is none."""
        try:
            file = self.path.open("rb")
        except OSError:
            return None, 0
        return file, self._tail_offset(file, tail)

    def _read(self, file: BinaryIO | None, offset: int) -> tuple[int, bytes]:
        """Return what begins at the offset, or where the file begins now, and where that is."""
        if file is None:
            return offset, b""
        begin = max(offset, self._start)
        file.seek(begin)
        return begin, file.read(_CHUNK)

    def _read_end(self, count: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._start, size - count))
                return file.read(count)
        except OSError:
            return b""

    def _tail_offset(self, file: BinaryIO, lines: int) -> int:
        """Return where the last `lines` lines begin."""
        at = file.seek(0, os.SEEK_END)
        left = lines + 1
        first = True
        while at > self._start:
            begin = max(self._start, at - _CHUNK)
            file.seek(begin)
            data = file.read(at - begin)
            if first and not data.endswith(b"\n"):
                left -= 1  # the last line has no end yet
            first = False
            found = len(data)
            while left and (found := data.rfind(b"\n", 0, found)) >= 0:
                left -= 1
            if not left:
                return begin + found + 1
            at = begin
        return self._start


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


def _decode(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace")
