"""The runner with real processes: start, status, logs, stop, what is left, and who is killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import LoadEvent, ReadyEvent
from localmesh.rpc.errors import ConfigError
from localmesh.worker import runner as runner_module
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Event, Exited, Said, Spawned, Start, StartFailed, Stop
from localmesh.worker.launch import folder_of
from localmesh.worker.ports import PortRange
from localmesh.worker.processes import belonging, read_stat
from localmesh.worker.runner import Runner

FAKE = (sys.executable, str(Path(__file__).with_name("fake_replica.py")))
REPLICA = ReplicaId(ModelName("m"), NodeName("n1"), 0)


def config_at(folder: Path, **changes: object) -> WorkerConfig:
    known: dict[str, object] = {
        "mesh": "test",
        "node": NodeName("n1"),
        "registries": ("127.0.0.1:1",),
        "models_dir": folder / "models",
        "backends_dir": folder / "backends",
        "state_dir": folder / "state",
        "cache_dir": folder / "cache",
        "run_dir": folder / "run",
        "replica_command": FAKE,
        "drain_seconds": 0.0,
        "environment": {
            "PATH": os.defpath,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "SECRET": "hidden",
        },
    }
    return WorkerConfig(**{**known, **changes})  # type: ignore[arg-type]


def order(replica: ReplicaId = REPLICA, devices: dict[DeviceId, int] | None = None, **options: str) -> Start:
    spec = ModelSpec(name=replica.model, backend="process:fake", source="", options=MappingProxyType(options))
    return Start(id=replica, revision="r1", spec=spec, devices=devices or {CPU: 100})


class Running:
    """A runner with what it told."""

    runner: Runner

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def told(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._more.clear()
                await self._more.wait()

    async def ready(self, replica: ReplicaId = REPLICA) -> ReadyEvent:
        await self.until(lambda: any(_is_ready(e, replica) for e in self.events))
        return next(e.event for e in self.events if isinstance(e, Said) and isinstance(e.event, ReadyEvent))

    async def end(self) -> Exited | StartFailed:
        await self.until(lambda: isinstance(self.events[-1], Exited | StartFailed) if self.events else False)
        last = self.events[-1]
        assert isinstance(last, Exited | StartFailed)
        return last

    @property
    def pid(self) -> int:
        return next(e.pid for e in self.events if isinstance(e, Spawned))


def _is_ready(event: Event, replica: ReplicaId) -> bool:
    return isinstance(event, Said) and event.id == replica and isinstance(event.event, ReadyEvent)


@asynccontextmanager
async def running(config: WorkerConfig, gpu_bytes: dict[DeviceId, int] | None = None) -> AsyncIterator[Running]:
    run = Running()
    runner = Runner(
        config, clock=SystemClock(), on_event=run.told, gpu_bytes=lambda pids: (list(pids), gpu_bytes or {})[1]
    )
    run.runner = runner
    await runner.open()
    until = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(runner.run(until))
            await asyncio.sleep(0)
            try:
                yield run
            finally:
                task.cancel()
    finally:
        runner.close()
    assert not belonging(folder_of(config.run_dir, REPLICA).path)


async def test_a_replica_is_started_heard_and_stopped_as_told(tmp_path: Path) -> None:
    """F46, F39."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order())
        ready = await run.ready()
        assert ready.limit == 4
        assert ready.endpoint.startswith("127.0.0.1:")
        await run.until(lambda: isinstance(run.events[-1], Said) and isinstance(run.events[-1].event, LoadEvent))
        load = run.events[-1]
        assert isinstance(load, Said)
        assert load.measured == {CPU: 2000}
        pid = run.pid
        assert os.getpgid(pid) == pid
        run.runner.stop(Stop(id=REPLICA, drain=True))
        end = await run.end()
        assert isinstance(end, Exited)
        assert end.returncode == -signal.SIGTERM
        assert read_stat(pid) is None
        log = run.runner.logs.latest(REPLICA)
        assert log is not None
        life = log.life
    folder = folder_of(tmp_path / "run", REPLICA).path
    left = sorted(p.name for p in folder.iterdir())
    assert left == [f"output-{life}.log", "replica"]


async def test_a_process_that_dies_at_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="crash"))
        end = await run.end()
    assert isinstance(end, Exited)
    assert end.returncode == 3
    assert end.last_lines == "starting m/n1/0\nTraceback: the engine is missing a nose"


async def test_a_command_that_cannot_be_run_is_a_failed_start(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path, replica_command=(str(tmp_path / "nothing"),))) as run:
        run.runner.start(order())
        end = await run.end()
    assert isinstance(end, StartFailed)
    assert end.reason == "LOAD_FAILED"
    assert "nothing" in end.message


async def test_a_missing_source_is_a_failed_start_that_names_the_path(tmp_path: Path) -> None:
    """F46."""
    spec = ModelSpec(name=ModelName("m"), backend="llama", source="a/b.gguf")
    async with running(config_at(tmp_path)) as run:
        run.runner.start(Start(id=REPLICA, revision="r1", spec=spec, devices={CPU: 1}))
        end = await run.end()
    assert isinstance(end, StartFailed)
    assert end.reason == "SOURCE_MISSING"
    assert str(tmp_path / "models/a/b.gguf") in end.message


