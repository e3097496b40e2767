"""What native code writes to file descriptor 2, for error messages: llama.cpp says there why it cannot load."""

import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

_TAIL = 8192


class StderrCapture:
    """Remembers what is written to descriptor 2 while it is entered, without keeping it from where it goes.

    Where descriptor 2 is a file, the file is read. Otherwise it is led into a file of ours meanwhile, and what came is
    passed on at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start = 0
        self._original = -1
        self._file = -1

    def __enter__(self) -> Self:
        """Begin."""
        if stat.S_ISREG(os.fstat(2).st_mode):
            self._start = os.fstat(2).st_size
            return self
        self._file, name = tempfile.mkstemp(dir=self._folder, prefix="stderr-")
        Path(name).unlink()
        self._original = os.dup(2)
        os.dup2(self._file, 2)
        return self

    def text(self) -> str:
        """Return the last 8 KiB of what came since the beginning."""
        source = self._file if self._file >= 0 else os.open("/proc/self/fd/2", os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = os.fstat(source).st_size
            return os.pread(source, _TAIL, max(self._start, end - _TAIL)).decode("utf-8", "replace")
        finally:
            if source != self._file:
                os.close(source)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        if self._file < 0:
            return
        os.dup2(self._original, 2)
        os.close(self._original)
        size = os.fstat(self._file).st_size
        position = 0
        while position < size and (chunk := os.pread(self._file, 1 << 16, position)):
            os.write(2, chunk)
            position += len(chunk)
        os.close(self._file)
        self._file = -1
