"""Foreign backends: started unchanged, spoken to in both protocols, and never left behind. F46, F47."""

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from localmesh.core.ids import ModelName
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import FailedEvent, LoadEvent
from localmesh.rpc.errors import from_rpc_error
from localmesh.thirdparty import backend_pb2
from localmesh.thirdparty.backend_pb2_grpc import BackendStub
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub

LONG = 60.0

Install = Callable[..., Path]
Start = Callable[..., Any]


def echo_spec(**options: str) -> ModelSpec:
    return ModelSpec(name=ModelName("e"), backend="process:echo", source="", context_tokens=77, options=options)


async def failure_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def ended(pid: int) -> bool:
    """Wait until a process has gone, a zombie being as good as gone."""
    try:
        process = psutil.Process(pid)
        async with asyncio.timeout(20):
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.02)
    except psutil.NoSuchProcess:
        return True
    except TimeoutError:
        return False
    return True


@pytest.fixture
def start_echo(start_replica: Start, echo_backend: Install) -> Start:
    def start(*modes: str, **options: str) -> Any:
        folder = echo_backend(*modes)
        replica = start_replica(echo_spec(**options), backend_dir=str(folder), source_path="/models/weights.bin")
        replica.backend = folder
        return replica

    return start


async def test_typed_calls_are_mapped_to_the_backends_protocol(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        answer = await stub.Generate(pb.GenerateRequest(prompt="hello you"))
        assert answer.text == "echo: hello you"
        assert answer.finish_reason == pb.FINISH_REASON_STOP
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)
        messages = [pb.ChatMessage(role=pb.ROLE_USER, content="hi")]
        assert (await stub.Chat(pb.ChatRequest(messages=messages))).message.content == "echo: hi"
        embedded = await stub.Embed(pb.EmbedRequest(inputs=["abc", "de"]))
        assert [list(e.values) for e in embedded.embeddings] == [[3.0, 1.0], [2.0, 1.0]]
        assert list((await stub.Tokenize(pb.TokenizeRequest(text="ab"))).tokens) == [97, 98]
        scored = await stub.Score(pb.ScoreRequest(prompt="x", candidates=["abc"]))
        assert (scored.candidates[0].logprob, scored.candidates[0].tokens) == (pytest.approx(-3.0), 3)


async def test_a_stream_whose_characters_come_in_pieces_is_put_together(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        request = pb.StreamGenerateRequest(prompt="naïve 日本", sampling=pb.SamplingOptions(max_tokens=7))
        pieces = [p async for p in InferenceServiceStub(channel).StreamGenerate(request)]
    assert "".join(p.text for p in pieces) == "echo: naïve 日本"
    assert "\ufffd" not in "".join(p.text for p in pieces)
    assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert pieces[-1].usage.completion_tokens == 7


async def test_what_the_backend_does_not_implement_is_unsupported(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        error = await failure_of(InferenceServiceStub(channel).Rerank(pb.RerankRequest(query="a", documents=["b"])))
        assert error.reason == "CAPABILITY_UNSUPPORTED"
        assert error.metadata["capability"] == "rerank"


async def test_the_raw_protocol_passes_as_bytes_also_methods_that_nobody_here_knows(start_echo: Start) -> None:
    """F55."""
    replica = start_echo().ready()
    async with replica.channel() as channel:
        stub = BackendStub(channel)
        assert (await stub.Health(backend_pb2.HealthMessage())).message == b"OK"
        assert (await stub.Predict(backend_pb2.PredictOptions(Prompt="x"))).message == b"echo: x"
        stream = stub.PredictStream(backend_pb2.PredictOptions(Prompt="xy"))
        assert b"".join([reply.message async for reply in stream]) == b"echo: xy"
        assert await channel.unary_unary("/backend.Backend/TTS")(b"\x01\xff") == b"tts:\x01\xff"
        audio = channel.stream_stream("/backend.Backend/AudioToAudioStream")(iter([b"a", b"b"]))
        assert [reply async for reply in audio] == [b"audio:a", b"audio:b"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/backend.Backend/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_clients_cannot_load_another_model_nor_unload_this_one(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        stub = BackendStub(channel)
        assert (await stub.LoadModel(backend_pb2.ModelOptions(Model="e"))).success
        answer = await stub.LoadModel(backend_pb2.ModelOptions(Model="other"))
        assert not answer.success
        assert "'e'" in answer.message
        assert (await failure_of(stub.Free(backend_pb2.HealthMessage()))).reason == "CAPABILITY_UNSUPPORTED"
    assert not (replica.backend / "freed").exists()


async def test_the_backend_is_told_how_to_load(start_echo: Start) -> None:
    replica = start_echo(Type="Llama", TrustRemoteCode="true", custom="7", load_seconds="30").ready()
    async with replica.channel() as channel:
        told = await BackendStub(channel).ModelMetadata(backend_pb2.ModelOptions())
    options = backend_pb2.ModelOptions.FromString(bytes.fromhex(json.loads(told.rendered_template)["options"]))
    assert (options.Model, options.ModelFile, options.ModelPath) == ("e", "/models/weights.bin", "/models")
    assert (options.ContextSize, options.Threads, options.NGPULayers) == (77, 1, 0)
    assert (options.Type, options.TrustRemoteCode) == ("Llama", True)
    assert list(options.Options) == ["custom:7"]


async def test_other_users_of_the_machine_cannot_call_the_backend_directly(start_echo: Start) -> None:
    replica = start_echo().ready()
    backend = psutil.Process(int((replica.backend / "pid").read_text()))
    [port] = [c.laddr.port for c in backend.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await BackendStub(channel).Predict(backend_pb2.PredictOptions(Prompt="x"))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("modes", "options", "reason", "says"),
    [
        (["die_at_start"], {}, "LOAD_FAILED", "exit code 3; its last words:\nImportError: libcudart.so.12"),
        (["hang_health"], {"start_seconds": "2"}, "LOAD_FAILED", "did not answer Health within 2 s"),
        (["hang_load"], {"load_seconds": "1"}, "LOAD_FAILED", "reading the weights, slowly"),
        (["fail_load"], {}, "LOAD_FAILED", "these are no weights"),
        ([], {"load_seconds": "soon"}, "LOAD_FAILED", "'soon' is not a number"),
        ([], {"Threads": "many"}, "LOAD_FAILED", "option Threads"),
    ],
)
async def test_a_backend_that_does_not_come_up_fails_with_its_own_words_and_leaves_nothing(
    start_echo: Start, modes: list[str], options: dict[str, str], reason: str, says: str
) -> None:
    replica = start_echo(*modes, "grandchild", **options)
    failed = await asyncio.to_thread(replica.failed)
    assert failed.reason == reason
    assert says in failed.message
    for name in ("pid", "grandchild"):
        if (replica.backend / name).exists():
            assert await ended(int((replica.backend / name).read_text()))


async def test_a_backend_that_is_not_installed_is_said_to_be(start_replica: Start, tmp_path: Path) -> None:
    failed = start_replica(echo_spec(), backend_dir=str(tmp_path / "none")).failed()
    assert failed.reason == "ENGINE_UNAVAILABLE"
    assert "run.sh" in failed.message


async def test_a_backend_that_dies_in_a_request_ends_the_replica_with_the_news(start_echo: Start) -> None:
    replica = start_echo("grandchild").ready()
    async with replica.channel() as channel:
        error = await failure_of(InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="crash")))
    assert error.reason == "REPLICA_LOST"
    assert "SIGABRT" in error.message
    failed = await replica.see(FailedEvent)
    assert failed.reason == "ENGINE_FAILED"
    assert "free(): invalid pointer" in failed.message
    assert await asyncio.to_thread(replica.process.wait, LONG) == 1
    assert await ended(int((replica.backend / "grandchild").read_text()))


async def test_a_backend_that_dies_in_a_stream_breaks_it_and_says_so(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in BackendStub(channel).PredictStream(backend_pb2.PredictOptions(Prompt="crash")):
                pass
    assert from_rpc_error(caught.value).reason == "REPLICA_LOST"


async def test_an_error_of_the_backend_is_passed_on_in_its_words(start_echo: Start) -> None:
    replica = start_echo().ready()
    async with replica.channel() as channel:
        error = await failure_of(InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="error")))
        assert error.reason == "ENGINE_FAILED"
        assert "the model said no" in error.message
        assert (await InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="x"))).text == "echo: x"


