"""What becomes of archives and folders: what is in them arrives, and nothing outside of the target is touched."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from localmesh.core.errors import BackendInvalid
from localmesh.worker.unpack import Limits, copy, root_of, size_of, unpack

LIMITS = Limits(size_bytes=1 << 20, entries=100)


def tar(path: Path, *entries: tuple[str, bytes | str | None], mode: int = 0o644, compression: str = "gz") -> Path:
    """Write an archive: bytes are a file, text is a link's target, None is a folder."""
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = mode
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                info.linkname = content or ""
                archive.addfile(info)
    return path


def zipped(path: Path, *entries: tuple[str, bytes, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


def unpacked(archive: Path, folder: Path, limits: Limits = LIMITS) -> Path:
    folder.mkdir()
    unpack(archive, folder, limits=limits, told=lambda done, total: None)
    return folder


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_an_archive_arrives_with_modes_and_links(tmp_path: Path, compression: str) -> None:
    """F48."""
    archive = tar(
        tmp_path / "a",
        ("./", None),
        ("./run.sh", b"#!/bin/sh\n"),
        ("lib/deep/x.py", b"pass\n"),
        ("lib/link.py", "deep/x.py"),
        mode=0o6755,
        compression=compression,
    )
    found = unpacked(archive, tmp_path / "out")
    assert (found / "lib/link.py").read_bytes() == b"pass\n"
    assert stat.S_IMODE((found / "run.sh").stat().st_mode) & 0o7111 == 0o111
    assert root_of(found) == found
    assert size_of(found) == len(b"#!/bin/sh\npass\n")


def test_a_zip_arrives_with_modes_and_links(tmp_path: Path) -> None:
    """F48."""
    archive = zipped(
        tmp_path / "a.zip",
        ("top/run.sh", b"#!/bin/sh\n", 0o100755),
        ("top/data", b"d", 0),
        ("top/link", b"data", 0o120777),
    )
    found = unpacked(archive, tmp_path / "out")
    root = root_of(found)
    assert root == found / "top"
    assert (root / "link").read_bytes() == b"d"
    assert os.access(root / "run.sh", os.X_OK)


def test_what_has_no_run_sh_is_no_backend(tmp_path: Path) -> None:
    """F48."""
    found = unpacked(tar(tmp_path / "a", ("a/run.sh", b""), ("b/x", b"")), tmp_path / "out")
    with pytest.raises(BackendInvalid, match=r"run\.sh"):
        root_of(found)


def _hard_link(path: Path, target: str) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x")
        info.type, info.linkname = tarfile.LNKTYPE, target
        archive.addfile(info)
    return path


def _device(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("null")
        info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 3
        archive.addfile(info)
    return path


EVIL: dict[str, Callable[[Path], Path]] = {
    "absolute": lambda p: tar(p, ("/tmp/evil", b"x")),
    "dots": lambda p: tar(p, ("a/../../evil", b"x")),
    "link out": lambda p: tar(p, ("l", "../outside")),
    "absolute link": lambda p: tar(p, ("l", "/etc/passwd")),
    "through a link": lambda p: tar(p, ("l", "sub"), ("sub", None), ("l/evil", b"x")),
    "link below a link": lambda p: tar(p, ("sub", None), ("l", "sub"), ("l/m", "x")),
    "links that bend": lambda p: tar(p, ("a", "b/.."), ("b", ".")),
    "chain": lambda p: tar(p, ("p/q/r", "../.."), ("s", "p/q/r/..")),
    "loop": lambda p: tar(p, ("a", "b"), ("b", "a")),
    "hard link out": lambda p: _hard_link(p, "../../etc/passwd"),
    "hard link to nothing": lambda p: _hard_link(p, "nothing"),
    "device": _device,
    "twice": lambda p: tar(p, ("a", b"1"), ("a", b"2")),
    "file as folder": lambda p: tar(p, ("a", b"1"), ("a/b", b"2")),
    "too large": lambda p: tar(p, ("zeros", b"\0" * (2 << 20))),
    "too many": lambda p: tar(p, *((f"f{n}", b"") for n in range(101))),
    "zip dots": lambda p: zipped(p, ("../evil", b"x", 0)),
    "zip absolute": lambda p: zipped(p, ("/evil", b"x", 0)),
    "zip link out": lambda p: zipped(p, ("l", b"/etc", 0o120777)),
    "zip bomb": lambda p: zipped(p, ("zeros", b"\0" * (2 << 20), 0)),
    "zip device": lambda p: zipped(p, ("null", b"", 0o020666)),
}


@pytest.mark.parametrize("kind", EVIL)
def test_what_is_not_safe_is_refused_and_nothing_is_touched_outside(tmp_path: Path, kind: str) -> None:
    """F48."""
    archive = EVIL[kind](tmp_path / "archive")
    (tmp_path / "outside").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(BackendInvalid):
        unpacked(archive, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "out"])
    assert (tmp_path / "outside").read_text() == "mine"
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"PK\x03\x04" + b"\0" * 100, b"\x1f\x8b\x08" + b"\0" * 50, b"\xfd7zXZ\0" + b"x" * 50]
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    """F48."""
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(BackendInvalid, match="archive"):
        unpacked(tmp_path / "a", tmp_path / "out")


def test_an_archive_that_was_cut_off_is_damaged(tmp_path: Path) -> None:
    """F48."""
    whole = tar(tmp_path / "a", ("run.sh", os.urandom(100_000)))
    whole.write_bytes(whole.read_bytes()[:50_000])
    with pytest.raises(BackendInvalid):
        unpacked(whole, tmp_path / "out")


def test_a_folder_is_copied_with_links_as_they_are_and_its_sum_tells_any_change(tmp_path: Path) -> None:
    """F48."""
    source = tmp_path / "source"
    (source / "venv/bin").mkdir(parents=True)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "venv/bin/python").symlink_to("/usr/bin/python3")

    def copied(name: str) -> str:
        (tmp_path / name).mkdir()
        return copy(source, tmp_path / name, limits=LIMITS, told=lambda done, total: None)

    first = copied("one")
    assert (tmp_path / "one/venv/bin/python").readlink() == Path("/usr/bin/python3")
    assert os.access(tmp_path / "one/run.sh", os.X_OK)
    assert copied("two") == first
    (source / "run.sh").chmod(0o644)
    assert copied("three") != first
    os.mkfifo(source / "pipe")
    with pytest.raises(BackendInvalid):
        copied("four")
