"""Replica processes for tests: started as a worker starts them, watched over their status descriptor, always ended."""

import asyncio
import contextlib
import importlib.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import (
    FailedEvent,
    ReadyEvent,
    ReplicaSpecFile,
    StatusEvent,
    parse_status,
    status_to_json,
)

REPOSITORY = Path(__file__).parents[3]
TINY = REPOSITORY / "localmesh" / "testing" / "models" / "tiny.gguf"
LONG = 60.0
"""Seconds after which a test gives up on something that takes one."""


class Replica:
    """A replica process."""

    def __init__(self, folder: Path, spec: ModelSpec, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "log"
        values: dict[str, Any] = {
            "mesh": "test",
            "replica": ReplicaId(spec.name, NodeName("n1"), 0),
            "revision": "rev1",
            "spec": spec,
            "source_path": str(TINY),
            "devices": {CPU: 1 << 30},
            "run_dir": str(folder),
            "cache_dir": str(folder / "cache"),
            "drain_seconds": 5.0,
            "parent_pid": os.getpid(),
        }
        self.file = ReplicaSpecFile(**(values | changes))
        path = folder / "spec.json"
        path.write_text(self.file.to_json())
        reading, writing = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "localmesh.replica", "--spec", str(path), "--status-fd", str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ECHO_PYTHON": sys.executable},  # noqa: TID251 - a test
                start_new_session=True,
            )
        os.close(writing)
        self.events: list[StatusEvent] = []
        self._queue: queue.Queue[StatusEvent | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                self._queue.put(parse_status(line))
        self._queue.put(None)

    def wait_for(self, kind: type[Any], condition: Callable[[Any], bool] = lambda _: True) -> Any:
        """Return the next event of a kind that fulfils a condition; fail if the process ends before it."""
        while (event := self._queue.get(timeout=LONG)) is not None:
            self.events.append(event)
            if isinstance(event, kind) and condition(event):
                return event
        raise AssertionError(f"no {kind.__name__}; last: {self.events[-1:]}; log:\n{self.log.read_text()[-2000:]}")

    async def see(self, kind: type[Any], condition: Callable[[Any], bool] = lambda _: True) -> Any:
        """Do as `wait_for` without keeping the loop."""
        return await asyncio.to_thread(self.wait_for, kind, condition)

    def ready(self) -> "Replica":
        """Wait until it serves."""
        event = self.wait_for((ReadyEvent, FailedEvent))
        assert isinstance(event, ReadyEvent), f"{status_to_json(event)}\n{self.log.read_text()[-2000:]}"
        self.endpoint = event.endpoint
        self.limit = event.limit
        return self

    def failed(self) -> FailedEvent:
        """Wait until it has given up; it exits with 1."""
        event = self.wait_for(FailedEvent)
        assert self.process.wait(LONG) == 1
        assert isinstance(event, FailedEvent)
        return event

    def channel(self) -> Any:
        """Return a new asyncio channel to it."""
        return grpc.aio.insecure_channel(self.endpoint, options=[("grpc.enable_http_proxy", 0)])

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the process."""
        self.process.send_signal(signum)

    def end(self) -> None:
        """End it whatever its state, and sweep its group."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LONG)
        self._reader.join(LONG)


StartReplica = Callable[..., Replica]


@pytest.fixture
def start_replica(tmp_path: Path) -> Iterator[StartReplica]:
    """Start a replica: start_replica(spec, **changes of the spec file). All are ended with the test."""
    started: list[Replica] = []

    def start(spec: ModelSpec, **changes: Any) -> Replica:
        started.append(Replica(tmp_path / f"replica{len(started)}", spec, **changes))
        return started[-1]

    yield start
    for replica in started:
        replica.end()


def llama_spec(**changes: Any) -> ModelSpec:
    """Return a spec for tiny.gguf."""
    values: dict[str, Any] = {
        "name": ModelName("tiny"),
        "backend": "llama",
        "source": "tiny.gguf",
        "slots": 2,
        "context_tokens": 512,
        "threads": 1,
    }
    return ModelSpec(**(values | changes))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """One replica of tiny.gguf for all tests that only ask it things."""
    replica = Replica(tmp_path_factory.mktemp("tiny"), llama_spec(), served_by_trailers=True)
    try:
        yield replica.ready()
    finally:
        replica.end()


@pytest.fixture
def spec() -> Callable[..., ModelSpec]:
    """Return a maker of specs for tiny.gguf: spec(slots=1)."""
    return llama_spec


@pytest.fixture
def echo_backend(tmp_path: Path) -> Callable[..., Path]:
    """Install the test's own backend: echo_backend("hang_load") returns its folder."""

    def install(*modes: str) -> Path:
        folder = tmp_path / "backends" / "echo"
        shutil.copytree(REPOSITORY / "tests" / "backends" / "echo", folder)
        (folder / "mode").write_text(" ".join(modes))
        return folder

    return install


def _maker(file: str, function: str) -> Callable[..., Path]:
    """Return a function of a file in tests/models, which is no package."""
    pytest.importorskip("gguf", reason="the extra 'engines' is not installed")
    place = importlib.util.spec_from_file_location(file, REPOSITORY / "tests" / "models" / f"{file}.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    make: Callable[..., Path] = getattr(module, function)
    return make


@pytest.fixture(scope="session")
def make_gguf() -> Callable[..., Path]:
    """Return make_random_gguf(path, layers=..., ...)."""
    return _maker("random_gguf", "make_random_gguf")


@pytest.fixture(scope="session")
def make_reranker() -> Callable[..., Path]:
    """Return make_random_reranker(path)."""
    return _maker("random_reranker", "make_random_reranker")
