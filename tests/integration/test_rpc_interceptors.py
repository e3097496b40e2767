"""Failures that do not come straight out of a servicer still reach the caller as what they are."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from localmesh.core.errors import ComponentUnreachable, InternalError, MeshError, ModelNotFound
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc as stubs

WAIT = 20


async def fail(error: Exception) -> None:
    raise error


class Inference(stubs.InferenceServiceServicer):
    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> AsyncIterator[Any]:
        yield pb.StreamGenerateResponse()
        if request.model == "closed channel":
            raise asyncio.CancelledError
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            inner.create_task(fail(ModelNotFound("in a task", model="missing")))
            if request.model == "bug":
                outer.create_task(fail(ZeroDivisionError()))


@pytest.fixture
async def failure() -> AsyncIterator[Any]:
    """Return what a stream for a model fails with."""
    server = GrpcServer(ServerConfig(listen="127.0.0.1:0"), name="test server")
    server.add(stubs.add_InferenceServiceServicer_to_server, Inference(), "localmesh.v1.InferenceService")
    async with server, ChannelPool() as pool:
        stub: Any = stubs.InferenceServiceStub(pool.get(server.endpoint))

        async def ask(model: str) -> MeshError:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.StreamGenerate(pb.StreamGenerateRequest(model=model), timeout=WAIT):
                    pass
            return from_rpc_error(caught.value)

        yield ask


async def test_an_error_in_a_task_of_a_servicer_arrives_as_itself(failure) -> None:
    error = await failure("task")
    assert isinstance(error, ModelNotFound)
    assert error.metadata == {"model": "missing"}


async def test_a_bug_beside_an_expected_error_is_still_a_bug(failure) -> None:
    assert type(await failure("bug")) is InternalError


async def test_a_cancellation_that_nobody_asked_for_ends_the_call_with_a_status(failure) -> None:
    assert isinstance(await failure("closed channel"), ComponentUnreachable)
