"""The mesh that `localmesh up` runs on this machine, as it is written down for the commands."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_NAME = "up.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMesh:
    """Where the running mesh is, for commands on the same machine and by the same user."""

    pid: int
    """The process of `up`."""
    started: float
    """The process's start time as the system counts it: tells it from a later one with the same id."""
    mesh: str
    router: str
    registry: str
    etcd: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""

    def client_settings(self, given: Mapping[str, object]) -> dict[str, object]:
        """Return the settings that a command takes from here: never one that was given.

        The certificates go with the addresses: they are taken only where no address and no certificate was given.
        """
        settings: dict[str, object] = {}
        if not any(key in given for key in ("client.router", "client.registry")):
            settings |= {"client.router": self.router, "client.registry": self.registry}
            if self.tls_cert and not any(key.startswith("tls.") for key in given):
                settings |= {
                    "tls.cert": Path(self.tls_cert),
                    "tls.key": Path(self.tls_key),
                    "tls.ca": Path(self.tls_ca),
                }
        return settings


def find(state_dir: Path) -> RunningMesh | None:
    """Return the mesh that runs, or None if none does: what a killed `up` left behind is not believed."""
    try:
        found = RunningMesh(**json.loads((state_dir / _NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if process_started(found.pid) == found.started else None


def write(state_dir: Path, mesh: RunningMesh) -> None:
    """Write it down, readable by the owner only, whole or not at all."""
    temporary = state_dir / f".{_NAME}.{os.getpid()}"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(mesh), file)
    temporary.replace(state_dir / _NAME)


def remove(state_dir: Path) -> None:
    """Forget it."""
    with contextlib.suppress(FileNotFoundError):
        (state_dir / _NAME).unlink()


def process_started(pid: int) -> float:
    """Return when a process started, in clock ticks since boot, or 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    # The command's name is in brackets and may hold anything; the 20th field after it is the start time.
    return float(stat.rpartition(")")[2].split()[19])
