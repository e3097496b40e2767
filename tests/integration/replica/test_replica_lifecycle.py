"""A replica process from start to end: readiness, refusals, draining, cancellation, failures, death with its parent."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from localmesh.core.clock import SystemClock
from localmesh.core.ids import ModelName
from localmesh.core.replica_process import ListeningEvent, LoadEvent, PhaseEvent, ReadyEvent
from localmesh.rpc.errors import from_rpc_error
from localmesh.thirdparty import backend_pb2
from localmesh.thirdparty.backend_pb2_grpc import BackendStub
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub

ENDLESS = pb.StreamGenerateRequest(
    prompt="x", sampling=pb.SamplingOptions(grammar="root ::= [a-z ] root", temperature=1)
)
"""Goes on until the context is full."""
LONG = 60.0

Spec = Callable[..., Any]
Start = Callable[..., Any]


async def reason_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value).reason


class Endless:
    """An endless stream that runs."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.pieces = aiter(call)

    async def rest(self) -> list[Any]:
        return [piece async for piece in self.pieces]


async def first_piece(stub: Any) -> Endless:
    """Start an endless stream and return it once it runs."""
    stream = Endless(stub.StreamGenerate(ENDLESS))
    assert (await anext(stream.pieces)).text
    return stream


async def test_events_come_in_order_and_ready_has_endpoint_limit_and_memory(start_replica: Start, spec: Spec) -> None:
    """F39, F46."""
    replica = start_replica(spec(slots=3)).ready()
    kinds = [type(e) for e in replica.events]
    assert kinds[0] is PhaseEvent
    assert kinds.index(ListeningEvent) < kinds.index(ReadyEvent)
    assert PhaseEvent(phase="loading", done_bytes=0, total_bytes=2_757_440) in replica.events
    ready = replica.events[-1]
    assert ready.limit == 48
    assert 20 << 20 < ready.memory_bytes < 400 << 20


async def test_health_knows_the_server_the_services_and_the_model(tiny: Any) -> None:
    """F53."""
    async with tiny.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tiny", "localmesh.v1.InferenceService", "backend.Backend"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


async def test_a_request_above_the_limit_is_refused_before_any_work(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(slots=1, max_concurrent_requests=1)).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        stream = await first_piece(stub)
        assert await reason_of(stub.Tokenize(pb.TokenizeRequest(text="x"))) == "REPLICA_FULL"
        assert await reason_of(BackendStub(channel).Predict(backend_pb2.PredictOptions(Prompt="x"))) == "REPLICA_FULL"
        stream.call.cancel()
        await replica.see(LoadEvent, lambda e: e.in_flight == 0)
        assert (await stub.Tokenize(pb.TokenizeRequest(text="x"))).tokens


@pytest.mark.parametrize(
    "metadata",
    [
        {"localmesh-replica": "tiny/n1/1"},
        {"localmesh-replica": "tiny/n2/0"},
        {"localmesh-revision": "rev0"},
        {"localmesh-model": "other"},
    ],
)
async def test_a_request_meant_for_another_replica_is_refused(tiny: Any, metadata: dict[str, str]) -> None:
    """F16."""
    async with tiny.channel() as channel:
        request = pb.TokenizeRequest(text="x")
        stub = InferenceServiceStub(channel)
        assert await reason_of(stub.Tokenize(request, metadata=list(metadata.items()))) == "REPLICA_STALE"
        right = [("localmesh-replica", "tiny/n1/0"), ("localmesh-revision", "rev1"), ("localmesh-model", "tiny")]
        assert (await stub.Tokenize(request, metadata=right)).tokens
        assert await reason_of(stub.Tokenize(pb.TokenizeRequest(text="x", model="other"))) == "REPLICA_STALE"


async def test_the_worker_hears_how_many_requests_run(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec()).ready()
    async with replica.channel() as channel:
        stream = await first_piece(InferenceServiceStub(channel))
        assert (await replica.see(LoadEvent)).in_flight == 1
        stream.call.cancel()
        assert (await replica.see(LoadEvent)).in_flight == 0


