"""A whole worker with stand-in replicas against a stand-in registry, over real gRPC."""

import asyncio
import os
import platform
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.errors import NodeNameTaken, NodePending
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc
from localmesh.worker.agent import Worker
from localmesh.worker.machine import MachineConfig
from localmesh.worker.processes import read_stat
from tests.integration.worker_kit import (
    READY,
    Mesh,
    finished,
    serving_registry,
    working,
)


async def lapsed(worker: Worker) -> None:
    """Return when the registration is over by the worker's own clock."""
    async with asyncio.timeout(20):
        while worker.registered:
            await asyncio.sleep(0.05)


async def test_a_worker_registers_with_its_facts_and_measures(tmp_path: Path) -> None:
    """F1, F9."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        request = (await mesh.until(lambda: mesh.registrations))[0]
        measured = (await mesh.until(lambda: mesh.measurements))[0]
        assert worker.registered
        await finished(worker, mesh)
    facts = request.facts
    labels = {"zone": "a", "cpu.arch": platform.machine()}
    assert (request.node, dict(facts.labels), facts.max_replicas_per_model) == ("n1", labels, 1)
    assert facts.endpoint == worker.endpoint
    assert facts.devices[0].id == "cpu"
    assert 0 < facts.devices[0].budget_bytes < facts.devices[0].total_bytes
    assert facts.disk_total_bytes > 0
    assert {e.name for e in facts.engines} >= {"llama", "minilm"}
    assert len(request.public_key) > 80
    assert 0 < measured.free_bytes["cpu"] <= facts.devices[0].total_bytes
    assert mesh.deregistered == [1]


async def test_a_replica_is_driven_to_serving_and_stopped_when_told(tmp_path: Path) -> None:
    """F39, F46."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        key = await mesh.place()
        report = await mesh.serving()
        assert report.serving.limit == 4
        assert report.revision == "r1"
        await mesh.until(lambda: mesh.reports[key].serving.measured_bytes["cpu"] == 2000)
        assert mesh.reports[key].serving.in_flight == 1
        pid = next(iter(worker.replicas())).pid
        await mesh.unload(key)
        exit_report = (await mesh.until(lambda: mesh.exits))[0]
        assert exit_report.exited.reason == ""
        assert not exit_report.exited.while_loading
        assert read_stat(pid) is None
        await mesh.until(lambda: not list(worker.replicas()))
        await finished(worker, mesh)


async def test_absence_from_the_wanted_set_stops_nothing(tmp_path: Path) -> None:
    """F4."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        key = await mesh.place()
        await mesh.serving()
        pid = next(iter(worker.replicas())).pid
        del mesh.wanted[key]
        await mesh.change()
        beats = mesh.beats["a"]
        await mesh.until(lambda: mesh.beats["a"] > beats + 5)
        assert read_stat(pid) is not None
        await finished(worker, mesh)


@pytest.mark.parametrize(
    ("behave", "words"),
    [("crash", "missing a nose"), ("fail", "made of cheese"), ("hang", "made no progress for 1 s while starting")],
)
async def test_a_load_that_fails_is_reported_with_its_words(tmp_path: Path, behave: str, words: str) -> None:
    """F39, F46."""
    mesh = Mesh()
    loads = MachineConfig(load_seconds=1.0)
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint, loads=loads) as worker:
        await mesh.place(behave=behave)
        report = (await mesh.until(lambda: mesh.exits))[0]
        assert report.exited.reason == "LOAD_FAILED"
        assert report.exited.while_loading
        assert words in report.exited.message
        assert "starting m/n1/0" in report.exited.message
        await finished(worker, mesh)


async def test_a_replica_that_dies_is_reported_once_and_not_started_again(tmp_path: Path) -> None:
    """F43, F46."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        await mesh.place()
        await mesh.serving()
        os.kill(next(iter(worker.replicas())).pid, signal.SIGKILL)
        report = (await mesh.until(lambda: mesh.exits))[0]
        assert report.exited.reason == "REPLICA_LOST"
        assert not report.exited.while_loading
        assert "SIGKILL" in report.exited.message
        await mesh.until(lambda: not list(worker.replicas()))
        await mesh.place(revision="r2")
        assert (await mesh.serving()).revision == "r2"
        assert len(mesh.exits) == 1
        await finished(worker, mesh)


async def test_replicas_outlive_the_registry_and_are_taken_over(tmp_path: Path) -> None:
    """F4."""
    mesh = Mesh(ttl_seconds=1.0)
    async with AsyncExitStack() as stack:
        async with serving_registry(mesh, "a") as (_, endpoint):
            worker = await stack.enter_async_context(working(tmp_path, endpoint))
            await mesh.place()
            await mesh.serving()
            pid = next(iter(worker.replicas())).pid
        await lapsed(worker)
        assert read_stat(pid) is not None
        mesh.reports.clear()
        async with serving_registry(mesh, "a", port=int(endpoint.rpartition(":")[2])):
            await mesh.until(lambda: len(mesh.registrations) == 2)
            running = mesh.registrations[1].running
            assert [r.ref.index for r in running] == [0]
            assert running[0].HasField("serving")
            beats = mesh.beats["a"]
            await mesh.until(lambda: mesh.beats["a"] > beats + 3)
            assert next(iter(worker.replicas())).pid == pid
            assert read_stat(pid) is not None
            assert not mesh.exits
            await finished(worker, mesh)


