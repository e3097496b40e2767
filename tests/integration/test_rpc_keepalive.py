"""Pings tell a frozen peer from a quiet one, and are never too many for our servers."""

import asyncio
import signal
import sys
from pathlib import Path

import grpc
import pytest

from localmesh.rpc.channels import ChannelPool, channel_options

WAIT = 10.0
ROOT = str(Path(__file__).parents[2])
FREEZABLE = """
import asyncio, sys
from localmesh.rpc.server import GrpcServer, ServerConfig
import grpc

class Wait(grpc.GenericRpcHandler):
    def service(self, details):
        async def wait(requests, context):
            await context.write(b"begun")
            await asyncio.Event().wait()
        return grpc.stream_stream_rpc_method_handler(wait) if details.method == "/t.T/Wait" else None

async def main():
    async with GrpcServer(ServerConfig(), name="freezable", generic_handlers=[Wait()]) as server:
        print(server.port, flush=True)
        await server.wait()

asyncio.run(main())
"""


async def serve() -> tuple[asyncio.subprocess.Process, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FREEZABLE, stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": ROOT}
    )
    assert child.stdout is not None
    async with asyncio.timeout(WAIT):
        return child, f"127.0.0.1:{int(await child.stdout.readline())}"


async def test_a_frozen_peer_is_noticed_within_twenty_seconds() -> None:
    child, endpoint = await serve()
    try:
        async with ChannelPool() as pool:
            call = pool.get(endpoint).stream_stream("/t.T/Wait")()
            assert await call.read() == b"begun"
            child.send_signal(signal.SIGSTOP)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with asyncio.timeout(20):
                    await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        child.kill()
        await child.wait()


async def test_pings_are_never_too_many() -> None:
    """A server as gRPC makes it ends a connection at the third ping that it finds too early."""
    child, endpoint = await serve()
    try:
        options = channel_options(extra={"grpc.keepalive_time_ms": 1_000})
        async with grpc.aio.insecure_channel(endpoint, options=options) as channel:
            call = channel.stream_stream("/t.T/Wait")()
            assert await call.read() == b"begun"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5.5):
                    await call.code()
            call.cancel()
    finally:
        child.kill()
        await child.wait()