@pytest.mark.parametrize("raw", [False, True])
async def test_the_slot_of_a_caller_that_left_is_taken_until_the_backend_is_free(start_echo: Start, raw: bool) -> None:
    replica = start_echo(hang_seconds="30").ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        if raw:
            abandoned = BackendStub(channel).Predict(backend_pb2.PredictOptions(Prompt="slow 1.5"))
        else:
            abandoned = stub.Generate(pb.GenerateRequest(prompt="slow 1.5"))
        async with asyncio.timeout(LONG):
            while not (replica.backend / "started").exists():
                await asyncio.sleep(0.02)
        abandoned.cancel()
        (replica.backend / "started").unlink()
        await replica.see(LoadEvent, lambda e: e.in_flight == 0)
        assert (await stub.Generate(pb.GenerateRequest(prompt="slow 0"), timeout=LONG)).text == "echo: slow 0"
        assert (await BackendStub(channel).Health(backend_pb2.HealthMessage())).message == b"OK"


async def test_a_backend_that_hangs_after_its_caller_left_is_given_up(start_echo: Start) -> None:
    replica = start_echo(hang_seconds="0.5").ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt="slow 50"), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        failed = await replica.see(FailedEvent)
    assert failed.reason == "ENGINE_FAILED"
    assert "has not answered Health" in failed.message
    assert await ended(int((replica.backend / "pid").read_text()))


async def test_a_stop_frees_the_model_and_ends_the_whole_group(start_echo: Start) -> None:
    replica = start_echo("grandchild").ready()
    replica.kill(signal.SIGTERM)
    assert await asyncio.to_thread(replica.process.wait, LONG) == 0
    assert (replica.backend / "freed").exists()
    assert await ended(int((replica.backend / "pid").read_text()))
    assert await ended(int((replica.backend / "grandchild").read_text()))


async def test_a_backend_that_does_not_want_to_stop_is_killed(start_echo: Start) -> None:
    replica = start_echo("ignore_sigterm", stop_seconds="0.5").ready()
    replica.kill(signal.SIGTERM)
    assert await asyncio.to_thread(replica.process.wait, LONG) == 0
    assert await ended(int((replica.backend / "pid").read_text()))


async def test_nothing_outlives_a_replica_that_is_killed(start_echo: Start) -> None:
    """Not even what the backend started: killing the replica alone is enough."""
    replica = start_echo("grandchild", "ignore_sigterm").ready()
    replica.kill(signal.SIGKILL)
    assert await ended(int((replica.backend / "pid").read_text()))
    assert await ended(int((replica.backend / "grandchild").read_text()))


async def test_the_backends_output_is_in_the_replicas_log(start_echo: Start) -> None:
    replica = start_echo().ready()
    assert "echo is up" in replica.log.read_text()