async def test_who_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F46."""
    monkeypatch.setattr(runner_module, "_EXTRA_SECONDS", 0.3)
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="stubborn"))
        await run.ready()
        run.runner.stop(Stop(id=REPLICA, drain=True))
        end = await run.end()
    assert isinstance(end, Exited)
    assert end.returncode == -signal.SIGKILL


@pytest.mark.parametrize("session", ["shared", "own"])
async def test_a_grandchild_that_holds_the_pipes_delays_nothing_and_dies_too(tmp_path: Path, session: str) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="grandchild", session=session))
        await run.ready()
        log = run.runner.logs.latest(REPLICA)
        assert log is not None
        line = next(text for text in log.last_lines(4096).splitlines() if text.startswith("grandchild"))
        grandchild = int(line.split()[1])
        assert read_stat(grandchild) is not None
        os.kill(run.pid, signal.SIGKILL)
        end = await run.end()
        assert isinstance(end, Exited)
        assert end.returncode == -signal.SIGKILL
        stat = read_stat(grandchild)
        # whoever inherits it reaps it in its own time
        assert stat is None or stat.state == "Z"


async def test_garbage_on_the_status_pipe_is_skipped(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="garbage"))
        assert (await run.ready()).limit == 4


async def test_a_follower_of_the_log_sees_every_line_to_the_end(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="exit", lines="5000"))
        log = run.runner.logs.latest(REPLICA)
        assert log is not None
        found = run.runner.logs.stream_life(log, follow=True, tail=100_000)
        lines = [line.text async for line in found]
        await run.end()
    assert lines == ["starting m/n1/0", *(f"line {n}" for n in range(5000)), "good bye, cruel world"]


async def test_a_replica_sees_little_of_the_environment_and_only_its_gpus(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path), gpu_bytes={DeviceId("GPU-b"): 77, DeviceId("GPU-x"): 5}) as run:
        run.runner.start(
            order(
                devices={DeviceId("GPU-b"): 1, DeviceId("GPU-a"): 1},
                behave="exit",
                environment="SECRET,CUDA_VISIBLE_DEVICES",
            )
        )
        end = await run.end()
        ready = next(e for e in run.events if _is_ready(e, REPLICA))
    assert isinstance(end, Exited)
    assert "SECRET=None\nCUDA_VISIBLE_DEVICES=GPU-a,GPU-b\n" in end.last_lines
    assert isinstance(ready, Said)
    assert ready.measured == {DeviceId("GPU-b"): 77}


async def test_a_cpu_replica_sees_no_gpu(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="exit", environment="CUDA_VISIBLE_DEVICES"))
        end = await run.end()
    assert isinstance(end, Exited)
    assert "CUDA_VISIBLE_DEVICES=\n" in end.last_lines


async def test_public_ports_come_from_the_range_and_rest_after_use(
    tmp_path: Path, unused_tcp_port_range: PortRange
) -> None:
    """F46."""
    ports = unused_tcp_port_range
    second = ReplicaId(ModelName("m"), NodeName("n1"), 1)
    async with running(config_at(tmp_path, replica_ports=ports)) as run:
        run.runner.start(order())
        assert (await run.ready()).endpoint == f"127.0.0.1:{ports.first}"
        run.runner.stop(Stop(id=REPLICA, drain=False))
        await run.end()
        run.runner.start(order(second))
        await run.ready(second)
        endpoints = [e.event.endpoint for e in run.events if isinstance(e, Said) and isinstance(e.event, ReadyEvent)]
    assert endpoints == [f"127.0.0.1:{ports.first}", f"127.0.0.1:{ports.last}"]


async def test_a_stop_during_the_preparation_is_answered(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order())
        run.runner.stop(Stop(id=REPLICA, drain=False))
        end = await run.end()
    assert end == StartFailed(id=REPLICA, reason="", message="stopped before it began")


async def test_the_end_of_the_runner_kills_its_processes(tmp_path: Path) -> None:
    """F46."""
    async with running(config_at(tmp_path)) as run:
        run.runner.start(order(behave="stubborn"))
        await run.ready()
        pid = run.pid
    assert read_stat(pid) is None


async def test_a_run_folder_belongs_to_one_worker(tmp_path: Path) -> None:
    """F46."""
    config = config_at(tmp_path)
    async with running(config):
        other = Runner(config, clock=SystemClock(), on_event=lambda e: None, gpu_bytes=lambda pids: {})
        with pytest.raises(ConfigError, match="another worker uses the folder"):
            await other.open()


async def test_what_an_earlier_worker_left_is_ended_and_no_other_process(tmp_path: Path) -> None:
    """F43, F46: the recorded process lives on after its worker was killed; another number in a stale record does not
    cost its new owner the life."""
    config = config_at(tmp_path)
    left, stale = folder_of(config.run_dir, REPLICA), folder_of(config.run_dir, order_id(7))
    bystander = _sleeper()
    orphan = _sleeper(str(left.spec))
    try:
        for folder, process, shift in ((left, orphan, 0), (stale, bystander, 1)):
            private = folder.prepare()
            stat = read_stat(process.pid)
            assert stat is not None
            folder.write_record(pid=process.pid, start_ticks=stat.start_ticks - shift, private=private)
        async with running(config):
            assert orphan.wait(10) == -signal.SIGKILL
            assert bystander.poll() is None
            assert not left.record.exists()
            assert not stale.record.exists()
    finally:
        for process in (bystander, orphan):
            process.kill()
            process.wait()


def _sleeper(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", *arguments], process_group=0)


def order_id(index: int) -> ReplicaId:
    return ReplicaId(ModelName("m"), NodeName("n1"), index)


@pytest.fixture
def unused_tcp_port_range() -> PortRange:
    """Two neighbouring ports that nobody listens on."""
    import socket

    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if port == 65535:
                continue
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return PortRange(port, port + 1)
    raise AssertionError("no two neighbouring ports are free")