async def test_cancelling_while_tokens_are_made_frees_the_slot(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(slots=1, context_tokens=2048)).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        for _ in range(5):
            (await first_piece(stub)).call.cancel()
        answer = await stub.Generate(
            pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(max_tokens=1)), timeout=LONG
        )
        assert answer.usage.completion_tokens == 1
        metrics = await BackendStub(channel).GetMetrics(backend_pb2.MetricsRequest())
        assert metrics.tokens_generated < 5 * 2000  # none of the five ran to the end of its context


async def test_cancelling_while_the_prompt_is_read_frees_the_slot(
    start_replica: Start, spec: Spec, tmp_path: Path, make_gguf: Callable[..., Path]
) -> None:
    model = make_gguf(tmp_path / "big.gguf", layers=8, width=256, heads=8, feed_forward=1024, context=16384)
    replica = start_replica(spec(slots=1, context_tokens=16384), source_path=str(model)).ready()
    prompt = "x" * 15_000
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingOptions(max_tokens=1)))
        await replica.see(LoadEvent, lambda e: e.in_flight == 1)
        assert not call.done()
        call.cancel()
        await replica.see(LoadEvent, lambda e: e.in_flight == 0)
        short = pb.GenerateRequest(prompt="y", sampling=pb.SamplingOptions(max_tokens=1))
        assert (await stub.Generate(short, timeout=LONG)).usage.prompt_tokens < 10
        # the one slot answered the short request without having finished the long one
        metrics = await BackendStub(channel).GetMetrics(backend_pb2.MetricsRequest())
        assert metrics.prompt_tokens_processed < len(prompt)


async def test_a_deadline_ends_the_computing_too(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(slots=1, context_tokens=2048)).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.StreamGenerate(ENDLESS, timeout=0.2):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        sampling = pb.SamplingOptions(max_tokens=1)
        assert await stub.Generate(pb.GenerateRequest(prompt="x", sampling=sampling), timeout=LONG)


async def test_a_stop_lets_running_requests_finish_and_refuses_new_ones(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(context_tokens=2048), drain_seconds=LONG).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = await first_piece(stub)
        replica.kill(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await reason_of(stub.Tokenize(pb.TokenizeRequest(text="x"))) == "REPLICA_DRAINING"
        pieces = await stream.rest()
        assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert await asyncio.to_thread(replica.process.wait, LONG) == 0


async def test_a_stop_cuts_off_what_outlasts_the_limit(
    start_replica: Start, spec: Spec, tmp_path: Path, make_gguf: Any
) -> None:
    model = make_gguf(tmp_path / "m.gguf", layers=8, width=256, heads=8, feed_forward=1024, context=16384)
    replica = start_replica(spec(slots=1, context_tokens=16384), source_path=str(model), drain_seconds=0.2).ready()
    async with replica.channel() as channel:
        stream = await first_piece(InferenceServiceStub(channel))
        replica.kill(signal.SIGTERM)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await stream.rest()
    assert await asyncio.to_thread(replica.process.wait, LONG) == 0


async def test_an_idle_replica_stops_at_once(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(), drain_seconds=LONG).ready()
    replica.kill(signal.SIGTERM)
    assert await asyncio.to_thread(replica.process.wait, 20) == 0


def test_it_dies_with_the_process_that_started_it(start_replica: Start, spec: Spec, tmp_path: Path) -> None:
    """F46."""
    prepared = start_replica(spec())  # for its spec file only
    prepared.end()
    parent_code = (
        "import os, subprocess, sys, pathlib, re, threading\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.write_text(re.sub('\"parent_pid\": [0-9]+', f'\"parent_pid\": {os.getpid()}', path.read_text()))\n"
        "child = subprocess.Popen([sys.executable, '-m', 'localmesh.replica', '--spec', str(path)],\n"
        "    start_new_session=True, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "threading.Event().wait()\n"
    )
    repository = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, str(prepared.folder / "spec.json")],
        stdout=subprocess.PIPE,
        cwd=repository,
        text=True,
    )
    assert parent.stdout is not None
    try:
        replica = psutil.Process(int(parent.stdout.readline()))
        listens_by = SystemClock().monotonic() + LONG
        while not replica.net_connections("tcp"):
            assert SystemClock().monotonic() < listens_by
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs([replica], 20)
    assert not alive


