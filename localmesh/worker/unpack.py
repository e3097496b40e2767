"""Archives and folders of backends, brought into a staging folder. Blocks: for a thread.

An archive is somebody else's: nothing in it may be written, linked or made outside of the folder it is unpacked into,
and it may not fill the disk. Files are written first and never through a link; links come last and are looked at after.
"""

import hashlib
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from localmesh.core.errors import BackendInvalid

RUN = "run.sh"
_CHUNK = 1 << 20
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, NotImplementedError, RuntimeError)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a backend may take at most."""

    size_bytes: int
    entries: int


Told = Callable[[int, int], None]
"""Told bytes done and in all, now and then."""


class _Target:
    """A folder that is filled, within limits."""

    def __init__(self, folder: Path, limits: Limits, on_bytes: Callable[[], None]) -> None:
        self.folder = folder
        self.bytes = 0
        self._limits = limits
        self._on_bytes = on_bytes
        self._entries = 0
        self._links: list[Path] = []

    def place(self, name: str) -> Path | None:
        """Return where an entry goes; None for the folder itself.

        Raises:
            BackendInvalid: Its name leads elsewhere, or there are too many.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise BackendInvalid(f"it has an entry that leads out of it: {name!r}")
        self._entries += 1
        if self._entries > self._limits.entries:
            raise BackendInvalid(f"it has more than {self._limits.entries} entries")
        return self.folder.joinpath(*pure.parts) if pure.parts else None

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it."""
        path.mkdir(mode=0o755, parents=True, exist_ok=True)

    def write(self, path: Path, source: IO[bytes], *, executable: bool) -> str:
        """Write a file and return its SHA-256."""
        self.make_folder(path.parent)
        digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o755 if executable else 0o644), "wb") as file:
            while data := source.read(_CHUNK):
                self.bytes += len(data)
                if self.bytes > self._limits.size_bytes:
                    raise BackendInvalid(f"it takes more than {self._limits.size_bytes} bytes unpacked")
                digest.update(data)
                file.write(data)
                self._on_bytes()
        return digest.hexdigest()

    def link(self, path: Path, target: str) -> None:
        """Make a symbolic link. After all files."""
        self.make_folder(path.parent)
        self._inside(path.parent, "a link below a link")
        if path.parent.resolve() != path.parent:
            raise BackendInvalid(f"it has a link below a link: {path.relative_to(self.folder)}")
        path.symlink_to(target)
        self._inside(path, f"a link that leads out of it, to {target!r}")
        self._links.append(path)

    def check_links(self) -> None:
        """Look at all links again: a later one may have bent an earlier one."""
        for path in self._links:
            self._inside(path, "links that together lead out of it")

    def _inside(self, path: Path, what: str) -> None:
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:  # a loop
            raise BackendInvalid(f"it has a link that cannot be followed: {path.name}") from error
        if not real.is_relative_to(self.folder):
            raise BackendInvalid(f"it has {what}: {path.relative_to(self.folder)}")


def sha256_of(path: Path, told: Told) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            done += len(data)
            told(done, total)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path, *, limits: Limits, told: Told) -> None:
    """Unpack an archive into an empty folder.

    Raises:
        BackendInvalid: It is none, is damaged, or has something in it that is not safe.
        OSError: It cannot be read, or what is in it cannot be written.
    """
    total = archive.stat().st_size
    with archive.open("rb") as file:
        target = _Target(folder.resolve(), limits, lambda: told(file.tell(), total))
        is_zip = file.read(4) in _ZIP
        file.seek(0)
        try:
            if is_zip:
                _unzip(file, target)
            else:
                _untar(file, target)
        except _DAMAGED as error:
            raise BackendInvalid(f"it is no archive that can be read, or is damaged: {error}") from error
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise BackendInvalid(f"it has two entries of the same name: {error.filename}") from error
    target.check_links()


def copy(source: Path, folder: Path, *, limits: Limits, told: Told) -> str:
    """Copy a folder into an empty one, links as they are, and return a SHA-256 of all that is in it.

    Raises:
        BackendInvalid: It has something in it that is neither file, folder nor link, or is too large.
        OSError: It cannot be read, or what is in it cannot be written.
    """
    digest = hashlib.sha256()
    found = sorted(_walk(source), key=lambda pair: pair[0])
    total = sum(info.st_size for _, info in found if stat.S_ISREG(info.st_mode))
    target = _Target(folder.resolve(), limits, lambda: told(target.bytes, total))
    for name, info in found:
        path, place = source / name, target.place(name)
        if place is None:
            continue
        if stat.S_ISDIR(info.st_mode):
            target.make_folder(place)
            what = "d"
        elif stat.S_ISLNK(info.st_mode):
            # an operator's folder on this machine: an environment links to the Python that is installed here
            target.make_folder(place.parent)
            place.symlink_to(path.readlink())
            what = f"l{path.readlink()}"
        elif stat.S_ISREG(info.st_mode):
            runs = bool(info.st_mode & 0o111)
            with path.open("rb") as file:
                what = f"{'x' if runs else 'f'}{target.write(place, file, executable=runs)}"
        else:
            raise BackendInvalid(f"it has something that is neither file, folder nor link: {name}")
        digest.update(f"{name}\0{what}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def root_of(folder: Path) -> Path:
    """Return the folder that has the run.sh: this one, or the only one in it. Make the run.sh executable.

    Raises:
        BackendInvalid: There is none.
    """
    candidates = [folder]
    inside = list(folder.iterdir())
    if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink():
        candidates.append(inside[0])
    for candidate in candidates:
        script = candidate / RUN
        if script.is_file():
            if not script.is_symlink():
                script.chmod(script.stat().st_mode | 0o111)
            return candidate
    raise BackendInvalid(f"it has no file {RUN} at its top: a backend is started as `{RUN} --addr HOST:PORT`")


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(info.st_size for _, info in _walk(folder) if stat.S_ISREG(info.st_mode))


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name, info = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
            yield name, info
            if stat.S_ISDIR(info.st_mode):
                yield from _walk(folder / entry.name, f"{name}/")


def _untar(file: BinaryIO, target: _Target) -> None:
    links = []
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            path = target.place(member.name)
            if path is None:
                continue
            if member.isdir():
                target.make_folder(path)
            elif member.issym():
                links.append((path, member.linkname))
            elif member.islnk():
                first = target.place(member.linkname)
                if first is None or first.is_symlink() or not first.is_file():
                    raise BackendInvalid(f"it has a link to what is not in it: {member.name!r}")
                target.make_folder(path.parent)
                os.link(first, path, follow_symlinks=False)
            elif member.isfile() and (source := archive.extractfile(member)) is not None:
                target.write(path, source, executable=bool(member.mode & 0o111))
            else:
                raise BackendInvalid(f"it has something that is neither file, folder nor link: {member.name!r}")
    for path, linked in links:
        target.link(path, linked)


def _unzip(file: BinaryIO, target: _Target) -> None:
    links = []
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            path = target.place(info.filename)
            mode = info.external_attr >> 16
            if path is None:
                continue
            if info.is_dir():
                target.make_folder(path)
            elif stat.S_ISLNK(mode):
                if info.file_size > 4096:
                    raise BackendInvalid(f"it has a link that is too long: {info.filename!r}")
                links.append((path, os.fsdecode(archive.read(info))))
            elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                with archive.open(info) as source:
                    target.write(path, source, executable=bool(mode & 0o111))
            else:
                raise BackendInvalid(f"it has something that is neither file, folder nor link: {info.filename!r}")
    for path, linked in links:
        target.link(path, linked)
