"""A real etcd server on this machine, started and stopped with the program that needs it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import secrets
import shutil
import signal
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from localmesh.core.clock import Clock, SystemClock
from localmesh.etcd.binary import EtcdBinary, find_etcd
from localmesh.etcd.client import EtcdClient
from localmesh.etcd.config import EtcdConfig
from localmesh.etcd.errors import EtcdError, ServerStartError
from localmesh.etcd.verdict import knows_safe_progress

__all__ = ["EtcdBinary", "EtcdServer", "ServerTls", "find_etcd"]

logger = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 3000
_PORT_TRIES = 5
_STOP_SECONDS = 5.0
_STOP_THROW_AWAY_SECONDS = 0.5  # nothing is lost when it is killed, and etcd waits a second for closed streams
# etcd has no error for damaged files: it panics, in as many words as there are ways to be damaged.
_DAMAGE = ("invalid database", "corrupt", "crc mismatch", "checksum", "unexpected EOF", "panic:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM files for the client port. The certificate serves and is shown by our own readiness check.

    Clients must show a certificate of the same CA.
    """

    ca: Path
    certificate: Path
    key: Path


class EtcdServer:
    """Runs one etcd from `async with` on; `endpoint` takes clients as soon as the block is entered.

    `data_dir` None: a new temporary folder, removed at the end; a binary that is not durable takes no other.
    `port` 0: a free one. `log_path` None: a temporary file, quoted in errors.
    `temporary_parent`: where what is temporary is made; None: in the system's folder for it. `extra_args` are
    etcd's own flags and come last, so that they win. Raises ServerStartError with the end of etcd's log.

    The server has its own process group, so that Ctrl-C in a terminal reaches only its owner, and is killed
    when the thread that started it ends (where util-linux's setpriv is there).
    """

    def __init__(
        self,
        binary: EtcdBinary,
        *,
        data_dir: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        log_path: Path | None = None,
        temporary_parent: Path | None = None,
        tls: ServerTls | None = None,
        extra_args: tuple[str, ...] = (),
        start_seconds: float = 30.0,
        stop_seconds: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        if data_dir is not None and not binary.durable:
            raise ServerStartError(f"a data folder is not entrusted to this binary: {binary.warning}")
        self._binary = binary
        self._data_dir = data_dir
        self._host = host
        self._wanted_port = port
        self._port = port
        self._log_path = log_path
        self._temporary_parent = temporary_parent
        self._tls = tls
        self._extra_args = extra_args
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds or (_STOP_SECONDS if data_dir else _STOP_THROW_AWAY_SECONDS)
        self._clock = clock or SystemClock()
        self._temporary: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}" if self._tls else f"{host}:{self._port}"

    @property
    def port(self) -> int:
        """The client port."""
        return self._port

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The running process."""
        if self._process is None:
            raise RuntimeError("the etcd server is not started")
        return self._process

    @property
    def log_path(self) -> Path:
        """etcd's log."""
        if self._log_path is not None:
            return self._log_path
        if self._temporary is None:
            raise RuntimeError("the etcd server is not started")
        return self._temporary / "etcd.log"

    def config(self) -> EtcdConfig:
        """Return what a client on this machine needs to reach this server."""
        if self._tls is None:
            return EtcdConfig(endpoints=(self.endpoint,))
        return EtcdConfig(
            endpoints=(self.endpoint,),
            ca_pem=self._tls.ca.read_bytes(),
            cert_pem=self._tls.certificate.read_bytes(),
            key_pem=self._tls.key.read_bytes(),
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start and wait until a write succeeds. Leaves nothing behind if that fails or is cancelled."""
        if self._process is not None:
            raise RuntimeError("the etcd server is already started")
        if self._binary.warning:
            logger.warning("%s", self._binary.warning)
        if self._data_dir is not None and _is_locked(self._data_dir / "member" / "snap" / "db"):
            raise ServerStartError(f"the data folder {self._data_dir} is in use by another etcd")
        self._temporary = Path(tempfile.mkdtemp(prefix="localmesh-etcd-", dir=self._temporary_parent))
        try:
            for tries_left in reversed(range(_PORT_TRIES)):
                self._port = self._wanted_port or _free_port(self._host)
                may_retry = tries_left > 0 and not self._wanted_port
                if await self._start_once(self._temporary, may_retry=may_retry):
                    return
        except BaseException:
            await self.stop()
            raise

    async def _start_once(self, temporary: Path, *, may_retry: bool) -> bool:
        """Return False if somebody took the port that was free a moment ago, and it is worth another try."""
        log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(temporary), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        if await self._is_ready():
            return True
        died = self._process.returncode
        tail = self._log_tail(log_offset)
        await self._end_process()
        if "address already in use" in tail and may_retry:
            return False
        state = f"ended with {died}" if died is not None else f"took no write in {self._start_seconds} s"
        raise ServerStartError(f"etcd {self._binary.version} {state}{_hint(tail)}; its log ends:\n{tail}")

    def _command(self, temporary: Path) -> list[str]:
        # One member elects itself: a short election saves a second at each start. It also lowers etcd's
        # smallest TTL of a lease to 1 s, it is 1.5 times the election time-out.
        scheme = "https" if self._tls else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        client_url = f"{scheme}://{host}:{self._port}"
        peer_url = f"http://{host}:0"  # nobody joins: any port will do, and none is announced
        command = [
            str(self._binary.path),
            *("--name", "localmesh"),
            *("--data-dir", str(self._data_dir or temporary / "data")),
            *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"localmesh={peer_url}"),
            # The cluster's id comes from this token: a new store is never taken for the old one.
            *("--initial-cluster-token", secrets.token_hex(8)),
            *("--heartbeat-interval", "10", "--election-timeout", "100"),
            *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "10m"),
            *("--logger", "zap", "--log-outputs", "stderr", "--log-level", "warn"),
        ]
        if self._data_dir is None and not self._binary.version.startswith("3.4."):
            command.append("--unsafe-no-fsync")  # what is thrown away need not reach the disk
        if self._binary.version.startswith("3.5.") and not knows_safe_progress(self._binary.version):
            # Watches do not dare to ask these for progress: let them tell it unasked, which is safe.
            command += ["--experimental-watch-progress-notify-interval", "1s"]
        if self._tls is not None:
            command += ["--cert-file", str(self._tls.certificate), "--key-file", str(self._tls.key)]
            command += ["--trusted-ca-file", str(self._tls.ca), "--client-cert-auth"]
        command += self._extra_args
        # Not preexec_fn: running Python between fork and exec beside gRPC's threads can hang.
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        return command

    async def _is_ready(self) -> bool:
        """Return whether a write succeeded in time: the port is open up to two seconds before that."""
        process = self.process
        deadline = self._clock.monotonic() + self._start_seconds
        async with EtcdClient(self.config(), clock=self._clock) as client:
            while process.returncode is None and (now := self._clock.monotonic()) < deadline:
                try:
                    lease = await client.lease_grant(1, deadline=min(deadline, now + 0.25))
                    await client.lease_revoke(lease.id)
                except EtcdError:
                    answered = False
                else:
                    answered = True
                # The answer may be another server's, whose port ours has not yet failed to take.
                if answered and _listens(process.pid, self._port):
                    return True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await process.wait()
        return False

    def _log_tail(self, since: int = 0) -> str:
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, 2)
                log.seek(max(since, size - _LOG_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError as error:
            return f"(the log cannot be read: {error})"

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._stop_seconds):
                await process.wait()
        except TimeoutError:
            level = logging.WARNING if self._data_dir else logging.DEBUG
            logger.log(level, "etcd did not stop within %s s and is killed", self._stop_seconds)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def stop(self) -> None:
        """Stop the server and remove what was temporary. May be called twice, and when it died by itself."""
        try:
            await self._end_process()
        finally:
            temporary, self._temporary = self._temporary, None
            if temporary is not None:
                await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)


def _listens(pid: int, port: int) -> bool:
    """Return whether a process is the one that listens on a TCP port."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_locked(database: Path) -> bool:
    """Return whether a running etcd holds this file; another one would wait for it in silence."""
    try:
        with database.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # etcd itself says best what is wrong with it
    return False


def _hint(tail: str) -> str:
    """Return what to do about a failure that etcd's log explains."""
    if "address already in use" in tail:
        return ": its port is taken by another program"
    if "cannot allocate memory" in tail or "no space left" in tail:
        return ": the machine is out of memory or disk"
    if "permission denied" in tail:
        return ": it may not write its data folder"
    if any(word in tail for word in _DAMAGE):
        return ": its data folder seems damaged; move it away or restore it from a backup"
    return ""
