"""The backends that were installed on this node, on disk. Blocks: for a thread, but for `switch`, which is one rename.

NAME              -> .versions/NAME-GENERATION     a link: changed in one step
.versions/NAME-GENERATION/.localmesh.json          what it is and where it came from
.versions/NAME.last                                its last generation, also when it was deleted since
.staging/...                                       what is on its way; swept when the worker starts
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from localmesh.worker.unpack import RUN

_MANIFEST = ".localmesh.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was installed."""

    name: str
    generation: int
    sha256: str
    source: str
    installed_at: float
    """Seconds since 1970."""
    size_bytes: int


class BackendFolder:
    """One node's backends.

    Args:
        root: Folder of those that were installed; the worker's own.
        by_hand: Folder of those that somebody put there; only looked at.
    """

    def __init__(self, root: Path, *, by_hand: Path) -> None:
        self.root = root
        self.by_hand = by_hand
        self._staging = root / ".staging"
        self._versions = root / ".versions"

    def sweep(self) -> None:
        """Remove what a worker that died left half done."""
        shutil.rmtree(self._staging, ignore_errors=True)
        used = set()
        for name in self._linked():
            if self.installed(name) is None:
                (self.root / name).unlink(missing_ok=True)
            else:
                used.add((self.root / name).resolve())
        with suppress(OSError):
            for version in self._versions.iterdir():
                if version.is_dir() and version.resolve() not in used:
                    shutil.rmtree(version, ignore_errors=True)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """Yield an empty folder on the file system of the backends, which is removed at the end."""
        self._staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._staging))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def new_file(self, name: str) -> Path:
        """Make and return an empty file beside what is staged; the caller deletes it."""
        self._staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".archive", dir=self._staging)
        os.close(fd)
        return Path(path)

    def installed(self, name: str) -> Manifest | None:
        """Return what is installed under a name."""
        try:
            return Manifest(**json.loads((self.root / name / _MANIFEST).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def is_by_hand(self, name: str) -> bool:
        """Whether somebody has put a backend of that name there."""
        return (self.by_hand / name / RUN).is_file()

    def names(self) -> list[str]:
        """Return the names of all backends."""
        found = {name for name in self._linked() if self.installed(name) is not None}
        with suppress(OSError):
            found |= {p.name for p in self.by_hand.iterdir() if not p.name.startswith(".") and self.is_by_hand(p.name)}
        return sorted(found)

    def last_generation(self, name: str) -> int:
        """Return the number of the last install of that name; 0 when there was none."""
        try:
            return int((self._versions / f"{name}.last").read_text())
        except (OSError, ValueError):
            return 0

    def keep(self, staged: Path, manifest: Manifest) -> Path:
        """Move a staged backend to its place among the versions, and return it."""
        (staged / _MANIFEST).unlink(missing_ok=True)
        (staged / _MANIFEST).write_text(json.dumps(asdict(manifest)))
        self._versions.mkdir(mode=0o700, parents=True, exist_ok=True)
        version = self._versions / f"{manifest.name}-{manifest.generation}"
        shutil.rmtree(version, ignore_errors=True)
        staged.rename(version)
        (self._versions / f"{manifest.name}.last").write_text(str(manifest.generation))
        return version

    def switch(self, name: str, version: Path) -> Path | None:
        """Put a version in the place of what is there, in one step. Return the version that was there."""
        link = self.root / name
        before = link.resolve() if link.is_symlink() else None
        new = self._staging / f"{name}.link"
        new.unlink(missing_ok=True)
        new.symlink_to(version.relative_to(self.root))
        new.replace(link)
        return before if before is not None and before != version.resolve() else None

    def unlink(self, name: str) -> Path | None:
        """Take a backend away in one step. Return the version that was there."""
        link = self.root / name
        before = link.resolve() if link.is_symlink() else None
        link.unlink(missing_ok=True)
        return before

    def remove(self, version: Path | None) -> None:
        """Delete a version that is in nobody's use any more. What cannot be deleted is swept later."""
        if version is not None and version.parent == self._versions.resolve():
            shutil.rmtree(version, ignore_errors=True)

    def _linked(self) -> list[str]:
        try:
            return [p.name for p in self.root.iterdir() if p.is_symlink()]
        except OSError:
            return []


def backend_path(name: str, *, installed: Path, by_hand: Path) -> Path:
    """Return the folder of a backend: that of the present version of an installed one, else the one put by hand."""
    link = installed / name
    return link.resolve() if link.is_symlink() else by_hand / name
