"""How a replica's process is started: its folder, its environment, its spec file."""

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localmesh.core.ids import CPU, DeviceId, ReplicaId
from localmesh.core.replica_process import ReplicaSpecFile, TlsPaths
from localmesh.rpc.addresses import join_host_port
from localmesh.worker.backend_folder import backend_path
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Start
from localmesh.worker.processes import MARKER

_PASSED = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "SHELL", "LD_LIBRARY_PATH", "PYTHONPATH",
    "PYTHONHOME", "VIRTUAL_ENV", "XDG_CACHE_HOME", "SSL_CERT_FILE",
})  # fmt: skip
_PASSED_PREFIXES = (
    "LC_", "NVIDIA_", "CUDA_", "HSA_", "ROCR_", "HIP_", "GGML_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "HF_",
    "TRANSFORMERS_", "TORCH_", "PYTORCH_", "LOCALAI_",
)  # fmt: skip
_SOCKET_NAME_ROOM = 40
"""Bytes that a socket's name may take below the private folder; the system allows 107 for the whole path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFolder:
    """Where one replica's files are. The name is used again by the next life of the replica."""

    path: Path

    @property
    def spec(self) -> Path:
        """What the process is told."""
        return self.path / "spec.json"

    @property
    def record(self) -> Path:
        """Which process it is, for a worker that comes after this one."""
        return self.path / "process.json"

    def prepare(self) -> Path:
        """Make the folder, and a private one for sockets; return that one."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = self.path / "run"
        shutil.rmtree(private, ignore_errors=True)
        if len(os.fsencode(private)) > 107 - _SOCKET_NAME_ROOM:
            return Path(tempfile.mkdtemp(prefix="localmesh-"))
        private.mkdir(mode=0o700)
        return private

    def write_record(self, *, pid: int, start_ticks: int, private: Path) -> None:
        """Say which process runs here."""
        text = json.dumps({"pid": pid, "start_ticks": start_ticks, "private": str(private)})
        self.record.write_text(text)

    def read_record(self) -> tuple[int, int, Path | None]:
        """Return pid, start time and private folder of the process that ran here; zeros when that is not known."""
        try:
            body = json.loads(self.record.read_text())
            return int(body["pid"]), int(body["start_ticks"]), Path(body["private"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0, None

    def clear(self, private: Path | None) -> None:
        """Remove all but the output."""
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        self.record.unlink(missing_ok=True)
        self.spec.unlink(missing_ok=True)


def folder_of(run_dir: Path, replica: ReplicaId) -> ReplicaFolder:
    """Return a replica's folder: short, because sockets live below it, and one for each name."""
    digest = hashlib.blake2b(str(replica).encode(), digest_size=4).hexdigest()
    readable = replica.model[:16].replace(":", "_")
    return ReplicaFolder(path=run_dir / "replicas" / f"{readable}-{replica.index}-{digest}")


def replica_environment(
    environment: Mapping[str, str], *, folder: ReplicaFolder, devices: Mapping[DeviceId, int]
) -> dict[str, str]:
    """Return the environment of a replica: little of the worker's, no secrets, and only the GPUs that it claimed."""
    passed = {k: v for k, v in environment.items() if k in _PASSED or k.startswith(_PASSED_PREFIXES)}
    gpus = ",".join(sorted(d for d in devices if d != CPU))
    return {**passed, "CUDA_VISIBLE_DEVICES": gpus, MARKER: str(folder.path), "PYTHONUNBUFFERED": "1"}


def spec_file(
    config: WorkerConfig, start: Start, *, source: Path | None, port: int, private: Path, pid: int
) -> ReplicaSpecFile:
    """Return what the process is told.

    Args:
        config: The worker.
        start: What to start.
        source: The model's file or folder, None where there is none.
        port: Port to listen on; 0 for any.
        private: Folder for sockets.
        pid: The worker's process.
    """
    engine, _, name = start.spec.backend.partition(":")
    tls = config.tls
    return ReplicaSpecFile(
        mesh=config.mesh,
        replica=start.id,
        revision=start.revision,
        spec=start.spec,
        source_path=str(source) if source is not None else "",
        backend_dir=str(_backend_dir(config, name)) if engine == "process" else "",
        listen=join_host_port(config.replica_listen_host, port),
        advertise_host=config.advertise_host,
        devices=start.devices,
        gpu=any(d != CPU for d in start.devices),
        run_dir=str(private),
        cache_dir=str(config.cache_dir.absolute()),
        tls=None if tls is None else TlsPaths(cert=str(tls.cert), key=str(tls.key), ca=str(tls.ca)),
        insecure=config.insecure,
        max_message_bytes=config.max_message_bytes,
        drain_seconds=config.drain_seconds,
        served_by_trailers=config.served_by_trailers,
        parent_pid=pid,
    )


def _backend_dir(config: WorkerConfig, name: str) -> Path:
    return backend_path(name, installed=config.installed_dir.absolute(), by_hand=config.backends_dir.absolute())


def command(config: WorkerConfig, *, spec: Path, status_fd: int) -> tuple[str, ...]:
    """Return the command line of a replica."""
    base = config.replica_command or (sys.executable, "-m", "localmesh.replica")
    return (*base, "--spec", str(spec), "--status-fd", str(status_fd))


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on a port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # as gRPC does it: connections of an earlier server that wait for their end are no hindrance
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError:
        return False
    return True
