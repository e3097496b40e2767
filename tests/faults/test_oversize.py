"""Messages near and beyond the limit on their size: refused end to end, with a reason, quickly; nobody else waits."""

import asyncio

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.errors import InvalidRequest, PromptTooLong
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.rpc.errors import from_rpc_error
from localmesh.testing import for_model
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc as stubs

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
CLOCK = SystemClock()
# Tokenizing 40 MiB takes 50 s, which no cancellation ends.
MUCH_SOONER_SECONDS = 20.0


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_oversize_prompts_and_messages_are_refused_and_harm_nobody(serving_mesh, etcd_environment) -> None:
    async with serving_mesh(etcd_environment) as mesh:
        replicas = [ReplicaId(ModelName("tiny"), NodeName(n), 0) for n in ("alpha", "beta")]
        pids = [await mesh.replica_pid(replica) for replica in replicas]
        options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(mesh.router_endpoint, options=options) as channel:
            stub = stubs.InferenceServiceStub(channel)
            began = CLOCK.monotonic()
            large = pb.GenerateRequest(prompt="word " * (40 * MIB // 5))
            error = await refused(stub.Generate(large, metadata=for_model("tiny"), timeout=60))
            assert isinstance(from_rpc_error(error), PromptTooLong)
            text = pb.TokenizeRequest(text=large.prompt)
            error = await refused(stub.Tokenize(text, metadata=for_model("tiny"), timeout=60))
            assert isinstance(from_rpc_error(error), InvalidRequest)
            assert CLOCK.monotonic() - began < MUCH_SOONER_SECONDS
            larger = pb.GenerateRequest(prompt="word " * (70 * MIB // 5))
            error = await refused(stub.Generate(larger, metadata=for_model("tiny"), timeout=60))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_message" in from_rpc_error(error).message
        small = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=3))
        calls = (mesh.inference.Generate(small, metadata=for_model("tiny"), timeout=20) for _ in range(8))
        assert all(answer.usage.completion_tokens for answer in await asyncio.gather(*calls))
        assert [await mesh.replica_pid(replica) for replica in replicas] == pids
        assert mesh.starts("router") == 1