async def test_what_the_registration_names_is_stopped(tmp_path: Path) -> None:
    """F43."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        key = await mesh.place()
        await mesh.serving()
        pid = next(iter(worker.replicas())).pid
        mesh.stop = [mesh.wanted.pop(key).ref]
        mesh.incarnation += 100
        await mesh.until(lambda: mesh.exits)
        assert read_stat(pid) is None
        assert len(mesh.registrations) == 2
        await finished(worker, mesh)


async def test_a_lost_incarnation_means_a_new_registration_at_once(tmp_path: Path) -> None:
    """F4."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        await mesh.place()
        await mesh.serving()
        pid = next(iter(worker.replicas())).pid
        mesh.incarnation += 100
        await mesh.until(lambda: len(mesh.registrations) == 2)
        await mesh.until(lambda: mesh.beats["a"] and worker.registered)
        assert next(iter(worker.replicas())).pid == pid
        await finished(worker, mesh)


async def test_a_frozen_registry_is_left_for_the_next_with_the_same_incarnation(tmp_path: Path) -> None:
    """F4, F5."""
    mesh = Mesh(ttl_seconds=30.0)
    async with serving_registry(mesh, "a") as (a, first), serving_registry(mesh, "b") as (b, second):
        async with working(tmp_path, first, second) as worker:
            await mesh.place()
            await mesh.serving()
            used, other = (a, "b") if mesh.beats.get("a") else (b, "a")
            used.frozen.set()
            await mesh.until(lambda: mesh.beats.get(other, 0) > 2)
            assert worker.registered
            assert len(mesh.registrations) == 1
            await finished(worker, mesh)


async def test_a_dead_registry_is_passed_over_at_start(tmp_path: Path) -> None:
    """F1."""
    mesh = Mesh()
    async with serving_registry(mesh, "gone") as (_, dead):
        pass
    async with serving_registry(mesh, "b") as (_, alive), working(tmp_path, dead, alive) as worker:
        await mesh.until(lambda: mesh.beats.get("b", 0) > 1)
        await finished(worker, mesh)


async def test_pending_and_refused_nodes_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1."""
    monkeypatch.setattr("localmesh.worker.link._REFUSED_SECONDS", 0.2)
    mesh = Mesh(
        refuse=[
            NodePending("wait", retry_after_seconds=0.1, node="n1"),
            NodeNameTaken("n1 belongs to another key", node="n1"),
        ]
    )
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        await mesh.until(lambda: mesh.beats.get("a"))
        assert not mesh.refuse
        await finished(worker, mesh)


async def test_sources_are_looked_up_for_the_whole_catalog(tmp_path: Path) -> None:
    """F1."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/bad.gguf").write_bytes(b"GGML not this")
    entries = [
        pb.CatalogEntry(revision="x", spec=types_pb2.ModelSpec(name=name, backend="llama", source=source))
        for name, source in (("bad", "bad.gguf"), ("gone", "gone.gguf"))
    ]
    mesh = Mesh(catalog=entries)
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        await mesh.until(lambda: len(mesh.sources) == 2)
        await finished(worker, mesh)
    assert not mesh.sources["bad"].present
    assert "not a GGUF file" in mesh.sources["bad"].problem
    assert mesh.sources["gone"].path == str(tmp_path / "models/gone.gguf")


async def test_the_service_lists_processes_and_streams_output(tmp_path: Path) -> None:
    """F46."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        key = await mesh.place(lines="3")
        await mesh.serving()
        async with grpc.aio.insecure_channel(worker.endpoint) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            listed = await stub.ListProcesses(worker_service_pb2.ListProcessesRequest(), timeout=10)
            ref = types_pb2.ReplicaRef(model="m", node="n1", index=0)
            request = worker_service_pb2.StreamReplicaLogsRequest(ref=ref, follow=True)
            stream = stub.StreamReplicaLogs(request, timeout=30)
            lines = [(await stream.read()).line for _ in range(4)]
            await mesh.unload(key)
            assert await stream.read() is grpc.aio.EOF
            unknown = types_pb2.ReplicaRef(model="m", node="n1", index=9)
            call = stub.StreamReplicaLogs(worker_service_pb2.StreamReplicaLogsRequest(ref=unknown), timeout=10)
            with pytest.raises(grpc.RpcError) as failure:
                await call.read()
        await finished(worker, mesh)
    assert listed.node == "n1"
    assert listed.registered
    assert [p.state for p in listed.processes] == [READY]
    assert lines == ["starting m/n1/0", "line 0", "line 1", "line 2"]
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_graceful_stop_ends_the_replicas_first_and_reports_them(tmp_path: Path) -> None:
    """F46."""
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(tmp_path, endpoint) as worker:
        await mesh.place()
        await mesh.serving()
        pid = next(iter(worker.replicas())).pid
        await finished(worker, mesh)
        assert read_stat(pid) is None
