"""The worker's processes with the real replica: a model is loaded, and nothing outlives a worker that was killed."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from localmesh.core.clock import SystemClock
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import PhaseEvent, ReadyEvent
from localmesh.testing.sample_models import MODELS_FOLDER, TINY_SOURCE
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Event, Exited, Said, Start, StartFailed, Stop
from localmesh.worker.launch import folder_of
from localmesh.worker.processes import belonging
from localmesh.worker.runner import Runner

pytest.importorskip("xllamacpp", reason="the extra 'engines' is not installed")

ROOT = Path(__file__).resolve().parents[2]
REPLICA = ReplicaId(ModelName("tiny"), NodeName("n1"), 0)


def config_at(folder: Path) -> WorkerConfig:
    return WorkerConfig(
        mesh="test",
        node=NodeName("n1"),
        registries=("127.0.0.1:1",),
        models_dir=MODELS_FOLDER,
        backends_dir=folder / "backends",
        state_dir=folder / "state",
        cache_dir=folder / "cache",
        run_dir=folder / "run",
        drain_seconds=5.0,
        environment={"PATH": os.defpath, "PYTHONPATH": str(ROOT)},
    )


def order(source: str = TINY_SOURCE) -> Start:
    spec = ModelSpec(name=REPLICA.model, backend="llama", source=source, context_tokens=256, threads=1)
    return Start(id=REPLICA, revision="a" * 16, spec=spec, devices={CPU: 1 << 26})


async def test_a_real_model_is_loaded_measured_and_unloaded(tmp_path: Path) -> None:
    """F39, F46."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    runner = Runner(config_at(tmp_path), clock=SystemClock(), on_event=events.put_nowait, gpu_bytes=lambda pids: {})
    await runner.open()
    done = asyncio.Event()
    phases, ready = [], None
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(runner.run(done))
        await asyncio.sleep(0)
        runner.start(order())
        while not isinstance(event := await events.get(), Exited | StartFailed):
            match event:
                case Said(event=PhaseEvent(phase=phase)):
                    phases.append(phase)
                case Said(event=ReadyEvent()):
                    ready = event
                    await _serves(event.event.endpoint)  # type: ignore[union-attr]
                    runner.stop(Stop(id=REPLICA, drain=True))
                case _:
                    pass
        done.set()
    runner.close()
    assert isinstance(event, Exited), event
    assert event.returncode == 0
    assert phases[:2] == ["starting", "loading"]
    assert ready is not None
    assert ready.measured[CPU] > 1 << 20


async def _serves(endpoint: str) -> None:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert response.status == health_pb2.HealthCheckResponse.SERVING


WORKER = """
import asyncio, sys
from pathlib import Path
from localmesh.core.clock import SystemClock
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import ReadyEvent
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Said, Start
from localmesh.worker.runner import Runner

folder, models, root = (Path(a) for a in sys.argv[1:])
config = WorkerConfig(
    mesh="test", node=NodeName("n1"), registries=("127.0.0.1:1",), models_dir=models, backends_dir=folder / "b",
    state_dir=folder / "state", cache_dir=folder / "cache", run_dir=folder / "run",
    environment={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)},
)

def told(event):
    if isinstance(event, Said) and isinstance(event.event, ReadyEvent):
        print("ready", flush=True)

async def main():
    runner = Runner(config, clock=SystemClock(), on_event=told, gpu_bytes=lambda pids: {})
    await runner.open()
    async with asyncio.TaskGroup() as group:
        group.create_task(runner.run(asyncio.Event()))
        await asyncio.sleep(0)
        spec = ModelSpec(name=ModelName("tiny"), backend="llama", source="tiny.gguf", context_tokens=256, threads=1)
        replica = ReplicaId(ModelName("tiny"), NodeName("n1"), 0)
        runner.start(Start(id=replica, revision="a" * 16, spec=spec, devices={CPU: 1}))

asyncio.run(main())
"""


async def test_a_replica_dies_with_its_worker_and_the_next_worker_finds_a_clean_folder(tmp_path: Path) -> None:
    """F46."""
    worker = subprocess.Popen(  # noqa: ASYNC220 - starting is short
        [sys.executable, "-c", WORKER, str(tmp_path), str(MODELS_FOLDER), str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT)},
    )
    folder = folder_of(tmp_path / "run", REPLICA)
    try:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == "ready\n"
        assert belonging(folder.path)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    async with asyncio.timeout(30):
        while belonging(folder.path):
            await asyncio.sleep(0.02)
    assert folder.record.exists()
    runner = Runner(config_at(tmp_path), clock=SystemClock(), on_event=lambda e: None, gpu_bytes=lambda pids: {})
    await runner.open()
    runner.close()
    assert sorted(p.name.split("-")[0] for p in folder.path.iterdir()) == ["output", "replica"]


async def test_a_corrupt_model_is_a_failed_start_in_words(tmp_path: Path) -> None:
    """F46."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    events: asyncio.Queue[Event] = asyncio.Queue()
    config = replace(config_at(tmp_path), models_dir=tmp_path)
    runner = Runner(config, clock=SystemClock(), on_event=events.put_nowait, gpu_bytes=lambda pids: {})
    await runner.open()
    done = asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(runner.run(done))
        await asyncio.sleep(0)
        runner.start(order("bad.gguf"))
        event = await events.get()
        done.set()
    runner.close()
    assert isinstance(event, StartFailed)
    assert "bad.gguf" in event.message
    assert "GGUF" in event.message