async def test_it_does_not_start_for_a_worker_that_is_gone(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(), parent_pid=1)
    assert await asyncio.to_thread(replica.process.wait, LONG) == 1


async def test_two_replicas_never_share_a_port(start_replica: Start, spec: Spec) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        failed = start_replica(spec(), listen=f"127.0.0.1:{taken.getsockname()[1]}").failed()
    assert failed.reason == "PORT_IN_USE"
    assert "in use" in failed.message


async def test_it_refuses_to_be_open_to_a_network_without_tls(start_replica: Start, spec: Spec) -> None:
    assert "TLS" in start_replica(spec(), listen="0.0.0.0:0").failed().message


async def test_it_serves_on_ipv6(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec(), listen="[::1]:0").ready()
    assert replica.endpoint.startswith("[::1]:")
    async with replica.channel() as channel:
        assert (await InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(text="x"))).tokens


def _gguf_of_unknown_architecture() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("general.architecture") + struct.pack("<I", 8) + text("dreamy")


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"missing": True}, "SOURCE_MISSING", "there is no file"),
        ({"content": b"hello"}, "LOAD_FAILED", "not a GGUF file"),
        ({"content": b""}, "LOAD_FAILED", "truncated"),
        ({"cut": 1_000_000}, "LOAD_FAILED", "truncated GGUF file"),
        ({"content": _gguf_of_unknown_architecture()}, "LOAD_FAILED", "dreamy"),
        ({"spec": {"backend": "lama"}}, "ENGINE_UNAVAILABLE", "no engine 'lama'"),
        ({"spec": {"options": {"poling": "mean"}}}, "LOAD_FAILED", "unknown option 'poling'"),
        ({"spec": {"cache_type": "q9"}}, "LOAD_FAILED", "cache_type"),
        ({"gpu": True}, "ENGINE_UNAVAILABLE", "no GPU"),
    ],
    ids=lambda v: str(v)[:30],
)
async def test_a_load_that_cannot_work_fails_with_reason_and_sentence(
    start_replica: Start, spec: Spec, tmp_path: Path, change: dict[str, Any], reason: str, says: str
) -> None:
    path = tmp_path / "model.gguf"
    tiny = (Path(__file__).parents[3] / "localmesh/testing/models/tiny.gguf").read_bytes()
    if "missing" not in change:
        path.write_bytes(change.get("content", tiny[: change.get("cut")]))
    changes = {"gpu": True} if "gpu" in change else {}
    replica = start_replica(spec(**change.get("spec", {})), source_path=str(path), **changes)
    failed = replica.failed()
    assert failed.reason == reason
    assert says in failed.message
    assert not list(replica.folder.glob("*.sock"))


def test_a_spec_file_that_cannot_be_read_is_a_failure_that_is_told(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec())
    replica.end()
    path = replica.folder / "spec.json"
    path.write_text('{"mesh": 1}')
    reading, writing = os.pipe()
    done = subprocess.run(
        [sys.executable, "-m", "localmesh.replica", "--spec", str(path), "--status-fd", str(writing)],
        pass_fds=(writing,),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        timeout=LONG,
    )
    os.close(writing)
    with os.fdopen(reading) as lines:
        line = lines.read()
    assert done.returncode == 1
    assert "is missing" in line


async def test_a_native_crash_ends_the_process_and_nothing_is_left(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(spec()).ready()
    async with replica.channel() as channel:
        stream = await first_piece(InferenceServiceStub(channel))
        replica.kill(signal.SIGABRT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.rest()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(replica.process.wait, LONG) == -signal.SIGABRT


async def test_another_model_name_is_served_under_its_own_health_service(start_replica: Start, spec: Spec) -> None:
    replica = start_replica(replace(spec(), name=ModelName("a.b:c"))).ready()
    async with replica.channel() as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="a.b:c"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
